"""The table of hazards, against the published lists and our own."""

import pytest

from persona_rlhf.policy.hazards import CATEGORIES, hazards, of_llama_guard, public_sets, title
from persona_rlhf.policy.judges import root
from persona_rlhf.policy.rule_schema import RestrictionRule

AILUMINATE = {"vcr", "ncr", "src", "cse", "iwp", "ssh", "hte", "dfm", "prv", "ipv", "spc", "sxc"}
LLAMA_GUARD = {f"S{number}" for number in range(1, 15)}


def test_every_hazard_of_theirs_is_one_of_ours_and_no_other():
    assert {code for hazard in hazards().values() for code in hazard.ailuminate} == AILUMINATE
    assert {code for hazard in hazards().values() for code in hazard.llama_guard} == LLAMA_GUARD


def test_the_bundled_ones_are_those_with_banks():
    assert {name for name, hazard in hazards().items() if hazard.bundled} == set(CATEGORIES)


def test_every_category_can_stand_in_a_rule_and_is_no_look_alike_of_another():
    for name in hazards():
        assert RestrictionRule(id="r", kind="restriction", category=name).category == name
    assert len({root(name) for name in hazards()}) == len(hazards())


def test_the_table_of_public_sets_says_the_same_where_it_names_a_hazard_alone():
    for theirs, ours in public_sets()["ailuminate"].categories.items():
        if ours in CATEGORIES:
            assert theirs in hazards()[ours].ailuminate


@pytest.mark.parametrize(("code", "ours"), [("S4", ["child_sexual_abuse"]), ("S10", ["hate"]), ("S99", [])])
def test_a_classifiers_code_leads_back(code, ours):
    assert of_llama_guard(code) == ours


def test_a_title_is_for_people():
    assert title("hate") == "Hate"
    assert title("board_games") == "board games"
