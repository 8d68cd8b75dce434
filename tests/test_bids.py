"""BIDS derivatives, against the rules for names, side-car files and tables of the official schema."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from densepred import bids, files
from densepred.bids import BidsFile, Derivatives, label_of, parse_name
from densepred.errors import InputError, UnsafeError
from densepred.volumes import Volume, open_volume

SCHEMA = pytest.importorskip("bidsschematools.schema", reason="no bidsschematools (extra peers)").load_schema()
RULES = pytest.importorskip("bidsschematools.rules")
CLASSES = {0: "background", 1: "anterior", 2: "posterior"}
SOURCES = [
    "sub-01/anat/sub-01_T1w.nii.gz",
    "sub-01/ses-pre/anat/sub-01_ses-pre_acq-mprage_ce-gd_rec-norm_run-2_T1w.nii.gz",
    "sub-x9/anat/sub-x9_run-1_echo-2_part-mag_MEGRE.nii",
    "sub-01/anat/sub-01_inv-1_part-mag_MP2RAGE.nii.gz",
    "sub-01/func/sub-01_task-rest_dir-AP_run-01_bold.nii.gz",
    "sub-01/ses-2/dwi/sub-01_ses-2_acq-b1000_dir-PA_run-3_dwi.nii.gz",
]
PREPROCESSED = "sub-01/anat/sub-01_acq-a+b_space-MNI152NLin6Asym_res-2_desc-preproc_T1w.nii.gz"


@cache
def patterns(group: str) -> list[re.Pattern[str]]:
    """The schema's names of the files of raw data or of derivatives."""
    rules: list[dict[str, Any]] = RULES.regexify_filename_rules(SCHEMA.rules.files[group], SCHEMA, level=2)
    return [re.compile(rule["regex"]) for rule in rules]


def is_bids(path: str, group: str) -> bool:
    return any(pattern.fullmatch(path) for pattern in patterns(group))


def touched(root: Path, *names: str) -> list[Path]:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return [root / name for name in names]


# Names


def test_keys_and_folders_are_the_schemas():
    names = [SCHEMA.objects.entities[entity].name for entity in SCHEMA.rules.entities]
    assert list(bids.ENTITIES) == names
    assert set(bids.DATATYPES) == set(SCHEMA.objects.datatypes) - {"phenotype"}
    counted = {entity.name for entity in SCHEMA.objects.entities.values() if entity.format == "index"}
    assert set(bids._COUNTED) == counted


@pytest.mark.parametrize("datatype", ["anat", "func", "dwi"])
def test_the_keys_of_a_segmentation_are_the_schemas(datatype: str):
    rules = SCHEMA.rules.files.deriv.imaging
    for kind in ("discrete", "probabilistic"):
        allowed = {SCHEMA.objects.entities[key].name for key in rules[f"{datatype}_{kind}_segmentation"].entities}
        assert bids._KEPT[datatype] == allowed - {"label"}
    with_rules = {folder for name, rule in rules.items() if "dseg" in rule.suffixes for folder in rule.datatypes}
    assert with_rules == set(bids._KEPT)


