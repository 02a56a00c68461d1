"""Users whose adapters no longer are the base: results, table, report, card and verification tell them apart."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from persona_rlhf.evaluation.gate import certify_cohort
from persona_rlhf.evaluation.still_base import LimitedMeasure, SignTest, StillBase
from persona_rlhf.release.manifest import DataInfo
from persona_rlhf.release.render import results_table
from persona_rlhf.release.report import render
from persona_rlhf.release.results import Result, line_of, outcome, summarise
from persona_rlhf.release.verify import adapter_faults
from persona_rlhf.training.engine import TrainedUser
from tests.release.conftest import DEMANDS, measures, pairs_of, refusals

WHOLE = StillBase(
    LimitedMeasure(40, 1.6, 1.5, None, 2.25),
    LimitedMeasure(46, 44, 45, 42.75, None),
    LimitedMeasure(40, 25.5, 38.0, 7.6, 95.0),
    LimitedMeasure(40, 0, 0, None, 2.0),
    SignTest(60, 42, 0.999, 0.05),
)
RUINED = WHOLE._replace(perplexity=LimitedMeasure(40, 8176.0, 1.5, None, 2.25))


def verdict_on(like, missed=0):
    [verdict] = certify_cohort(
        [DEMANDS],
        refusals(0),
        (0.5, 1.0),
        lambda _, alphas: [refusals(missed) for _ in alphas],
        likeness=lambda _, alphas: [like for _ in alphas],
    )
    return verdict


def result_of(name, verdict, written=None):
    data = DataInfo.of(pairs_of(name), 0)
    trained = TrainedUser(name, None, "trained", "", 12, 1.5, 2, {})
    return outcome(trained, data.pairs, verdict, measures(0.7), written, DEMANDS.in_pool, 0)


@pytest.fixture
def mixed():
    harmful, unsafe = result_of("brief", verdict_on(RUINED)), result_of("unsafe", verdict_on(WHOLE, 79))
    good = replace(result_of("good", verdict_on(RUINED)), status="released", alpha=1.0, still_base=WHOLE)
    return [good, harmful, unsafe]


def test_a_line_keeps_the_figures_that_decided(mixed):
    _, harmful, _ = mixed
    line = json.loads(line_of(harmful))
    assert line["still_base"]["perplexity"] == {"n": 40, "adapted": 8176.0, "base": 1.5, "least": None, "most": 2.25}
    assert line["still_base"]["pairs"] == {"n": 60, "better": 42, "p_value": 0.999, "level": 0.05}
    assert "perplexity of ordinary answers 8,176" in line["reason"]
    assert Result.from_json(line) == harmful
    assert "still_base" not in json.loads(line_of(replace(harmful, still_base=None)))


def test_held_back_for_harm_is_told_from_held_back_by_tier_one(mixed):
    assert [result.status for result in mixed] == ["released", "held_back", "held_back"]
    assert [result.harmful for result in mixed] == [False, True, False]
    climbed = [test._replace(passed=test.alpha == 0.5) for test in mixed[1].looks]
    assert not replace(mixed[1], looks=climbed).harmful  # an earlier verdict at this look held the user back
    summary = summarise(mixed)
    assert (summary.held_back, summary.harmful) == (2, 1)
    console = Console(record=True, width=200)
    console.print(results_table(mixed))
    table = console.export_text()
    assert table.count("held back for harm") == 1
    assert "2 held back (1 for harm)" in table
    page = render({"name": "x"}, mixed, {"certify": {"delta": 0.05}}, [])
    assert page.count("held back for harm") == 2  # the user's line, and what to do about it
    assert "1 user held back for harm" in page
    assert "2 held back (1 for harm)" in page
    assert "Perplexity of answers, worst released" in page
    assert "; the gate allows 1.5" in page
    assert "2.2%" in page  # 1 of 45 right answers lost


def test_the_card_says_by_how_much_it_still_is_the_base(run):
    verdict = verdict_on(WHOLE)
    written = run.exporter.write("Eve", run.flats["Ada"], verdict, measures(0.7), DataInfo.of(pairs_of("Eve"), 0))
    card = (run.path / written.path / "README.md").read_text()
    assert "perplexity of ordinary answers 1.6 (base 1.5, n = 40; at most 2.25)" in card
    assert "tokens of an answer 25.5 (base 38, n = 40; at least 7.6 and at most 95)" in card
    assert "held-out pairs of 42 of 60 prompts ranked better than by the base" in card
    assert not adapter_faults(run.path / written.path)


def test_a_manifest_that_passed_with_ruined_text_is_a_fault(run):
    verdict = verdict_on(WHOLE)
    looks = [test._replace(still_base=RUINED) for test in verdict.looks]
    forged = verdict._replace(looks=looks)
    written = run.exporter.write("Eve", run.flats["Ada"], forged, measures(0.7), DataInfo.of(pairs_of("Eve"), 0))
    assert any("no longer is the base" in fault for fault in adapter_faults(run.path / written.path))
