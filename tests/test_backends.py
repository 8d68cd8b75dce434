"""Runtimes give the network's own logits; `auto` takes another than torch only for a reason, and says which."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densepred.errors import InputError
from densepred.inference import backends, openvino_runtime, runtimes
from densepred.inference.backends import prepare
from densepred.models.build import create_model
from densepred.models.heads import Segmentation
from densepred.models.layers import to_channels_last
from densepred.signals import _Stack

CPU = torch.device("cpu")
has_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
NETWORKS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "3d": ((2, 1, 16, 20, 17), {"dims": 3, "channels": (8, 16, 16)}),
    "2d": ((3, 2, 40, 33), {"dims": 2, "in_channels": 2, "channels": (8, 16), "norm": "group"}),
    "resnet": ((2, 3, 64, 64), {"encoder": "resnet18", "dims": 2, "in_channels": 3}),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    shape, options = NETWORKS[name]
    torch.manual_seed(0)
    model = create_model(seed=0, **options)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
    return model.eval(), torch.randn(shape)


def plain(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def close(got: Tensor, wanted: Tensor, share: float) -> None:
    assert got.shape == wanted.shape
    assert float((got.float() - wanted).abs().max()) <= share * float(wanted.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("backend", ["torch", pytest.param("openvino", marks=has_openvino)])
def test_runtimes_are_exact_and_leave_the_network_alone(name: str, backend: str) -> None:
    model, x = network(name)
    wanted, before = plain(model, x), {key: value.clone() for key, value in model.state_dict().items()}
    prepared = prepare(to_channels_last(model), x.shape, CPU, torch.float32, backend)
    close(prepared(x), wanted, 1e-4)
    half = prepare(model, x.shape, CPU, torch.bfloat16, "torch")
    close(half(x), wanted, 0.05)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
        assert value.dtype == before[key].dtype


@pytest.mark.parametrize("name", ["3d", "2d"])
def test_cast_weights_give_the_bits_of_autocast(name: str) -> None:
    model, x = network(name)
    prepared = prepare(model, x.shape, CPU, torch.bfloat16, "torch")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        wanted = to_channels_last(model)(x)
    assert torch.equal(prepared(x), wanted)


@pytest.mark.parametrize("backend", ["torch", pytest.param("openvino", marks=has_openvino)])
def test_fewer_windows_than_a_batch_and_outputs_by_name(backend: str) -> None:
    torch.manual_seed(0)
    heads = {"a": Segmentation(2), "b": Segmentation(3)}
    model = create_model(dims=2, channels=(4, 8), heads=heads, seed=0).eval()
    x = torch.randn(4, 1, 24, 24)
    with torch.no_grad():
        outputs = model(x)
    for name in ("a", "b"):
        prepared = prepare(model, x.shape, CPU, torch.float32, backend, output=name)
        first = prepared(x[:3])
        prepared(torch.zeros_like(x))  # must not reach what was given out
        close(first, outputs[name][:3], 1e-4)
    close(prepare(model, x.shape, CPU, torch.float32, backend)(x), outputs["a"], 1e-4)


def test_windows_of_another_shape_are_refused() -> None:
    model, x = network("2d")
    prepared = prepare(model, x.shape, CPU, torch.float32, "torch")
    for wrong in (x[:, :1], x[:0], torch.cat([x, x]), x[..., 1:]):
        with pytest.raises(ValueError, match="windows must have shape"):
            prepared(wrong)


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network("2d")
    with pytest.raises(ValueError, match="did you mean 'torch'"):
        prepare(model, x.shape, CPU, torch.float32, "toch")
    with pytest.raises(ValueError, match="evaluation mode"):
        prepare(model.train(), x.shape, CPU, torch.float32)
    model.eval()
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "openvino")
    monkeypatch.setattr(importlib, "import_module", _missing)
    with pytest.raises(InputError, match="openvino is not installed") as caught:
        prepare(model, x.shape, CPU, torch.float32, "openvino")
    assert "densepred[openvino]" in caught.value.fix


def _missing(name: str) -> Any:
    raise ModuleNotFoundError(f"No module named {name}", name=name.partition(".")[0])


@has_openvino
def test_openvino_computes_on_cpus_and_what_it_knows() -> None:
    model, x = network("2d")
    with pytest.raises(InputError, match="computes on CPUs, not on cuda"):
        prepare(model, x.shape, torch.device("cuda"), torch.float32, "openvino")
    odd = nn.Sequential(_Odd()).eval()
    with pytest.raises(InputError, match="OpenVINO cannot convert the network"):
        prepare(odd, (1, 1, 8, 8), CPU, torch.float32, "openvino")


class _Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Something no other runtime has."""
        return torch.special.airy_ai(x)


@has_openvino
def test_a_crash_of_openvino_is_a_fault_of_the_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network("2d")
    crash = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    monkeypatch.setattr(openvino_runtime, "_CHILD", crash + openvino_runtime._CHILD)
    with pytest.raises(InputError, match=r"OpenVINO fails on this network \(exit code -11\)"):
        prepare(model, x.shape, CPU, torch.float32, "openvino")


