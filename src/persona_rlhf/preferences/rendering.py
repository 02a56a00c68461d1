"""One pair as the model sees it: what its chat template makes of it, control tokens and all."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.preferences.pairs import PreferencePair, parsed_rows
from persona_rlhf.preferences.template import ChatTokenizer, control_tokens
from persona_rlhf.preferences.tokens import tokenize

if TYPE_CHECKING:
    from rich.panel import Panel


class Part(NamedTuple):
    """Some of a row: what its tokens say, how many they are, and the place of the first (an answer's: where the prompt
    ends)."""

    text: str
    tokens: int
    begins: int


class Rendered(NamedTuple):
    """The pair of a `place` (file and row), as `base` reads it: one prompt, and the two answers that may follow it."""

    place: str
    user_id: str
    base: str
    parts: dict[str, Part]  # prompt, chosen, rejected
    control: re.Pattern[str]  # tokens of the template's own

    def to_json(self) -> dict[str, Any]:
        """As an object of plain JSON values."""
        parts = {name: part._asdict() for name, part in self.parts.items()}
        return {"place": self.place, "user_id": self.user_id, "base": self.base, **parts}

    def panel(self) -> Panel:
        """For people: control tokens stand out, and what a terminal would obey is written out."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        lines = [Text(_harmless(f"{self.place}, user {self.user_id}"), "dim")]
        for name, part in self.parts.items():
            where = f", from token {part.begins} on" if part.begins else ""
            text = Text(_harmless(part.text))
            text.highlight_regex(self.control, "bold cyan")
            lines += [Text(f"{name}: {part.tokens} tokens{where}", "bold"), text]
        return Panel(Group(*lines), title=Text(f"as {self.base} sees it"), title_align="left")


def _harmless(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def first_pair(path: Path | str) -> PreferencePair:
    """The first pair of a path. Raises InputError where its first row is none."""
    found = next(parsed_rows(path))
    if isinstance(found, Problem):
        raise InputError([found])
    return found[0]


def rendered(pair: PreferencePair, base: str, tokenizer: ChatTokenizer) -> Rendered:
    """A pair as the model named `base` sees it. Raises InputError where its chat template does not take it."""
    [user] = tokenize([pair], tokenizer, sys.maxsize)
    [row] = user.train + user.heldout

    def part(ids: tuple[int, ...], begins: int) -> Part:
        text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Part(str(text), len(ids), begins)

    prompt = row.chosen.prompt
    parts = {
        "prompt": part(prompt, 0),
        "chosen": part(row.chosen.completion, len(prompt)),
        "rejected": part(row.rejected.completion, len(prompt)),
    }
    return Rendered(f"{pair.file}:{pair.line}", pair.user_id, base, parts, control_tokens(tokenizer))
