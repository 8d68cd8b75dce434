"""OpenVINO as the runtime of networks on CPUs: conversion, a first run at arm's length, and calls without copies."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from densepred.children import python
from densepred.errors import InputError
from densepred.inference.forward import pick
from densepred.inference.runtimes import Task, making
from densepred.signals import signal_stack_kept

HINTS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class OpenVinoRuntime:
    """OpenVINO on CPUs, with as many threads as torch; windows and logits are handed over without a copy.

    Threads may share it: calls take turns, each with all cores.

    Raises:
        InputError: it is not installed, does not compute on this device or in this precision, or not this network.
    """

    @signal_stack_kept()
    def __init__(self, model: nn.Module, task: Task) -> None:
        self.library = openvino()
        if task.device.type != "cpu":
            what = f"backend openvino computes on CPUs, not on {task.device.type}"
            raise InputError(what, "use inference.device=cpu or another backend")
        program = _converted(model, task)
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[task.precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # several processes would be pinned to the same cores
        }
        _try_in_child(self.library, program, settings)
        compiled = self.library.Core().compile_model(program, "CPU", settings)
        computes = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if computes != HINTS[task.precision]:
            what = f"OpenVINO computes in {computes} on this CPU, not in {HINTS[task.precision]}"
            raise InputError(what, "use inference.precision=float32 or inference.backend=torch")
        self.shape = tuple(compiled.output(0).shape)
        self.request = compiled.create_infer_request()
        self.lock = threading.Lock()

    @signal_stack_kept()
    def __call__(self, windows: Tensor) -> Tensor:
        """(B, C, *window) -> (B, K, *window) float32."""
        logits = torch.empty(self.shape)
        given = self.library.Tensor(windows.contiguous().numpy(), shared_memory=True)
        with self.lock:
            self.request.set_input_tensor(given)
            self.request.set_output_tensor(self.library.Tensor(logits.numpy(), shared_memory=True))
            self.request.start_async()
            self.request.wait()
        return logits


def openvino() -> ModuleType:
    """The package openvino.

    On import and on every conversion it reports to its makers through the package openvino_telemetry, without asking.
    That package is therefore hidden while it is imported here, for which openvino is prepared.

    Raises:
        InputError: it is not installed.
    """
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    reporting: Any = sys.modules.get("openvino_telemetry")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("openvino.frontend.pytorch.ts_decoder")
        return importlib.import_module("openvino")
    except ModuleNotFoundError as error:
        if error.name != "openvino":
            raise
        raise InputError("openvino is not installed", "pip install 'densepred[openvino]'") from error
    finally:
        del sys.modules["openvino_telemetry"]
        if reporting is not None:
            sys.modules["openvino_telemetry"] = reporting


class _Picked(nn.Module):
    """A network with one output."""

    def __init__(self, model: nn.Module, output: str | None) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, windows: Tensor) -> Tensor:
        """(B, C, *window) -> (B, K, *window)."""
        return pick(self.model(windows), self.output)


def _converted(model: nn.Module, task: Task) -> Any:
    """The network as OpenVINO's program, traced once in float32.

    Not by `openvino.convert_model`, which runs the network several times, and reports where someone else imported it.

    Raises:
        InputError: it does something that OpenVINO cannot.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with making("OpenVINO cannot convert the network"):
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trace is right for the one shape it is made for
            example = torch.zeros(task.shape)
            traced = torch.jit.trace(_Picked(model, task.output), example, check_trace=False)
            frontend = FrontEndManager().load_by_framework("pytorch")
            decoder = TorchScriptPythonDecoder(traced, example_input=(example,))  # needed until it is converted
            program = frontend.convert(frontend.load(decoder))
        program.reshape(list(task.shape))
    return program


_CHILD = """
import json, sys
sys.modules["openvino_telemetry"] = None
import numpy, openvino
compiled = openvino.Core().compile_model(sys.argv[1], "CPU", json.loads(sys.argv[2]))
compiled([numpy.zeros(compiled.input(0).shape, numpy.float32)])
"""


def _try_in_child(library: ModuleType, program: Any, settings: dict[str, Any]) -> None:
    """Compile and run it once in a process of its own, since OpenVINO ends the process over some networks.

    OpenVINO 2026.4 did so (a segmentation fault in `compile_model`, however converted) over a 3D residual encoder.

    Raises:
        InputError: the process died.
    """
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "network.xml"
        library.save_model(program, part, compress_to_fp16=False)
        command = python("-c", _CHILD, part, json.dumps(settings))
        code = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    if code:
        raise InputError(f"OpenVINO fails on this network (exit code {code})", "use inference.backend=torch")
