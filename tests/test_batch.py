"""Batches: what is done before, what is left alone, and what the records say; on runs that were never trained."""

from __future__ import annotations

import gc
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from densepred import files
from densepred.errors import UnsafeError
from densepred.inference.batch import predict
from densepred.inference.outputs import Outputs
from densepred.inference.predictor import Predictor
from tests.untrained_runs import image, noise, run_of

BOTH = ["inference.outputs=[labels, probabilities]"]
ALONE = ["inference.outputs=[probabilities]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("flat"), ".fits", {0: "sky", 1: "star"})


def entries(out: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def failures(out: Path) -> dict[str, str]:
    return dict(row.split("\t")[::2][:2] for row in (out / "failures.tsv").read_text().splitlines()[1:])


def values(path: Path) -> list[bytes]:
    """Those of every image of a file; its header has the time of writing."""
    with fits.open(path) as file:
        return [hdu.data.tobytes() for hdu in file if hdu.is_image and hdu.data is not None]


def by_hand(path: Path) -> bytes:
    """Change a map as somebody would who corrects it."""
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(np.ones((24, 24), np.uint8))]).writeto(path, overwrite=True)
    return path.read_bytes()


# Finding what is done


def test_another_part_of_a_file_is_another_input(run: Path, tmp_path: Path):
    hdus = [fits.ImageHDU(noise(seed), name="SCI", ver=seed) for seed in (1, 2)]
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(tmp_path / "x.fits")
    written = []
    for part in ("SCI,1", "SCI,2", "all"):
        asked = f"{tmp_path}/x.fits[{part}]"
        if written:
            refused = predict(run, [asked], tmp_path / "out", ALONE).failed["x"]
            assert "holds the result of another image of the same file [SCI," in refused.what
        assert predict(run, [asked], tmp_path / "out", ALONE, overwrite=True).done == ["x"]
        assert predict(run, [asked], tmp_path / "out", ALONE).skipped == ["x"]
        assert entries(tmp_path / "out")["x"]["roles"] == [["image 0", 0, part]]
        predict(run, [asked], tmp_path / part, ALONE)
        written.append(values(tmp_path / "out" / "probabilities" / "x.fits.fz"))
        assert written[-1] == values(tmp_path / part / "probabilities" / "x.fits.fz")
    assert written[0] != written[1]
    assert sorted(written[2]) == sorted(written[0] + written[1])


def test_the_record_has_a_command_that_can_be_typed_again(run: Path, tmp_path: Path):
    x = image(tmp_path / "x.fits", noise(1))
    predict(run, [f"{x}[0]"], tmp_path / "out", ["inference.cutout='0:16,2:20'", "inference.bin=2", *BOTH])
    history = "".join(fits.getheader(tmp_path / "out" / "x.fits.fz", 1)["HISTORY"])
    typed = "predict run 'x.fits[0]' 'inference.cutout='\"'\"'0:16,2:20'\"'\"'' inference.bin=2"
    assert f"densepred: {typed} 'inference.outputs=[labels, probabilities]'" in history


def test_whole_paths_are_recorded_only_if_asked_for(run: Path, tmp_path: Path):
    x = image(tmp_path / "x.fits", noise(1))
    for name, asked in (("plain", []), ("whole", ["inference.record_paths=true"])):
        predict(run, [x], tmp_path / name, asked)
        header = fits.getheader(tmp_path / name / "x.fits.fz", 1)
        assert header["DPINPUT"] == (str(x) if asked else "x.fits")
        assert (str(tmp_path) in "".join(header["HISTORY"])) == bool(asked)


# What is left alone


def test_a_corrected_map_stays_when_other_outputs_were_asked_for_between(run: Path, tmp_path: Path):
    x, out = image(tmp_path / "x.fits", noise(1)), tmp_path / "out"
    predict(run, [x], out)
    corrected = by_hand(out / "x.fits.fz")
    assert predict(run, [x], out, ALONE).done == ["x"]
    again = predict(run, [x], out)
    assert "changed since it was written" in again.failed["x"].what
    assert (out / "x.fits.fz").read_bytes() == corrected
    assert predict(run, [x], out, overwrite=True).done == ["x"]
    assert (out / "x.fits.fz").read_bytes() != corrected


def test_a_map_corrected_after_a_failed_redo_stays(run: Path, tmp_path: Path):
    x, out = image(tmp_path / "x.fits", noise(1)), tmp_path / "out"
    predict(run, [x], out)
    good = x.read_bytes()
    x.write_bytes(good[:3000])
    before = (out / "x.fits.fz").read_bytes()
    failed = predict(run, [x], out)
    assert (out / "x.fits.fz").read_bytes() == before
    assert "not of this run: x.fits.fz" in failed.failed["x"].what
    assert "not of this run: x.fits.fz" in failures(out)["x"]
    assert "not of this run" in entries(out)["x"]["failed"]
    x.write_bytes(good)
    assert predict(run, [x], out).skipped == ["x"]
    assert "failed" not in entries(out)["x"]
    assert not (out / "failures.tsv").exists()
    image(x, noise(2))
    corrected = by_hand(out / "x.fits.fz")
    assert list(predict(run, [x], out).failed) == ["x"]
    assert (out / "x.fits.fz").read_bytes() == corrected