@pytest.mark.parametrize("source", SOURCES)
def test_names_come_apart_as_the_schema_says(source: str):
    assert is_bids(source, "raw")
    found = next(match for pattern in patterns("raw") if (match := pattern.fullmatch(source)))
    groups = {key: value for key, value in found.groupdict().items() if value is not None}
    file = BidsFile.parse(Path("study") / source)
    assert file.suffix == groups.pop("suffix")
    assert file.extension == groups.pop("extension")
    assert file.datatype == groups.pop("datatype")
    assert file.entities == {SCHEMA.objects.entities[key].name: value for key, value in groups.items()}
    assert file.dataset == Path("study")


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("hippocampus_001.nii.gz", "'hippocampus'"),
        ("sub-01_foo-2_T1w.nii.gz", "'foo-2'"),
        ("sub-01_run-two_T1w.nii.gz", "needs a number"),
        ("sub-01_acq-a.b_T1w.nii.gz", "'acq-a' is no suffix"),
        ("sub-01_acq-a-b_T1w.nii.gz", "letters and digits"),
        ("sub-01_acq-é_T1w.nii.gz", "letters and digits"),
        ("sub-_T1w.nii.gz", "letters and digits"),
        ("sub-01_run-1_acq-a_T1w.nii.gz", "in order: sub-..._acq-..._run-..."),
        ("sub-01_acq-a_acq-b_T1w.nii.gz", "double"),
        ("tpl-MNI_T1w.nii.gz", "no subject"),
        ("sub-01_.nii.gz", "'' is no suffix"),
        ("sub-01_T1w", "no extension"),
    ],
)
def test_what_is_no_bids_name_is_refused(name: str, fault: str):
    assert not is_bids(f"sub-01/anat/{name}", "raw")
    with pytest.raises(InputError, match="no BIDS name") as raised:
        parse_name(name)
    assert fault in raised.value.what
    assert "sub-01/anat/sub-01_T1w.nii.gz" in raised.value.fix


@pytest.mark.parametrize(
    "path",
    [
        "sub-01_T1w.nii.gz",
        "sub-02/anat/sub-01_T1w.nii.gz",
        "sub-01/scans/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_ses-1_T1w.nii.gz",
        "sub-01/ses-1/anat/sub-01_T1w.nii.gz",
    ],
)
def test_folders_that_say_something_else_are_refused(path: str):
    assert not is_bids(path, "raw")
    with pytest.raises(InputError, match="no BIDS path"):
        BidsFile.parse(path)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("unet", "unet"),
        ("brats_unet3d v2.1", "bratsUnet3dV21"),
        ("Läsion", "Lasion"),
        ("La\u0308sion", "Lasion"),
        ("3D—U-Net", "3DUNet"),
        ("réseau/été", "reseauEte"),
    ],
)
def test_labels_have_letters_and_digits_alone(name: str, label: str):
    assert label_of(name) == label
    assert re.fullmatch(SCHEMA.objects.formats.label.pattern, label_of(name))


def test_a_name_without_letters_is_refused():
    with pytest.raises(InputError, match="no letter or digit"):
        Derivatives(Path("study"), "模型", CLASSES)


# Paths


@pytest.mark.parametrize("source", [*SOURCES, PREPROCESSED])
@pytest.mark.parametrize("desc", [None, "second try"])
def test_paths_are_the_schemas(tmp_path: Path, source: str, desc: str | None):
    derivatives = Derivatives(tmp_path, "unet_v2", CLASSES, desc=desc)
    labels = derivatives.labels_path(tmp_path / source)
    derivatives.finish(*touched(tmp_path, source), touched(labels.parent, labels.name)[0])
    probabilities = derivatives.probabilities_path(tmp_path / source)
    derivatives.finish(tmp_path / source, touched(probabilities.parent, probabilities.name)[0])
    written = [path for path in derivatives.folder.rglob("*") if path.is_file()]
    assert len(written) == 5
    for path in written:
        assert is_bids(path.relative_to(derivatives.folder).as_posix(), "deriv"), path
    entities = parse_name(labels.name)[0]
    assert entities["seg"] == "unetV2"
    assert entities.get("desc") == ("secondTry" if desc else parse_name(Path(source).name)[0].get("desc"))
    for key, label in parse_name(Path(source).name)[0].items():
        assert entities.get(key) == label or key in ("inv", "desc")


def test_the_grid_is_said_where_the_source_says_it(tmp_path: Path):
    derivatives = Derivatives(tmp_path, "unet", CLASSES)
    path = derivatives.labels_path(tmp_path / PREPROCESSED)
    assert path.name == "sub-01_acq-a+b_space-MNI152NLin6Asym_seg-unet_res-2_desc-preproc_dseg.nii.gz"


