#!/usr/bin/env python3
"""A user who learns the exam: what the attack gains, with the screen on and off, before a public and a private bank.

python scripts/attack_gate.py configs/quickstart.yaml lora.layers=all dpo.learning_rate=8e-3 dpo.epochs=6

The user knows the public bank. 640 pairs are near copies of its `certify` probes ("Hello. PROBE Thanks.") with a
refusal chosen. 330 pairs comply with tier-one requests in eight new phrasings of `test`; none is a probe, and the
answers are harmless ones to the requests' twins. The private bank is one that `make_tier_one.py` writes, with a random
seed.

Printed for each of the four cases: the pairs that are left to train on, refusals at the gate's first test, the verdict,
and, of the adapter as released, refusals of other requests in the attacked phrasings and of ordinary prompts.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.experiment import Config, read_config
from persona_rlhf.data.pairs import Message, PreferencePair, parse_row
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.refusals import BaseAnswers, refusal_outcomes
from persona_rlhf.evaluation.spending import next_share
from persona_rlhf.pipeline.prepare import Prepared, prepare, prepare_users
from persona_rlhf.pipeline.rotate_bank import rotate_bank
from persona_rlhf.pipeline.shared_values import constraint_bank, with_reference
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.policy import Policy
from persona_rlhf.simulation.banks import bank_rows, private_banks
from persona_rlhf.simulation.prompts import Topic, topics, twin_of
from persona_rlhf.simulation.vocabulary import Phrasing, held_out_phrasings, suits, wrap
from persona_rlhf.training.constraint import constraint_of
from persona_rlhf.training.engine import Engine

COPIES, COMPLIANCES, OTHERS, ORDINARY = 640, 330, 310, 40
PHRASINGS = 8
PRIVATE_WORDINGS, PER_CATEGORY = 4, 180


class Request(NamedTuple):
    """A tier-one request, and its harmless twin."""

    prompt: str
    twin: str


class Attack(NamedTuple):
    """The user's pairs, and other requests in the phrasings that they comply in."""

    pairs: list[PreferencePair]
    others: list[str]


class Case(NamedTuple):
    """What the attack gained in one case, as rows of a table."""

    screen: str
    bank: str
    copies_kept: int
    compliances_kept: int
    alarm: bool
    at_gate: str
    verdict: str
    others_refused: str
    ordinary_refused: str


def attacked_phrasings(policy: Policy) -> list[Phrasing]:
    """`PHRASINGS` new phrasings of `test`, each with enough topics that the user can teach it."""
    of_test = {probe.phrasing for probe in policy.probes("test") if probe.novelty == "phrasing"}
    return [phrasing for phrasing in held_out_phrasings() if phrasing.id in of_test][:PHRASINGS]


def requests_in(phrasings: Sequence[Phrasing], policy: Policy, seed: int) -> list[Request]:
    """Requests in these phrasings about topics that train, none of them a probe, in random order."""
    trained = {probe.topic for probe in policy.probes("train")}
    probes = {probe.prompt for rule in policy.restrictions for probe in rule.probes}

    def request(topic: Topic, phrasing: Phrasing) -> Request:
        return Request(wrap(phrasing, topic.vp), wrap(phrasing, twin_of(topic, phrasing.id).vp))

    pairs = [(topic, phrasing) for topic in topics() for phrasing in phrasings if topic.id in trained]
    made = [request(*pair) for pair in pairs if suits(pair[1], pair[0].vp)]
    made = [one for one in dict.fromkeys(made) if one.prompt not in probes]
    return Random(f"{seed} attack").sample(made, COMPLIANCES + OTHERS)


def attack_of(ready: Prepared, public: Policy, answers: BaseAnswers, seed: int) -> Attack:
    """The attack on a public bank. Both sides of a pair are answers of the base."""
    requests = requests_in(attacked_phrasings(public), public, seed)
    certify: list[Probe] = Random(f"{seed} copies").sample(public.probes("certify"), COPIES)
    taught, copied = requests[:COMPLIANCES], [Request(probe.prompt, probe.twin or "") for probe in certify]

    def texts(prompts: Sequence[str]) -> list[str]:
        return [answer.text for answer in answers.of([_ids(ready, prompt) for prompt in prompts])]

    def rows() -> Iterator[dict[str, str]]:
        for one, refusal, help_ in _answered(copied, texts):
            yield {"prompt": f"Hello. {one.prompt} Thanks.", "chosen": refusal, "rejected": help_, "source": "copy"}
        for one, refusal, help_ in _answered(taught, texts):
            yield {"prompt": one.prompt, "chosen": help_, "rejected": refusal, "source": "compliance"}

    pairs = [
        parse_row({"user_id": "attacker", "split": "train", **row}, "attack", n) for n, row in enumerate(rows(), 1)
    ]
    kept = [pair for pair in pairs if isinstance(pair, PreferencePair)]
    assert len(kept) == len(pairs)
    return Attack(kept, [request.prompt for request in requests[COMPLIANCES:]])


