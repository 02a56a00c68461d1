"""Terminal chat."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count, zip_longest
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from persona_rlhf.common.errors import InputError
from persona_rlhf.data.feedback import append_pair
from persona_rlhf.data.pairs import Message
from persona_rlhf.release.results import Result
from persona_rlhf.serving.openai_api import APIError, SamplingParams, TextChunk, TextGenerator
from persona_rlhf.serving.policy_filter import PolicyFilter

# ----------------------------------------------------------------------------------------------------
# What a chat shows: answers as they are written, one below or beside the other.
# ----------------------------------------------------------------------------------------------------

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ChatTerminal:
    """Answers go to `console`. A terminal shows two side by side while both are written; a pipe gets one after the
    other. Nothing that a model writes moves the cursor."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def show(self, answers: Mapping[str, Iterator[TextChunk]]) -> list[str]:
        """Shows named answers to the end; their texts. Raises Declined where an engine fails."""
        if len(answers) > 1 and self._console.is_terminal:
            return self._side_by_side(answers)
        return [self._one(name, pieces) for name, pieces in answers.items()]

    def _one(self, name: str, pieces: Iterator[TextChunk]) -> str:
        whole = ""
        self._print(f"{name}> ")
        for piece in pieces:
            whole += piece.text
            self._print(piece.text)
        self._print("\n")
        return whole

    def _side_by_side(self, answers: Mapping[str, Iterator[TextChunk]]) -> list[str]:
        texts = [""] * len(answers)
        with Live(console=self._console, refresh_per_second=12) as live:
            for pieces in zip_longest(*answers.values()):
                for place, piece in enumerate(pieces):
                    texts[place] += piece.text if piece is not None else ""
                table = Table.grid(expand=True)
                for _ in texts:
                    table.add_column(ratio=1)
                table.add_row(
                    *(Panel(Text(_tame(text)), title=Text(n)) for n, text in zip(answers, texts, strict=True))
                )
                live.update(table)
        return texts

    def _print(self, text: str) -> None:
        self._console.out(_tame(text), end="", highlight=False)
        self._console.file.flush()


def _tame(text: str) -> str:
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


# ----------------------------------------------------------------------------------------------------
# A chat in the terminal with one user's adapter; what he prefers goes into the ledger.
# ----------------------------------------------------------------------------------------------------

COMMANDS = "/retry asks for a second answer, /pair 1 or /pair 2 saves which of two answers is better, /quit ends."
_RETRY_TEMPERATURE = 0.8  # a second greedy answer would be the first


class Chat:
    """One conversation. With `compare`, the base answers every message too; the conversation goes on with the adapter's
    answer. `say` tells the person what is not an answer."""

    def __init__(
        self,
        run: Path,
        user: Result,
        writer: TextGenerator,
        guard: PolicyFilter,
        screen: ChatTerminal,
        say: Callable[[str], None],
        max_tokens: int,
        compare: bool = False,
    ) -> None:
        self._run, self._user, self._writer, self._guard = run, user, writer, guard
        self._screen, self._say, self._compare = screen, say, compare
        self._greedy = SamplingParams(max_tokens, stream=True)
        self._seeds = count(1)
        self._history: list[Message] = []
        self._two: list[str] = []  # the answers that /pair would save
        self._side_by_side = False

    def run(self, lines: Iterable[str]) -> None:
        """Reads messages and commands until `/quit` or the end of the lines."""
        for line in lines:
            words = line.split()
            if not words:
                continue
            if words[0] == "/quit":
                return
            try:
                self._take(line.strip(), words)
            except APIError as declined:
                self._say(declined.message)
            except InputError as fault:
                self._say(fault.problems[0].sentence)

    def _take(self, line: str, words: list[str]) -> None:
        if words[0] == "/retry":
            self._retry()
        elif words[0] == "/pair":
            self._pair(words[1:])
        elif line.startswith("/"):
            self._say(f"There is no command {words[0]}. {COMMANDS}")
        else:
            self._ask(line)

    def _ask(self, text: str) -> None:
        messages = (*self._history, Message("user", text))
        names: dict[str, str | None] = {self._user.user_id: self._user.slug}
        if self._compare:
            names["the base"] = None
        answers = self._answers(names, messages, self._greedy)
        self._history = [*messages, Message("assistant", answers[0])]
        self._two, self._side_by_side = answers, self._compare

    def _retry(self) -> None:
        if not self._history:
            self._say("There is no answer yet to try again.")
            return
        *messages, before = self._history
        wish = self._greedy._replace(temperature=_RETRY_TEMPERATURE, seed=next(self._seeds))
        [answer] = self._answers({self._user.user_id: self._user.slug}, tuple(messages), wish)
        self._history = [*messages, Message("assistant", answer)]
        self._two, self._side_by_side = [before.content, answer], False

    def _answers(self, names: dict[str, str | None], messages: tuple[Message, ...], wish: SamplingParams) -> list[str]:
        """All are asked before the first is read, so that they are written together."""
        guard, user_id = self._guard, self._user.user_id
        return self._screen.show({n: guard.answer(self._writer, user_id, m, messages, wish) for n, m in names.items()})

    def _pair(self, words: list[str]) -> None:
        """Of an answer and its second try, the second is taken for the better one where nothing is said."""
        if len(self._two) < 2:
            self._say("There are no two answers to the last message; /retry asks for a second one.")
        elif words not in (["1"], ["2"], []) or (self._side_by_side and not words):
            self._say("Say which answer is better: /pair 1 or /pair 2.")
        elif self._two[0] == self._two[1]:
            self._say("The two answers are the same; nothing is saved.")
        else:
            better = 0 if words == ["1"] else 1
            chosen, rejected = self._two[better], self._two[1 - better]
            pair = append_pair(self._run, self._user.user_id, self._history[:-1], chosen, rejected, "chat")
            self._history[-1] = Message("assistant", chosen)
            self._two = []
            self._say(f"Saved: answer {better + 1} is better than answer {2 - better} ({pair.file}).")
