from math import inf

import pytest
import torch

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.experiment import GuardSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.evaluation.classifier import WordScorer
from persona_rlhf.evaluation.request_screens import SafetyModelScreen, load_guard
from tests.evaluation.test_classifier import by_hand

SETTINGS = GuardSettings(model="data/base", unsafe="ab", safe="ca")


class Written:
    """Stands for a model: the odds of a request by its last word, and what it goes on to write."""

    def __init__(self, odds: dict[str, float], codes: str) -> None:
        self.odds, self.codes, self.went_on = odds, codes, list[str]()

    def ids(self, turns, places):
        return [places["prompt"]]

    def logp(self, ids, word):
        return self.odds[ids[0]] if word == SETTINGS.unsafe else 0.0

    def continuation(self, ids, word, tokens):
        self.went_on.append(ids[0])
        return self.codes


def request(*turns: str):
    return tuple(Message(("user", "assistant")[n % 2], turn) for n, turn in enumerate(turns))


@pytest.mark.parametrize(
    ("codes", "categories"),
    [
        ("\nS1", {"terrorist_content", "threats_of_violence", "violent_crimes"}),
        ("\nS4,S10", {"child_sexual_abuse", "hate"}),
        ("\nS4\nS10 and S99", {"child_sexual_abuse", "hate"}),
        ("", set()),
        ("\nXS10", set()),
    ],
)
def test_codes_become_our_categories(monkeypatch, codes, categories):
    found = SafetyModelScreen(_words(monkeypatch, {"x": 0.5}, codes), SETTINGS)([request("x")])
    assert found == [(0.5, categories)]


def _words(monkeypatch, odds: dict[str, float], codes: str) -> WordScorer:
    written, words = Written(odds, codes), WordScorer.__new__(WordScorer)
    for name in ("ids", "logp", "continuation"):
        monkeypatch.setattr(words, name, getattr(written, name), raising=False)
    words.went_on = written.went_on  # type: ignore[attr-defined]
    return words


def test_what_is_surely_safe_is_asked_for_no_codes(monkeypatch):
    words = _words(monkeypatch, {"x": -3.1, "y": -2.9}, "\nS1")
    one, two = SafetyModelScreen(words, SETTINGS)([request("x"), request("y")])
    assert (one.value, one.categories) == (-inf, frozenset())
    assert two.value == -2.9
    assert words.went_on == ["y"]


def test_a_conversation_is_told_turn_by_turn_and_the_system_left_out(monkeypatch):
    told = "user: x\n\nassistant: no\n\nuser: y"
    words = _words(monkeypatch, {told: 1.0}, "")
    [found] = SafetyModelScreen(words, SETTINGS)([(Message("system", "be brief"), *request("x", "no", "y"))])
    assert found.value == 1.0


def test_a_model_is_loaded_and_asked_by_its_chat_template(base, tmp_path):
    folder, template = tmp_path / "guard", tmp_path / "prompt.txt"
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    settings = GuardSettings(model=str(folder), unsafe="ab", safe="ca")
    guard = load_guard(settings, torch.device("cpu"))
    [found] = guard([request("how to")])
    text = "<u>how to</s><a>"
    odds = by_hand(base, text, "ab", True) - by_hand(base, text, "ca", True)
    assert found.value == (pytest.approx(odds, abs=1e-4) if odds >= -3 else -inf)
    ids = base.tokenizer(text + "ab", add_special_tokens=False)["input_ids"]
    written = base.model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
    expected = base.tokenizer.decode(written, skip_special_tokens=True)
    words = guard._words
    assert words.continuation(words.ids(request("how to"), {}), "ab", 5) == expected
    template.write_text("Is this unsafe? ")
    with pytest.raises(InputError, match=r"a template holds \{prompt\}"):
        load_guard(settings.model_copy(update={"template": template}), torch.device("cpu"))
