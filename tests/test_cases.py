"""Finding cases, by patterns and by lists, and the plan made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from densepred.cases.case import Case, collect, find, id_of
from densepred.cases.names import channel_names, class_names, ignored_values
from densepred.cases.patterns import match
from densepred.cases.plan import FORMAT_VERSION, Plan, index_classes, make_plan
from densepred.config import Config, DataConfig, ModelConfig
from densepred.errors import InputError, NothingDoneError, UnsafeError
from tests.case_files import blob, by_patterns, make_set, plan, save, save_json


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


# finding


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a/b.nii.gz", "b"), ("b.NII.GZ", "b"), ("sub-01_1.5T.nii", "sub-01_1.5T"), ("m.fits.fz", "m"), ("m", "m")],
)
def test_id_is_the_name_without_the_suffixes_of_format_and_compression(name: str, expected: str) -> None:
    assert id_of(name) == expected


def test_patterns_pair_images_and_labels_sorted_by_id(tmp_path: Path) -> None:
    touch(tmp_path / "imagesTr", "b.nii.gz", "a.nii.gz", "._a.nii.gz")
    touch(tmp_path / "labelsTr", "a.nii.gz", "b.nii.gz")
    cases = collect(by_patterns(tmp_path))
    assert [case.id for case in cases] == ["a", "b"]
    assert cases[0].images == (tmp_path / "imagesTr/a.nii.gz",)
    assert cases[0].label == tmp_path / "labelsTr/a.nii.gz"


def test_channels_come_in_the_order_of_the_mapping(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{case}/{name}.nii.gz" for case in ("s1", "s2") for name in ("t1", "flair", "seg")))
    channels = {"t1": "{id}/t1.nii.gz", "flair": "{id}/flair.nii.gz"}
    data = by_patterns(tmp_path, images=channels, labels="{id}/seg.nii.gz")
    cases = collect(data)
    assert [case.id for case in cases] == ["s1", "s2"]
    assert [path.name for path in cases[0].images] == ["t1.nii.gz", "flair.nii.gz"]
    assert channel_names(data) == ("t1", "flair")


@pytest.mark.parametrize(
    ("images", "labels", "names"),
    [
        ("{id}.nii.gz", "{id}_seg.nii.gz", ("{}.nii.gz", "{}_seg.nii.gz")),
        ("{id}_0000.nii.gz", "{id}.nii.gz", ("{}_0000.nii.gz", "{}.nii.gz")),
        ("*.nii.gz", "{id}-label.nii.gz", ("{}.nii.gz", "{}-label.nii.gz")),
        ("**/{id}/{id}_t1.nii.gz", "**/{id}/{id}_seg.nii.gz", ("x/{0}/{0}_t1.nii.gz", "x/{0}/{0}_seg.nii.gz")),
    ],
)
def test_one_folder_may_hold_all(tmp_path: Path, images: str, labels: str, names: tuple[str, str]) -> None:
    touch(tmp_path, *(name.format(case) for case in ("s1", "s2") for name in names))
    cases = collect(by_patterns(tmp_path, images=images, labels=labels))
    assert [(case.id, case.images[0], case.label) for case in cases] == [
        (case, tmp_path / names[0].format(case), tmp_path / names[1].format(case)) for case in ("s1", "s2")
    ]


def test_a_pattern_may_use_every_sign_of_the_shell(tmp_path: Path) -> None:
    touch(tmp_path, "run1/a.nii", "run2/b.nii", "run3/c.nii")
    assert list(match(["run[!3]/?.nii"], tmp_path)[0]) == ["a", "b"]
    assert list(match([str(tmp_path / "run3" / "*.nii")], Path("/"))[0]) == ["c"]


def test_all_faults_of_pairing_are_raised_at_once(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a.nii.gz", "imagesTr/b.nii.gz", "labelsTr/b.nii.gz", "labelsTr/c.nii.gz")
    with pytest.raises(InputError) as caught:
        collect(by_patterns(tmp_path))
    message = str(caught.value)
    assert "2 problems" in message
    assert "a: no label: nothing matches 'labelsTr/a.nii.gz'" in message
    assert "c.nii.gz: a label without an image" in message
    assert [case.id for case in find(by_patterns(tmp_path)).cases] == ["b"]


def test_a_missing_channel_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "s1/t1.nii", "s1/t2.nii", "s1/seg.nii", "s2/t1.nii", "s2/seg.nii")
    data = by_patterns(tmp_path, images={"t1": "{id}/t1.nii", "t2": "{id}/t2.nii"}, labels="{id}/seg.nii")
    with pytest.raises(InputError, match=r"ERROR s2: no channel t2: nothing matches 's2/t2.nii'"):
        collect(data)


def test_without_a_label_pattern_cases_have_no_labels(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a.nii.gz")
    assert collect(by_patterns(tmp_path, labels=None)) == [Case("a", (tmp_path / "imagesTr/a.nii.gz",))]


def test_files_that_share_an_id_are_listed(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.nii", "b/x.nii")
    with pytest.raises(InputError, match=r"2 files share this id: .*a/x.nii, .*b/x.nii\n  fix: put \{id\} into"):
        collect(by_patterns(tmp_path, images="**/*.nii", labels=None))


@pytest.mark.parametrize("name", ["-rf.nii", "über.nii", "a b.nii", "x" * 210 + ".nii", "😀.nii"])
def test_impossible_ids_are_refused(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    with pytest.raises(InputError, match="impossible id"):
        collect(by_patterns(tmp_path, images="*.nii", labels=None))


def test_ids_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    save_csv(tmp_path, "id,image\nA1,a.nii\na1,b.nii\n")
    touch(tmp_path, "a.nii", "b.nii")
    with pytest.raises(InputError, match="differs from A1 in case only"):
        collect(DataConfig(root=str(tmp_path), dataset="list.csv"))


def test_one_file_does_not_fill_two_roles(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii")
    with pytest.raises(InputError, match=r"a.nii: one file for image and label, which the recipe tells apart"):
        collect(by_patterns(tmp_path, images="*.nii", labels="{id}.nii"))
    warm = {"sci": "{id}.nii", "warm": {"file": "{id}.nii", "bits": [1]}}
    assert len(collect(by_patterns(tmp_path, images=warm, labels=None))) == 1  # one pattern twice is meant so


def test_ids_of_several_images_in_a_file_collide_loudly(tmp_path: Path) -> None:
    for name, count in (("a", 2), ("a_0", 1)):
        images = [fits.ImageHDU(np.eye(3), name="SCI", ver=version + 1) for version in range(count)]
        fits.HDUList([fits.PrimaryHDU(), *images]).writeto(tmp_path / f"{name}.fits")
    with pytest.raises(InputError, match=r"a_0.fits\[SCI,1\]: has the same id as .*a.fits\[SCI,1\]"):
        collect(by_patterns(tmp_path, images="{id}.fits[all]", labels=None))


def test_nothing_found_tells_what_is_there(tmp_path: Path) -> None:
    touch(tmp_path, *(f"imagesTr/{number}.mha" for number in range(12)))
    with pytest.raises(NothingDoneError, match=r"no images matched 'imagesTr/\*.nii.gz' .*holds 12 .mha files"):
        collect(by_patterns(tmp_path))
    with pytest.raises(NothingDoneError, match=r"there is no folder .*volumes"):
        collect(by_patterns(tmp_path, images="volumes/{id}/*.nii.gz"))


# lists


def save_csv(root: Path, text: str) -> None:
    (root / "list.csv").write_text(text)


def test_csv_with_channels_labels_and_groups(tmp_path: Path) -> None:
    touch(tmp_path, "a1.nii", "a2.nii", "b1.nii", "b2.nii", "a_l.nii")
    touch(tmp_path / "away", "b_l.nii")
    away = tmp_path / "away" / "b_l.nii"
    save_csv(tmp_path, f"id,image:t1,image:t2,label,group\nb, b1.nii, b2.nii, {away}, p1\na,a1.nii,a2.nii,a_l.nii,\n")
    data = DataConfig(root=str(tmp_path), dataset="list.csv")
    assert collect(data) == [
        Case("a", (tmp_path / "a1.nii", tmp_path / "a2.nii"), tmp_path / "a_l.nii"),
        Case("b", (tmp_path / "b1.nii", tmp_path / "b2.nii"), away, "p1"),
    ]
    assert channel_names(data) == ("t1", "t2")


@pytest.mark.parametrize("role", ["mask", "weight"])
def test_planes_of_a_list_must_be_in_the_recipe(tmp_path: Path, role: str) -> None:
    touch(tmp_path, "a.nii", "q.nii")
    save_csv(tmp_path, f"id,image,{role}\na,a.nii,q.nii\n")
    data = {"root": str(tmp_path), "dataset": "list.csv"}
    with pytest.raises(InputError, match=rf"the list has a {role}, .* no data.validity.{role}.*\n  fix: add"):
        collect(DataConfig.model_validate(data))
    cases = collect(DataConfig.model_validate(data | {"validity": {role: "{id}_q.nii"}}))
    assert getattr(cases[0], role) == tmp_path / "q.nii"


def test_csv_faults(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii")
    save_csv(tmp_path, "id,image,label\na,a.nii,\nb,gone.nii,gone_label.nii\n")
    data = DataConfig(root=str(tmp_path), dataset="list.csv")
    with pytest.raises(InputError) as caught:
        collect(data)
    for text in ("3 problems", "line 2 has no label", "gone.nii: no such file", "gone_label.nii: no such file"):
        assert text in str(caught.value)
    save_csv(tmp_path, "id,picture\na,a.nii\n")
    with pytest.raises(InputError, match="no column of images among id, picture"):
        collect(data)
    save_csv(tmp_path, "id,image\n../../x,a.nii\n")
    with pytest.raises(UnsafeError, match="is a path"):
        collect(data)


def test_decathlon_list(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTr/extra.nii.gz")
    entry = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
    labels = {"1": "liver", "0": "background", "2": "tumour"}
    save_json(tmp_path, {"modality": {"0": "CT"}, "labels": labels, "training": [entry]})
    data = DataConfig(root=str(tmp_path), dataset="dataset.json")
    assert [case.id for case in collect(data)] == ["a"]
    assert class_names(data) == {0: "background", 1: "liver", 2: "tumour"}
    assert list(class_names(data)) == [0, 1, 2]
    assert channel_names(data) == ("CT",)
    notes = [(note.severity, note.what) for note in find(data).problems]
    assert notes == [("note", "1 files here are not in the list: extra.nii.gz")]
    save_json(tmp_path, {"training": [entry, entry, {"image": "imagesTr/extra.nii.gz"}]})
    with pytest.raises(InputError, match=r"(?s)2 problems.*has the same id as training\[0\].*names no label"):
        collect(data)


def test_nnunet_list(tmp_path: Path) -> None:
    touch(tmp_path / "imagesTr", *(f"{case}_000{channel}.nii.gz" for case in "ab" for channel in (0, 1)))
    touch(tmp_path / "labelsTr", "a.nii.gz", "b.nii.gz")
    content = {
        "channel_names": {"1": "T2", "0": "T1"},
        "labels": {"background": 0, "ignore": 3, "edema": 1, "core": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    save_json(tmp_path, content)
    data = DataConfig(root=str(tmp_path), dataset="dataset.json")
    cases = collect(data)
    assert [case.id for case in cases] == ["a", "b"]
    assert [path.name for path in cases[1].images] == ["b_0000.nii.gz", "b_0001.nii.gz"]
    assert cases[1].label == tmp_path / "labelsTr/b.nii.gz"
    assert channel_names(data) == ("T1", "T2")
    assert class_names(data) == {0: "background", 1: "edema", 2: "core"}
    assert ignored_values(data) == (3,)
    save_json(tmp_path, content | {"labels": {"background": 0, "whole": [1, 2]}})
    with pytest.raises(InputError, match=r"defines regions \(whole\)"):
        class_names(data)


@pytest.mark.parametrize(
    ("text", "what"), [("{", "no valid JSON"), ("[]", "no JSON object"), ("{}", 'no list "training"')]
)
def test_lists_that_are_none(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=what):
        collect(DataConfig(root=str(tmp_path), dataset="dataset.json"))


def test_hippocampus_has_203_cases(real_data: Path) -> None:
    data = DataConfig(root=str(real_data / "hippocampus"), dataset="dataset.json")
    cases = collect(data)
    assert len(cases) == 203
    assert cases[0].id == "hippocampus_001"
    assert class_names(data) == {0: "background", 1: "Anterior", 2: "Posterior"}
    patterns = by_patterns(real_data / "hippocampus")
    assert [case.id for case in collect(patterns)] == [case.id for case in cases]


# the plan


def test_values_of_one_name_are_one_class() -> None:
    assert index_classes({0: "bg", 2: "kidney", 7: "kidney", 3: "liver"}) == (
        ("bg", "kidney", "liver"),
        (0, 2, 3),
        {0: 0, 2: 1, 7: 1, 3: 2},
    )


def test_plan_reads_channels_and_median_spacing_from_the_headers(tmp_path: Path) -> None:
    image, label = blob()
    for case, spacing in (("a", (3.0, 1.0, 1.0)), ("b", (2.0, 1.0, 0.5)), ("c", (5.0, 1.5, 0.5))):
        save(tmp_path / f"imagesTr/{case}.nii.gz", image, spacing)
        save(tmp_path / f"labelsTr/{case}.nii.gz", label, spacing)
    data = by_patterns(tmp_path, spacing="median", ignore=(5,))
    made = make_plan(Config(data=data), collect(data))
    assert made.spacing == (3.0, 1.0, 0.5)
    assert (made.channels, made.classes, made.values) == (("channel 0",), ("background", "head", "body"), (0, 1, 2))
    assert made.ignore == (5,)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made


def test_plan_faults(tmp_path: Path) -> None:
    make_set(tmp_path, 1)
    data = by_patterns(tmp_path)
    with pytest.raises(InputError, match="0 classes are named"):
        make_plan(Config(data=data.model_copy(update={"classes": {}})), collect(data))
    with pytest.raises(InputError, match=r"3 spatial axes, but model\.dims is 2"):
        make_plan(Config(data=by_patterns(tmp_path, spacing="median"), model=ModelConfig(dims=2)), collect(data))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"format_version": FORMAT_VERSION + 1, "densepred_version": "9.9", "new": 1}))
    with pytest.raises(InputError, match=r"made in format 4 by 9.9; this version reads up to 3\n  fix: upgrade"):
        Plan.load(path)
    path.write_text(plan().model_dump_json().replace('"2":2', '"2":5'))
    with pytest.raises(InputError, match="does not lead from values"):
        Plan.load(path)
    path.write_text("[1]")
    with pytest.raises(InputError, match="no plan"):
        Plan.load(path)