def test_files_that_the_manifest_does_not_know_stay_and_others_go_on(run: Path, tmp_path: Path):
    x, z = (image(tmp_path / f"{name}.fits", noise(1)) for name in "xz")
    predict(run, [x], tmp_path / "out")
    foreign = by_hand(tmp_path / "out" / "z.fits.fz")
    image(x, noise(2))
    result = predict(run, [x, z], tmp_path / "out")
    assert (result.done, list(result.failed)) == (["x"], ["z"])
    assert "was not predicted here" in result.failed["z"].what
    assert (tmp_path / "out" / "z.fits.fz").read_bytes() == foreign
    assert predict(run, [x, z], tmp_path / "out", overwrite=True).done == ["z"]


def test_a_manifest_of_a_version_with_one_output_protects_as_well(run: Path, tmp_path: Path):
    x, y, out = image(tmp_path / "x.fits", noise(1)), image(tmp_path / "y.fits", noise(2)), tmp_path / "out"
    predict(run, [x, y], out)
    lines = []
    for entry in entries(out).values():
        (name, digest), *_ = entry.pop("outputs").items()
        entry.pop("roles")
        lines.append(json.dumps(entry | {"output": name, "sha256": digest}) + "\n")
    (out / "manifest.jsonl").write_text("".join(lines))
    corrected = by_hand(out / "x.fits.fz")
    result = predict(run, [x, y], out)
    assert (result.done, list(result.failed)) == (["y"], ["x"])
    assert (out / "x.fits.fz").read_bytes() == corrected


def test_a_manifest_that_names_files_outside_is_not_believed(run: Path, tmp_path: Path):
    x, out = image(tmp_path / "x.fits", noise(1)), tmp_path / "out"
    other = by_hand(tmp_path / "other.fits")
    predict(run, [x], out)
    for name in ("../other.fits", str(tmp_path / "other.fits")):
        line = {"id": "x", "outputs": {name: files.sha256(tmp_path / "other.fits")}}
        (out / "manifest.jsonl").write_text(json.dumps(line) + "\n")
        predict(run, [x], out, overwrite=True)
        assert (tmp_path / "other.fits").read_bytes() == other


