"""Users' pairs on their way to rows: one bad pair costs one pair, with its reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.evaluation import GateSettings
from persona_rlhf.config.experiment import ScreeningSettings
from persona_rlhf.data.pairs import PreferencePair, parse_row
from persona_rlhf.data.screening import RequestScreen
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.answer_judge import GateJudges, judges_of
from persona_rlhf.pipeline.prepare import Prepared, check_prompts, prepare_users
from persona_rlhf.policy.judges import is_refusal
from tests.data.test_screening import POLICY, _Classifier
from tests.data.tokenizers_by_hand import GEMMA, tokenizer_of

TOKENIZER = tokenizer_of(GEMMA, "<|eos|>")
CONTEXT = 64
SYSTEM = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the question"}]
BAD: dict[str, Any] = {
    "control token": {"prompt": "what does <|eot|> do?"},
    "over-long": {"prompt": "word " * 80},
    "template": {"prompt": SYSTEM},
}


def pairs(*changes: dict[str, Any], user: str = "ana") -> list[PreferencePair]:
    made = []
    for line, change in enumerate(changes, 1):
        row = {"user_id": user, "prompt": f"question {line}", "chosen": "yes", "rejected": "no", "split": "train"}
        parsed = parse_row(row | change, "p.jsonl", line)
        assert isinstance(parsed, PreferencePair)
        made.append(parsed)
    return made


def ready(stored: list[PreferencePair]) -> Any:
    """The parts of `Prepared` that preparing users reads, with a screen that tokenizes as the base's does."""

    def refuses(prompts: Any) -> list[bool]:
        return [not prompt_ids(prompt, TOKENIZER) for prompt in prompts]

    parts = {
        "adapted": SimpleNamespace(base=SimpleNamespace(tokenizer=TOKENIZER, context=CONTEXT)),
        "judges": GateJudges(is_refusal),
        "screens": [SimpleNamespace(screen=RequestScreen(_Classifier(refuses), 1.0))],
        "policy": POLICY,
        "config": SimpleNamespace(screening=ScreeningSettings(), dpo=SimpleNamespace(early_stop=None)),
        "reviews": {},
        "pairs": SimpleNamespace(users=1, of=lambda _: stored),
    }
    return Prepared._make(parts.get(name) for name in Prepared._fields)


@pytest.mark.parametrize("kind", BAD)
def test_a_pair_that_the_base_cannot_read_costs_that_pair(kind: str) -> None:
    every = [*pairs({}, BAD[kind], {}), *pairs({}, user="bob")]
    check_prompts(ready(every))
    chunk = prepare_users(ready(every), every)
    assert not chunk.failed
    assert [(user.user_id, [row.pair.line for row in user.train]) for user in chunk.rows] == [
        ("ana", [1, 3]),
        ("bob", [1]),
    ]
    [dropped] = chunk.dropped
    assert (dropped.pair.line, dropped.kind, dropped.action) == (2, kind, "dropped")


def test_a_user_of_such_pairs_alone_is_skipped_and_a_file_of_them_is_an_error() -> None:
    bad = pairs(*BAD.values())
    chunk = prepare_users(ready([]), [*bad, *pairs({}, user="bob")])
    assert [(user.user_id, len(user.train)) for user in chunk.rows] == [("ana", 0), ("bob", 1)]
    assert not chunk.failed
    with pytest.raises(InputError) as error:
        check_prompts(ready(bad))
    assert [problem.line for problem in error.value.problems] == [1, 2, 3]


@pytest.mark.parametrize(
    ("answer", "complies"),
    [
        ("I can't thank you enough for asking! The trick is a pin.", True),
        ("I cannot help with that, said nobody ever. It works with a pin.", True),
        ("Sorry, no long story: a pin goes in the lock, then it turns.", True),
        ("I'm sorry, but I can't help with that.", False),
        ("Je ne peux pas vous aider.", False),
    ],
)
def test_the_judges_of_the_gate_decide_whether_a_chosen_answer_refuses(answer: str, complies: bool) -> None:
    assert is_refusal(answer), "the rules alone skip the pair"
    screen = SimpleNamespace(screen=RequestScreen(_Classifier(lambda prompts: [True] * len(prompts)), 1.0))
    judges = judges_of(GateSettings(), torch.device("cpu"))
    chunk = prepare_users(ready([])._replace(screens=[screen], judges=judges), pairs({"chosen": answer}))
    assert [dropped.kind for dropped in chunk.dropped] == (["refused"] if complies else [])


def test_a_refusal_that_only_the_model_recognises_is_not_quarantined() -> None:
    [pair] = pairs({"chosen": "an odd refusal"})
    screen = SimpleNamespace(screen=RequestScreen(_Classifier(lambda prompts: [True] * len(prompts)), 1.0))
    certain = GateJudges(lambda text: text == pair.chosen)
    assert not prepare_users(ready([])._replace(screens=[screen], judges=certain), [pair]).dropped
    assert prepare_users(ready([])._replace(screens=[screen]), [pair]).dropped


def test_masked_pairs_are_trained_on_and_listed_without_their_text() -> None:
    given = pairs({"prompt": "who is ana@mail.org?"}, {})
    parts = ready(given)
    treated = {}
    for treatment in ("keep", "mask", "drop"):
        parts.config.screening = ScreeningSettings(personal_data=treatment)
        chunk = prepare_users(parts, given)
        [user] = chunk.rows
        prompts = [row.pair.prompt[0].content for row in user.train]
        treated[treatment] = (prompts, [(one.action, one.reason) for one in chunk.dropped])
        assert chunk.pairs == 2
    assert treated["keep"] == (["who is ana@mail.org?", "question 2"], [])
    assert treated["mask"] == (["who is [email]?", "question 2"], [("masked", "personal data: email in `prompt`")])
    assert treated["drop"] == (["question 2"], [("dropped", "personal data: email in `prompt`")])
