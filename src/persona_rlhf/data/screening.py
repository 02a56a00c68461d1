"""Drop, quarantine or flag pairs, each with a reason; request-classifier protocol."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import Field, field_validator

from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.config.loader import Section, read_section, read_yaml
from persona_rlhf.data.feedback import Review, accepted_by
from persona_rlhf.data.pairs import PreferencePair, Prompt
from persona_rlhf.data.tokenize import ChatTokenizer, PairRow, UserRows, control_tokens
from persona_rlhf.policy.judges import is_refusal, plain
from persona_rlhf.policy.properties import satisfied

if TYPE_CHECKING:
    from persona_rlhf.config.experiment import ScreeningSettings
    from persona_rlhf.policy.policy import Policy


# ----------------------------------------------------------------------------------------------------
# Is a request one that the policy forbids? What screening asks of classifiers, whatever they are made of.
# ----------------------------------------------------------------------------------------------------


class RequestScore(NamedTuple):
    """How much a request looks forbidden, more being worse, and the hazard categories that it may be of: none where the
    classifier does not tell them apart."""

    value: float
    categories: frozenset[str] = frozenset()


@runtime_checkable
class RequestClassifier(Protocol):
    """Scores requests: a table of patterns, the base itself, a model from the hub."""

    @property
    def finding(self) -> str:
        """What is said of a request that counts as forbidden, "kind: sentence"; reports count by its kind."""

    def __call__(self, requests: Sequence[Prompt]) -> Sequence[RequestScore]:
        """A score a request, in their order."""


class RequestScreen(NamedTuple):
    """A classifier, and the value from which on a request counts as forbidden."""

    classifier: RequestClassifier
    threshold: float

    def findings(self, requests: Sequence[Prompt], categories: Collection[str]) -> list[str | None]:
        """What is found against each request, None where nothing is: of `categories`, where the classifier tells."""
        return [self._finding(score, categories) for score in self.classifier(requests)] if requests else []

    def _finding(self, score: RequestScore, categories: Collection[str]) -> str | None:
        of = score.categories & set(categories)
        if score.value < self.threshold or (score.categories and not of):
            return None
        return f"{self.classifier.finding} ({', '.join(sorted(of))})" if of else self.classifier.finding


# ----------------------------------------------------------------------------------------------------
# Rules of screening: patterns of requests that are forbidden, by hazard category, in a file of the provider's.
# ----------------------------------------------------------------------------------------------------


class Pattern(Section):
    """Requests of one hazard category: one that `any` is found in, and `unless` is not."""

    category: str = Field(description="The hazard category, as the policy's documents name it.")
    any: list[str] = Field(min_length=1, description="Regular expressions on the plain text, one of which is found.")
    unless: list[str] = Field([], description="Regular expressions, none of which is found.")

    @field_validator("any", "unless")
    @classmethod
    def _compiles(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                found = re.compile(pattern).search("")
            except re.error as fault:
                raise ValueError(f"`{pattern}` is no regular expression ({fault})") from fault
            if found is not None:
                raise ValueError(f"`{pattern}` is found in every text")
        return patterns

    def finds(self, text: str) -> bool:
        """Whether a plain text is such a request."""
        return any(re.search(one, text) for one in self.any) and not any(re.search(one, text) for one in self.unless)


class _File(Section):
    rules: list[Pattern] = Field(min_length=1)


class Patterns:
    """Scores 1 where a turn of the user's is found by a pattern, else 0.

    Patterns are searched in the plain text (`likeness.plain`): lower case, without accents and punctuation, one space
    between words. `unless` is about the same turn.
    """

    def __init__(self, file: Path, rules: Sequence[Pattern]) -> None:
        self._rules = rules
        self.finding = f"rules: a pattern of {file.name} finds the prompt"

    @classmethod
    def read(cls, file: Path, categories: Collection[str]) -> Patterns:
        """Raises InputError where the file is none, or names a category that the policy does not restrict."""
        document = read_yaml(file)
        rules = read_section(_File, document).rules
        problems = []
        for n, rule in enumerate(rules):
            if rule.category not in categories:
                hint = did_you_mean(rule.category, categories) or f"; it restricts {', '.join(sorted(categories))}"
                place = document.place(("rules", n, "category"))
                sentence = f"the policy restricts no `{rule.category}`{hint}"
                problems.append(Problem(place.file, place.line, f"rules[{n}].category", sentence))
        if problems:
            raise InputError(problems)
        return cls(file, rules)

    def __call__(self, requests: Sequence[Prompt]) -> list[RequestScore]:
        found = []
        for request in requests:
            turns = [plain(message.content) for message in request if message.role == "user"]
            own = frozenset(rule.category for rule in self._rules if any(map(rule.finds, turns)))
            found.append(RequestScore(float(bool(own)), own))
        return found


# ----------------------------------------------------------------------------------------------------
# Which pairs are trained on, and why the others are not.
# ----------------------------------------------------------------------------------------------------

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
    screens: Sequence[RequestScreen] = (),
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


def _against_restrictions(
    pairs: Sequence[PreferencePair], policy: Policy, screens: Sequence[RequestScreen]
) -> dict[int, str]:
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
