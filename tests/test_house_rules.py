"""The rules of docs/architecture.md that can be read off the source."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "densepred"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [path for folder in ("data", "scripts", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
TREES = {path: ast.parse(path.read_text()) for path in [*MODULES, *SCRIPTS]}

FORBIDDEN_IMPORTS = {
    "volumes": ("torch", "densepred.models", "densepred.cases", "densepred.training", "densepred.inference"),
    "models": ("densepred.volumes", "densepred.files", "densepred.cases", "densepred.training", "densepred.inference"),
    "cases": ("densepred.models", "densepred.training", "densepred.inference", "densepred.evaluation"),
    "augment": ("densepred.training", "densepred.inference", "densepred.evaluation", "densepred.volumes"),
    "inference": ("densepred.training", "densepred.evaluation"),
    "evaluation": ("densepred.training", "densepred.inference"),
    **dict.fromkeys(("config", "errors.py", "files.py", "yamlfile.py", "cli"), ("torch",)),
}
NEVER = ("pickle", "dill", "joblib", "monai.bundle", "monai.auto3dseg", "segmentation_models_pytorch.utils")


def imports(tree: ast.Module, top_level: bool = False) -> Iterator[str]:
    """The modules that a file imports, each also with the names taken from it."""
    for node in _unconditional(tree.body) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _unconditional(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Statements that run on import: those in functions and under TYPE_CHECKING do not."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from ast.walk(node)


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def for_each(paths: Iterable[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """A test of each of these files, which names all that break the rule."""

    def decorated(rule: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            broken = []
            for path in paths:
                try:
                    rule(path)
                except AssertionError as error:
                    broken.append(f"{path.relative_to(ROOT)}: {error}")
            assert not broken, "\n".join(broken)

        test.__doc__ = rule.__doc__
        return test

    return decorated


@for_each(TREES)
def test_files_and_functions_are_short(path: Path):
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


def test_the_median_file_is_short():
    lengths = sorted(len(path.read_text().splitlines()) for path in MODULES)
    assert lengths[len(lengths) // 2] <= 150


@for_each(MODULES)
def test_functions_take_at_most_ten_arguments(path: Path):
    for node in ast.walk(TREES[path]):
        if not isinstance(node, ast.FunctionDef):
            continue
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        assert len([a for a in given if a.arg not in ("self", "cls")]) <= MOST.get((path.name, node.name), 10), (
            node.name
        )
        assert not (node.name == "__init__" and node.args.kwarg), "no **kwargs in constructors"


MOST = {("build.py", "create_model"): 14, ("prediction.py", "predict"): 12}
"""`create_model` has one argument for each key of the section `model`, besides channels, classes and seed; a command
has one for each of its options."""


@for_each([path for path in MODULES if path != PACKAGE / "cli" / "base.py"])
def test_the_library_does_not_print(path: Path):
    assert "print" not in [name for name, _ in calls(TREES[path])]


@for_each(MODULES)
def test_nothing_from_a_file_can_run(path: Path):
    for name, call in calls(TREES[path]):
        assert name not in ("eval", "exec", "yaml.unsafe_load", "os.system"), ast.unparse(call)
        if name == "torch.load":
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert safe.get("weights_only") == "True", ast.unparse(call)
        assert not any(keyword.arg == "shell" for keyword in call.keywords), ast.unparse(call)
        if name in ("np.load", "numpy.load", "numpy.lib.format.read_array", "np.lib.format.read_array"):
            allowed = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert allowed.get("allow_pickle", "False") == "False", ast.unparse(call)
    for module in imports(TREES[path]):
        assert not within(module, NEVER), module


@for_each(MODULES)
def test_only_one_module_knows_layers_by_dimension(path: Path):
    if path == PACKAGE / "models" / "layers.py":
        return
    by_dimension = [
        f"{kind}{dims}d" for kind in ("Conv", "ConvTranspose", "conv", "conv_transpose") for dims in (1, 2, 3)
    ]
    named = {node.attr for node in ast.walk(TREES[path]) if isinstance(node, ast.Attribute)}
    named |= {node.id for node in ast.walk(TREES[path]) if isinstance(node, ast.Name)}
    assert not named & set(by_dimension)


@for_each(MODULES)
def test_imports_point_one_way(path: Path):
    forbidden = FORBIDDEN_IMPORTS.get(path.relative_to(PACKAGE).parts[0], ())
    if path.parent.name == "weights":  # reading files of weights; it knows nothing of images
        forbidden = tuple(module for module in forbidden if module != "densepred.files")
    found = imports(TREES[path], top_level=path.parent.name == "cli")  # the command line imports in its functions
    assert not [module for module in found if within(module, forbidden)]


@for_each([path for path in MODULES if path != PACKAGE / "files.py"])
def test_files_are_put_in_their_places_by_one_module(path: Path):
    """Renaming is `files.py`'s alone, and what is opened for writing is a path it gave: one with `part` in its name."""
    for name, call in calls(TREES[path]):
        assert name not in ("os.rename", "shutil.move", "os.replace") or path.name in RENAMES, ast.unparse(call)
        if name.rpartition(".")[2] in ("write_bytes", "write_text"):
            assert "part" in name, ast.unparse(call)
        if name == "open" or name.endswith(".open"):
            modes = [
                node.value for node in [*call.args, *(k.value for k in call.keywords)] if isinstance(node, ast.Constant)
            ]
            writes = any(
                isinstance(mode, str) and set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in modes
            )
            assert not writes or "part" in ast.unparse(call), ast.unparse(call)


RENAMES = {"downloads.py", "checkpoint.py", "cache.py"}
"""These rename whole folders that they have finished."""


def test_the_rules_see_a_breach():
    """The helpers above find what they look for."""
    tree = ast.parse("import torch\ndef f():\n    from densepred.models import build\n    x.open('a', 'wb')\n")
    assert list(imports(tree)) == ["torch", "densepred.models", "densepred.models.build"]
    assert list(imports(tree, top_level=True)) == ["torch"]
    assert [name for name, _ in calls(tree)] == ["x.open"]
    assert within("torch.nn", ("torch",))
    assert not within("torchvision", ("torch",))


def test_every_broken_rule_is_named():
    @for_each([ROOT / "one.py", ROOT / "two.py", ROOT / "three.py"])
    def rule(path: Path) -> None:
        assert path.stem == "two", "another"

    with pytest.raises(AssertionError, match=r"one\.py: another") as caught:
        rule()
    assert "three.py: another" in str(caught.value)
    assert "two.py" not in str(caught.value)
