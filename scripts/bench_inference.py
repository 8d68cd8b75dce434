"""Sliding-window inference of ours and of other libraries, on the same network, windows and volume.

    python scripts/bench_inference.py --size 256 --window 96 --overlap 0.5
    python scripts/bench_inference.py --only ours monai nnunet --device cuda --size 512 --compile
    python scripts/bench_inference.py --files --memory --channels 8 16 --size 512
    python scripts/bench_inference.py --run runs/hippo --volume case.nii.gz
    python scripts/bench_inference.py --images 1000 --image-size 512

The network is a plain 3D U-Net, 32-64-128-256-320, with weights from a seed (no class wins everywhere), or a trained
run's. Every tool gets the same module with the same weights: what they differ in is what they do around it. The bare
network's time is the number of windows (ours, evenly spread) times one forward pass at the best of its settings, with
OpenVINO or torch.compile for the rows that use these.

Each row is a process of its own, all with the allocator's settings of the command `densepred`; `--repeats` rounds in
which rows take turns, each against the bare network of its round; medians of time and ratio, the highest memory.
Measured is one call, after imports, building the network and a call on four windows to warm up (on GPUs all): from an
image in memory to labels in memory. On a GPU both lie there, but torchio and KonfAI keep them on the host. The time of
`argmax` is inside, and given beside where the tool leaves it to its user. With `--files` it is from a file to a file,
by each tool's own road: `densepred predict`; MONAI's LoadImage, argmax and SaveImage (astropy for FITS, which it does
not read); nnU-Net's predict_from_files with its worker processes; KonfAI's predict_model.

Memory is of the whole process with its libraries: VmHWM, the peak of what was resident, and torch's peaks on the GPU;
where a tool starts workers, also the sum of its processes' resident memory, looked at four times a second. With
`--memory` each tool runs once and without warming up, and only memory is told.

Agreement is the share of voxels labelled as by ours in float32 with that tool's weights of windows and places, or the
nearest that ours has: torchio's Hann weights and KonfAI's Gaussian without MONAI's clamp and padded last windows it
does not, and on files no fixed steps. Settings: a tool's default first, then its faster ones. Tools that are not
installed are left out; `pip install --no-deps` keeps them from changing torch (`pyproject.toml`, extra `bench`).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from densepred.allocator import tune_allocator

TOOLS = ("ours", "monai", "nnunet", "torchio", "konfai")
NAMES = {
    "ours": "densepred",
    "monai": "MONAI",
    "nnunet": "nnU-Net",
    "torchio": "torchio",
    "konfai": "KonfAI",
}
Figures = dict[str, Any]
RUNTIMES = ("openvino", "compiled")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[256], help="voxels of the volume, one number or three")
    parser.add_argument("--window", type=int, nargs="+", help="voxels of a window; 96, or the run's")
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128, 256, 320], help="widths of the U-Net")
    parser.add_argument("--run", type=Path, help="a trained run instead of weights from a seed")
    parser.add_argument("--volume", type=Path, help="an image instead of a synthetic one")
    parser.add_argument("--only", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--settings", choices=("default", "all"), default="all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of torch in each process")
    parser.add_argument("--compile", action="store_true", help="rows with torch.compile too")
    parser.add_argument("--files", action="store_true", help="from .nii.gz to .nii.gz, and from .fits to .fits")
    parser.add_argument("--suffixes", nargs="+", choices=(".nii.gz", ".fits"), default=[".nii.gz", ".fits"])
    parser.add_argument("--memory", action="store_true", help="peak memory alone")
    parser.add_argument("--images", type=int, help="so many 2D images instead")
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="of the bare network, at least, in each setting")
    parser.add_argument("--folder", type=Path, help="for the files, some GB; by default a temporary one")
    parser.add_argument("--json", type=Path, help="file for all figures")
    for name in ("--child", "--setting", "--suffix"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--work", "--result"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


class Bench:
    """The rows of one call, and the processes that measure them."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments, self.work, self.count = arguments, work, 0

    def child(self, name: str, setting: object = None, suffix: str = "") -> Figures:
        """The figures of one process; `failed` says why there are none, `labels` where its labels are."""
        said, self.count = self.arguments, self.count + 1
        result = self.work / f"{self.count}.json"
        command = [sys.executable, __file__, "--child", name, "--work", str(self.work), "--result", str(result)]
        if setting is not None:
            command += ["--setting", json.dumps(dataclasses.asdict(setting))]  # type: ignore[call-overload]
        if said.threads:
            command += ["--threads", str(said.threads)]
        if said.images:
            command += ["--images", str(said.images), "--image-size", str(said.image_size)]
        command += ["--seconds", str(said.seconds)]
        command += ["--compile"] * said.compile + ["--memory"] * said.memory
        command += ["--files", "--suffix", suffix] if suffix else []
        with (self.work / f"{self.count}.log").open("w+") as log:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
            together = watch(process) if suffix else 0.0
            if process.wait() or not result.exists():
                log.seek(0)
                lines = log.read().strip().splitlines() or [f"ended with {process.returncode}"]
                why = next((line for line in lines if line.startswith("ERROR")), lines[-1])
                return {"failed": why if process.returncode >= 0 else f"killed by signal {-process.returncode}"}
        found = json.loads(result.read_text())
        if suffix and together:
            found["together"] = together
        return {**found, "labels": result.with_suffix(".npy")} if setting is not None else found

    def rows(self) -> list[tuple[str, Any, str]]:
        """(tool, setting, suffix): ours in float32 as the others are compared with, then the tools."""
        said, rows = self.arguments, []
        compiled, device = said.compile, json.loads((self.work / "task.json").read_text())["device"]
        suffixes = said.suffixes if said.files else [""]
        for tool in said.only:
            module = import_module(f"bench_peers.{tool}")
            settings = module.settings(device, compiled)
            for setting in settings[: 1 if said.settings == "default" else None]:
                rows += [(tool, setting, suffix) for suffix in suffixes if suffix in module.FORMATS or not suffix]
        if said.memory:
            return rows
        references = [(tool, self.reference(tool), suffix) for tool, _, suffix in rows]
        needed = [("ours", setting, suffix) for _, setting, suffix in references]
        return list(dict.fromkeys([*needed, *rows]))

    def reference(self, tool: str) -> Any:
        """Ours in float32 with the tool's map and windows; recipes know no fixed ones."""
        from bench_peers.common import Setting

        against = import_module(f"bench_peers.{tool}").AGAINST
        return Setting(blend=against[0], spacing="even" if self.arguments.files else against[1])

    def measure(self) -> tuple[dict[str, list[float]], dict[tuple[str, Any, str], list[Figures]]]:
        """The bare network's seconds a window by variant, and the figures of each row; an item a round."""
        rows = self.rows()
        bare: dict[str, list[float]] = {}
        found: dict[tuple[str, Any, str], list[Figures]] = {row: [] for row in rows}
        labels: dict[tuple[Any, str], Path] = {}
        for _ in range(1 if self.arguments.memory else self.arguments.repeats):
            if not self.arguments.memory:
                once = self.child("bare")
                if "failed" in once:
                    raise SystemExit(f"the bare network: {once['failed']}")
                for variant, seconds in once.items():
                    bare.setdefault(variant, []).append(seconds)
            for row in rows:
                tool, setting, suffix = row
                figures = self.child(tool, setting, suffix)
                found[row].append(figures)
                self.progress(row, figures)
                if "labels" not in figures:
                    continue
                if tool == "ours" and setting.precision == "float32" and setting.batch == 1:
                    labels.setdefault((setting, suffix), figures["labels"])
                reference = labels.get((self.reference(tool), suffix))
                if tool == "ours" and setting.precision == "float32":
                    reference = None
                if reference is not None:
                    figures["agreement"] = agreement(figures["labels"], reference)
                if figures["labels"] not in labels.values():
                    figures["labels"].unlink()
                del figures["labels"]
        return bare, found

    @staticmethod
    def progress(row: tuple[str, Any, str], figures: Figures) -> None:
        tool, setting, suffix = row
        said = figures.get("failed") or f"{figures['seconds']:.2f} s, {figures['rss']:.0f} MB"
        print(f"{NAMES[tool]} {setting} {suffix}: {said}", file=sys.stderr, flush=True)


