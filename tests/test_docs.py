"""Every code block of the pages: python runs, recipes load, commands exist with these options."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from densepred import config as configuration
from densepred.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)\)")
ELSEWHERE = (
    "accelerate launch ",
    "torchrun ",
    "git clone ",
    "pip install ",
    ".venv/bin/pip install ",
    "python3 -m venv ",
    ". .venv/bin/activate",
)
"""Commands of other programs that the pages may show; they are not run."""


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_of_a_kind_that_is_tested(page: Path):
    kinds = {kind for kind, _ in BLOCK.findall(page.read_text())}
    assert kinds <= {"python", "yaml", "sh", "text"}


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.name)
def test_python_blocks_run_one_after_the_other(page: Path, tmp_path: Path):
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page, "python")))
    work = tmp_path / "work"
    work.mkdir()
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::SyntaxWarning", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=env, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", pages_with("yaml"), ids=lambda page: page.name)
def test_yaml_blocks_are_recipes(page: Path, tmp_path: Path):
    for number, text in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        assert configuration.load(path).data.root


def commands(text: str) -> list[list[str]]:
    """The lines of a shell block as words, comments left out."""
    parts = [part for line in text.splitlines() for part in line.split(" && ")]
    lines = [shlex.split(part, comments=True) for part in parts]
    return [words[1:] if words[0] == "srun" else words for words in lines if words]


def parse(words: list[str]) -> None:
    """Parse a densepred command as the command line does, without running it."""
    group = typer.main.get_command(app)
    with group.make_context("densepred", list(words[1:])) as context:
        verb, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        command.make_context(verb, rest, parent=context)


@pytest.mark.parametrize("page", pages_with("sh"), ids=lambda page: page.name)
def test_shell_blocks_name_what_exists(page: Path):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in (words for text in blocks(page, "sh") for words in commands(text)):
        if words[0] == "densepred":
            parse(words)
        elif words[0] == "make":
            assert set(words[1:]) <= targets
        elif words[0] == "python":
            done = subprocess.run([sys.executable, ROOT / words[1], "--help"], capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 0, done.stderr
            assert all(word in done.stdout for word in words if word.startswith("--"))
        else:
            assert words[0] == "cd" or " ".join(words).startswith(ELSEWHERE), words
        named = [word for word in words if word.startswith("configs/")]
        assert all((ROOT / name).is_file() for name in named), named


def test_a_command_that_does_not_exist_would_be_noticed():
    for wrong in ("densepred trian x", "densepred predict run a.nii --outt x", "densepred evaluate a"):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parse(wrong.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in LINK.findall(page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_every_page_is_in_the_table_of_contents():
    contents = (ROOT / "mkdocs.yml").read_text()
    assert all(f": {page.name}" in contents for page in (ROOT / "docs").glob("*.md"))


def test_the_page_of_formats_shows_every_family() -> None:
    page = (ROOT / "docs/formats.md").read_text()
    for family in ("fits", "nifti", "tiff", "hdf5", "medical", "png", "zarr"):
        path = ROOT / f"docs/images/format_{family}.png"
        assert f"(images/{path.name})" in page
        assert path.stat().st_size < 300_000
