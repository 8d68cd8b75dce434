"""Forms change how a network computes, not what."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from densepred.models.build import create_model
from densepred.models.dense import Model
from densepred.models.forms import is_channels_last, is_copied, set_form

CPU = torch.device("cpu")


def gradients(model: Model, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)  # dropout
    out = model(x)
    assert isinstance(out, Tensor)
    out.square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("encoder", "dims"), [("plain", 2), ("plain", 3), ("resnet18", 2)])
def test_checkpointing_changes_neither_gradients_nor_running_statistics(encoder: str, dims: int) -> None:
    options = {"channels": (4, 6, 8)} if encoder == "plain" else {}
    plain = create_model(encoder, dims=dims, norm="batch", dropout=0.3, seed=0, **options)
    lean = set_form(copy.deepcopy(plain), "lean", CPU)
    x = torch.randn(2, 1, *(33, 34, 35)[:dims])
    for ours, theirs in zip(gradients(lean, x), gradients(plain, x), strict=True):
        assert torch.equal(ours, theirs)
    for (name, ours), theirs in zip(lean.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        ("plain", "unetplusplus"),
        ("convnext_tiny", "fpn"),
        ("timm.resnet18", "unet"),
        ("timm.pvt_v2_b0", "unet"),
        ("smp.resnet18", "smp.UnetPlusPlus"),
    ],
)
def test_checkpointing_changes_no_gradient_of_any_network(encoder: str, decoder: str) -> None:
    options = {"channels": (4, 6, 8)} if encoder == "plain" else {}
    plain = create_model(encoder, decoder, dims=2, seed=0, **options)
    lean = set_form(copy.deepcopy(plain), "lean", CPU)
    x = torch.randn(2, 1, 65, 70)
    for ours, theirs in zip(gradients(lean, x), gradients(plain, x), strict=True):
        assert torch.equal(ours, theirs)


class Live(TorchDispatchMode):
    """Follows the bytes of the tensors there are, less those of a network's parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sizes = {p.untyped_storage()._cdata: 0 for p in (*model.parameters(), *model.buffers())}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def peak(model: Model, x: Tensor) -> int:
    """Bytes of activations and gradients while it trains one step."""
    model.zero_grad()
    with Live(model) as live:
        out = model(x)
        assert isinstance(out, Tensor)
        out.square().mean().backward()
    return live.most


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"network": "monai.MedNeXtSmall"}, 64),
        ({"encoder": "timm.convnext_atto"}, 256),
        ({"encoder": "convnext_tiny", "width": 8}, 128),
    ],
    ids=str,
)
def test_checkpointing_lowers_the_peak_of_a_training_step(options: dict[str, Any], size: int) -> None:
    plain = create_model(dims=2, seed=0, **options)
    lean = set_form(copy.deepcopy(plain), "lean", CPU)
    x = torch.randn(2, 1, size, size)
    assert peak(lean, x) < 0.6 * peak(plain, x)


@pytest.mark.parametrize("form", ["plain", "lean"])
@pytest.mark.parametrize("encoder", ["resnet18", "timm.resnet18", "smp.resnet18", "torchvision.resnet18"])
def test_networks_go_through_pickle(encoder: str, form: Any) -> None:
    model = set_form(create_model(encoder, dims=2, seed=0), form, CPU)
    again = pickle.loads(pickle.dumps(model))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    x = torch.randn(2, 1, 64, 64)
    for ours, theirs in zip(gradients(again, x), gradients(model, x), strict=True):
        assert torch.equal(ours, theirs)


def kept(model: nn.Module, x: Tensor) -> int:
    """Numbers that autograd keeps for the backward pass."""
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or pack(t), lambda t: t):
        model(x)
    return sum(sizes.values())


def test_checkpointing_keeps_less_and_a_copy_does_too() -> None:
    model = create_model(channels=(8, 16, 24), seed=0)
    x = torch.randn(1, 1, 32, 32, 32)
    before = kept(model, x)
    lean = copy.deepcopy(set_form(model, "lean", CPU))
    assert kept(lean, x) < before / 2
    assert list(lean.state_dict()) == list(create_model(channels=(8, 16, 24)).state_dict())


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="form must be one of auto, plain, fast, lean, got 'quick'"):
        set_form(create_model(channels=(4, 8)), "quick", CPU)  # type: ignore[arg-type]


@pytest.mark.slow
def test_compiled_gives_the_same() -> None:
    model = create_model(channels=(4, 6), convs_per_stage=1, decoder_convs=1, dims=2, seed=0).eval()
    x = torch.randn(1, 1, 16, 17)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(set_form(model, "fast", CPU)(x), expected, atol=1e-5, rtol=1e-5)


def test_tensors_are_channels_last_where_no_norm_copies_them() -> None:
    gpu, batch = torch.device("cuda"), create_model("resnet18", dims=2, width=4)
    instance, other = create_model(channels=(4, 8)), nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2))
    assert is_channels_last(batch, "auto", gpu)
    assert is_channels_last(batch, "lean", gpu)
    assert is_channels_last(instance, "fast", gpu)
    assert not any(is_channels_last(model, "auto", gpu) for model in (instance, other))
    assert not is_channels_last(batch, "auto", CPU)
    assert not is_channels_last(batch, "plain", gpu)
    assert [is_copied(model, gpu) for model in (batch, instance, other)] == [False, True, True]
    assert [is_copied(model, gpu, torch.bfloat16) for model in (batch, instance, other)] == [False, False, True]
    assert not is_copied(instance, CPU)