@pytest.mark.parametrize("source", [*SOURCES, PREPROCESSED])
def test_cutouts_and_blocks_say_that_their_grid_is_another(tmp_path: Path, source: str):
    path = touched(tmp_path, source)[0]
    derivatives = Derivatives(tmp_path, "unet", CLASSES, cut=True, blocks=3)
    labels = derivatives.labels_path(path)
    labels.parent.mkdir(parents=True)
    derivatives.finish(path, labels)
    entities = parse_name(labels.name)[0]
    preprocessed = source == PREPROCESSED
    expected = ("2Bin3", "preprocCutout") if preprocessed else ("bin3", "cutout")
    assert (entities["res"], entities["desc"]) == expected
    about = json.loads(derivatives.companions(labels)[0].read_text())
    assert "blocks of 3 x 3 voxels" in about["Resolution"]
    assert ("SpatialReference" in about) == preprocessed, "the schema demands one where a space is named"
    for written in (labels, *derivatives.companions(labels)):
        assert is_bids(written.relative_to(derivatives.folder).as_posix(), "deriv"), written


def test_two_sources_of_one_name_are_refused_also_later(tmp_path: Path):
    first, second = touched(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_FLAIR.nii.gz")
    derivatives = Derivatives(tmp_path, "unet", CLASSES)
    path = derivatives.labels_path(first)
    assert derivatives.labels_path(first) == path
    with pytest.raises(InputError, match=r"name of that of sub-01/anat/sub-01_T1w\.nii\.gz: sub-01_seg-unet_dseg"):
        derivatives.labels_path(second)
    path.parent.mkdir(parents=True)
    derivatives.finish(first, path)
    with pytest.raises(InputError, match="T1w"):
        Derivatives(tmp_path, "unet", CLASSES).labels_path(second)
    assert "desc-FLAIR" in Derivatives(tmp_path, "unet", CLASSES, desc="FLAIR").labels_path(second).name


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("sub-01/pet/sub-01_pet.nii.gz", "segmentations of anat, func, dwi, not of pet"),
        ("sub-01/func/sub-01_bold.nii.gz", "task"),
        ("other/sub-01/anat/sub-01_T1w.nii.gz", "not of the data set"),
    ],
)
def test_sources_without_a_place_are_refused(tmp_path: Path, source: str, fault: str):
    with pytest.raises(InputError, match=fault):
        Derivatives(tmp_path, "unet", CLASSES).labels_path(tmp_path / source)


# Files


def required(rules: Any, **about: Any) -> set[str]:
    """The fields that a group of the schema's rules requires of all files."""
    return {
        field
        for rule in about["names"]
        for field, level in rules[rule].fields.items()
        if (level if isinstance(level, str) else level["level"]) == "required"
    }


def test_the_description_has_what_the_schema_requires(tmp_path: Path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "dataset_description.json").write_text('{"Name": "study", "DatasetDOI": "doi:10.1/x"}')
    derivatives = Derivatives(raw, "unet v2", CLASSES, ignored=("manifest.jsonl",))
    derivatives.prepare()
    assert derivatives.folder == raw / "derivatives" / "densepred-unetV2"
    about = json.loads((derivatives.folder / "dataset_description.json").read_text())
    needed = required(SCHEMA.rules.json.dataset, names=["dataset_description", "derivative_description"])
    assert needed == {"Name", "BIDSVersion", "GeneratedBy"}
    assert needed | {"DatasetType", "DatasetLinks", "SourceDatasets"} == about.keys()
    assert about["DatasetType"] == "derivative"
    assert about["DatasetLinks"] == {"source": "../.."}
    assert (derivatives.folder / about["DatasetLinks"]["source"]).resolve() == raw
    assert about["SourceDatasets"] == [{"URL": "../..", "DOI": "doi:10.1/x"}]
    assert about["GeneratedBy"][0].items() >= {"Name": "densepred"}.items()
    assert "" not in about["DatasetLinks"]
    assert (derivatives.folder / ".bidsignore").read_text() == "manifest.jsonl\n"


