"""Cross-validation folds."""

from __future__ import annotations

from pathlib import Path

import pytest

from densepred.cases.case import Case, collect
from densepred.cases.folds import folds, split
from densepred.config import DataConfig
from densepred.errors import InputError
from tests.case_files import save_json


def cases_named(*ids: str, group: str | None = None) -> list[Case]:
    return [Case(name, (Path(f"{name}.nii"),), None, group) for name in ids]


def test_folds_partition_the_cases_and_keep_groups_together() -> None:
    cases = cases_named(*(f"sub-{n // 3:02d}_{n % 3}" for n in range(30)))
    made = folds(cases, DataConfig(group=r"(sub-\d+)"))
    assert len(made) == 5
    assert sorted(name for _, val in made for name in val) == sorted(case.id for case in cases)
    for train, val in made:
        assert len(val) == 6
        assert set(train) | set(val) == {case.id for case in cases}
        assert not {name[:6] for name in train} & {name[:6] for name in val}
    assert folds(cases[::-1], DataConfig(group=r"(sub-\d+)")) == made
    assert folds(cases, DataConfig(group=r"(sub-\d+)", seed=1)) != made


def test_folds_balance_groups_of_different_size() -> None:
    cases = [Case(f"c{n}", (Path("x"),), None, "big" if n < 10 else str(n)) for n in range(50)]
    assert [len(val) for _, val in folds(cases, DataConfig())] == [10] * 5
    assert any(val == sorted(f"c{n}" for n in range(10)) for _, val in folds(cases, DataConfig()))


def test_folds_that_cannot_be_made() -> None:
    with pytest.raises(InputError, match="1 groups of cases cannot make 5 folds"):
        folds(cases_named("a", "b", "c", "d", "e", "f", group="same"), DataConfig())
    with pytest.raises(InputError, match="matches nothing in 1 ids: x"):
        folds(cases_named("s1", "s2", "x"), DataConfig(group=r"(s\d)", folds=2))


def test_split_takes_the_fold() -> None:
    cases = cases_named(*"abcdefghij")
    train, val = split(cases, DataConfig(fold=2))
    assert ([case.id for case in train], [case.id for case in val]) == folds(cases, DataConfig())[2]
    assert split(cases, DataConfig(fold="all")) == (cases, [])


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([{"train": ["a", "zz"], "val": ["b"]}], "fold 0 lists 1 ids that are not in the data: zz"),
        ([{"train": ["a", "b"], "val": ["b"]}], "fold 0 lists 1 ids more than once: b"),
        ([{"train": ["a"], "val": ["b"]}, {"train": ["c"], "val": []}], "fold 1 has 1 ids to train on and 0"),
        ([{"train": ["a"]}], "not in the form of folds"),
        ({}, "not in the form of folds"),
    ],
)
def test_given_folds_are_validated(tmp_path: Path, content: object, what: str) -> None:
    save_json(tmp_path, content, "splits.json")
    with pytest.raises(InputError, match=what):
        folds(cases_named("a", "b", "c"), DataConfig(root=str(tmp_path), splits="splits.json"))


def test_given_folds_must_not_tear_groups(tmp_path: Path) -> None:
    save_json(tmp_path, [{"train": ["s1_l", "s2_l"], "val": ["s1_r"]}], "splits.json")
    data = DataConfig(root=str(tmp_path), splits="splits.json", group="(s.)")
    with pytest.raises(InputError, match="fold 0 has 1 groups on both sides: s1"):
        folds(cases_named("s1_l", "s1_r", "s2_l"), data)
    with pytest.raises(InputError, match="fold 3 of 1"):
        split(cases_named("s1_l", "s1_r", "s2_l"), data.model_copy(update={"group": None, "fold": 3}))


def test_hippocampus_folds_keep_subjects_apart(real_data: Path) -> None:
    data = DataConfig(root=str(real_data / "hippocampus"), dataset="dataset.json", splits="splits.json")
    made = folds(collect(data), data)
    assert len(made) == 5
    assert sorted(name for _, val in made for name in val) == [case.id for case in collect(data)]
    for train, val in made:
        subjects = [{(int(name.split("_")[1]) + 1) // 2 for name in side} for side in (train, val)]
        assert not subjects[0] & subjects[1]
