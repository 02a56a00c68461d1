"""The table of preference sets, and paths into rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.data.preference_sets import PreferenceSet, preference_sets, value_at
from persona_rlhf.policy.hazards import public_sets

ROW = {"a": {"b": [{"kind": "x", "c": 1}, {"kind": "y", "c": 2}]}, "a.b": "whole", "n": None, "t": "text"}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("t", "text"),
        ("a.b", "whole"),
        ("a.b.1.c", 2),
        ("a.b.[kind=y].c", 2),
        ("a.b.[kind=z].c", None),
        ("a.b.2.c", None),
        ("a.x.c", None),
        ("t.length", None),
        ("n.x", None),
    ],
)
def test_the_value_at_a_path(path: str, value: object) -> None:
    assert value_at(ROW, path) == value


def test_no_name_stands_for_two_sets() -> None:
    assert not preference_sets().keys() & {"chitchat", "cragc25", *public_sets()}


@pytest.mark.parametrize("columns", preference_sets().values(), ids=preference_sets())
def test_a_set_says_how_a_preference_is_stated(columns: PreferenceSet) -> None:
    stated = [columns.choice, columns.score, columns.ranking, columns.chosen]
    assert sum(path is not None for path in stated) == 1
    assert (columns.chosen is None) == (columns.rejected is None)
    assert columns.chosen or columns.text
    assert columns.roles_of_columns
    assert set(columns.labels.values()) <= {*columns.answers, None}


def test_all_unknown_roles_are_named_at_once() -> None:
    with pytest.raises(InputError) as error:
        preference_sets()["label-studio"].with_columns({"lft": "data.a", "rigth": "data.b"})
    assert [problem.sentence for problem in error.value.problems] == [
        "`label-studio` has no role `lft` (did you mean `left`?)",
        "`label-studio` has no role `rigth` (did you mean `right`?)",
    ]


@pytest.mark.parametrize("columns", preference_sets().values(), ids=preference_sets())
def test_the_page_lists_a_set_with_its_licence(columns: PreferenceSet) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "import.md").read_text(encoding="utf-8")
    [line] = [line for line in page.splitlines() if line.startswith(f"| `{columns.name}` |")]
    assert f"| {columns.licence} |" in line
    assert all(f"`{path}`" in line for path in columns.user if "." not in path)