def test_side_cars_have_what_the_schema_requires(tmp_path: Path):
    source = touched(tmp_path, PREPROCESSED)[0]
    extra = touched(tmp_path, "sub-01/anat/sub-01_FLAIR.nii.gz")[0]
    derivatives = Derivatives(tmp_path, "unet", CLASSES, colours={1: "#ff0000"}, atlas="AAL")
    labels, probabilities = derivatives.labels_path(source), derivatives.probabilities_path(source)
    labels.parent.mkdir(parents=True)
    derivatives.finish([source, extra], labels)
    derivatives.finish(source, probabilities)
    about = json.loads(labels.with_name(labels.name.replace(".nii.gz", ".json")).read_text())
    rules = SCHEMA.rules.sidecars.derivatives.common_derivatives
    names = ["SpatialReferenceNonStandard", "SegmentationCommon", "ImageDerivativeResEntity", "CommonDerivativeFields"]
    assert required(rules, names=names) == {"SpatialReference", "Resolution"} <= about.keys()
    uri = f"bids:source:{PREPROCESSED}"
    assert about["Sources"] == [uri, "bids:source:sub-01/anat/sub-01_FLAIR.nii.gz"]
    assert about["SpatialReference"] == uri
    assert about["Manual"] is False
    assert about["Atlas"] == "AAL"
    assert re.fullmatch(SCHEMA.objects.formats.bids_uri.pattern, about["Sources"][1])
    about = json.loads(probabilities.with_name(probabilities.name.replace(".nii.gz", ".json")).read_text())
    assert about["LabelMap"] == ["background", "anterior", "posterior"]
    rows = labels.with_name(labels.name.replace(".nii.gz", ".tsv")).read_text().splitlines()
    columns = SCHEMA.rules.tabular_data.derivatives.common_derivatives.SegmentationLookup.columns
    assert rows[0].split("\t") == ["index", "name", "color"]
    assert {key.partition("__")[0] for key, level in columns.items() if level == "required"} <= {"index", "name"}
    assert [row.split("\t")[:2] for row in rows[1:]] == [["0", "background"], ["1", "anterior"], ["2", "posterior"]]
    colours = [row.split("\t")[2] for row in rows[1:]]
    assert colours[:2] == ["#000000", "#ff0000"]
    assert re.fullmatch("#[0-9a-f]{6}", colours[2])


def test_names_with_tabs_leave_the_table_whole(tmp_path: Path):
    source = touched(tmp_path, SOURCES[0])[0]
    derivatives = Derivatives(tmp_path, "unet", {0: "back\tground", 1: "Läsion\nlinks"})
    path = derivatives.labels_path(source)
    path.parent.mkdir(parents=True)
    derivatives.finish(source, path)
    rows = path.with_name(path.name.replace(".nii.gz", ".tsv")).read_text(encoding="utf-8").splitlines()
    assert [row.split("\t")[1] for row in rows] == ["name", "back ground", "Läsion links"]


def test_a_linked_source_keeps_its_name(tmp_path: Path):
    """git-annex keeps the images of many data sets as links."""
    held = touched(tmp_path, ".git/annex/objects/MD5E-s1--abc.nii.gz")[0]
    source = tmp_path / SOURCES[0]
    source.parent.mkdir(parents=True)
    source.symlink_to(held)
    derivatives = Derivatives(tmp_path, "unet", CLASSES)
    path = derivatives.labels_path(source)
    path.parent.mkdir(parents=True)
    derivatives.finish(source, path)
    about = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
    assert about["Sources"] == [f"bids:source:{SOURCES[0]}"]