def interrupted(monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException) -> None:
    """Let the next prediction end before its files are put in their places, or when one of them is."""
    leave = Outputs.__exit__

    def struck(self: Outputs, *_: object) -> None:
        if moment == "after":
            leave(self, None, None, None)
        else:
            leave(self, type(error), error, None)
        raise error

    monkeypatch.setattr(Outputs, "__exit__", struck)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_killed_redo_is_done_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str):
    x, out = image(tmp_path / "x.fits", noise(1)), tmp_path / "out"
    predict(run, [x], out, BOTH)
    image(x, noise(2))
    with monkeypatch.context() as patch:
        interrupted(patch, moment, KeyboardInterrupt())
        patch.setattr("densepred.inference.manifest.Manifest.compact", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            predict(run, [x], out, BOTH)
    assert "begun" in (out / "manifest.jsonl").read_text().splitlines()[-1]
    assert predict(run, [x], out, BOTH).done == ["x"]
    predict(run, [x], tmp_path / "whole", BOTH)
    for name in ("x.fits.fz", "probabilities/x.fits.fz"):
        assert values(out / name) == values(tmp_path / "whole" / name)
    for folder in (out, tmp_path / "whole"):
        names = entries(folder)["x"].pop("outputs")
        assert names == {name: files.sha256(folder / name) for name in ("x.fits.fz", "probabilities/x.fits.fz")}
    same = [{**entries(folder)["x"], "outputs": None} for folder in (out, tmp_path / "whole")]
    assert same[0] == same[1]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_map_corrected_after_its_redo_broke_stays(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    x, out = image(tmp_path / "x.fits", noise(1)), tmp_path / "out"
    predict(run, [x], out)
    image(x, noise(2))
    with monkeypatch.context() as patch:
        interrupted(patch, moment, PermissionError(13, "Permission denied"))
        assert list(predict(run, [x], out).failed) == ["x"]
    assert "inputs" not in entries(out)["x"]
    corrected = by_hand(out / "x.fits.fz")
    assert list(predict(run, [x], out).failed) == ["x"]
    assert (out / "x.fits.fz").read_bytes() == corrected


# What goes with other results


def test_probabilities_of_another_input_do_not_stay(run: Path, tmp_path: Path):
    x, out = image(tmp_path / "x.fits", noise(1)), tmp_path / "out"
    predict(run, [x], out, BOTH)
    assert predict(run, [x], out).skipped == ["x"]
    stale = out / "probabilities" / "x.fits.fz"
    assert stale.exists()
    image(x, noise(2))
    assert predict(run, [x], out).done == ["x"]
    assert not stale.exists()
    assert list(entries(out)["x"]["outputs"]) == ["x.fits.fz"]


def test_changed_probabilities_of_another_input_are_no_ones_to_remove(run: Path, tmp_path: Path):
    x, out = image(tmp_path / "x.fits", noise(1)), tmp_path / "out"
    predict(run, [x], out, BOTH)
    image(x, noise(2))
    changed, labels = by_hand(out / "probabilities" / "x.fits.fz"), (out / "x.fits.fz").read_bytes()
    assert "not go with the new result" in predict(run, [x], out).failed["x"].what
    assert (out / "probabilities" / "x.fits.fz").read_bytes() == changed
    assert (out / "x.fits.fz").read_bytes() == labels


def test_an_earlier_result_that_is_the_input_is_not_removed(run: Path, tmp_path: Path):
    out = tmp_path / "out"
    predict(run, [image(tmp_path / "x.fits", noise(1))], out, BOTH)
    with pytest.raises(UnsafeError, match="replace the input"):
        predict(run, [f"{out}/probabilities/x.fits.fz[PROB_star]"], out)
    assert (out / "probabilities" / "x.fits.fz").exists()


def test_labels_keep_their_names(run: Path, tmp_path: Path):
    other = run_of(tmp_path, ".fits", {0: "sky", 1: "galaxy"}, "other")
    x, y, out = image(tmp_path / "x.fits", noise(1)), image(tmp_path / "y.fits", noise(2)), tmp_path / "out"
    predict(run, [x], out)
    before = (out / "labels.json").read_text()
    with pytest.raises(UnsafeError, match=r"1 star; 0 sky, 1 galaxy\) for 1 cases that stay, such as x"):
        predict(other, [y], out)
    assert (out / "labels.json").read_text() == before
    assert not (out / "y.fits.fz").exists()
    corrected = (out / "x.fits.fz").read_bytes(), by_hand(out / "x.fits.fz")
    with pytest.raises(UnsafeError, match="says something else"):
        predict(other, [x, y], out)
    (out / "x.fits.fz").write_bytes(corrected[0])
    assert predict(other, [x, y], out).done == ["x", "y"]
    assert json.loads((out / "labels.json").read_text())["classes"]["1"] == "galaxy"
    assert predict(run, [y], out, overwrite=True).done == ["y"]
    assert (out / "labels.json").read_text() == before


def test_a_description_of_labels_that_is_no_batchs_stays(run: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "labels.json").write_text('{"classes": {"1": "mine"}}')
    with pytest.raises(UnsafeError, match="not of a batch"):
        predict(run, [image(tmp_path / "x.fits", noise(1))], tmp_path / "out")
    assert "mine" in (tmp_path / "out" / "labels.json").read_text()


# Failures


def test_failures_hold_no_frames(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Held:
        """Stands for an open file."""

    held: list[weakref.ref[Held]] = []

    def failing(make: Callable[[], Exception]) -> Callable[..., None]:
        def fail(*_: object) -> None:
            local = Held()
            held.append(weakref.ref(local))
            try:
                raise ValueError("first")
            except ValueError as error:
                raise make() from error

        return fail

    x = image(tmp_path / "x.fits", noise(1))
    for make in (lambda: UnsafeError("no"), lambda: OSError(5, "Input/output error"), lambda: RuntimeError("bug")):
        monkeypatch.setattr(Predictor, "predict_file", failing(make))
        error = predict(run, [x], tmp_path / "out").failed["x"]
        gc.collect()
        assert held.pop()() is None
        assert (error.__traceback__, error.__context__, error.__cause__) == (None, None, None)


def test_only_our_own_unfinished_files_are_swept_away(tmp_path: Path):
    others = [".notes.part.txt", ".x.part.dir", "sub.1.part.x", ".99999999.part.x", ".12.abcdefgh.part.x", ".git"]
    for name in others:
        (tmp_path / name).mkdir() if name.endswith("dir") else (tmp_path / name).touch()
    alive = files.part_path(tmp_path / "x.nii").name.replace(f".{os.getpid()}.", f".{os.getppid()}.")
    (tmp_path / alive).touch()
    files.part_path(tmp_path / "x.nii").touch()
    gone = tmp_path / ".4194305.0123abcd.part.x.zarr"  # above the largest number of a process
    (gone / "inner").mkdir(parents=True)
    assert files.sweep_parts(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, alive])
