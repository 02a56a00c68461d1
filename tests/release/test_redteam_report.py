import json

import pytest
from rich.console import Console

from persona_rlhf.evaluation.records import Outcome, Refused
from persona_rlhf.release.redteam_report import (
    REDTEAM,
    Attacked,
    MergedPair,
    RedTeamResult,
    content_of,
    figures_of,
    redteam_table,
    write_redteam,
)
from persona_rlhf.release.results import read_results
from persona_rlhf.release.verify import verify


def outcome(one: int, other: int, answers: Refused | None = None) -> Outcome:
    """Of 40 prompts, 20 of each of two categories; the base refuses 18 of each."""
    categories = {"one": Refused(20, one, 18), "other": Refused(20, other, 18)}
    return Outcome(40, one + other, 36, categories, answers)


def found_in(run) -> RedTeamResult:
    users = [
        Attacked(
            r.user_id,
            r.slug,
            r.alpha,
            r.manifest_sha256,
            {"plain": outcome(18 - n, 18), "sampled": outcome(9, 10, Refused(200, 150 - n, 160))},
        )
        for n, r in enumerate(r for r in read_results(run.path) if r.path is not None)
    ]
    merged = [MergedPair((users[0].user_id, users[1].user_id), outcome(20, 20))]
    return RedTeamResult(users, merged, {"system": "the base's chat template [does not] take it"})


def test_the_figures_of_an_attack():
    figures = figures_of({"a": outcome(18, 18), "b": outcome(14, 18), "c": outcome(18, 16)})
    assert (figures.users, figures.n, figures.refused, figures.base_refused) == (3, 120, 102, 108)
    assert figures.mean == 0.85
    assert figures.points == pytest.approx(-5.0)
    assert (figures.points_low, figures.points_high) == (None, None)  # three users are too few
    eight = figures_of({f"{n}": outcome(18 - n % 4, 18) for n in range(8)})
    assert eight.points == pytest.approx(-3.75)
    assert eight.points_low < eight.points < eight.points_high < 0
    assert 0.77 < figures.low < 0.85 < figures.high < 0.91
    assert figures.worst_user[:2] == ("b", 0.8)
    assert figures.worst_user.points == pytest.approx(-10.0)
    assert figures.worst_category.name == "one"
    assert figures.worst_category.points == pytest.approx(100 * -4 / 60)
    assert figures.answers is None
    drawn = figures_of({"a": outcome(1, 1, Refused(200, 150, 160)), "b": outcome(1, 1, Refused(200, 50, 160))})
    assert drawn.answers == (0.5, 0.8)
    with pytest.raises(ValueError, match="at least one user"):
        figures_of({})


def test_the_file_is_sealed_with_the_run_and_any_change_is_found(run):
    found = found_in(run)
    file = write_redteam(run.path, content_of(found, {"seed": 0}))
    assert file == run.path / REDTEAM
    assert verify(run.path) == []
    write_redteam(run.path, content_of(found, {"seed": 0}))
    assert verify(run.path) == []
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b'"seed": 0', b'"seed": 1'))
    assert any(f"{REDTEAM} was changed" in fault for fault in verify(run.path))
    file.unlink()
    assert any(f"{REDTEAM} is missing" in fault for fault in verify(run.path))


def forge(run, edit):
    """A forger who writes and seals as we do."""
    content = content_of(found_in(run), {"seed": 0})
    edit(content)
    write_redteam(run.path, content)
    return verify(run.path)


def test_figures_that_do_not_follow_and_other_adapters_are_found(run):
    assert forge(run, lambda content: None) == []
    assert "do not follow" in forge(run, lambda c: c["attacks"]["plain"].update(refused=120))[0]
    assert "do not follow" in forge(run, lambda c: c["attacks"].pop("merged"))[0]
    assert "about other adapters" in forge(run, lambda c: c["users"][0].update(manifest_sha256="0" * 64))[0]
    assert "lacks a required entry" in forge(run, lambda c: c.pop("users"))[0]
    assert "lacks a required entry" in forge(run, lambda c: c["users"][0]["attacks"]["plain"].pop("n"))[0]


def test_the_file_says_who_and_what_and_can_be_read_by_others(run):
    content = json.loads(write_redteam(run.path, content_of(found_in(run), {"seed": 3})).read_text())
    assert content["seed"] == 3
    assert list(content["attacks"]) == ["plain", "sampled", "merged"]
    assert {user["user_id"] for user in content["users"]} == {
        r.user_id for r in read_results(run.path) if r.status == "released"
    }
    assert content["users"][1]["attacks"]["plain"]["categories"]["one"] == {"n": 20, "refused": 17, "base_refused": 18}
    assert content["merged"][0]["outcome"]["refused"] == 40


def test_the_table_names_every_attack_the_worst_and_what_was_left_out(run):
    console = Console(width=200, record=True)
    console.print(redteam_table(found_in(run)))
    text = console.export_text()
    for words in ("plain", "sampled", "by single answer", "merged", "-5.0", "one", "[does not] take it"):
        assert words in text
