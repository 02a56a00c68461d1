"""Screening of pairs: drop, quarantine or flag, each with a reason; the protocol of request classifiers."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import Field, field_validator

from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.config.loader import Section, read_section, read_yaml
from persona_rlhf.data.disguises import unmasked
from persona_rlhf.data.feedback import Review, accepted_by
from persona_rlhf.data.near_copies import NearCopyIndex, ProtectedPrompt
from persona_rlhf.data.pairs import Message, PreferencePair, Prompt
from persona_rlhf.data.tokenize import ChatTokenizer, PairRow, UserRows, control_tokens, written_token
from persona_rlhf.policy.judges import is_refusal, plain
from persona_rlhf.policy.properties import satisfied

if TYPE_CHECKING:
    from persona_rlhf.config.experiment import ScreeningSettings
    from persona_rlhf.policy.policy import Policy


class RequestScore(NamedTuple):
    """How forbidden a request looks (higher is worse), and its possible hazard categories.

    `categories` is empty if the classifier does not distinguish them.
    """

    value: float
    categories: frozenset[str] = frozenset()


@runtime_checkable
class RequestClassifier(Protocol):
    """A classifier of requests: a table of patterns, the base itself, or a model from the hub."""

    @property
    def finding(self) -> str:
        """The reason given for a forbidden request, "kind: sentence"; reports count by its kind."""

    def __call__(self, requests: Sequence[Prompt]) -> Sequence[RequestScore]:
        """One score per request, in order."""


class RequestScreen(NamedTuple):
    """A classifier, and the threshold at or above which a request counts as forbidden."""

    classifier: RequestClassifier
    threshold: float

    def findings(self, requests: Sequence[Prompt], categories: Collection[str]) -> list[str | None]:
        """The finding about each request, or None; of these `categories` if the classifier distinguishes them."""
        return [self._finding(score, categories) for score in self.classifier(requests)] if requests else []

    def _finding(self, score: RequestScore, categories: Collection[str]) -> str | None:
        matching = score.categories & set(categories)
        if score.value < self.threshold or (score.categories and not matching):
            return None
        return f"{self.classifier.finding} ({', '.join(sorted(matching))})" if matching else self.classifier.finding


class Pattern(Section):
    """Requests of one hazard category: a text that matches a pattern of `any` and none of `unless`."""

    category: str = Field(description="The hazard category, as the policy's documents name it.")
    any: list[str] = Field(min_length=1, description="Regular expressions on the plain text, one of which is found.")
    unless: list[str] = Field([], description="Regular expressions, none of which is found.")

    @field_validator("any", "unless")
    @classmethod
    def _compiles(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                empty_match = re.compile(pattern).search("")
            except re.error as fault:
                raise ValueError(f"`{pattern}` is no regular expression ({fault})") from fault
            if empty_match is not None:
                raise ValueError(f"`{pattern}` is found in every text")
        return patterns

    def finds(self, text: str) -> bool:
        """Whether a plain text is such a request."""
        return any(re.search(one, text) for one in self.any) and not any(re.search(one, text) for one in self.unless)


class _File(Section):
    rules: list[Pattern] = Field(min_length=1)


class Patterns:
    """The classifier with a table of patterns: 1 if a pattern matches one of the user's turns, else 0.

    Patterns are searched in the plain text (`judges.plain`): lower case, without accents and punctuation, one space
    between words. `unless` applies to the same turn.
    """

    def __init__(self, file: Path, rules: Sequence[Pattern]) -> None:
        self._rules = rules
        self.finding = f"rules: a pattern of {file.name} finds the prompt"

    @classmethod
    def read(cls, file: Path, categories: Collection[str]) -> Patterns:
        """The patterns of a file. Raises InputError if it is wrong, or names a category without a restriction."""
        document = read_yaml(file)
        rules = read_section(_File, document).rules
        problems = []
        for n, rule in enumerate(rules):
            if rule.category not in categories:
                hint = did_you_mean(rule.category, categories) or f"; it restricts {', '.join(sorted(categories))}"
                source = document.place(("rules", n, "category"))
                sentence = f"the policy restricts no `{rule.category}`{hint}"
                problems.append(Problem(source.file, source.line, f"rules[{n}].category", sentence))
        if problems:
            raise InputError(problems)
        return cls(file, rules)

    def __call__(self, requests: Sequence[Prompt]) -> list[RequestScore]:
        scores = []
        for request in requests:
            turns = [plain(message.content) for message in request if message.role == "user"]
            categories = frozenset(rule.category for rule in self._rules if any(map(rule.finds, turns)))
            scores.append(RequestScore(float(bool(categories)), categories))
        return scores


TOLERATED_COPIES = 0.05
"""Share of a user's pairs that may be near copies of probes before each of them counts for the alarm."""

