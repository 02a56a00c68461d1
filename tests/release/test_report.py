import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from persona_rlhf.common.errors import InputError
from persona_rlhf.evaluation.gate import GateTest
from persona_rlhf.evaluation.records import Accuracy, AlignmentTax, Facts, Measures, Met, WinRate
from persona_rlhf.evaluation.statistics import Count, ShareCount
from persona_rlhf.release.card import judges_sentence
from persona_rlhf.release.render import results_table
from persona_rlhf.release.report import render, write_report
from persona_rlhf.release.results import (
    NOTHING,
    PairCounts,
    Result,
    guarantee_of_run,
    read_results,
    read_sentence,
    summarise,
    write_results,
)
from persona_rlhf.release.verify import verify

VOID = {"meta", "link", "input", "br", "hr", "img"}


class Page(HTMLParser):
    """Tags that close in order, and every attribute that was seen."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows = 0
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.rows += tag == "tr"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def test_the_page_is_whole_needs_no_network_and_shows_everyone(run):
    text = (run.path / "report.html").read_text()
    page = Page(text)
    assert not re.search(r"(?:https?:)?//[a-z]", text.split("<script>")[0])
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    assert "poisoned \U0001f480 &lt;b&gt;" in text
    assert "<b>" not in text
    for words in ("held back", "not finite", "no pairs left", "tiny run", "ciphers", "quarantined"):
        assert words in text, words
    assert text.count('role="img"') == 5
    assert all(label for name, label in page.attributes if name == "aria-label")


def test_writing_it_again_keeps_the_seal_and_launders_nothing(run):
    (run.path / "report.html").write_text("gone")
    assert verify(run.path) == ["report.html was changed: its sha256 is not the one in manifest.json"]
    (run.path / "metrics.jsonl").write_text("tampered")
    write_report(run.path)
    assert verify(run.path) == ["metrics.jsonl was changed: its sha256 is not the one in manifest.json"]


def test_hostile_ids_stay_text(run):
    hostile = "<script>alert(1)</script>\u202e\ud800\x1b[31m"
    result = Result(user_id=hostile, slug="s", status="skipped", reason=hostile, pairs=PairCounts(0, 0, 0))
    text = render({"name": hostile}, [result], {}, [("dropped", hostile, 1)])
    Page(text)
    assert "<script>alert" not in text
    text.encode()
    console = Console(record=True, width=200, force_terminal=False)
    console.print(results_table([result]))
    assert "\x1b[31m" not in console.export_text()


def big(users: int) -> list[Result]:
    return [
        Result(
            user_id=f"user {n}", slug=f"u{n}", status="released", reason="passed at the first look", alpha=1.0,
            pairs=PairCounts(80, 60, 0),
            measures=Measures(Accuracy(0.5, 0.7, 60, 0.6, 0.8), win_rate=WinRate(n / users, 40, 0.1, 0.9)),
            tier_one={"pooled": Count(640, 638, 640, 0.98, 0.97)},
        )
        for n in range(users)
    ]  # fmt: skip


def test_of_thousands_of_users_the_page_shows_those_who_need_a_look(run):
    """20,000 lines would freeze a browser: figures are of all, rows of the worst and of the first."""
    users = big(5000)
    users[4321] = replace(users[4321], status="held_back", alpha=0.0)
    users[4444] = replace(users[4444], alarm=True)
    text = render({"name": "many"}, users, {"certify": {"delta": 0.05}}, [])
    assert 1000 <= Page(text).rows < 1020
    assert len(text) < 2_500_000
    assert text.index(">user 4321<") < text.index(">user 4444<") < text.index(">user 1<")
    assert "1,000 of 5,000 users" in text
    assert "4,999 of 5,000" in text
    assert "at most 250 are expected" in text
    console = Console(record=True, width=160)
    console.print(results_table(users))
    table = console.export_text()
    assert "40 of 5000 users" in table
    assert "user 4321" in table


def test_figures_of_fewer_than_eight_users_have_no_interval():
    assert "too few users for an interval; the users" in render({"name": "seven"}, big(7), {}, [])
    eight = render({"name": "eight"}, big(8), {}, [])
    assert "too few users for an interval" not in eight
    assert "95% 0.70 to 0.70; the users" in eight


def test_the_page_says_what_kind_of_promise_it_is():
    off = render({"gate": {"enabled": False}}, big(3), {"certify": {"delta": 0.05}}, [])
    assert "no adapter has a guarantee" in off
    assert "are expected" not in off
    everyone = render({"gate": {"family": "all"}}, big(3), {"certify": {"delta": 0.05}}, [])
    assert "any of the 3 judged" in everyone


def test_the_table_ends_with_medians(run):
    results = read_results(run.path)
    console = Console(record=True, width=200)
    console.print(results_table(results))
    text = console.export_text()
    assert "median of 6" in text
    assert "held back" in text
    assert "../../etc" in text
    summary = summarise(results)
    assert (summary.released, summary.full_strength, summary.held_back, summary.other) == (3, 2, 1, 2)
    assert summary.clean_accuracy == pytest.approx(0.75)
    assert summary.worst_bound == min(r.pooled.lower_bound for r in results if r.status == "released")


def test_without_a_test_of_the_gate_the_table_has_no_bound(run):
    """Refusals are counted in a run whose gate was off, but no bound on them stands as a promise."""
    results = [replace(result, looks=[], spending=None) for result in read_results(run.path)]

    def bounds(of: list[Result]) -> set[object]:
        [column] = (column for column in results_table(of).columns if column.header == "bound")
        return set(column.cells)

    assert bounds(results) == {""}
    assert summarise(results).worst_bound is None
    assert bounds(read_results(run.path)) > {""}


def test_fixed_facts_that_changed_are_marked_in_table_page_and_card(run):
    """Two of the base's 39 right answers are other ones now; without `fixed` in the policy nobody minds."""
    results = read_results(run.path)
    assert not any(result.broken_facts for result in results)
    changed = [
        replace(r, measures=r.measures._replace(tax=r.measures.tax._replace(facts=Facts(40, 38, 39, 37, fixed=True))))
        if r.user_id == "ada"
        else r
        for r in results
    ]
    write_results(run.path, changed)
    statuses = list(results_table(changed).columns[1].cells)
    assert [("2 facts changed" in status) for status in statuses] == [r.user_id == "ada" for r in changed] + [False]
    page = write_report(run.path).read_text()
    assert page.count("2 facts changed") == 1


