"""Batches of BIDS derivatives: side-car files under the rules for results, names of cut-outs and blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from densepred.cases.case import Case
from densepred.inference.batch import predict
from densepred.inference.layouts import Bids
from densepred.inference.predictor import Predictor, load
from tests.untrained_runs import image, noise, run_of

BOTH = ["inference.outputs=[labels, probabilities]"]


@pytest.fixture(scope="module")
def brain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("brain"), ".nii.gz", {0: "background", 1: "lesion"})


def subject(root: Path, label: str = "01") -> Path:
    return image(root / "study" / f"sub-{label}" / "anat" / f"sub-{label}_T1w.nii.gz", noise(int(label)))


def test_side_cars_are_left_alone_as_results_are(brain: Path, tmp_path: Path):
    source, folder = subject(tmp_path), tmp_path / "derivatives" / "densepred-run"
    assert predict(brain, [source], tmp_path, bids=True).done == ["sub-01_T1w"]
    path = folder / "sub-01" / "anat" / "sub-01_seg-run_dseg.json"
    written = path.read_text()
    path.write_text(json.dumps(json.loads(written) | {"Manual": True}))
    changed = path.read_text()
    for overrides in ([], ["inference.overlap=0.25"]):
        result = predict(brain, [source], tmp_path, overrides, bids=True)
        assert result.failed["sub-01_T1w"].file == path
        assert path.read_text() == changed
    assert predict(brain, [source], tmp_path, bids=True, overwrite=True).done == ["sub-01_T1w"]
    assert path.read_text() == written


def test_missing_side_cars_are_written_without_predicting_again(
    brain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, folder = subject(tmp_path), tmp_path / "derivatives" / "densepred-run" / "sub-01" / "anat"
    predict(brain, [source], tmp_path, bids=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for suffix in (".json", ".tsv"):
        (folder / f"sub-01_seg-run_dseg{suffix}").unlink()
    monkeypatch.setattr(Predictor, "predict_file", lambda *_: pytest.fail("predicted again"))
    assert predict(brain, [source], tmp_path, bids=True).done == ["sub-01_T1w"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert predict(brain, [source], tmp_path, bids=True).skipped == ["sub-01_T1w"]


def test_cutouts_and_blocks_have_names_of_their_own(brain: Path, tmp_path: Path):
    source, folder = subject(tmp_path), tmp_path / "derivatives" / "densepred-run" / "sub-01" / "anat"
    for overrides in ([], ["inference.bin=2"], ["inference.cutout='0:16,2:20'"]):
        assert predict(brain, [source], tmp_path, overrides, bids=True).done == ["sub-01_T1w"]
    names = sorted(path.name for path in folder.glob("*.nii.gz"))
    stem = "sub-01_seg-run"
    assert names == [f"{stem}_{rest}dseg.nii.gz" for rest in ("desc-cutout_", "", "res-bin2_")]
    about = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert [name for name, content in about.items() if "SpatialReference" in content] == [f"{stem}_dseg.json"]
    assert "blocks of 2 x 2" in about[f"{stem}_res-bin2_dseg.json"]["Resolution"]
    assert predict(brain, [source], tmp_path, bids=True).skipped == ["sub-01_T1w"]


def test_what_goes_with_results_is_all_that_is_written(brain: Path, tmp_path: Path):
    source, predictor = subject(tmp_path), load(brain, BOTH)
    layout = Bids(tmp_path, source, "run", predictor.plan, predictor.config.inference)
    case = Case("a", (source,))
    paths = layout.paths(case)
    next(iter(paths.values())).parent.mkdir(parents=True)
    layout.finish(case, paths)
    written = {path for path in layout.folder.rglob("*") if path.is_file()}
    assert written == set(layout.companions(paths))
