"""`report A B`: decisions, settings, paired differences and alarms of two runs on one page outside both."""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import ttest_rel
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.evaluation.records import Accuracy, Measures
from persona_rlhf.evaluation.spending import Spending
from persona_rlhf.evaluation.statistics import Count
from persona_rlhf.release.results import PairCounts, Result, read_results, write_results
from persona_rlhf.release.run_comparison import (
    OneRun,
    UserOfRun,
    common_users,
    compare_runs,
    differing,
    paired,
    render_runs,
)
from tests.release.test_report import Page

HOSTILE = "<script>alert(1)</script>\u202e\ud800\x1b[31m"


def result(user: str, accuracy: float, heldout: str = "h", **changes: object) -> Result:
    spending = Spending(1, 0.6, 0.03, 0.03, 0.05, heldout=heldout)
    line = Result(
        user_id=user, slug=user, status="released", reason="passed", alpha=1.0, pairs=PairCounts(80, 60, 0),
        measures=Measures(Accuracy(0.5, accuracy, 60, accuracy - 0.1, accuracy + 0.1)),
        tier_one={"pooled": Count(640, 638, 640, 0.98, 0.97)}, spending=spending,
    )  # fmt: skip
    return replace(line, **changes)


def users_of(results: list[Result]) -> dict[str, UserOfRun]:
    return {one.user_id: UserOfRun.of(one) for one in results}


def test_the_interval_is_paired_and_needs_eight_users_in_both():
    levels = [0.5 + 0.04 * n for n in range(10)]
    lifts = [0.03 + 0.004 * (n % 3) for n in range(10)]
    before = users_of([result(f"u{n}", level) for n, level in enumerate(levels)])
    after = users_of(
        [result(f"u{n}", level + lift) for n, (level, lift) in enumerate(zip(levels, lifts, strict=True))]
        + [result("new", 0.1)]
    )
    [row] = [row for row in paired(before, after) if row.name == "held-out accuracy"]
    low, high = ttest_rel([a + b for a, b in zip(levels, lifts, strict=True)], levels).confidence_interval()
    assert row.users == 10
    assert row.interval == pytest.approx((low, high))
    assert row.interval.low > 0, "the pairing takes out the spread between users"
    assert (row.a, row.b) == pytest.approx((sum(levels) / 10, sum(levels) / 10 + sum(lifts) / 10))
    few = dict(list(before.items())[:7])
    assert [one.interval for one in paired(few, after)] == [None] * len(paired(few, after))


def test_a_held_back_user_counts_with_the_figures_of_the_run_and_an_unjudged_one_does_not():
    before = users_of([result("a", 0.8), result("b", 0.8)])
    after = users_of([result("a", 0.5, status="held_back", alpha=0.0), result("b", 0.9, tier_one=None)])
    [row] = [row for row in paired(before, after) if row.name == "held-out accuracy"]
    assert (row.users, row.change) == (1, pytest.approx(-0.3))


def test_another_verdict_stands_first_then_alarms_then_losses():
    before = users_of([result(name, 0.8) for name in "abcd"] + [result("gone", 0.8)])
    after = users_of(
        [
            result("a", 0.9),
            result("b", 0.6),
            result("c", 0.95, alarm=True),
            result("d", 0.99, status="held_back"),
        ]
    )
    assert [row.user_id for row in common_users(before, after)] == ["d", "c", "b", "a"]


def test_keys_that_differ_or_lack_on_one_side_are_listed():
    assert differing({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "x", "d": "4"}) == [
        ("b", "2", "x"),
        ("c", "3", "not set"),
        ("d", "not set", "4"),
    ]


@pytest.fixture
def two(run, tmp_path):
    """The run and a copy with another rate, one verdict and one held-out set."""
    other = tmp_path / "second"
    shutil.copytree(run.path, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config + "dpo:\n  learning_rate: 0.25\nrun:\n  dir: elsewhere\n")
    results = read_results(other)
    results[0] = replace(results[0], status="held_back", reason=f"no {HOSTILE}", alpha=0.0)
    write_results(other, [*results, result(HOSTILE, 0.5)])
    write_results(run.path, [*read_results(run.path), result(HOSTILE, 0.7, heldout="other")])
    return run.path, other


def hashes(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "lock")
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_page_has_both_decisions_and_what_differs_and_no_script(two):
    a, b = (OneRun.read(label, run) for label, run in zip("AB", two, strict=True))
    text = render_runs(a, b)
    page = Page(text)
    assert text.index("4 of 7 users released") < text.index("3 of 7 users released")
    assert "<script" not in text
    assert not re.search(r"(?:https?:)?//[a-z]", text)
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    assert '>dpo.learning_rate</td><td class="why">not set</td><td class="why">0.25<' in text
    assert "run.dir" not in text
    assert "1 user of 1 have other held-out pairs in B than in A." in text
    assert "The bases differ" not in text
    assert "The policies differ" not in text
    assert all(label for name, label in page.attributes if name == "aria-label")
    other = b._replace(identity={"base": "another"}, settings={"policy documents": "tier 1, a stricter one"})
    cautioned = render_runs(a, other)
    assert "The bases differ" in cautioned
    assert "The policies differ" in cautioned


def test_the_command_writes_one_page_and_changes_neither_run(two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    before = [hashes(run) for run in two]
    done = runner.invoke(app, ["report", *map(str, two)])
    assert done.exit_code == 0, done.output
    assert "Two runs side by side" in (tmp_path / "comparison.html").read_text()
    assert [hashes(run) for run in two] == before
    compare_runs(two[0], two[0], tmp_path / "same.html")
    assert "both configs and policies are the same" in (tmp_path / "same.html").read_text()


@pytest.mark.parametrize(
    "extra", [["--impact"], ["--out", "run/page.html"], ["--out", "second/../run/adapters/page.html"]]
)
def test_two_runs_have_no_impact_and_no_page_in_them(two, tmp_path, monkeypatch, extra):
    monkeypatch.chdir(tmp_path)
    before = [hashes(run) for run in two]
    done = CliRunner().invoke(app, ["report", *(run.name for run in two), *extra])
    assert done.exit_code == 2
    assert [hashes(run) for run in two] == before
    assert CliRunner().invoke(app, ["report", "run", "--out", "page.html"]).exit_code == 2


def test_a_folder_without_results_is_wrong_input(run, tmp_path):
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(
        app, ["report", str(run.path), str(tmp_path / "empty"), "--out", str(tmp_path / "p.html")]
    )
    assert done.exit_code == 2
    assert not (tmp_path / "p.html").exists()