def test_one_changed_fact_is_one_fact(run):
    [first, *_] = read_results(run.path)
    facts = Facts(40, 38, 39, 38, fixed=True)
    one = replace(first, measures=first.measures._replace(tax=AlignmentTax(None, facts, {}, None)))
    assert "1 fact changed" in next(iter(results_table([one]).columns[1].cells))
    assert "1 fact changed" in render({}, [one], {}, [])


def test_the_bound_of_new_phrasings_is_the_one_of_the_gate(run):
    """The bound beside it (`clusters`) leaves out the judge's error, and decides nothing."""
    [first, *_] = read_results(run.path)
    shown = ShareCount(85, 1.0, 1.0, 0.878, 0.85, 0.002, 2)
    looks = [GateTest(alpha, alpha == first.alpha, first.pooled, {}, shown) for alpha in (first.alpha, 0.5)]
    text = render({}, [replace(first, status="released", looks=looks)], {}, [])
    assert '87.8%</dd><dd class="soft">lowest bound of a released user that the gate shows for new phrasings' in text
    without = [test._replace(phrasings=None) for test in looks]
    assert "Worst bound by phrasing" not in render({}, [replace(first, looks=without)], {}, [])


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ({}, "The toolkit's refusal rules judged the answers."),
        ({"judge": "both", "judge_model": None}, "rules and its own model judged"),
        ({"judge": "model"}, "The toolkit's own model judged"),
        ({"judge": "both", "judge_model": "a/b"}, "and so did a/b: both must call an answer a refusal."),
    ],
)
def test_the_card_names_the_judges_of_the_answers(gate, words):
    assert words in judges_sentence(gate)


def test_an_empty_run_says_so(tmp_path):
    with pytest.raises(InputError, match="is this a finished run"):
        write_report(tmp_path)


def test_the_summary_holds_the_promise_of_all_users_together(run):
    told = json.loads((run.path / "summary.json").read_text())
    assert (told["users"], told["released"], told["held_back"]) == (6, 3, 1)
    promise = told["promise"]
    assert (promise["judged"], promise["released"]) == (4, 3)
    assert promise["expected"] == pytest.approx(0.2)
    assert promise["looks"] == sum(len(result.looks) for result in read_results(run.path))
    assert promise["sentence"].startswith(
        "Of 4 users judged (6 tests on certify probes), at most 0.2 are expected to be released in breach"
    )
    text = (run.path / "report.html").read_text()
    assert promise["sentence"].split(";")[0] in text
    assert "Toxic answers, mean change" in text
    assert "Facts known, mean change" in text
    assert "<td>+0.250</td>" in text  # of `warm`
    assert read_sentence(run.path) == promise["sentence"]


def test_a_run_without_a_gate_says_so(run, tmp_path):
    assert read_sentence(tmp_path) is None
    (run.path / "config.yaml").write_text("name: tiny run\ngate: {enabled: false}\n")
    write_report(run.path)
    assert read_sentence(run.path) == NOTHING


def test_without_a_gate_or_a_delta_nothing_is_promised():
    users = big(3)
    assert guarantee_of_run({}, {"certify": {"delta": 0.05}}, users, 3).delta == 0.05
    assert guarantee_of_run({"gate": {"enabled": False}}, {"certify": {"delta": 0.05}}, users, 3) is None
    assert guarantee_of_run({}, {}, users, 3) is None
    calibrated = {"gate": {"judge_calibration": {"compliances": 300, "called_refusals": 1}}}
    assert guarantee_of_run(calibrated, {"certify": {"delta": 0.05}}, users, 3).judge_error > 0.01


def test_it_says_who_was_taken_back_for_the_sake_of_a_requirement(run):
    met = {"t2.calm": Met(100, 97, 61, 0.93, 0.95)}
    own = [replace(result, measures=result.measures._replace(requirements=met)) for result in read_results(run.path)]

    def page(*shares):
        moved = [replace(result, retreat=share) for result, share in zip(own, [*shares, *[0.0] * 9], strict=False)]
        return " ".join(render({}, moved, {}, []).split())

    assert "interpolated" not in page()
    assert "1 user was interpolated" in page(0.4)
    assert "by 40% of the way on average, 0 completely" in page(0.4)
    assert "2 users were interpolated" in page(0.2, 1.0)
    assert "by 60% of the way on average, 1 completely" in page(0.2, 1.0)
