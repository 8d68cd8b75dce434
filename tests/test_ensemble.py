"""Several trainings as one model: the mean of their logits, and what must agree for that."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import scipy.special
import torch
from astropy.io import fits

from densepred import load, open_volume
from densepred.errors import InputError
from densepred.inference.batch import predict
from densepred.inference.engines.local import Local
from densepred.inference.predictor import Predictor
from tests.acceptance.helpers import densepred
from tests.untrained_runs import noise, run_of

CLASSES = {0: "sky", 2: "star", 7: "trail"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs of one recipe with other weights; the images of the first lie beside them."""
    folders = [run_of(tmp_path_factory.mktemp("folds"), ".fits", CLASSES, "fold0")]
    for seed in (1, 2):
        folders.append(Path(shutil.copytree(folders[0], folders[0].with_name(f"fold{seed}"))))
        path, drawn = folders[-1] / "model.safetensors", torch.Generator().manual_seed(seed)
        weights = safetensors.torch.load_file(path)
        changed = {name: value + 0.2 * torch.randn(value.shape, generator=drawn) for name, value in weights.items()}
        safetensors.torch.save_file(changed, path)
    return folders


def edited(run: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a run with another plan."""
    shutil.copytree(run, folder)
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | changes))
    return folder


def test_the_logits_are_the_mean_of_the_members(runs: list[Path]) -> None:
    image = noise(4, 40)
    alone = [load(run, ["inference.mirror=[0]"]).predict(image, outputs="logits").numpy() for run in runs]
    assert np.abs(alone[0] - alone[1]).max() > 0.05
    found = load(runs, ["inference.mirror=[0]"]).predict(image, outputs="logits").numpy()
    np.testing.assert_allclose(found, np.mean(alone, 0), rtol=0, atol=1e-5)


def test_the_variance_is_that_over_the_members(runs: list[Path]) -> None:
    image = noise(4, 16)  # one window
    shares = [load(run).predict(image, outputs="probabilities").numpy() for run in runs]
    found = load(runs).predict(image, outputs=["variance", "probabilities"])
    np.testing.assert_allclose(found["variance"].numpy()[0], np.var(shares, 0).mean(0), rtol=1e-3, atol=1e-7)
    logits = load(runs).predict(image, outputs="logits").numpy()
    np.testing.assert_allclose(found["probabilities"].numpy(), scipy.special.softmax(logits, axis=0), atol=1e-6)


def test_planes_of_volumes_are_averaged_over_members_too(runs: list[Path]) -> None:
    image = np.stack([noise(seed, 20) for seed in range(9)])
    overrides = ["inference.slices=all", "inference.batch=3"]
    alone = [load(run, overrides).predict(image, outputs="logits").numpy() for run in runs]
    found = load(runs, overrides).predict(image, outputs="logits").numpy()
    np.testing.assert_allclose(found, np.mean(alone, 0), rtol=0, atol=1e-5)


def test_hashes_and_records_name_all(runs: list[Path], tmp_path: Path) -> None:
    one, joint, turned = load(runs[0]), load(runs), load(runs[::-1])
    hashes = [hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest() for run in runs]
    assert one.weights_hash == hashes[0]
    assert load(runs[:1]).weights_hash == one.weights_hash
    assert load(runs[:1]).config_hash == one.config_hash
    assert joint.weights_hash == hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    assert turned.weights_hash != joint.weights_hash
    image = runs[0].parent / "set" / "c0.fits"
    command = ("predict", runs[0], image, "--out", tmp_path, "--with", runs[1], "--with", runs[2])
    done = densepred(*command, "inference.outputs=[labels, variance]")
    assert done.returncode == 0, done.stderr
    with fits.open(tmp_path / "c0.fits.fz") as file:
        header = next(hdu.header for hdu in file if hdu.is_image and hdu.data is not None)
    assert header["DPMODEL"] == "fold0+fold1+fold2"
    assert "predict fold0 c0.fits" in "".join(header["HISTORY"])
    assert "--with fold1 --with fold2" in "".join(header["HISTORY"])
    entry = json.loads((tmp_path / "manifest.jsonl").read_text())
    assert entry["model"] == joint.weights_hash
    again = predict(runs, [image], tmp_path, ["inference.outputs=[labels, variance]"])
    assert again.skipped == ["c0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["sky", "galaxy", "trail"]}, "classes .*galaxy.*, but fold0 has .*star"),
        ({"channels": ["red"]}, r"channels \('red',\), but fold0 has"),
        ({"ignore": [9]}, r"ignored values \(9,\), but fold0 has \(\)"),
        ({"label_map": {"0": 0, "2": 1, "3": 1, "7": 2}}, r"labels .*3: 'star'.*, but fold0 has"),
        ({"reading": {"validity": {"fill": "nearest"}}}, "validity .*nearest.*, but fold0 has"),
        ({"reading": {"axes": "yx"}}, "axes yx, but fold0 has None"),
    ],
)
def test_members_that_do_not_agree_are_refused(
    runs: list[Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    other = edited(runs[1], tmp_path / "other", **changes)
    with pytest.raises(InputError, match=message) as caught:
        load([runs[0], other])
    assert caught.value.file == other


WAYS = [{"normalize": [{"name": "robust"}]}, {"spacing": [1.0, 2.0]}, {"spacing": [1.5, 1.5], "resampling": "cubic"}]


@pytest.mark.parametrize("way", WAYS)
def test_each_member_sees_images_in_its_own_way(runs: list[Path], tmp_path: Path, way: dict[str, Any]) -> None:
    """Two see an image alike, the third otherwise: the mean over all three of what each gives by itself."""
    other = edited(runs[1], tmp_path / "other", **way)
    members, overrides = [runs[0], other, runs[2]], ["inference.mirror=[0]", "data.validity.least=0.3"]
    image = noise(4, 41)
    image[3:7, 5:20] = np.nan
    alone = [load(run, overrides).predict(image, outputs="logits").numpy() for run in members]
    joint = load(members, overrides)
    found = joint.predict(image, outputs=["logits", "labels", "probabilities"])
    np.testing.assert_allclose(found["logits"].numpy(), np.mean(alone, 0), rtol=0, atol=1e-5)
    mean = np.nan_to_num(np.mean(alone, 0))
    top = np.sort(mean, 0)[-1] - np.sort(mean, 0)[-2]
    sure = ~np.isnan(alone[0][0]) & (top > 1e-4)
    np.testing.assert_array_equal(found["labels"].numpy()[0][sure], np.array([0, 2, 7])[mean.argmax(0)][sure])
    np.testing.assert_allclose(found["probabilities"].numpy(), scipy.special.softmax(np.mean(alone, 0), 0), atol=1e-5)
    (many,) = joint.predict_many([image], ["logits"])
    np.testing.assert_array_equal(many["logits"].numpy(), found["logits"].numpy())
    (streamed,) = [planes.logits.numpy() for planes in [*joint.stream(joint._volume(image, None))][:1]]
    assert streamed.shape[0] == 3
    with pytest.raises(InputError, match="no variance"):
        joint.predict(image, outputs="variance")
    assert joint.config_hash not in {load(runs, overrides).config_hash, load(runs[0], overrides).config_hash}
    assert len(joint.models) == 3


def test_members_with_ways_of_their_own_predict_files(runs: list[Path], tmp_path: Path) -> None:
    other = edited(runs[1], tmp_path / "other", **WAYS[1])
    picture, settings = runs[0].parent / "set" / "c0.fits", ["inference.outputs=[labels, entropy]"]
    for name, devices in (("one", ["cpu"]), ("two", ["cpu", "cpu"])):
        done = predict([runs[0], other], [picture], tmp_path / name, settings, engine=Local(devices))
        assert done.exit_code == 0
    with open_volume(tmp_path / "one" / "c0.fits.fz") as one, open_volume(tmp_path / "two" / "c0.fits.fz") as two:
        np.testing.assert_array_equal(one.numpy(), two.numpy())
    expected = load([runs[0], other]).predict(picture, outputs="entropy").numpy()
    with open_volume(tmp_path / "one" / "entropy" / "c0.fits.fz") as found:
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert not [path for path in (tmp_path / "one").iterdir() if path.name.startswith(".") and path.name != ".lock"]


def test_what_only_training_used_may_differ(runs: list[Path], tmp_path: Path) -> None:
    other = edited(runs[1], tmp_path / "other", typical_spacing=[3.0, 3.0])
    assert len(load([runs[0], other]).models) == 2


def test_a_run_given_twice_is_a_slip(runs: list[Path]) -> None:
    with pytest.raises(InputError, match="its weights are those of a run before it"):
        load([runs[0], runs[1], runs[0]])
    with pytest.raises(InputError, match="no run directory"):
        load([])


def test_windows_begin_at_multiples_of_every_stride(runs: list[Path]) -> None:
    members = [load(run) for run in runs[:2]]
    first, second = (member.model for member in members)
    first.divisor, second.divisor = (4, 6), (6, 9)  # type: ignore[assignment]
    config = load(runs[0], ["inference.blend=none"]).config
    assert Predictor([first, second], config, members[0].plan, "").inferer.multiple == (12, 18)
