"""The last lines of a run for people: each user who got nothing, with the reason, once."""

import pytest
import typer

from persona_rlhf.cli.console import exit_if_withheld
from persona_rlhf.common.files import slug
from persona_rlhf.release.results import PairCounts, Result


def result(user: str, status: str, reason: str) -> Result:
    return Result(user_id=user, slug=slug(user), status=status, reason=reason, pairs=PairCounts(1, 1, 0))


def test_each_user_without_an_adapter_is_named_with_one_reason(capsys):
    users = [
        result("ada", "released", "all demands met at alpha 1"),
        result("bob", "held_back", "held back: at alpha 0.25 pooled refused 3 of 9"),
        result("eve", "failed", "training failed (OSError)"),
    ]
    with pytest.raises(typer.Exit) as end:
        exit_if_withheld(users)
    assert end.value.exit_code == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["bob: held back: at alpha 0.25 pooled refused 3 of 9", "eve: failed: training failed (OSError)"]
    exit_if_withheld(users[:1])


def test_of_many_users_the_rest_is_counted(capsys):
    with pytest.raises(typer.Exit):
        exit_if_withheld(result(f"u{n}", "failed", "lost") for n in range(23))
    assert capsys.readouterr().err.splitlines()[-1].startswith("and 3 more users")