@has_openvino
def test_openvino_leaves_the_stack_of_signals() -> None:
    def stack() -> tuple[int | None, int]:
        found = _Stack()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
        return found.start, found.size

    model, x = network("2d")
    before = stack()
    prepare(model, x.shape, CPU, torch.float32, "openvino")(x)
    assert stack() == before


@has_openvino
def test_threads_share_openvino() -> None:
    model, x = network("2d")
    prepared = prepare(model, x.shape, CPU, torch.float32, "openvino")
    images = [x * scale for scale in (0.5, 1.0, 2.0, 3.0)]
    wanted = [prepared(image) for image in images]
    got: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        got[number] = [prepared(images[number]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, wanted[number]) for number, several in got.items() for one in several)
    assert len(got) == 4


@has_openvino
def test_openvino_reports_to_nobody(tmp_path: Any) -> None:
    """Not a name is looked up nor a file left in the home folder, where its reports would keep an identity."""
    program = """
import socket, sys
def refuse(*args, **options):
    raise AssertionError("the network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import torch
from densepred.inference.backends import prepare
from densepred.models.build import create_model
model = create_model(dims=2, channels=(4, 8)).eval()
prepare(model, (1, 1, 16, 16), torch.device("cpu"), torch.float32, "openvino")(torch.zeros(1, 1, 16, 16))
assert "openvino" in sys.modules and "openvino_telemetry" not in sys.modules
"""
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


class Counted:
    """A runtime that says when it ran, at a speed of its own; `change` makes it wrong."""

    def __init__(self, base: runtimes.Runtime, clock: list[float], seconds: float, change: float = 0.0) -> None:
        self.base, self.clock, self.seconds, self.change = base, clock, seconds, change

    def __call__(self, windows: Tensor) -> Tensor:
        self.clock[0] += self.seconds
        return self.base(windows) + self.change


def arranged(
    monkeypatch: pytest.MonkeyPatch, speed: dict[str, float], change: float = 0.0
) -> Callable[..., backends.Prepared]:
    """`prepare` of a small network whose runtimes take the seconds in `speed` on a clock of the test's own."""
    clock, torch_runtime = [0.0], runtimes.TorchRuntime
    monkeypatch.setattr(backends.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(backends, "TorchRuntime", lambda *args: Counted(torch_runtime(*args), clock, speed["torch"]))
    for name in ("compiled", "openvino"):

        def make(model: nn.Module, task: runtimes.Task, name: str = name) -> runtimes.Runtime:
            if name not in speed:
                raise InputError(f"{name} is not here")
            return Counted(torch_runtime(model, task), clock, speed[name], change)

        monkeypatch.setitem(backends.RUNTIMES, name, make)
    model, x = network("2d")

    def run(**options: Any) -> backends.Prepared:
        return prepare(model, x.shape, CPU, options.pop("precision", torch.float32), **options)

    return run


def test_auto_takes_what_is_faster_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    run = arranged(monkeypatch, {"torch": 1.0, "openvino": 0.5, "compiled": 0.4})
    assert run(windows=10_000).backend == "compiled"
    some = run(windows=450)
    assert some.backend == "openvino"
    said = some.describe()
    assert said.startswith("backend openvino: 166.7 ms a window; torch: 333.3 ms a window, slower than openvino")
    assert "compiled: not tried: a trial takes about 44 s, all windows 150 s" in said


def test_auto_stays_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    run = arranged(monkeypatch, {"torch": 1.0, "openvino": 0.96})
    few, many = run(windows=99), run(windows=10_000)
    assert few.backend == many.backend == "torch"
    assert "not tried for 99 windows" in few.describe()
    assert "not faster than torch by enough" in many.describe()
    assert "compiled is not here" in many.describe()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [0.5, float("nan")])
def test_auto_never_takes_wrong_logits(monkeypatch: pytest.MonkeyPatch, precision: torch.dtype, change: float) -> None:
    run = arranged(monkeypatch, {"torch": 1.0, "openvino": 0.1, "compiled": 0.1}, change)
    made = run(windows=100_000, precision=precision)
    assert made.backend == "torch"
    assert made.describe().count("its logits are off by") == 2


@pytest.mark.slow
def test_compiled_agrees_to_the_precision_of_bfloat16() -> None:
    torch.manual_seed(0)
    small = {"channels": (4, 8), "convs_per_stage": 1, "decoder_convs": 1}
    model, x = create_model(dims=2, seed=0, **small).eval(), torch.randn(2, 1, 32, 32)
    prepared = prepare(model, x.shape, CPU, torch.bfloat16, "compiled")
    close(prepared(x[:1]), plain(model, x)[:1], 0.05)


def test_compiling_without_a_compiler_is_a_named_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = network("2d")
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler"):
        prepare(model, x.shape, CPU, torch.float32, "compiled")
