"""Fingerprints against numpy and SciPy, what folders say, and the recipes that come of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from densepred.config import DataConfig
from densepred.errors import InputError, NothingDoneError
from densepred.planning import fingerprint as fingerprints
from densepred.planning.fingerprint import measure
from densepred.planning.layouts import of_folder
from densepred.planning.measure import Measuring
from densepred.planning.planner import read_source
from densepred.planning.sketch import Gathering, merged, sketch
from tests.case_files import CLASSES, blob, by_patterns, make_set, save, save_json


def test_merged_sketches_are_those_of_all_values():
    generator = np.random.default_rng(0)
    parts = [generator.normal(100 * n, 1 + n, 5000 + 1000 * n) for n in range(5)]
    every, both = np.concatenate(parts), merged([sketch(part) for part in parts])
    assert both.count == len(every)
    assert both.mean == pytest.approx(every.mean(), rel=1e-12)
    assert both.std == pytest.approx(every.std(), rel=1e-12)
    assert (both.low, both.high) == (pytest.approx(every.min()), pytest.approx(every.max()))
    for probability in (0.005, 0.1, 0.5, 0.77, 0.995):
        rank = np.mean(every <= both.quantile(probability))
        assert rank == pytest.approx(probability, abs=1e-3)


def test_a_value_that_many_have_is_their_quantile():
    """Black borders: more than the half is 0."""
    found = sketch(np.concatenate([np.zeros(600), np.linspace(1, 100, 400)]))
    assert [found.quantile(p) for p in (0.005, 0.5)] == [0.0, 0.0]
    assert found.quantile(0.8) == pytest.approx(50, abs=1)
    assert sketch(np.full(7, 3.0)).quantile(0.5) == 3.0


def test_values_come_in_slabs_and_a_sample_is_kept_of_many(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("densepred.planning.sketch.MOST_VALUES", 1000)
    values = np.random.default_rng(1).gamma(2.0, 10.0, 50_000)
    gathering = Gathering(values.size)
    for part in np.array_split(values, 37):
        gathering.add(part)
    found = gathering.sketch()
    assert sum(len(part) for part in gathering.kept) == math.ceil(values.size / 51)
    assert (found.count, found.mean) == (values.size, pytest.approx(values.mean()))
    assert (found.std, found.high) == (pytest.approx(values.std()), pytest.approx(values.max()))
    assert abs(np.mean(values <= found.quantile(0.5)) - 0.5) < 0.05


def test_a_case_is_what_numpy_and_scipy_say(tmp_path: Path):
    generator = np.random.default_rng(2)
    image = np.zeros((9, 12, 14), np.float32)
    image[2:8, 3:11, 1:13] = generator.normal(50, 9, (6, 8, 12))
    image[4, 5, 6] = np.nan
    label = np.zeros(image.shape, np.uint8)
    label[2:4, 3:5, 1:3], label[6:8, 8:11, 10:13], label[5, 5, 5] = 1, 1, 2
    save(tmp_path / "imagesTr/a.nii.gz", image, (3.0, 1.0, 0.5))
    save(tmp_path / "labelsTr/a.nii.gz", label, (3.0, 1.0, 0.5))
    found = measure(by_patterns(tmp_path), tmp_path / "out").cases[0]
    assert (found.shape, found.cropped, found.spacing) == ((9, 12, 14), (6, 8, 12), (3.0, 1.0, 0.5))
    assert found.relative_size == pytest.approx(6 * 8 * 12 / image.size)
    finite = image[np.isfinite(image)]
    assert found.valid[0].count == finite.size == image.size - 1
    assert found.valid[0].mean == pytest.approx(finite.mean(dtype=float))
    inside = image[label > 0]
    assert found.foreground[0].std == pytest.approx(inside.std(dtype=float))
    assert found.foreground[0].quantile(0.995) == pytest.approx(np.quantile(inside, 0.995), rel=0.01)
    _, pieces = ndimage.label(label == 1, np.ones((3, 3, 3)))
    head = found.classes["head"]
    assert (head.voxels, head.pieces, head.largest, head.typical) == ((label == 1).sum(), pieces, 18, (18 + 8) / 2)
    assert found.classes["body"].voxels == 1


def test_a_faulty_case_is_named_and_the_others_are_measured(tmp_path: Path):
    ids = make_set(tmp_path, 4)
    broken = tmp_path / "imagesTr" / f"{ids[1]}.nii.gz"
    broken.write_bytes(broken.read_bytes()[:300])
    (tmp_path / "labelsTr" / f"{ids[2]}.nii.gz").unlink()
    found = measure(by_patterns(tmp_path), tmp_path / "out")
    assert [case.id for case in found.cases] == [ids[0], ids[3]]
    assert {problem.case for problem in found.faults} == {ids[1], ids[2]}
    assert len(found.summary()["left_out"]) == 2
    for case in ids:
        (tmp_path / "imagesTr" / f"{case}.nii.gz").write_bytes(b"no image")
    with pytest.raises(NothingDoneError, match="no case can be read"):
        measure(by_patterns(tmp_path), tmp_path / "out")


def test_what_is_measured_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ids = make_set(tmp_path, 4)
    read: list[str] = []
    whole = Measuring.case

    def counted(self: Measuring, case: object) -> object:
        read.append(case.id)  # type: ignore[attr-defined]
        if len(read) == 3:
            raise KeyboardInterrupt
        return whole(self, case)  # type: ignore[arg-type]

    monkeypatch.setattr(Measuring, "case", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(by_patterns(tmp_path), tmp_path / "out", workers=1)
    done = {path.stem for path in (tmp_path / "out").glob("*.json")}
    assert done >= set(ids[:2])
    assert ids[2] not in done
    read[:] = ["again"] * 3
    first = measure(by_patterns(tmp_path), tmp_path / "out", workers=1)
    assert set(read[3:]) == set(ids) - done
    read[:] = ["again"] * 5
    save(tmp_path / "imagesTr" / f"{ids[0]}.nii.gz", blob(seed=99)[0] + 1000)
    second = measure(by_patterns(tmp_path), tmp_path / "out", workers=2)
    assert sorted(read[5:]) == ids[:1]
    assert second.cases[1:] == first.cases[1:]
    assert second.cases[0].valid[0].mean > first.cases[0].valid[0].mean + 900


def test_the_values_of_unnamed_labels_become_classes(tmp_path: Path):
    make_set(tmp_path, 3)
    found = measure(by_patterns(tmp_path, classes={}), tmp_path / "out")
    assert found.classes == {0: "background", 1: "class_1", 2: "class_2"}
    named = measure(by_patterns(tmp_path), tmp_path / "named")
    assert named.names == tuple(CLASSES.values())
    for value, name in CLASSES.items():
        unnamed = found.class_facts(found.classes[value])
        assert unnamed == named.class_facts(name)
    merging = measure(by_patterns(tmp_path, classes={0: "background", 1: "all", 2: "all"}), tmp_path / "merged")
    assert merging.class_facts("all")["share"] == pytest.approx(
        named.class_facts("head")["share"] + named.class_facts("body")["share"]
    )


def test_sets_that_make_no_sense_are_refused(tmp_path: Path):
    image, label = blob((8, 9, 10))
    save(tmp_path / "imagesTr/a.nii.gz", image)
    save(tmp_path / "labelsTr/a.nii.gz", np.arange(label.size, dtype=np.int16).reshape(label.shape) % 100)
    with pytest.raises(InputError, match="instances rather than classes"):
        measure(by_patterns(tmp_path, classes={}), tmp_path / "out")
    save(tmp_path / "labelsTr/a.nii.gz", np.zeros_like(label))
    with pytest.raises(InputError, match="nothing to learn"):
        measure(by_patterns(tmp_path, classes={}), tmp_path / "out")


def pairs(root: Path, images: str, labels: str, count: int = 3, ending: str = ".nii.gz") -> None:
    for number in range(count):
        image, label = blob(seed=number)
        save(root / f"{images.format(id=f'x{number}')}{ending}", image)
        save(root / f"{labels.format(id=f'x{number}')}{ending}", label)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("images/{id}", "labels/{id}"),
        ("imagesTr/{id}", "labelsTr/{id}"),
        ("Scans/{id}", "Masks/{id}_mask"),
        ("images/{id}_0000", "labels/{id}"),
        ("{id}", "{id}_seg"),
        ("{id}", "{id}-label"),
        ("{id}", "{id}_mask"),
    ],
)
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_loose_files_are_found_as_they_are(tmp_path: Path, images: str, labels: str, ending: str):
    pairs(tmp_path, images, labels, ending=ending)
    data = of_folder(tmp_path)
    found = measure(data, tmp_path / "out")
    assert [case.id for case in found.cases] == ["x0", "x1", "x2"]
    assert not found.faults
    assert found.classes == {0: "background", 1: "class_1", 2: "class_2"}


def test_channels_in_files_of_their_own(tmp_path: Path):
    for number in range(3):
        image, label = blob(seed=number)
        for channel in (0, 1):
            save(tmp_path / f"imagesTr/x{number}_{channel:04d}.nii.gz", image + 100 * channel)
        save(tmp_path / f"labelsTr/x{number}.nii.gz", label)
    found = measure(of_folder(tmp_path), tmp_path / "out")
    assert found.channels == ("channel_0000", "channel_0001")
    assert [round(s.mean / 100) for s in found.intensities("valid")] == [1, 2]
    save_json(tmp_path, {"channel_names": {"0": "T1", "1": "CT"}, "labels": {"background": 0, "a": 1, "b": 2},
                         "numTraining": 3, "file_ending": ".nii.gz"})  # fmt: skip
    save_json(tmp_path, [{"train": ["x0", "x1"], "val": ["x2"]}], "splits_final.json")
    data = of_folder(tmp_path)
    assert (data.dataset, data.splits) == ("dataset.json", "splits_final.json")
    found = measure(data, tmp_path / "out")
    assert (found.channels, found.names) == (("T1", "CT"), ("background", "a", "b"))


def test_channels_of_the_decathlon_lie_in_one_file(tmp_path: Path):
    content = {"modality": {"0": "FLAIR", "1": "T1w"}, "training": [], "labels": {"0": "background", "1": "edema"}}
    save_json(tmp_path, content)
    assert of_folder(tmp_path).axes == "xyzc"


def test_folders_that_say_nothing(tmp_path: Path):
    with pytest.raises(NothingDoneError, match="holds nothing"):
        of_folder(tmp_path)
    for number in range(3):
        save(tmp_path / f"scan{number}.nii.gz", blob(seed=number)[0])
    with pytest.raises(InputError, match="scan0") as caught:
        of_folder(tmp_path)
    assert "data.images" in caught.value.fix


def test_images_without_a_label_are_named(tmp_path: Path):
    pairs(tmp_path, "images/{id}", "labels/{id}", 4)
    (tmp_path / "labels/x2.nii.gz").unlink()
    found = measure(of_folder(tmp_path), tmp_path / "out")
    assert [problem.case for problem in found.faults] == ["x2"]


def test_the_source_is_a_data_section_and_nothing_else(tmp_path: Path):
    path = tmp_path / "data.yaml"
    path.write_text("data: {images: 'a/{id}.nii', labels: 'b/{id}.nii'}\n")
    assert read_source(path) == DataConfig(images="a/{id}.nii", labels="b/{id}.nii")
    path.write_text("data: {dataset: a.csv}\nmodel: {dims: 2}\n")
    with pytest.raises(InputError, match="also model"):
        read_source(path)
    path.write_text("data: {datset: a.csv}\n")
    with pytest.raises(InputError, match="did you mean 'dataset'"):
        read_source(path)


def test_the_summary_is_complete(tmp_path: Path):
    make_set(tmp_path, 3)
    found = measure(by_patterns(tmp_path), tmp_path / "out")
    found.save(tmp_path / "fingerprint.json")
    content = json.loads((tmp_path / "fingerprint.json").read_text())
    assert content["version"] == fingerprints.VERSION
    facts = {"mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5"}
    assert set(content["intensities"]["foreground"][0]) == facts
    assert content["each"]["case_00"]["shape"] == [6, 7, 8]
    assert content["class_sizes"]["head"]["cases"] == 3


def test_images_numbered_with_four_digits_are_no_channels(tmp_path: Path):
    for number in range(3):
        image, label = blob(seed=number)
        save(tmp_path / f"images/case_{number:04d}.nii.gz", image)
        save(tmp_path / f"labels/case_{number:04d}.nii.gz", label)
    found = measure(of_folder(tmp_path), tmp_path / "out")
    assert [case.id for case in found.cases] == ["case_0000", "case_0001", "case_0002"]
    assert found.cases[0].channels == 1


def test_labels_that_number_objects_are_one_class(tmp_path: Path):
    image, label = blob()
    label[5] = 7
    save(tmp_path / "imagesTr/a.nii.gz", image)
    save(tmp_path / "labelsTr/a.nii.gz", label)
    data = by_patterns(tmp_path, classes={0: "background", 1: "cell"}, instances=True)
    found = measure(data, tmp_path / "out")
    assert not found.faults
    assert found.cases[0].classes["cell"].voxels == (label > 0).sum()


def test_classes_whose_names_are_numbers_are_counted_once(tmp_path: Path):
    make_set(tmp_path, 3)
    found = measure(by_patterns(tmp_path, classes={0: "background", 1: "1", 2: "2"}), tmp_path / "out")
    named = measure(by_patterns(tmp_path), tmp_path / "named")
    assert found.class_facts("1") == named.class_facts("head")
