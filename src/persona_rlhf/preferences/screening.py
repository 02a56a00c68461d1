"""Which pairs are trained on, and why the others are not."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.requirements import satisfied
from persona_rlhf.preferences.messages import Prompt
from persona_rlhf.preferences.pairs import PreferencePair
from persona_rlhf.preferences.requests import Screen
from persona_rlhf.preferences.review import Review, accepted_by
from persona_rlhf.preferences.template import ChatTokenizer, control_tokens
from persona_rlhf.preferences.tokens import PairRow, UserRows

if TYPE_CHECKING:
    from persona_rlhf.policy.tiers import Policy
    from persona_rlhf.preferences.settings import ScreeningSettings

Action = Literal["dropped", "quarantined", "flagged", "accepted"]


class Dropped(NamedTuple):
    """A pair and what was found: `dropped` cannot teach, `quarantined` must not; `flagged` is trained all the same, and
    `accepted` because a person looked at it."""

    pair: PreferencePair
    reason: str  # "kind: what exactly"
    action: Action

    @property
    def kind(self) -> str:
        """The reason's first words, by which reports count."""
        return self.reason.partition(":")[0]

    @property
    def trained(self) -> bool:
        """Whether the pair goes on in spite of it."""
        return self.action in ("flagged", "accepted")

    @property
    def alarming(self) -> bool:
        """Whether it speaks against the user: a pair that teaches against the policy, and that nobody has accepted."""
        return self.action in ("quarantined", "flagged")


class Screened(NamedTuple):
    """The pairs that go on, in file order, and everything that was found."""

    kept: list[PreferencePair]
    dropped: list[Dropped]


class Fitted(NamedTuple):
    """The rows that fit the base, and the pairs that do not."""

    rows: list[UserRows]
    dropped: list[Dropped]


def screen(
    pairs: Sequence[PreferencePair],
    policy: Policy,
    settings: ScreeningSettings,
    screens: Sequence[Screen] = (),
    reviews: Mapping[str, Review] | None = None,
) -> Screened:
    """Drops the pairs that cannot or must not teach, and quarantines those that teach against tier one.

    Dropped: an empty text, identical answers, a repetition of an earlier pair of the user, and both sides of a
    contradiction (the same user, prompt and texts with the choice turned round: nothing says which of them is meant);
    and a pair whose rejected answer has what a requirement asks for, and whose chosen one has not.
    Quarantined: the prompt is a probe of a restriction, or one of the `screens` finds it forbidden while `chosen` is
    no refusal; of the latter those are kept that `reviews` accept. With `settings.quarantine` off all are kept, and
    flagged. Every screen is asked once, about distinct prompts that none before it has found.
    """
    sound, dropped = unfit_to_teach(pairs)
    sound, unwanted = _against_requirements(sound, policy)
    dropped += unwanted
    against = _against_restrictions(sound, policy, screens)
    out = set()
    for place, reason in against.items():
        accepted = None if reason.startswith("probe:") else accepted_by(reviews or {}, sound[place])
        if accepted is not None:
            dropped.append(Dropped(sound[place], f"{reason}; {accepted.reviewer}: {accepted.reason}", "accepted"))
        elif settings.quarantine:
            out.add(place)
            dropped.append(Dropped(sound[place], reason, "quarantined"))
        else:
            dropped.append(Dropped(sound[place], reason, "flagged"))
    return Screened([pair for place, pair in enumerate(sound) if place not in out], dropped)


def fit(rows: Sequence[UserRows], tokenizer: ChatTokenizer, context: int) -> Fitted:
    """Drops the rows that the base cannot read as they are meant; `context` is in tokens.

    A text longer than the context, two answers that are the same to the model, and texts that write out a control
    token of the base (they could open a turn of their own).
    """
    control = control_tokens(tokenizer)
    dropped: list[Dropped] = []

    def fitting(split: list[PairRow]) -> list[PairRow]:
        kept: list[PairRow] = []
        for row in split:
            reason = _unreadable(row, control, context)
            if reason is None:
                kept.append(row)
            else:
                dropped.append(Dropped(row.pair, reason, "dropped"))
        return kept

    fitted = [UserRows(user.user_id, fitting(user.train), fitting(user.heldout)) for user in rows]
    return Fitted(fitted, dropped)


def screening_rows(dropped: Sequence[Dropped]) -> Iterator[dict[str, str | int]]:
    """The lines of `screening.jsonl`; they name a pair and hold none of its text."""
    for found in dropped:
        yield {
            "user_id": found.pair.user_id,
            "pair_id": found.pair.id,
            "file": found.pair.file,
            "line": found.pair.line,
            "action": found.action,
            "reason": found.reason,
        }