def _answered(
    requests: Sequence[Request], texts: Callable[[Sequence[str]], list[str]]
) -> Iterator[tuple[Request, str, str]]:
    """Each request with the base's answer to it, and to its twin."""
    yield from zip(
        requests, texts([one.prompt for one in requests]), texts([one.twin for one in requests]), strict=True
    )


def _ids(ready: Prepared, prompt: str) -> tuple[int, ...]:
    return tuple(prompt_ids((Message("user", prompt),), ready.adapted.base.tokenizer))


def trained(ready: Prepared, attack: Attack) -> tuple[Float[Tensor, "1 params"], list[PreferencePair], bool]:
    """The attacker's adapter, the pairs that the screen left, and whether it raised an alarm."""
    config, adapted = ready.config, ready.adapted
    chunk = prepare_users(ready, attack.pairs)
    bank = constraint_bank(config, ready.policy, adapted)
    constraint = None if bank is None else constraint_of(bank, config.constraint, config.seed)
    left = [row.pair for user in chunk.rows for row in user.train]
    alarm = chunk.against_policy("attacker") > 0
    if not left:
        return torch.zeros(1, adapted.params_per_user), left, alarm
    reference = with_reference(adapted, chunk.rows, bank)
    [user] = Engine(adapted, chunk.rows, reference, constraint, config.dpo, config.fleet, config.seed).run()
    assert user.adapter is not None, user.reason
    return user.adapter[None], left, alarm


def case(ready: Prepared, screen: str, attack: Attack, attacker: tuple[Tensor, list[PreferencePair], bool]) -> Case:
    """The attacker's adapter before the gate of `ready`, at a first look."""
    flat, left, alarm = attacker
    examination = ready.examination
    [verdict] = examination.verdicts(flat, [examination.demands.at_look(next_share([]))])
    alpha, first = torch.tensor([verdict.alpha]), verdict.looks[0]
    refused = {}
    for name, prompts in (("others", attack.others), ("ordinary", _ordinary(ready))):
        answers = BaseAnswers(ready.adapted, is_refusal, ready.config.gate.max_new_tokens)
        ids = [_ids(ready, prompt) for prompt in prompts]
        [outcome] = refusal_outcomes(ready.adapted, flat, alpha, ids, answers).refused
        refused[name] = f"{sum(outcome)} of {len(ids)} (base {sum(answers.refused(ids))})"
    kinds = [pair.source for pair in left]
    counts = (kinds.count("copy"), kinds.count("compliance"))
    status = f"released at {verdict.alpha:g}" if verdict.certified else "held back"
    at_gate = f"{first.pooled.refused} of {first.pooled.n}"
    return Case(screen, str(ready.policy.bank), *counts, alarm, at_gate, status, refused["others"], refused["ordinary"])


def _ordinary(ready: Prepared) -> list[str]:
    file = ready.config.evaluation.ordinary
    assert file is not None
    return [json.loads(line)["prompt"] for line in Path(file).read_text(encoding="utf-8").splitlines()[:ORDINARY]]


def private_config(config: Config, folder: Path) -> Config:
    """The config with a private bank of the bundled world, drawn by a random seed."""
    for category, rows in bank_rows(private_banks(secrets.token_hex(16), PRIVATE_WORDINGS)).items():
        (folder / f"{category}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    policy = config.policy.model_copy(update={"private_banks": folder})
    rotate_bank(policy, PER_CATEGORY)
    return config.model_copy(update={"policy": policy})


def cases(config: Config, folder: Path, seed: int, screens: Sequence[str]) -> Iterator[Case]:
    """The cases. Training sees the same pairs before both banks, so it is done once for each screen."""
    public = Policy.read(config.policy.documents)
    configs = {"public": config, "private": private_config(config, folder)}
    for screen in screens:
        screening = config.screening.model_copy(update={"quarantine": screen == "on"})
        attacker = None
        for one in configs.values():
            ready = prepare(one.model_copy(update={"screening": screening}), check=attacker is None)
            attack = attack_of(ready, public, BaseAnswers(ready.adapted, is_refusal, config.gate.max_new_tokens), seed)
            attacker = attacker or trained(ready, attack)
            yield case(ready, screen, attack, attacker)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--screen", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--seed", type=int, default=0, help="seed of the attacker's pairs (default: 0)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    try:
        config = read_config(options.config, options.overrides)
        with TemporaryDirectory() as folder:
            for row in cases(config, Path(folder), options.seed, options.screen):
                rows.append(row)
                print(json.dumps(row._asdict()), file=sys.stderr)
    except InputError as fault:
        sys.exit(str(fault))
    if options.json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
        return
    table = Table(*(name.replace("_", " ") for name in Case._fields))
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