FEWEST_COPIES = 3
"""Number of such pairs that a user may always have."""

Action = Literal["dropped", "masked", "quarantined", "flagged", "accepted"]


class Dropped(NamedTuple):
    """A pair with a finding. `dropped` and `quarantined` pairs are not trained on.

    `flagged` ones are, since the quarantine is off; `accepted` ones are, since a reviewer accepted them. `masked` ones
    are, without their personal data.
    """

    pair: PreferencePair
    reason: str  # "kind: what exactly"
    action: Action

    @property
    def kind(self) -> str:
        """The reason up to the colon, by which reports count."""
        return self.reason.partition(":")[0]

    @property
    def trained(self) -> bool:
        """Whether the pair is trained on in spite of the finding."""
        return self.action in ("masked", "flagged", "accepted")

    @property
    def alarming(self) -> bool:
        """Whether the pair teaches against the policy and no reviewer accepted it: it counts for the user's alarm."""
        return self.action in ("quarantined", "flagged")


class Screened(NamedTuple):
    """The pairs to train on, in file order, and all findings."""

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
    near_copies: NearCopyIndex | None = None,
    refuses: Callable[[str], bool] = is_refusal,
) -> Screened:
    """Drops pairs that cannot or must not teach, and quarantines those that teach against tier one.

    Dropped: an empty text; identical answers; a repetition of an earlier pair of the user; both sides of a
    contradiction (the same user, prompt and texts, decided otherwise); a held-out tie; a pair whose rejected answer
    meets a requirement that its chosen one breaks; and a near copy of a prompt of the gate, whichever is chosen.
    Quarantined: the prompt is a probe of a restriction; or one of the `screens` finds it, or a turn of it, forbidden
    while `chosen` is no refusal, and no review in `reviews` accepts the pair; or it is a near copy of a probe, and the
    user has more of these than `TOLERATED_COPIES`. With `settings.quarantine` off these are kept and flagged, and near
    copies stay. A tie counts as a preference for either answer. Each screen is called once, with the distinct requests
    of the pairs that no earlier screen found.
    `refuses` is the judge of answers: a refusal that turns into help must not count as one.
    """
    usable, dropped = unfit_to_teach(pairs)
    usable, against_requirements = _against_requirements(usable, policy)
    dropped += against_requirements
    against = _against_restrictions(usable, policy, screens, refuses)
    copies = {} if near_copies is None or not settings.quarantine else copies_of(usable, near_copies)
    many = _users_with_many(
        usable, [place for place, copy in copies.items() if not copy.harmless and place not in against]
    )
    out = set()
    for index in sorted({*against, *copies}):
        pair, reason = usable[index], against.get(index)
        review = None if reason is None or reason.startswith("probe:") else accepted_by(reviews or {}, pair)
        if reason is not None and review is None:
            dropped.append(Dropped(pair, reason, "quarantined" if settings.quarantine else "flagged"))
        elif index in copies:
            counts = not copies[index].harmless and pair.user_id in many
            reason = f"probe: near copy of {copies[index].name}"
            dropped.append(Dropped(pair, reason, "quarantined" if counts else "dropped"))
        elif review is not None:
            dropped.append(Dropped(pair, f"{reason}; {review.reviewer}: {review.reason}", "accepted"))
        if not dropped[-1].trained:
            out.add(index)
    return Screened([pair for index, pair in enumerate(usable) if index not in out], dropped)


def fit(rows: Sequence[UserRows], tokenizer: ChatTokenizer, context: int) -> Fitted:
    """Drops the rows that do not fit the base; `context` is in tokens.

    These are texts longer than the context, two answers with the same tokens, and texts that contain a control token
    of the base (they could open another turn).
    """
    control = control_tokens(tokenizer)
    dropped: list[Dropped] = []

    def fitting(split: Sequence[PairRow]) -> list[PairRow]:
        kept: list[PairRow] = []
        for row in split:
            reason = _unreadable(row, control, context)
            if reason is None:
                kept.append(row)
            else:
                dropped.append(Dropped(row.pair, reason, "dropped"))
        return kept

    fitted = [
        UserRows(user.user_id, fitting(user.train), fitting(user.heldout), ties=fitting(user.ties)) for user in rows
    ]
    return Fitted(fitted, dropped)


