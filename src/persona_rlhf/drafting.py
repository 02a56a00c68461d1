"""Pairs for a user who has judged nothing yet: the base answers, and his stated tastes tell which answer he would like.

Tier three says in words what pairs say in examples. For each prompt the base is sampled several times; the answer that
is nearest to what the user wished for is chosen, the farthest rejected. Answers that break a requirement, and prompts
that the base refuses, are left out: tastes stay inside the tiers above them. The pairs are ordinary ones. He can be
trained on them, and they can be corrected before; each names the tastes it was drafted from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.config import Config
from persona_rlhf.evaluation.refusals import answer_text
from persona_rlhf.evaluation.retention import read_ordinary, some
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.policy.instructions import post_check
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.rules import Preference
from persona_rlhf.policy.tiers import Policy
from persona_rlhf.policy.wishes import READABLE, distance, readable_tastes
from persona_rlhf.preferences.importers import write_lines
from persona_rlhf.preferences.messages import Message
from persona_rlhf.preferences.tokens import prompt_ids
from persona_rlhf.training.base import load_base
from persona_rlhf.training.fleet import AdaptedModel

ANSWERS = 8  # of the base to a prompt
_PROMPTS = 16  # answered in one pass


class Drafted(NamedTuple):
    """What was drafted: pairs and the prompts tried for them, the tastes they came from, and those that only the user
    can judge by."""

    user_id: str
    pairs: int
    prompts: int
    tastes: list[str]
    unread: list[str]
    path: Path

    def to_json(self) -> dict[str, Any]:
        """As an object of plain JSON values."""
        return {**self._asdict(), "path": str(self.path)}

    def sentences(self) -> Iterator[str]:
        """What to tell people."""
        yield f"{self.pairs} pairs drafted from {', '.join(self.tastes)} on {self.prompts} prompts: {self.path}"
        if self.unread:
            yield f"  Only the user can judge by {', '.join(self.unread)}."


def draft(config: Config, user_id: str, out: Path, pairs: int) -> Drafted:
    """Writes up to `pairs` pairs of a user to `out` (JSON lines), on prompts of `evaluation.ordinary`.

    Raises InputError where no program can read his tastes, where there are no prompts, where no two answers of the base
    differ by them, and where `out` exists.
    """
    policy = Policy.read(config.policy.documents)
    tastes = readable_tastes(policy, user_id)
    texts = read_ordinary(Path(config.evaluation.ordinary)) if config.evaluation.ordinary else []
    _check(policy, user_id, tastes, texts, out)
    adapted = AdaptedModel(load_base(config.base), config.lora)
    unread = [taste.id for taste in policy.for_user(user_id).preferences if taste not in tastes]
    tried = some(texts, len(texts))[::-1]  # the first ones are asked of every user when he is measured
    rows = list(islice(_drafts(config, policy, adapted, user_id, tastes, tried), pairs))
    if not rows:
        sentence = f"no two answers of the base differ by the tastes of `{user_id}`; state others, or judge pairs"
        raise InputError([Problem(str(out), None, "--user", sentence)])
    write_lines(out, (json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows))
    return Drafted(user_id, len(rows), rows[-1][0] + 1, [taste.id for taste in tastes], unread, out)


def _check(policy: Policy, user_id: str, tastes: list[Preference], texts: list[str], out: Path) -> None:
    problems = []
    if not tastes:
        whose = "states no taste that a program can read and no requirement overrules"
        sentence = f"`{user_id}` {whose}; state one of {', '.join(READABLE)} in tier three, or judge pairs"
        problems.append(Problem(", ".join(document.path for document in policy.documents), None, "--user", sentence))
    if not texts:
        sentence = "there are no prompts to draft on; name a file of them"
        problems.append(Problem("config", None, "evaluation.ordinary", sentence))
    if out.exists() or out.suffix != ".jsonl":
        problems.append(Problem(str(out), None, None, "the output is one new file of JSON lines; name it *.jsonl"))
    if problems:
        raise InputError(problems)


def _drafts(
    config: Config, policy: Policy, adapted: AdaptedModel, user_id: str, tastes: list[Preference], texts: list[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Pairs as rows of a file, each with the number of its prompt among `texts`."""
    wishes = [taste.wish for taste in tastes if taste.wish is not None]
    source = "drafted: " + ", ".join(taste.id for taste in tastes)
    for start in range(0, len(texts), _PROMPTS):
        part = texts[start : start + _PROMPTS]
        asked = [prompt_ids((Message("user", text),), adapted.base.tokenizer) for text in part for _ in range(ANSWERS)]
        with adapted.using(None):
            [written] = adapted.generate([asked], config.gate.max_new_tokens, 1.0, config.seed)
        said = [answer_text(adapted, answer) for answer in written]
        for n, text in enumerate(part):
            answers = said[n * ANSWERS : (n + 1) * ANSWERS]
            if any(map(is_refusal, answers)):
                continue
            sound = [answer for answer in dict.fromkeys(answers) if answer and not post_check(policy, text, answer)]
            order = sorted(sound, key=lambda answer: distance(wishes, answer))
            if order and distance(wishes, order[0]) < distance(wishes, order[-1]):
                pair = {"prompt": text, "chosen": order[0], "rejected": order[-1]}
                yield start + n, {"user_id": user_id, **pair, "id": f"draft-{start + n:05}", "source": source}
