"""Which files of a command make which cases: folders, files and patterns against the recipe's own patterns."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from densepred import config as configuration
from densepred.cases.case import Case
from densepred.cases.patterns import match
from densepred.cases.reading import Reading
from densepred.cli import base
from densepred.config import Config, DataConfig
from densepred.errors import InputError, NothingDoneError
from densepred.evaluation.pairing import find_files
from densepred.inference import inputs as module
from densepred.inference.batch import predict
from densepred.inference.inputs import find_inputs
from densepred.training.loop import train
from tests.case_files import make_set, save_json
from tests.untrained_runs import image, noise, run_of

WEIGHED = {"images": "images/{id}.fits", "labels": "labels/{id}.fits", "validity": {"weight": "weights/{id}.fits"}}
BESIDE = {"images": "{id}.fits", "labels": "{id}_lab.fits", "validity": {"mask": "{id}_dq.fits"}}
TWO = {"images": {"t1": "t1/{id}.fits", "t2": "t2/{id}.fits"}, "labels": "l/{id}.fits"}
LISTED = {"dataset": "list.csv"}


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(data: dict, inputs: Sequence[object], root: Path, channels: int = 1) -> dict[str, Case]:
    config = Config(data=DataConfig.model_validate({"root": str(root), **data}))
    numbered = [f"channel {number}" for number in range(channels)]
    return {case.id: case for case in find_inputs([str(one) for one in inputs], config, numbered)}


def names(case: Case) -> dict[str, str]:
    return {role: "/".join(path.parts[-2:]) for role, path in case.roles.items()}


def fault(case: Case) -> str:
    assert case.fault is not None
    return case.fault.what


# patterns whose last parts are equal


def test_planes_are_found_from_the_folder_above(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{kind}/c{n}.fits" for kind in ("images", "weights", "labels") for n in (0, 1)))
    for item in (tmp_path, tmp_path / "images", tmp_path / "images" / "c0.fits"):
        cases = found(WEIGHED, [item], tmp_path)
        assert names(cases["c0"]) == {"image 0": "images/c0.fits", "weight": "weights/c0.fits"}
        assert len(cases) == (1 if item.suffix else 2)


def test_an_image_is_never_its_own_plane(tmp_path: Path) -> None:
    touch(tmp_path, "new/x.fits", "new/y.fits", "new/weights/y.fits")
    cases = found(WEIGHED, [tmp_path / "new"], tmp_path)
    assert names(cases["x"]) == {"image 0": "new/x.fits"}
    assert names(cases["y"]) == {"image 0": "new/y.fits", "weight": "weights/y.fits"}
    both = BESIDE | {"images": "i/{id}_sci.fits", "validity": {"mask": "m/{id}.fits", "weight": "w/{id}.fits"}}
    touch(tmp_path, "plain/a_sci.fits", "plain/a.fits")
    assert names(found(both, [tmp_path / "plain"], tmp_path)["a"]) == {"image 0": "plain/a_sci.fits"}


def test_one_file_is_never_two_channels(tmp_path: Path) -> None:
    touch(tmp_path, "t1/a.fits", "t2/a.fits", "new/a.fits")
    for item in (tmp_path / "t1", tmp_path / "t2" / "a.fits", tmp_path):
        assert names(found(TWO, [item], tmp_path, 2)["a"]) == {"image 0": "t1/a.fits", "image 1": "t2/a.fits"}
    case = found(TWO, [tmp_path / "new"], tmp_path, 2)["a"]
    assert "one file for channel t1 and channel t2" in fault(case)
    with pytest.raises(InputError, match="one file for"):
        Reading().open_case(case)
    with pytest.raises(InputError, match="one file for"):
        Reading().count(case)


def test_one_pattern_for_two_roles_is_meant_so(tmp_path: Path) -> None:
    touch(tmp_path, "a_flc.fits")
    warm = {"file": "{id}_flc.fits[DQ,1]", "bits": [64]}
    data = {"images": {"sci": "{id}_flc.fits[SCI,1]", "warm": warm}, "validity": {"mask": "{id}_flc.fits[DQ,1]"}}
    case = found(data, [tmp_path], tmp_path, 2)["a"]
    assert case.fault is None
    assert case.mask == case.images[1] == tmp_path / "a_flc.fits[DQ,1]"


# patterns that lead elsewhere


@pytest.mark.parametrize("given", ["absolute", "above"])
def test_patterns_that_lead_elsewhere_find_nothing_there(tmp_path: Path, given: str) -> None:
    touch(tmp_path, "set/i/c0.fits", "set/w/c0.fits", "set/l/c0.fits", "set/root/readme", "new/fresh.fits")
    start = str(tmp_path / "set") if given == "absolute" else ".."
    patterns = {"images": f"{start}/i/{{id}}.fits", "labels": f"{start}/l/{{id}}.fits"}
    for validity in ({}, {"weight": f"{start}/w/{{id}}.fits"}):
        data = patterns | {"validity": validity}
        root = tmp_path / "set" / "root"
        assert list(found(data, [tmp_path / "new"], root)) == ["fresh"]
        there = found(data, [tmp_path / "set" / "i"], root)
        assert names(there["c0"]) == {"image 0": "i/c0.fits"} | ({"weight": "w/c0.fits"} if validity else {})


def test_a_folder_of_a_case_finds_that_case_alone(tmp_path: Path) -> None:
    touch(tmp_path, "s1/t1.nii", "s1/t2.nii", "s2/t1.nii", "s2/t2.nii")
    data = {"images": {"t1": "{id}/t1.nii", "t2": "{id}/t2.nii"}}
    assert names(found(data, [tmp_path / "s1"], tmp_path, 2).pop("s1")) == {
        "image 0": "s1/t1.nii",
        "image 1": "s1/t2.nii",
    }
    assert list(found(data, [tmp_path / "s1"], tmp_path, 2)) == ["s1"]


# single cases that lack something


def test_each_plane_is_absent_by_itself(tmp_path: Path) -> None:
    data = BESIDE | {"validity": {"mask": "{id}_dq.fits", "weight": "{id}_w.fits"}}
    touch(tmp_path, "a.fits", "a_dq.fits", "b.fits", "b_dq.fits", "b_w.fits", "b_lab.fits")
    for item in (tmp_path, *sorted(tmp_path.glob("?.fits"))):
        cases = found(data, [item], tmp_path)
        if "a" in cases:
            assert (cases["a"].mask, cases["a"].weight) == (tmp_path / "a_dq.fits", None)
        if "b" in cases:
            assert (cases["b"].mask, cases["b"].weight) == (tmp_path / "b_dq.fits", tmp_path / "b_w.fits")
    assert list(found(data, [tmp_path], tmp_path)) == ["a", "b"]
    assert list(found(data, [tmp_path / "*.fits"], tmp_path)) == ["a", "b"]
    assert list(found(data, sorted(tmp_path.glob("*.fits")), tmp_path)) == ["a", "b"]
    reading = Reading(validity=DataConfig.model_validate(data).validity)
    with pytest.raises(InputError, match="no weight: the model was trained with one"):
        reading.open_case(found(data, [tmp_path], tmp_path)["a"])


@pytest.mark.parametrize("images", ["{id}.fits", "*.fits"])
def test_labels_beside_images_are_no_images(tmp_path: Path, images: str) -> None:
    touch(tmp_path, "a.fits", "a_lab.fits", "b.fits")
    data = {"images": images, "labels": "{id}_lab.fits"}
    for inputs in ([tmp_path], [tmp_path / "*.fits"], sorted(tmp_path.iterdir())):
        cases = found(data, inputs, tmp_path)
        assert list(cases) == ["a", "b"]
        assert all(case.label is None for case in cases.values())


def test_a_folder_of_labels_holds_no_images(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.fits", "labels/a.fits")
    for data in (WEIGHED, {"images": "images/*.fits", "labels": "labels/{id}.fits"}):
        with pytest.raises(NothingDoneError, match="no inputs matched"):
            found(data, [tmp_path / "labels"], tmp_path)


def test_a_missing_channel_is_a_fault_of_its_case(tmp_path: Path) -> None:
    touch(tmp_path, "t1/a.fits", "t2/a.fits", "t1/b.fits")
    cases = found(TWO, [tmp_path], tmp_path, 2)
    assert cases["a"].fault is None
    assert fault(cases["b"]) == "no channel t2: nothing matches 't2/b.fits'"


def test_files_that_share_an_id_are_a_fault_of_their_case(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.nii", "y/a.nii", "y/b.nii")
    cases = found({"images": "*/{id}.nii"}, [tmp_path], tmp_path)
    assert "2 files share this id" in fault(cases["a"])
    assert cases["b"].fault is None
    assert list(found({"images": "*/{id}.nii"}, [tmp_path / "x"], tmp_path)) == ["a"]


# lists


def test_planes_of_listed_cases_are_found_by_id_in_the_folder_of_the_file(tmp_path: Path) -> None:
    touch(tmp_path, "new/a.fits", "new/a_dq.fits", "new/b.fits", "new/b_dq.fits")
    data = LISTED | {"validity": {"mask": "masks/{id}_dq.fits"}}
    for inputs in ([tmp_path / "new"], sorted((tmp_path / "new").iterdir())):
        cases = found(data, inputs, tmp_path)
        assert {case.id: names(case).get("mask") for case in cases.values()} == {
            "a": "new/a_dq.fits",
            "b": "new/b_dq.fits",
        }
    one = found(data, [tmp_path / "new" / "a.fits"], tmp_path)
    assert names(one["a"]) == {"image 0": "new/a.fits", "mask": "new/a_dq.fits"}


def test_planes_in_the_file_of_the_image_have_its_version(tmp_path: Path) -> None:
    touch(tmp_path, "a.fits")
    data = LISTED | {"validity": {"mask": "{id}.fits[DQ,1]"}}
    assert found(data, [f"{tmp_path}/a.fits[SCI,1]"], tmp_path)["a"].mask == tmp_path / "a.fits[DQ,1]"
    for part in ("[SCI,2]", "[3]", ""):
        assert found(data, [f"{tmp_path}/a.fits{part}"], tmp_path)["a"].mask is None


def test_numbered_channels_with_planes_and_gaps(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}.nii" for name in ("k0_0000", "k0_0001", "k0_dq", "k1_0001", "other")))
    data = LISTED | {"validity": {"mask": "{id}_dq.nii"}}
    cases = found(data, [tmp_path], tmp_path, 2)
    assert list(cases) == ["k0", "k1", "other"]
    assert [path.name for path in cases["k0"].images] == ["k0_0000.nii", "k0_0001.nii"]
    assert cases["k0"].mask == tmp_path / "k0_dq.nii"
    assert fault(cases["k1"]) == "no channel 0000: there is no file k1_0000"
    assert list(found(LISTED, sorted(tmp_path.glob("k0_0*")), tmp_path, 1)) == ["k0_0000", "k0_0001"]


# every input gives a case or an error


def test_what_is_not_there_is_a_case_that_fails(tmp_path: Path) -> None:
    touch(tmp_path, "a.fits")
    items = [f"{tmp_path}/{name}" for name in ("a.fits[SCI,1]", "typo.fits[SCI,1]", "gone.fits")]
    cases = found({"images": "{id}.fits"}, items, tmp_path)
    assert list(cases) == ["a", "gone", "typo"]
    with pytest.raises(InputError, match="no such file"):
        Reading().count(cases["typo"])


def test_patterns_and_folders_that_give_nothing_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.fits", "empty/readme.txt")
    for item in (tmp_path / "x*.fits", tmp_path / "empty", f"{tmp_path}/x*.fits[SCI]"):
        with pytest.raises(InputError, match="no inputs matched") as caught:
            found({"images": "{id}.fits"}, [tmp_path / "in", item], tmp_path)
        assert str(item) in caught.value.what
        assert not isinstance(caught.value, NothingDoneError)


def test_relative_paths_mean_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "images/a.fits", "weights/a.fits")
    monkeypatch.chdir(tmp_path / "images")
    for item in (".", "a.fits", "*.fits", "../images", os.path.join("..", "images", "a.fits")):
        assert names(found(WEIGHED, [item], tmp_path)["a"]) == {"image 0": "images/a.fits", "weight": "weights/a.fits"}


def test_two_inputs_of_one_id_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.nii", "y/a.nii")
    with pytest.raises(InputError, match="two inputs have the id a"):
        found({"images": "*.nii"}, [tmp_path / "x", tmp_path / "y"], tmp_path)


# through to the predictions


def test_one_bad_case_stops_no_other(tmp_path: Path) -> None:
    run = run_of(tmp_path, ".nii.gz", {0: "sky", 1: "source"})
    image(tmp_path / "new" / "a.nii.gz", noise(1))
    result = predict(run, [tmp_path / "new", f"{tmp_path}/typo.fits[SCI,1]"], tmp_path / "out")
    assert (result.done, list(result.failed), result.exit_code) == (["a"], ["typo"], 3)
    assert predict(run, [tmp_path / "set"], tmp_path / "out2").done == ["c0", "c1"]


def test_the_channel_of_validity_is_no_file(tmp_path: Path) -> None:
    for case in make_set(tmp_path, 2, (16, 16)):
        (tmp_path / "imagesTr" / f"{case}.nii.gz").rename(tmp_path / "imagesTr" / f"{case}_0000.nii.gz")
    labels = {"background": 0, "head": 1, "body": 2}
    save_json(tmp_path, {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"})
    raw = {
        "data": {"root": str(tmp_path), "dataset": "dataset.json", "validity": {"channel": True}, "fold": "all"},
        "model": {"dims": 2, "channels": [4, 8]},
        "patch": {"size": [16, 16], "batch": 1},
        "training": {"epochs": 1, "steps": 1, "tensorboard": False, "device": "cpu"},
    }
    run = train(configuration.check(raw, {}, "test"), tmp_path / "run").path
    assert predict(run, [tmp_path / "imagesTr"], tmp_path / "out").done == ["case_00", "case_01"]


def test_changed_detached_voxels_are_predicted_anew(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    run = run_of(tmp_path, ".nii.gz", {0: "sky", 1: "source"})
    head = "ObjectType = Image\nNDims = 2\nDimSize = 24 24\nElementType = MET_FLOAT\nElementDataFile = v.raw\n"
    (tmp_path / "v.mhd").write_text(head)
    noise(1).tofile(tmp_path / "v.raw")
    assert predict(run, [tmp_path / "v.mhd"], tmp_path / "out").done == ["v"]
    assert predict(run, [tmp_path / "v.mhd"], tmp_path / "out").skipped == ["v"]
    noise(2).tofile(tmp_path / "v.raw")
    assert predict(run, [tmp_path / "v.mhd"], tmp_path / "out").done == ["v"]


HUBBLE = {
    "images": {"sci": "{id}_flc.fits[SCI,1]", "err": "{id}_flc.fits[ERR,1]", "flat": "{id}_flat.fits"},
    "labels": "{id}_mask.fits",
    "validity": {"mask": "{id}_flc.fits[DQ,1]"},
}


@pytest.mark.parametrize("given", ["2", "all", " 2"])
def test_another_version_of_the_image_brings_that_of_the_other_hdus(tmp_path: Path, given: str) -> None:
    touch(tmp_path, "a_flc.fits", "a_flat.fits", "a_mask.fits")
    case = found(HUBBLE, [f"{tmp_path}/a_flc.fits[sci,{given}]"], tmp_path, 3)["a"]
    parts = {role: path.name.partition("[")[2].rstrip("]") for role, path in case.roles.items()}
    wanted = given.strip()
    expected = {"image 0": f"SCI,{wanted}", "image 1": f"ERR,{wanted}", "image 2": "", "mask": f"DQ,{wanted}"}
    assert parts == expected


def test_another_hdu_than_the_recipes_comes_alone(tmp_path: Path) -> None:
    touch(tmp_path, "a_flc.fits", "a_flat.fits")
    case = found(HUBBLE, [f"{tmp_path}/a_flc.fits[ERR,2]"], tmp_path, 3)["a_flc"]
    assert names(case)["image 0"].endswith("a_flc.fits[ERR,2]")
    assert len(case.images) == 1


def test_files_find_their_cases_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"images/c{n}.fits" for n in range(300)))
    calls, plain = [], module.split_part
    monkeypatch.setattr(module, "split_part", lambda path: calls.append(path) or plain(path))
    assert len(found({"images": "images/{id}.fits"}, sorted((tmp_path / "images").iterdir()), tmp_path)) == 300
    assert len(calls) < 20 * 300


def test_a_folder_that_cannot_be_read_is_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "a.nii").touch()
    plain = Path.iterdir

    def closed(self: Path) -> Iterator[Path]:
        if self.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self)

    monkeypatch.setattr(Path, "iterdir", closed)
    assert list(find_files(tmp_path, "labels")) == ["a"]


def test_a_reader_of_stderr_that_went_away_fails_no_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    run = run_of(tmp_path, ".nii.gz", {0: "sky", 1: "star"})
    path = image(tmp_path / "in" / "a.nii.gz", noise(1, 96))  # of several windows, which are told
    handler = base._Stderr()
    monkeypatch.setattr(sys, "stderr", Gone())
    log = logging.getLogger("densepred")
    log.addHandler(handler)
    try:
        monkeypatch.setattr(log, "level", logging.INFO)
        assert predict(run, [path], tmp_path / "out").done == ["a"]
    finally:
        log.removeHandler(handler)


def test_a_series_with_a_text_beside_it_is_one_case(tmp_path: Path) -> None:
    touch(tmp_path, "1.2.55/0.dcm", "1.2.55/1.dcm", "1.2.55/LICENSE", "1.2.56/a.dcm")
    assert list(found(LISTED, [tmp_path / "1.2.55"], tmp_path)) == ["1.2.55"]
    assert sorted(match(["*"], tmp_path)[0]) == ["1.2.55", "1.2.56"]
    touch(tmp_path, "1.2.56/b.nii")
    assert sorted(found(LISTED, [tmp_path / "1.2.56"], tmp_path)) == ["a", "b"]