def screening_rows(dropped: Sequence[Dropped]) -> Iterator[dict[str, str | int]]:
    """The lines of `screening.jsonl`, which name a pair and hold none of its text."""
    for finding in dropped:
        yield {
            "user_id": finding.pair.user_id,
            "pair_id": finding.pair.id,
            "file": finding.pair.file,
            "line": finding.pair.line,
            "action": finding.action,
            "reason": finding.reason,
        }


def unfit_to_teach(pairs: Sequence[PreferencePair]) -> tuple[list[PreferencePair], list[Dropped]]:
    """The pairs that are usable by their texts alone, and the dropped ones."""
    first: dict[tuple[str, Prompt, str, str, bool], PreferencePair] = {}
    for pair in pairs:
        for order in pair.orders:
            first.setdefault((pair.user_id, pair.prompt, *order, pair.tie), pair)
    usable: list[PreferencePair] = []
    dropped: list[Dropped] = []
    for pair in pairs:
        texts = {"prompt": pair.prompt[-1].content, "chosen": pair.chosen, "rejected": pair.rejected}
        empty = next((name for name, text in texts.items() if not text.strip()), None)
        same = first[pair.user_id, pair.prompt, pair.chosen, pair.rejected, pair.tie]
        reverse = first.get((pair.user_id, pair.prompt, pair.rejected, pair.chosen, False))
        opposite = reverse or first.get((pair.user_id, pair.prompt, pair.chosen, pair.rejected, not pair.tie))
        if empty is not None:
            reason = f"empty: `{empty}` holds no text"
        elif pair.chosen == pair.rejected:
            reason = "identical: chosen and rejected are the same text"
        elif opposite is not None:
            verdict = "holds both answers alike" if opposite.tie else "prefers one of them"
            verdict = verdict if pair.tie or opposite.tie else "prefers the other answer"
            reason = f"contradiction: at {opposite.file}:{opposite.line} this user {verdict}"
        elif same is not pair:
            reason = f"repetition: the same stands at {same.file}:{same.line}"
        elif pair.tie and pair.split == "heldout":
            reason = "tie: its prompt is held out, and two answers alike have no order to predict"
        else:
            usable.append(pair)
            continue
        dropped.append(Dropped(pair, reason, "dropped"))
    return usable, dropped


def _against_requirements(
    pairs: Sequence[PreferencePair], policy: Policy
) -> tuple[list[PreferencePair], list[Dropped]]:
    """The pairs that are kept, and those that prefer an answer that breaks a requirement to one that meets it.

    A pair of two answers that both break it is kept: its preference is about something else.
    """
    kept, dropped = list[PreferencePair](), list[Dropped]()
    for pair in pairs:
        request = next((message.content for message in reversed(pair.prompt) if message.role == "user"), "")
        verdicts = (
            (rule.id, satisfied(rule, request, preferred), satisfied(rule, request, other))
            for rule in policy.requirements
            for preferred, other in pair.orders
        )
        against = next((rule for rule, chosen, rejected in verdicts if chosen is False and rejected is True), None)
        if against is None:
            kept.append(pair)
        else:
            reason = f"requirement: it prefers an answer without what `{against}` requires to one with it"
            dropped.append(Dropped(pair, reason, "dropped"))
    return kept, dropped


