"""Lists of cases as the inputs of a prediction: a CSV, or the dataset.json of a data set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from densepred.cases.case import Case
from densepred.config import Config, DataConfig
from densepred.errors import InputError, NothingDoneError, UnsafeError
from densepred.inference.batch import predict
from densepred.inference.inputs import find_inputs
from densepred.volumes import open_volume
from tests.case_files import save_json
from tests.untrained_runs import image, noise, run_of

PLAIN = ("channel 0",)
FITS = {"images": "{id}.fits"}


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def csv(root: Path, *lines: str) -> Path:
    path = root / "cases.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def found(
    inputs: Sequence[object], channels: Sequence[str] = PLAIN, data: dict | None = None, root: Path | None = None
) -> dict[str, Case]:
    config = Config(data=DataConfig.model_validate({"root": str(root or "elsewhere"), **(data or FITS)}))
    return {case.id: case for case in find_inputs([str(one) for one in inputs], config, channels)}


# CSV


def test_paths_are_relative_to_the_list_and_labels_are_no_images(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.fits", "in/a_truth.fits", "b.fits", "in/b.fits")
    away = tmp_path / "b.fits"
    path = csv(
        tmp_path / "in", "id,image,label,group", "one, a.fits, a_truth.fits, p1", f"b,{away},,", ",b.fits[SCI],,"
    )
    with pytest.raises(InputError, match="line 4 has the same id as line 3"):
        found([path])
    path = csv(tmp_path / "in", "id,image,label,group", "one, a.fits, a_truth.fits, p1", f"b,{away},gone.fits,")
    cases = found([path, tmp_path / "in" / "a_truth.fits"])
    assert cases == {"one": Case("one", (tmp_path / "in" / "a.fits",)), "b": Case("b", (away,))}


def test_a_list_is_found_by_a_pattern_and_mixed_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "in/a.fits", "c.fits")
    csv(tmp_path / "in", "image", '"a.fits[SCI,1]"')
    monkeypatch.chdir(tmp_path)
    cases = found(["in/*.csv", "c.fits"])
    assert {name: case.images for name, case in cases.items()} == {
        "a": (tmp_path / "in/a.fits[SCI,1]",),
        "c": (tmp_path / "c.fits",),
    }
    with pytest.raises(InputError, match="two inputs have the id a"):
        found(["in/*.csv", "in/a.fits"])


def test_channels_come_in_the_order_of_the_model(tmp_path: Path) -> None:
    touch(tmp_path, "1.fits", "2.fits")
    path = csv(tmp_path, "id,image:t2,image:t1", "a,2.fits,1.fits")
    assert [file.name for file in found([path], ("t1", "t2"))["a"].images] == ["1.fits", "2.fits"]
    assert [file.name for file in found([path], ("channel 0", "channel 1"))["a"].images] == ["2.fits", "1.fits"]
    with pytest.raises(
        InputError, match=r"the channels t2, t1; the model has t1, flair\n  fix: .*image:t1, image:flair"
    ):
        found([path], ("t1", "flair"))


def test_a_missing_file_is_a_fault_of_its_case(tmp_path: Path) -> None:
    touch(tmp_path, "a.fits", "b.fits")
    data = FITS | {"validity": {"mask": "{id}_dq.fits"}}
    cases = found([csv(tmp_path, "id,image,mask", "a,a.fits,gone.fits", "b,b.fits,a.fits")], data=data)
    assert cases["a"].fault is not None
    assert (cases["a"].fault.what, Path(cases["a"].fault.file).name) == ("no such file", "gone.fits")
    assert (cases["b"].fault, cases["b"].mask) == (None, tmp_path / "a.fits")


def test_planes_that_are_not_listed_are_found_from_the_folder_of_the_list(tmp_path: Path) -> None:
    touch(tmp_path, "i/a.fits", "masks/a_dq.fits", "i/b.fits", "i/b_dq.fits")
    data = {"dataset": "cases.csv", "validity": {"mask": "masks/{id}_dq.fits"}}
    cases = found([csv(tmp_path, "image", "i/a.fits", "i/b.fits")], data=data)
    assert {case.id: case.mask for case in cases.values()} == {
        "a": tmp_path / "masks/a_dq.fits",
        "b": tmp_path / "i/b_dq.fits",
    }


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (("id,image", "a,a.fits", "", "a,b.fits"), "cases.csv: line 4 has the same id as line 2"),
        (("id,image", "a,a.fits", "A,b.fits"), "an id that differs from a in case only"),
        (("id,image", "a,a.fits", "b,"), "line 3 has no image"),
        (("id,image,weight", "a,a.fits,"), "line 2 has no weight"),
        (("id,image,mask", "a,a.fits,b.fits"), "the list has a mask, and the model was trained without one"),
        (("id,image", "a,a.fits", "b,b.fits,c.fits"), "line 3 has 3 cells, there are 2 columns"),
        (("id,image", 'a,"a.fits', "b,b.fits"), "line 3 cannot be read"),
        (("id,image,image", "a,a.fits,b.fits"), "two columns are called image"),
        (("id,picture", "a,a.fits"), "no column of images among id, picture"),
        (("id,image", "a b,a.fits"), "impossible id 'a b'"),
    ],
)
def test_a_malformed_list_is_one_error(tmp_path: Path, lines: Sequence[str], what: str) -> None:
    touch(tmp_path, "a.fits", "b.fits", "c.fits")
    with pytest.raises(InputError) as caught:
        found([csv(tmp_path, *lines)])
    assert what in str(caught.value)
    assert "problems" not in str(caught.value)


def test_lists_that_cannot_be_taken(tmp_path: Path) -> None:
    with pytest.raises(UnsafeError, match="is a path"):
        found([csv(tmp_path, "id,image", "../a,a.fits")])
    with pytest.raises(NothingDoneError, match="lists no case"):
        found([csv(tmp_path, "id,image")])
    with pytest.raises(InputError, match=r"gone.csv: cannot be read \(No such file"):
        found([tmp_path / "gone.csv"])


# dataset.json


def entry(name: str) -> dict[str, str]:
    return {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}


def test_decathlon_cases_to_test_or_else_those_of_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b.nii.gz", "imagesTs/c.nii.gz")
    content = {"modality": {"0": "CT"}, "training": [entry("a")]}
    save_json(tmp_path, content | {"test": ["./imagesTs/b.nii.gz", {"image": "imagesTs/c.nii.gz"}]})
    with caplog.at_level(logging.INFO, "densepred"):
        cases = found([tmp_path / "dataset.json"])
        assert [case.images for case in cases.values()] == [(tmp_path / f"imagesTs/{name}.nii.gz",) for name in "bc"]
        save_json(tmp_path, content | {"test": []})
        assert found([tmp_path / "dataset.json"]) == {"a": Case("a", (tmp_path / "imagesTr/a.nii.gz",))}
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        'the 2 cases of its list "test"',
        'the 1 cases of its list "training"',
    ]


def test_decathlon_channels(tmp_path: Path) -> None:
    touch(tmp_path, "1.nii", "2.nii", "4d.nii")
    content = {"modality": {"0": "T2", "1": "T1"}, "test": [{"id": "a", "image": ["2.nii", "1.nii"]}]}
    save_json(tmp_path, content)
    path = tmp_path / "dataset.json"
    assert [file.name for file in found([path], ("T1", "T2"))["a"].images] == ["1.nii", "2.nii"]
    assert [file.name for file in found([path], ("T2", "T1"))["a"].images] == ["2.nii", "1.nii"]
    save_json(tmp_path, content | {"test": ["4d.nii"]})
    assert list(found([path], ("T2", "T1"))) == ["4d"]
    with pytest.raises(InputError, match="the channels in the order T2, T1; the model has T1, T2"):
        found([path], ("T1", "T2"))


def test_json_that_is_no_list_for_prediction(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    save_json(tmp_path, {"test": ["a.nii", 3, "x/a.nii"]})
    with pytest.raises(
        InputError, match=r"(?s)2 problems.*test\[1\]: .*names no image.*test\[2\] has the same id as test\[0\]"
    ):
        found([path])
    save_json(tmp_path, {"channel_names": {"0": "CT"}, "labels": {}, "file_ending": ".nii.gz"})
    with pytest.raises(InputError, match=r"lists no files .*\n  fix: give the folder"):
        found([path])
    path.write_text('{"test": [\n"a.nii",\n}')
    with pytest.raises(InputError, match=r"no valid JSON: .*line 3"):
        found([path])


# through to the predictions


def test_a_batch_from_lists(tmp_path: Path) -> None:
    run = run_of(tmp_path, ".nii.gz", {0: "sky", 1: "source"})
    for seed, name in enumerate(("a", "b", "a_label")):
        image(tmp_path / "new" / f"{name}.nii.gz", noise(seed))
    path = csv(tmp_path, "id,image,label", "x,new/a.nii.gz,new/a_label.nii.gz", "gone,new/c.nii.gz,", "y,new/b.nii.gz,")
    result = predict(run, [path], tmp_path / "out")
    assert (result.done, list(result.failed), result.exit_code) == (["x", "y"], ["gone"], 3)
    assert (tmp_path / "out" / "failures.tsv").read_text().splitlines()[1].startswith("gone\t")
    save_json(tmp_path, {"test": ["new/a.nii.gz", "new/b.nii.gz"]})
    assert predict(run, [tmp_path / "dataset.json"], tmp_path / "out2").done == ["a", "b"]
    for one, other in (("x", "a"), ("y", "b")):
        left, right = open_volume(tmp_path / f"out/{one}.nii.gz"), open_volume(tmp_path / f"out2/{other}.nii.gz")
        assert np.array_equal(left.numpy(), right.numpy())