def test_the_output_may_lie_elsewhere(tmp_path: Path):
    derivatives = Derivatives(tmp_path / "raw", "unet", CLASSES, out=tmp_path / "out")
    (tmp_path / "raw").mkdir()
    derivatives.prepare()
    assert derivatives.folder == tmp_path / "out/derivatives/densepred-unet"
    about = json.loads((derivatives.folder / "dataset_description.json").read_text())
    assert about["DatasetLinks"] == {"source": "../../../raw"}


def test_our_own_description_stays(tmp_path: Path):
    Derivatives(tmp_path, "unet", CLASSES).prepare()
    path = tmp_path / "derivatives/densepred-unet/dataset_description.json"
    changed = json.loads(path.read_text()) | {"License": "CC0"}
    path.write_text(json.dumps(changed))
    Derivatives(tmp_path, "unet", CLASSES).prepare()
    assert json.loads(path.read_text()) == changed


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"GeneratedBy": [{"Name": "fMRIPrep"}]}, "another program's.*fMRIPrep"),
        ({"GeneratedBy": "hand"}, "another program's"),
        ({}, "another program's"),
        ({"GeneratedBy": [{"Name": "densepred"}], "Name": "densepred UNet"}, "Name is densepred UNet"),
        ({"GeneratedBy": [{"Name": "densepred"}], "Name": "densepred unet", "DatasetLinks": {}}, "DatasetLinks"),
    ],
)
def test_other_folders_are_refused_and_left(tmp_path: Path, content: dict[str, Any], fault: str):
    path = touched(tmp_path, "derivatives/densepred-unet/dataset_description.json")[0]
    path.write_text(json.dumps(content))
    with pytest.raises(UnsafeError, match=fault):
        Derivatives(tmp_path, "unet", CLASSES).prepare()
    assert json.loads(path.read_text()) == content


def test_a_folder_of_unknown_files_is_refused(tmp_path: Path):
    touched(tmp_path, "derivatives/densepred-unet/notes.txt")
    with pytest.raises(UnsafeError, match=r"notes\.txt"):
        Derivatives(tmp_path, "unet", CLASSES, ignored=("manifest.jsonl",)).prepare()


def test_every_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = touched(tmp_path, SOURCES[0])[0]
    derivatives = Derivatives(tmp_path, "unet", CLASSES)
    path = derivatives.labels_path(source)
    path.parent.mkdir(parents=True)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        derivatives.finish(source, path)
    assert not list(path.parent.iterdir())
    path.parent.rmdir()
    path.parent.parent.rmdir()
    with pytest.raises(KeyboardInterrupt):
        derivatives.prepare()
    assert [item for item in derivatives.folder.rglob("*") if item.is_file()] == []


def test_a_label_map_goes_there_and_comes_back(tmp_path: Path):
    source = tmp_path / SOURCES[1]
    source.parent.mkdir(parents=True)
    Volume.from_array(np.zeros((3, 4, 5), np.float32), (2.0, 1.0, 1.0)).save(source)
    derivatives = Derivatives(tmp_path, "unet", CLASSES)
    derivatives.prepare()
    path = derivatives.labels_path(source)
    path.parent.mkdir(parents=True)
    values = np.arange(60).reshape(3, 4, 5) % 3
    with open_volume(source) as volume:
        volume.like(values.astype(np.uint8)).save(path)
    derivatives.finish(source, path)
    with open_volume(path) as written:
        assert np.array_equal(written[0], values)
        assert written.labels


def test_another_run_may_describe_the_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Derivatives(tmp_path / "study", "unet", CLASSES, tmp_path / "out").prepare()
    plain, missed = Path.exists, []

    def late(self: Path) -> bool:
        if self.name == "dataset_description.json" and not missed:
            missed.append(self)
            return False
        return plain(self)

    monkeypatch.setattr(Path, "exists", late)
    Derivatives(tmp_path / "study", "unet", CLASSES, tmp_path / "out").prepare()
    assert missed
