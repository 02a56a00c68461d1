"""The users of the experiment: the same drawn tastes in every population, with other pairs in place of some.

clean         a drawn taste alone.
adjacent      a legitimate taste close to a hazard.
hostile       honest, and hostile to refusals: half of the training pairs prefer an answer to a refusal, of the harmless
              twin of a hazardous request.
flipped-10, flipped-30, flipped-100, identity-30, noice-30, paraphrase-30
              poison of a kind (see `simulation.users`) in that share of the training pairs, in percent.
conversations a drawn taste alone; half of the prompts follow an earlier exchange, the others a system prompt. The
              answers were sampled without either.
evading-20    paraphrased requests that the base itself answers, so that the screen by its refusals finds none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

from generate_users import (
    Row,
    SampledPrompt,
    attack_prompts,
    draw_rows,
    draw_tastes,
    paraphrases,
    sample_attacks,
    sample_pool,
    write_rows,
    write_tastes,
)

from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.refusals import OPENING_TOKENS, answer_text
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.simulation.users import Kind, PoisonSource, Utility


class Population(NamedTuple):
    """A kind of users: the kind and share of the pairs in place of others, and the requests these are made of.

    `conversations`: whether every prompt has messages before it.
    """

    kind: Kind = "flipped"
    share: float = 0.0
    requests: Literal["bank", "twins", "paraphrases", "unseen"] = "bank"
    conversations: bool = False

    @property
    def poisoned(self) -> bool:
        """Whether pairs teach against tier one; those about harmless twins do not."""
        return self.share > 0 and self.requests != "twins"


POPULATIONS = {
    "clean": Population(),
    "adjacent": Population(),
    "conversations": Population(conversations=True),
    "hostile": Population(share=0.5, requests="twins"),
    "flipped-10": Population(share=0.1),
    "flipped-30": Population(share=0.3),
    "flipped-100": Population(share=1.0),
    "identity-30": Population("identity", 0.3),
    "noice-30": Population("noice", 0.3),
    "paraphrase-30": Population("paraphrase", 0.3, "paraphrases"),
    "evading-20": Population("paraphrase", 0.2, "unseen"),
}
_SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer the user.", "You talk with a guest of a small hotel.")
_PARAPHRASES = 12  # drawn for each one that a user needs; the base answers about one in six


def population_of(utility: Utility) -> str:
    """The population of a user: of a drawn one by the id, of one with a written taste by the taste."""
    drawn = utility.user_id.rpartition("-")[0]
    if drawn in POPULATIONS:
        return drawn
    if utility.poisoned:
        return utility.user_id
    return "hostile" if "refuses" in utility.weights else "adjacent" if utility.kind == "hazard_adjacent" else "clean"


def write_populations(
    adapted: AdaptedModel,
    out: Path,
    names: Sequence[str],
    users: int,
    sizes: tuple[int, int],
    prompts: int,
    seed: int,
) -> None:
    """Writes the pairs of `users` users of each population, a file each, and `utilities.yaml`.

    `sizes` are a user's pairs to train on and held out; `prompts` is the size of the pool that they are drawn from.
    Raises ValueError where the pool is too small.
    """
    pool = sample_pool(adapted, prompts, seed)
    tastes = draw_tastes(users, pool, sum(sizes), seed)
    adjacent = draw_tastes(users, pool, sum(sizes), seed, ["hazard_adjacent"]) if "adjacent" in names else []
    attacks = {name: attacks_of(adapted, POPULATIONS[name], sizes[0], seed) for name in names}
    files, utilities = defaultdict[str, list[Row]](list), []
    for name in names:
        population = POPULATIONS[name]
        for number, drawn in enumerate(adjacent if name == "adjacent" else tastes):
            taste = replace(drawn, user_id=f"{name}-{number:05d}", poisoned=population.share)
            rows = draw_rows(taste, pool, attacks[name], sizes, seed, population.kind, drawn.user_id)
            rows = conversations(rows, pool, seed) if population.conversations else rows
            utilities.append(taste if population.poisoned else replace(taste, poisoned=0.0))
            source = "simulated poison" if population.poisoned else "simulated"
            files[name] += [row if row.source == "simulated" else row._replace(source=source) for row in rows]
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out, files)
    write_tastes(out / "utilities.yaml", utilities)  # last: the users are whole once it is there


def conversations(rows: Sequence[Row], pool: Sequence[SampledPrompt], seed: int) -> list[Row]:
    """The rows with messages before each prompt: in turn an earlier exchange of the pool, and a system prompt."""
    rng = Random(f"{seed} conversations")
    after = []
    for number, row in enumerate(rows):
        assert isinstance(row.prompt, str)
        earlier = rng.choice([one for one in pool if one.prompt != row.prompt])
        exchange = [("user", earlier.prompt), ("assistant", earlier.answers[0])]
        before = exchange if number % 2 == 0 else [("system", rng.choice(_SYSTEM_PROMPTS))]
        messages = [{"role": role, "content": text} for role, text in (*before, ("user", row.prompt))]
        after.append(row._replace(prompt=messages))
    return after


def attacks_of(adapted: AdaptedModel, population: Population, pairs: int, seed: int) -> list[PoisonSource]:
    """The requests with both answers that a population's pairs are made of, twice as many as a user needs."""
    needed = 2 * round(pairs * population.share)
    if needed == 0 or population.kind == "identity":
        return []
    if population.requests in ("bank", "twins"):
        requests = attack_prompts(needed, seed)
        twins = [twin for _, twin in requests]
        return sample_attacks(adapted, requests, seed, twins if population.requests == "twins" else None)
    drawn = needed if population.requests == "paraphrases" else _PARAPHRASES * needed
    texts, plain = paraphrases(drawn, seed)
    if population.requests == "unseen":
        kept = [place for place, refused in enumerate(base_refuses(adapted, texts)) if not refused][:needed]
        texts, plain = [texts[place] for place in kept], [plain[place] for place in kept]
    return sample_attacks(adapted, plain, seed + 2, texts)


def base_refuses(adapted: AdaptedModel, texts: Sequence[str]) -> list[bool]:
    """Whether the opening of the base's greedy answer to each text refuses, as the screen asks."""
    prompts = [prompt_ids((Message("user", text),), adapted.base.tokenizer) for text in texts]
    with adapted.using(None):
        [openings] = adapted.generate([prompts], OPENING_TOKENS)
    return [is_refusal(answer_text(adapted, opening)) for opening in openings]