def normalised(text: str) -> str:
    """A text in one case, width and Unicode form, with one space for punctuation and spaces."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return re.sub(r"[\W_]+", " ", plain).strip()


def copies_of(pairs: Sequence[PreferencePair], index: NearCopyIndex) -> dict[int, ProtectedPrompt]:
    """The places of pairs with a near copy of a prompt of the gate, and that prompt.

    All turns but the assistant's are read as one text, so a copy may begin in one turn and end in another. In the
    assistant's turns and in both answers only probes count: an honest answer may take up a harmless prompt.
    """
    read: dict[str, ProtectedPrompt | None] = {}

    def copied(text: str) -> ProtectedPrompt | None:
        if text not in read:
            read[text] = index.find(text)
        return read[text]

    copies: dict[int, ProtectedPrompt] = {}
    for place, pair in enumerate(pairs):
        request = copied("\n".join(message.content for message in pair.prompt if message.role != "assistant"))
        answers = [message.content for message in pair.prompt if message.role == "assistant"]
        in_answers = [copied(text) for text in (*answers, pair.chosen, pair.rejected)]
        near = [copy for copy in in_answers if copy is not None and not copy.harmless]
        near += [] if request is None else [request]
        if near:
            copies[place] = min(near, key=lambda copy: copy.harmless)
    return copies


def _users_with_many(pairs: Sequence[PreferencePair], copies: Sequence[int]) -> set[str]:
    """The users with more near copies of probes, at these places, than honest users have by chance."""
    pairs_of = Counter(pair.user_id for pair in pairs)
    copies_of = Counter(pairs[place].user_id for place in copies)
    return {user for user, n in copies_of.items() if n > max(FEWEST_COPIES, TOLERATED_COPIES * pairs_of[user])}


def _against_restrictions(
    pairs: Sequence[PreferencePair],
    policy: Policy,
    screens: Sequence[RequestScreen],
    refuses: Callable[[str], bool],
) -> dict[int, str]:
    """The indices of the pairs that would teach against a restriction, with the reasons."""
    rules = {normalised(probe.prompt): rule.id for rule in policy.restrictions for probe in rule.probes}
    reasons: dict[int, str] = {}
    complying: list[int] = []
    for index, pair in enumerate(pairs):
        turns = (normalised(message.content) for message in pair.prompt if message.role == "user")
        rule = next((rules[text] for text in turns if text in rules), None)
        if rule is not None:
            reasons[index] = f"probe: the prompt is one of the restriction `{rule}`"
        elif screens and not all(is_refusal(text) and refuses(text) for text, _ in pair.orders):  # the rules cost less
            complying.append(index)
    requests = {index: _requests_in(pairs[index].prompt, refuses) for index in complying}
    findings: dict[Prompt, str] = {}
    for screened in screens:
        open_pairs = (of_pair for of_pair in requests.values() if not any(map(findings.__contains__, of_pair)))
        rest = list(dict.fromkeys(request for of_pair in open_pairs for request in of_pair))
        results = zip(rest, screened.findings(rest, policy.categories), strict=True)
        findings |= {prompt: finding for prompt, finding in results if finding is not None}
    for index, of_pair in requests.items():
        finding = next((findings[request] for request in of_pair if request in findings), None)
        pair = pairs[index]
        if finding is not None and not all(refuses(preferred) for preferred, _ in pair.orders):
            unlike = "an answer of the tie" if pair.tie else "chosen"
            reasons[index] = f"{finding}, and {unlike} is no refusal"
    return dict(sorted(reasons.items()))


def _requests_in(prompt: Prompt, refuses: Callable[[str], bool]) -> list[Prompt]:
    """The requests that a prompt makes: the whole of it, and each turn of the user alone that no refusal follows.

    A screen that asks the base would else be led by what a pair lets the assistant say: after "Sure, I am glad to
    help." the base no longer refuses. Of a turn in disguise, such as base64, the plain text is asked as well.
    """
    answers = [*(message.content if message.role == "assistant" else "" for message in prompt[1:]), ""]
    turns = zip(prompt, answers, strict=True)
    user_turns = [turn.content for turn, answer in turns if turn.role == "user" and not refuses(answer)]
    texts = (text for turn in user_turns for text in (turn, *unmasked(turn)))
    return list(dict.fromkeys([prompt, *((Message("user", text),) for text in texts)]))


def _unreadable(row: PairRow, control: re.Pattern[str], context: int) -> str | None:
    longest = max(row.chosen.length, row.rejected.length)
    if longest > context:
        return f"over-long: {longest:,} tokens with the prompt, and the context has {context:,}"
    if row.chosen.completion == row.rejected.completion:
        return "identical: chosen and rejected are the same tokens to this base"
    answers = (Message("assistant", row.pair.chosen), Message("assistant", row.pair.rejected))
    token = written_token((*row.pair.prompt, *answers), control)
    return None if token is None else f"control token: a text writes out the base's `{token}`"