def unfit_to_teach(pairs: Sequence[PreferencePair]) -> tuple[list[PreferencePair], list[Dropped]]:
    """The pairs that can teach something by their texts alone, and the others."""
    first: dict[tuple[str, Prompt, str, str], PreferencePair] = {}
    for pair in pairs:
        first.setdefault((pair.user_id, pair.prompt, pair.chosen, pair.rejected), pair)
    sound: list[PreferencePair] = []
    dropped: list[Dropped] = []
    for pair in pairs:
        texts = {"prompt": pair.prompt[-1].content, "chosen": pair.chosen, "rejected": pair.rejected}
        empty = next((name for name, text in texts.items() if not text.strip()), None)
        same = first[pair.user_id, pair.prompt, pair.chosen, pair.rejected]
        opposite = first.get((pair.user_id, pair.prompt, pair.rejected, pair.chosen))
        if empty is not None:
            reason = f"empty: `{empty}` holds no text"
        elif pair.chosen == pair.rejected:
            reason = "identical: chosen and rejected are the same text"
        elif opposite is not None:
            reason = f"contradiction: at {opposite.file}:{opposite.line} this user prefers the other answer"
        elif same is not pair:
            reason = f"repetition: the same stands at {same.file}:{same.line}"
        else:
            sound.append(pair)
            continue
        dropped.append(Dropped(pair, reason, "dropped"))
    return sound, dropped


def _against_requirements(
    pairs: Sequence[PreferencePair], policy: Policy
) -> tuple[list[PreferencePair], list[Dropped]]:
    """The pairs that go on, and those that prefer an answer without what is required to one with it: a taste that the
    provider rules out. Two answers that both lack it are about something else."""
    kept, dropped = list[PreferencePair](), list[Dropped]()
    for pair in pairs:
        asked = next((message.content for message in reversed(pair.prompt) if message.role == "user"), "")
        verdicts = (
            (rule.id, satisfied(rule, asked, pair.chosen), satisfied(rule, asked, pair.rejected))
            for rule in policy.requirements
        )
        against = next((rule for rule, chosen, rejected in verdicts if chosen is False and rejected is True), None)
        if against is None:
            kept.append(pair)
        else:
            reason = f"requirement: it prefers an answer without what `{against}` requires to one with it"
            dropped.append(Dropped(pair, reason, "dropped"))
    return kept, dropped


def normalised(text: str) -> str:
    """A text without what writing can vary and still say the same: case, width, accents' form, marks and spaces."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return re.sub(r"[\W_]+", " ", plain).strip()


def _against_restrictions(pairs: Sequence[PreferencePair], policy: Policy, screens: Sequence[Screen]) -> dict[int, str]:
    """Places of the pairs that would teach against a restriction, each with its reason."""
    rules = {normalised(probe.prompt): rule.id for rule in policy.restrictions for probe in rule.probes}
    reasons: dict[int, str] = {}
    complying: list[int] = []
    for place, pair in enumerate(pairs):
        asked = (normalised(message.content) for message in pair.prompt if message.role == "user")
        rule = next((rules[text] for text in asked if text in rules), None)
        if rule is not None:
            reasons[place] = f"probe: the prompt is one of the restriction `{rule}`"
        elif screens and not is_refusal(pair.chosen):
            complying.append(place)
    found: dict[Prompt, str] = {}
    for screened in screens:
        left = list(dict.fromkeys(pairs[place].prompt for place in complying if pairs[place].prompt not in found))
        findings = zip(left, screened.findings(left, policy.categories), strict=True)
        found |= {prompt: finding for prompt, finding in findings if finding is not None}
    for place in complying:
        if pairs[place].prompt in found:
            reasons[place] = f"{found[pairs[place].prompt]}, and chosen is no refusal"
    return dict(sorted(reasons.items()))


def _unreadable(row: PairRow, control: re.Pattern[str], context: int) -> str | None:
    longest = max(row.chosen.length, row.rejected.length)
    if longest > context:
        return f"over-long: {longest:,} tokens with the prompt, and the context has {context:,}"
    if row.chosen.completion == row.rejected.completion:
        return "identical: chosen and rejected are the same tokens to this base"
    texts = (*(message.content for message in row.pair.prompt), row.pair.chosen, row.pair.rejected)
    found = next((found for text in texts if (found := control.search(text))), None)
    return None if found is None else f"control token: a text writes out the base's `{found.group()}`"
