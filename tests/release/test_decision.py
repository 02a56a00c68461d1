import json
from dataclasses import replace

from persona_rlhf.evaluation.impact import impact_of
from persona_rlhf.evaluation.impact_evidence import RunEvidence, UserEvidence
from persona_rlhf.evaluation.prior_gain import PriorGain
from persona_rlhf.release.decision import decision_of, identity_of
from persona_rlhf.release.integrity import append
from persona_rlhf.release.report import render, write_report
from persona_rlhf.release.results import read_results, summarise


def decision(results, gated=True, impact=()):
    return decision_of(results, summarise(results), gated, impact)


def test_the_first_sentence_counts_verdicts_and_reasons_are_of_users_without_an_adapter(run):
    results = read_results(run.path)
    made = decision(results)
    assert made.sentence == "3 of 6 users released, 1 held back, 1 skipped, 1 failed."
    assert sum(users for *_, users in made.reasons) == 3
    assert {status for status, *_ in made.reasons} == {"held back", "skipped", "failed"}
    assert not any(reason.startswith("held back") for _, reason, _ in made.reasons)
    many = [replace(results[0], status="skipped", reason=f"reason {n}") for n in range(9)]
    assert (len(decision(many).reasons), decision(many).further) == (5, 4)


def test_users_who_keep_the_population_s_adapter_for_one_cause_count_together(run):
    [some, *_] = read_results(run.path)
    gains = [PriorGain("population", "held-out pairs", 60, n / 100, -0.1, 0.4, 0.1 + n / 100) for n in range(9)]
    causes = [f"the gain over it is {gain}, and level 0.05 asks for more" for gain in gains] + [
        "no pair tells a gain, and level 0.05 asks for more"
    ]
    verdict = "passed at the first look (of the population's adapter: {})"
    users = [replace(some, status="prior", reason=verdict.format(cause)) for cause in causes]
    made = decision(users)
    assert made.reasons == [
        ("prior", "the gain over it is ... (whole reasons in the table of users)", 9),
        ("prior", "no pair tells a gain ... (whole reasons in the table of users)", 1),
    ]
    assert made.further == 0


def test_each_alarm_has_an_action_and_a_clean_run_has_none(run):
    results = read_results(run.path)
    released = [replace(result, alarm=False) for result in results if result.status == "released"]
    assert decision(released).advice == []
    assert [one.alarm for one in decision(released, gated=False).advice] == ["The gate was off"]
    alarms = [one.alarm for one in decision([*released, replace(released[0], alarm=True)]).advice]
    assert alarms == ["1 user with pairs against the policy"]
    alarms = {one.alarm for one in decision(results).advice}
    assert {"1 user failed", "1 user held back by the gate"} <= alarms
    human = UserEvidence(pairs=[("As a human I agree.", "Yes.")] * 20)
    impact = impact_of(RunEvidence([human], []))
    advice = decision(released, impact=impact).advice
    assert "Impact: users whose choices reward claims to be human" in [one.alarm for one in advice]
    assert all(one.action for one in advice)


def test_the_run_is_identified_by_base_computation_time_and_seed(run):
    append(run.path, "begun")
    append(run.path, "released", user="x")
    rows = dict(identity_of(run.path, {"seed": 7}))
    assert rows["base"] == f"tiny-base, weights sha256 {'c' * 16}"
    assert rows["seed"] == "7"
    assert "minutes up to the last verdict" in rows["trained"]
    assert "someone" not in json.dumps(rows), "a folder on the machine of the run"


def test_the_decision_stands_before_figures_and_pictures(run):
    page = write_report(run.path).read_text()
    places = [
        page.index(words) for words in ("3 of 6 users released", "What to do", "tiny-base", "<h2>Figures", "<svg")
    ]
    assert places == sorted(places)
    off = render({"gate": {"enabled": False}}, read_results(run.path), {"certify": {"delta": 0.05}}, [])
    assert off.index("no adapter has a guarantee") < off.index("<h2>Figures")