def watch(process: subprocess.Popen[bytes]) -> float:
    """Waits for a process; the most MB that it and its workers had resident together, or 0 where it had none."""
    most, alone = 0.0, True
    while process.poll() is None:
        sizes = resident(process.pid)
        alone &= len(sizes) < 2
        most = max(most, sum(sizes))
        time.sleep(0.25)
    return 0.0 if alone else most / 1024


def resident(root: int) -> list[int]:
    """Resident kB of a process and of all that it started."""
    parents, sizes = {}, {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
        except (OSError, ValueError):  # it has ended
            continue
        pid = int(path.parent.name)
        parents[pid], sizes[pid] = int(lines["PPid"]), int(lines.get("VmRSS", "0 kB").split()[0])
    family = {root}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    return [sizes.get(pid, 0) for pid in family]


def agreement(first: Path, second: Path) -> float:
    """Share of voxels with the same label."""
    import numpy as np

    one, two = np.load(first, mmap_mode="r"), np.load(second, mmap_mode="r")
    if one.shape != two.shape:
        raise ValueError(f"labels of shapes {one.shape} and {two.shape}")
    return sum(int((a == b).sum()) for a, b in zip(one, two, strict=True)) / one.size


def prepare(arguments: argparse.Namespace, work: Path) -> Figures:
    """Writes what the children read; says what they are given."""
    import torch
    from bench_peers import volumes

    from densepred.device import pick_device
    from densepred.inference.windows import WindowGrid

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = str(pick_device(arguments.device))
    wide = [n * 3 if len(n) == 1 else n for n in (arguments.size, arguments.window or ([] if arguments.run else [96]))]
    task: Figures = {"window": wide[1], "overlap": arguments.overlap, "device": device}
    task |= {"channels": 1, "classes": arguments.classes}
    if arguments.volume is None:
        channels = (
            1 if arguments.run is None else len(json.loads((arguments.run / "plan.json").read_text())["channels"])
        )
        volumes.write_volume(work, size := tuple(wide[0]), channels)
    else:
        size = volumes.read_volume(work, arguments.volume, arguments.run)
    task = volumes.write_task(work, task, arguments.run, tuple(arguments.channels))
    if arguments.files and task["channels"] > 1:
        raise SystemExit("--files is for networks of one channel")
    if arguments.files:
        volumes.write_files(work, task, arguments.run, arguments.suffixes)
    grids = {s: WindowGrid.plan(size, task["window"], task["overlap"], s) for s in ("even", "fixed")}
    machine = torch.cuda.get_device_name(device) if device != "cpu" else f"{cpu()}, {torch.get_num_threads()} threads"
    return {
        "machine": machine,
        "torch": torch.__version__,
        "size": list(size),
        **{name: task[name] for name in ("window", "overlap", "device", "classes", "model")},
        "windows": {spacing: len(grid) for spacing, grid in grids.items()},
    }


def cpu() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def summary(row: tuple[str, Any, str], rounds: list[Figures], bare: list[float]) -> Figures:
    """Medians of time and of the ratio to the bare network of the same round, the highest memory."""
    tool, setting, suffix = row
    found: Figures = {"tool": NAMES[tool], "setting": str(setting), "suffix": suffix, "rounds": rounds}
    failed = [figures["failed"] for figures in rounds if "failed" in figures]
    if failed:
        return {**found, "failed": failed[0]}
    for name in ("seconds", "argmax"):
        if name in rounds[0]:
            found[name] = statistics.median(figures[name] for figures in rounds)
    if bare:
        found["ratio"] = statistics.median(f["seconds"] / b for f, b in zip(rounds, bare, strict=True))
    for name in ("rss", "together", "allocated", "reserved"):
        if name in rounds[0]:
            found[name] = max(figures.get(name, 0.0) for figures in rounds)
    if "agreement" in rounds[0]:
        found["agreement"] = min(figures["agreement"] for figures in rounds)
    return found


def table(rows: list[Figures], memory: bool) -> str:
    """The rows in Markdown."""
    gpu = any("allocated" in row for row in rows)
    head = ["tool", "setting", *(["time", "x bare", "of it argmax"] if not memory else []), "peak RSS"]
    head += ["peak VRAM, allocated / reserved"] * gpu + ["labels as ours in float32"] * (not memory)
    lines = [head, ["---"] * len(head)]
    for row in rows:
        name = f"{row['setting']} {row['suffix']}".strip()
        if "failed" in row:
            lines.append([row["tool"], name, f"failed: {row['failed'][:100]}", *[""] * (len(head) - 3)])
            continue
        cells = [row["tool"], name]
        if not memory:
            argmax = f"{row['argmax']:.2f} s" if row.get("argmax", 0) > 0.001 else ""
            cells += [f"{row['seconds']:.2f} s", f"{row['ratio']:.3f}", argmax]
        together = f" ({row['together']:,.0f} with its workers)" if "together" in row else ""
        cells.append(f"{row['rss']:,.0f} MB{together}")
        if gpu:
            cells.append(f"{row['allocated']:,.0f} / {row['reserved']:,.0f} MB" if "allocated" in row else "")
        if not memory:
            cells.append(f"{row['agreement']:.4%}" if "agreement" in row else "")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def best_of(bare: dict[str, list[float]], runtime: str, windows: int) -> list[float]:
    """Seconds of all windows in each round, of the network alone in a runtime other than torch."""
    found = [seconds for variant, seconds in bare.items() if f", {runtime}" in variant]
    return [seconds * windows for seconds in min(found, key=statistics.median)] if found else []


def bench_volume(arguments: argparse.Namespace, work: Path) -> Figures:
    """Time, memory and agreement on a volume."""
    given = prepare(arguments, work)
    size, window = ("x".join(map(str, given[name])) for name in ("size", "window"))
    counts = f"{given['windows']['even']} windows evenly spread, {given['windows']['fixed']} at fixed steps"
    print(f"{given['machine']}, torch {given['torch']}; {size} voxels, {given['classes']} classes")
    print(f"windows of {window}, overlap {given['overlap']}: {counts}\n", flush=True)
    bare, found = Bench(arguments, work).measure()
    best: list[float] = []
    own: dict[str, list[float]] = {}
    if bare:
        medians = {variant: statistics.median(seconds) for variant, seconds in bare.items()}
        name = min(
            (v for v in medians if not any(f", {runtime}" in v for runtime in RUNTIMES)),
            key=lambda variant: medians[variant],
        )
        best = [seconds * given["windows"]["even"] for seconds in bare[name]]
        own = {runtime: best_of(bare, runtime, given["windows"]["even"]) for runtime in RUNTIMES}
        told = "; ".join(f"{variant} {1000 * seconds:.1f} ms" for variant, seconds in medians.items())
        print(f"bare network, a window: {told}")
        print(f"best: {name}, {statistics.median(best):.2f} s for all windows\n")
    runtimes = {row: "compiled" if row[1].compiled else row[1].backend for row in found}
    rows = [summary(row, rounds, own.get(runtimes[row]) or best) for row, rounds in found.items()]
    print(table(rows, arguments.memory), flush=True)
    return {**given, "bare": bare, "bare_seconds": best, "rows": rows}


def bench_images(arguments: argparse.Namespace, work: Path) -> Figures:
    """Images a second."""
    import torch

    from densepred.device import pick_device

    task = {"window": [arguments.image_size] * 2, "overlap": 0.0, "device": str(pick_device(arguments.device))}
    (work / "task.json").write_text(json.dumps({**task, "model": {}, "channels": 3, "classes": 3}))
    rounds = [Bench(arguments, work).child("images") for _ in range(arguments.repeats)]
    for figures in rounds:
        if "failed" in figures:
            raise SystemExit(figures["failed"])
    side = arguments.image_size
    print(f"{arguments.images} images of {side}x{side}, ResNet-34 U-Net, torch {torch.__version__}\n")
    print("| run | images a second | of the bare network |\n|---|---|---|")
    for name in rounds[0]["bare"]:
        speed = statistics.median(one["bare"][name] for one in rounds)
        print(f"| bare network, {name} | {speed:.2f} | |")
    alone, ours = (statistics.median(one[name] for one in rounds) for name in ("alone", "ours"))
    ratio = statistics.median(one["ours"] / one["alone"] for one in rounds)
    print(f"| {rounds[0]['best']}, in turns with densepred | {alone:.2f} | 1.000 |")
    print(f"| densepred | {ours:.2f} | {ratio:.3f} |", flush=True)
    return {"torch": torch.__version__, "images": arguments.images, "image_size": side, "rounds": rounds}


def main() -> None:
    """Parse the command line, measure and report; or, as a child, measure one row."""
    arguments = parsed()
    if arguments.child:
        tune_allocator()  # before torch is imported, as the command `densepred` does; for every tool, to be fair
        import_module("bench_peers.child").main(arguments)
        return
    for tool in list(arguments.only):
        missing = [name for name in import_module(f"bench_peers.{tool}").REQUIRES if not importlib.util.find_spec(name)]
        if missing:
            print(f"without {NAMES[tool]}: {', '.join(missing)} not installed", flush=True)
            arguments.only.remove(tool)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        found = (bench_images if arguments.images else bench_volume)(arguments, Path(name))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1, default=str) + "\n")
    raise SystemExit(any(row["tool"] == NAMES["ours"] and "failed" in row for row in found.get("rows", [])))


if __name__ == "__main__":
    main()
