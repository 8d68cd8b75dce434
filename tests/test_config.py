"""Recipes: every fault at once with its place, and documents that nobody should open refused quickly."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from densepred import config as configuration
from densepred.config import Config, ModelConfig
from densepred.errors import DensepredError, InputError, UnsafeError
from densepred.models import catalog

ROOT = Path(__file__).parent.parent
DATA = 'data: {images: "imagesTr/*.nii.gz", labels: "labelsTr/{id}.nii.gz"}\n'


@pytest.fixture
def load(tmp_path: Path):
    """Load a recipe from text."""

    def loaded(text: str | bytes, *overrides: str) -> Config:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return configuration.load(path, overrides)

    return loaded


def fault_of(load, text: str | bytes, *overrides: str) -> DensepredError:
    began = time.process_time()
    with pytest.raises(DensepredError) as raised:
        load(text, *overrides)
    assert time.process_time() - began < 5  # each takes well under a second
    return raised.value


def test_three_mistakes_are_reported_at_once_with_line_and_path(load):
    text = DATA + "trainig:\n  epochs: 3\nmodel:\n  dims: 4\npatch:\n\n  batch: two\n"
    error = fault_of(load, text)
    places = [line.strip().partition("recipe.yaml:")[2] for line in error.what.splitlines()[1:]]
    assert [place.split(": ")[:2] for place in places] == [["2", "trainig"], ["5", "model.dims"], ["8", "patch.batch"]]
    assert "did you mean 'training'?" in places[0]
    assert "2 or 3" in places[1]
    assert "'two'" in places[2]
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("text", "path", "says"),
    [
        ("patch: {sise: [1, 1, 1]}", "patch.sise", "did you mean 'size'?"),
        ("optimizer: {lr: fast}", "optimizer.lr", "valid number"),
        ("optimizer: {lr: .inf}", "optimizer.lr", "finite"),
        ("training: {epochs: true}", "training.epochs", "valid integer"),
        ("training: {epochs: 2.5}", "training.epochs", "valid integer"),
        ("training: {epochs: 0}", "training.epochs", "greater than 0"),
        ("training: {device: tpu}", "training.device", "cuda"),
        ("augment: {noise: {probability: 2, range: [0, 1]}}", "augment.noise.probability", "less than or equal to 1"),
        ("model: {_target_: os.system}", "model._target_", "unknown key"),
        ("model: {encoder: plane}", "model.encoder", "did you mean 'plain'?"),
        ("model: {activation: import os}", "model.activation", "known: "),
        ("model: {strides: [1, 0, 2, 2, 2]}", "model.strides", "greater than 0"),
        ("loss: 3", "loss", "LossConfig"),
    ],
)
def test_a_wrong_key_or_value_names_itself(load, text: str, path: str, says: str):
    error = fault_of(load, DATA + text)
    (line,) = error.what.splitlines()[1:]
    assert f"recipe.yaml:2: {path}: " in line
    assert says in line


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (DATA + "patch: {size: [32, 32]}", "patch.size"),
        (DATA + "model: {dims: 2}", "patch.size"),
        (DATA + "inference: {window: [8, 8]}", "inference.window"),
        (DATA + "inference: {mirror: [3]}", "inference.mirror"),
        (DATA + "augment: {flip: [-1]}", "augment.flip.axes"),
        (DATA + "augment: {gamma: {probability: 1, range: [2, 1]}}", "augment.gamma.range"),
        (DATA + "model: {channels: [8, 16], strides: [1, 2, 2]}", "model.strides"),
        (DATA + "model: {channels: [8, 16], kernels: [3, [1, 3]]}", "model.kernels"),
        (DATA + "model: {encoder: resnet18, strides: [1, 2, 2, 2, 2]}", "model.strides"),
        (DATA + "model: {channels: [8, 16], deep_supervision: 1}", "model.deep_supervision"),
        (DATA + "loss: {dice: 0, cross_entropy: 0}", "loss"),
        ("data: {}", "data"),
        ("data: {images: a, labels: '{id}', dataset: d.json}", "data.dataset"),
        ("data: {images: a}", "data.labels"),
        ("data: {images: a, labels: b}", "data.labels"),
        ("data: {dataset: d.json, fold: 5}", "data.fold"),
        ("data: {dataset: d.json, group: '('}", "data.group"),
        ("data: {dataset: d.json, spacing: [1, 0, 1]}", "data.spacing"),
        ("data: {dataset: d.json, classes: {0: a, 1: b}, ignore: [1]}", "data.ignore"),
    ],
)
def test_settings_that_contradict_each_other(load, text: str, path: str):
    error = fault_of(load, text)
    (line,) = error.what.splitlines()[1:]
    assert f": {path}: " in line


def test_contradictions_and_wrong_types_come_together(load):
    error = fault_of(load, "data: {images: a}\nmodel: {dims: x}\npatch: {size: [1, 2]}")
    assert [line.split(": ")[1] for line in error.what.splitlines()[1:]] == ["data.labels", "model.dims", "patch.size"]


def test_overrides_win_and_are_typed(load):
    more = ("training.epochs=7", "patch.size=[8, 8, 8]", "optimizer.lr=1e-3", "data.classes.4=lesion")
    config = load(DATA + "training: {epochs: 3, steps: 5}", *more)
    assert (config.training.epochs, config.training.steps) == (7, 5)
    assert config.patch.size == (8, 8, 8)
    assert config.optimizer.lr == 1e-3
    assert config.data.classes == {4: "lesion"}


@pytest.mark.parametrize(
    ("text", "overrides", "wanted"),
    [
        ("", ["augment=nnunet", "augment.blur.probability=0.3"], "augment: {recipe: nnunet, blur: {probability: 0.3}}"),
        (
            "augment: {flip: [0]}",
            ["augment.flip.probability=0.3"],
            "augment: {flip: {axes: [0], probability: 0.3}}",
        ),
        (
            "augment: [{noise: }, {flip: [1]}]",
            ["augment.flip.probability=0.3"],
            "augment: [{noise: {}}, {flip: {axes: [1], probability: 0.3}}]",
        ),
        ("loss: {dice: 2}", ["loss.dice.generalised=true"], "loss: {dice: {weight: 2, generalised: true}}"),
    ],
)
def test_an_override_of_a_part_keeps_the_rest_of_a_short_form(load, text: str, overrides: list[str], wanted: str):
    assert load(DATA + text, *overrides) == load(DATA + wanted)


def test_an_override_of_a_method_keeps_its_name(load):
    found = load(DATA, "data.normalize=asinh", "data.normalize.softening=5").data.normalize
    assert (found.name, found.softening) == ("asinh", 5)


def test_an_override_of_a_channel_keeps_its_file(load):
    data = "data: {images: {T1: '{id}.nii', T2: '{id}_2.nii'}, labels: 'l/{id}.nii'}"
    found = load(data, "data.images.T1.normalize=robust").data.images
    assert (found["T1"].file, found["T1"].normalize.name, found["T2"]) == ("{id}.nii", "robust", "{id}_2.nii")


def test_an_override_of_a_covariate_keeps_the_others(load):
    data = "data: {images: 'a/{id}.nii', targets: {t: {column: t}}, table: t.csv, covariates: [age, sex]}"
    found = load(data, "data.covariates.age.mean=50", "data.covariates.age.deviation=9").data.covariates
    assert list(found) == ["age", "sex"]
    assert (found["age"].mean, found["sex"]) == (50, None)


@pytest.mark.parametrize("augment", ["[flip, noise]", "[{flip: [0]}, {flip: [1]}]"])
def test_an_override_of_a_list_that_is_no_mapping_is_refused(load, augment: str):
    error = fault_of(load, DATA + f"augment: {augment}", "augment.noise.probability=0.5")
    assert "entries are not each one transform, listed once" in error.what


@pytest.mark.parametrize(
    ("override", "kind", "says"),
    [
        ("training.epoch=3", InputError, "command line: training.epoch: unknown key (did you mean 'epochs'?)"),
        ("training.epochs", InputError, "not of the form"),
        ("training.epochs=[", InputError, "not valid YAML"),
        ("model={dims: 2, dims: 3}", UnsafeError, "stands twice"),
        ("model=!!python/object/apply:os.getcwd []", UnsafeError, "a tag"),
    ],
)
def test_faulty_overrides(load, override: str, kind: type[DensepredError], says: str):
    error = fault_of(load, DATA, override)
    assert isinstance(error, kind)
    assert says in error.what


def test_a_tag_never_runs(load, tmp_path: Path):
    fired = tmp_path / "fired"
    error = fault_of(load, f'data: !!python/object/apply:os.system ["touch {fired}"]')
    assert isinstance(error, UnsafeError)
    assert "line 1" in error.what
    assert not fired.exists()


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
LADDER = "a0: &a0 []\n" + "".join(f"a{i}: &a{i} {'[' * 40}*a{i - 1}{']' * 40}\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        pytest.param(BOMB, 5, "aliases", id="billion laughs"),
        pytest.param(LADDER, 5, "levels", id="deep through aliases"),
        pytest.param("a: &a [*a]", 5, "aliases", id="an alias to itself"),
        pytest.param("a: " + "[" * 100_000, 5, "levels", id="100 000 open lists"),
        pytest.param("a: " + "{b: " * 50_000, 5, "levels", id="50 000 open mappings"),
        pytest.param("a: [" + "1," * 60_000 + "]", 5, "nodes", id="60 000 values"),
        pytest.param("#" * 300_000, 5, "256000 bytes", id="300 kB"),
        pytest.param("training: {epochs: 1}\ntraining: {epochs: 2}", 5, "twice, again at line 2", id="key twice"),
        pytest.param("training:\n  epochs: 1\n  epochs: 2", 5, "twice, again at line 3", id="inner key twice"),
        pytest.param("x: !include /etc/passwd", 5, "a tag", id="include"),
        pytest.param(DATA.encode("utf-16"), 2, "not UTF-8", id="UTF-16"),
        pytest.param(b"data: \xff", 2, "byte 6", id="not text"),
        pytest.param("data:\n\troot: x", 2, "line 2, column 1", id="tab"),
        pytest.param("data: [", 2, "not valid YAML at line", id="open list at the end"),
        pytest.param("a: 1\n---\nb: 2", 2, "another document", id="two documents"),
        pytest.param("data: {<<: {root: x}}", 2, "line 1, column 8", id="merge key"),
        pytest.param("training: {seed: 2024-99-99}", 2, "2024-99-99", id="no date"),
        pytest.param("training: {seed: " + "9" * 5000 + "}", 2, "no meaning", id="5000 digits"),
        pytest.param("[1]: 2", 2, "not a plain word", id="a list as key"),
        pytest.param("- data", 2, "not a mapping", id="a list"),
        pytest.param("\0", 2, "not valid YAML", id="NUL"),
    ],
)
def test_documents_that_are_refused(load, text: str | bytes, code: int, says: str):
    error = fault_of(load, text)
    assert error.exit_code == code
    assert says in error.what


def test_a_byte_order_mark_is_fine(load):
    assert load(b"\xef\xbb\xbf" + DATA.encode()) == load(DATA)


def test_a_missing_recipe_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="No such file"):
        configuration.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("3E4", 3e4), ("1.5e-2", 0.015), ("2", 2.0)])
def test_numbers_with_exponents(load, text: str, value: float):
    assert load(DATA + f"optimizer: {{lr: {text}}}").optimizer.lr == value


def test_the_resolved_recipe_reads_back_the_same(load):
    text = (
        "data: {dataset: d.json, classes: {0: a, 3: b}, ignore: [255], spacing: [1.5, 1, 1], group: '(x\\d)'}\n"
        "model: {channels: [8, 16], strides: [1, [2, 2, 1]], kernels: [[1, 3, 3], 3]}\n"
        "optimizer: {name: adamw, lr: 1e-3}\ninference: {window: [8, 8, 8], mirror: [0, 2]}\n"
    )
    config = load(text)
    again = configuration.dump(config)
    assert load(again) == config
    assert "&" not in again


def test_the_schema_has_every_key_with_a_description():
    schema = Config.model_json_schema()
    for section in schema["$defs"].values():
        for name, field in section["properties"].items():
            assert field.get("description") or "const" in field, name
        assert section["additionalProperties"] is False
    assert set(schema["properties"]) == set(Config.model_fields)
    assert TypeAdapter(Config).validate_python(
        {
            "data": {"dataset": "d.json"},
            "model": {"dims": schema["$defs"]["ModelConfig"]["properties"]["dims"]["enum"][0]},
        }
    )


def test_the_names_are_those_of_the_registries():
    from densepred.models import build, layers

    made = {"encoder": build.ENCODERS, "decoder": build.DECODERS, "network": build.NETWORKS}
    for kind, makers in made.items():
        assert set(makers) == {*catalog.REGISTRIES[kind], *catalog.ADAPTERS[kind]}
    assert set(catalog.ACTIVATIONS) == set(layers.ACTIVATIONS)
    fields = set(ModelConfig.model_fields)
    assert all(entry.options <= fields for entries in catalog.REGISTRIES.values() for entry in entries.values())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_loads(path: Path):
    config = configuration.load(path)
    assert config.data.images or config.data.dataset


def test_reading_a_recipe_imports_no_torch(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(DATA)
    code = f"import sys; import densepred; c = densepred.load_config({str(path)!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    modules = done.stdout.split()
    assert "densepred.config" in modules
    assert not {"torch", "numpy", "monai", "matplotlib"} & set(modules)


def test_what_looks_like_a_number_stays_a_name(tmp_path: Path) -> None:
    classes = ("1e5", "-3E+2", "1.5", "yes", "null")
    targets = {"kind": {"column": "kind", "classes": classes}}
    config = configuration.check({"data": {"images": "*.png", "table": "t.csv", "targets": targets}}, {}, "test")
    (tmp_path / "recipe.yaml").write_text(configuration.dump(config))
    assert configuration.load(tmp_path / "recipe.yaml") == config


def test_faults_below_names_are_told_by_their_whole_key() -> None:
    data = {"images": "*.png", "table": "t.csv", "covariates": {"age": {"mean": 1.0}}}
    data["targets"] = {"kind": {"column": "kind", "meen": 3.0}}
    with pytest.raises(InputError) as caught:
        configuration.check({"data": data}, {}, "test")
    assert "data.covariates.age.deviation: field required" in caught.value.what
    assert "data.targets.kind.meen: unknown key (did you mean 'mean'?)" in caught.value.what
