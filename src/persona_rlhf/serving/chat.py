"""Terminal chat with one user's adapter; `/pair` saves a preference to the feedback ledger."""

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

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import pseudonym
from persona_rlhf.common.run_lock import WAIT_SECONDS, run_lock
from persona_rlhf.data.feedback import append_pair
from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.release.deletion_records import forgotten
from persona_rlhf.release.results import Result
from persona_rlhf.serving.openai_api import AdmittedAdapter, APIError, SamplingParams, TextChunk, TextGenerator
from persona_rlhf.serving.policy_filter import PolicyFilter

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ChatTerminal:
    """Answers on a console: two side by side in a terminal, one after the other in a pipe.

    Control characters in an answer are replaced, so that it cannot move the cursor.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def show(self, answers: Mapping[str, Iterator[TextChunk]]) -> list[str]:
        """Shows the named answers to their ends; returns their texts. Raises APIError if an engine fails."""
        if len(answers) > 1 and self._console.is_terminal:
            return self._side_by_side(answers)
        return [self._one(name, chunks) for name, chunks in answers.items()]

    def _one(self, name: str, chunks: Iterator[TextChunk]) -> str:
        answer = ""
        self._print(f"{name}> ")
        for chunk in chunks:
            answer += chunk.text
            self._print(chunk.text)
        self._print("\n")
        return answer

    def _side_by_side(self, answers: Mapping[str, Iterator[TextChunk]]) -> list[str]:
        texts = [""] * len(answers)
        with Live(console=self._console, refresh_per_second=12) as live:
            for chunks in zip_longest(*answers.values()):
                for column, chunk in enumerate(chunks):
                    texts[column] += chunk.text if chunk is not None else ""
                table = Table.grid(expand=True)
                for _ in texts:
                    table.add_column(ratio=1)
                table.add_row(
                    *(
                        Panel(Text(_printable(text)), title=Text(name))
                        for name, text in zip(answers, texts, strict=True)
                    )
                )
                live.update(table)
        return texts

    def _print(self, text: str) -> None:
        self._console.out(_printable(text), end="", highlight=False)
        self._console.file.flush()


def _printable(text: str) -> str:
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


COMMANDS = "/retry asks for a second answer, /pair 1 or /pair 2 saves which of two answers is better, /quit ends."
_RETRY_TEMPERATURE = 0.8  # a second greedy answer would be the first


class Chat:
    """One conversation with the adapter of `user`.

    With `with_base`, the base answers every message too; the conversation continues with the adapter's answer. `admit`
    checks the adapter before every answer. `note` prints a line that is not an answer.
    """

    def __init__(
        self,
        run: Path,
        user: Result,
        admit: Callable[[str], AdmittedAdapter],
        generator: TextGenerator,
        policy_filter: PolicyFilter,
        terminal: ChatTerminal,
        note: Callable[[str], None],
        max_tokens: int,
        with_base: bool = False,
    ) -> None:
        self._run, self._user, self._admit = run, user, admit
        self._generator, self._policy_filter = generator, policy_filter
        self._terminal, self._note, self._compare = terminal, note, with_base
        self._greedy = SamplingParams(max_tokens, stream=True)
        self._seeds = count(1)
        self._history: list[Message] = []
        self._candidates: list[str] = []  # the two answers that /pair can save
        self._with_base = False

    def run(self, lines: Iterable[str]) -> None:
        """Reads messages and commands until `/quit` or the end of the lines."""
        for line in lines:
            words = line.split()
            if not words:
                continue
            if words[0] == "/quit":
                return
            try:
                self._handle(line.strip(), words)
            except APIError as error:
                self._note(error.message)
            except InputError as error:
                self._note(error.problems[0].sentence)

    def _handle(self, line: str, words: list[str]) -> None:
        if words[0] == "/retry":
            self._retry()
        elif words[0] == "/pair":
            self._pair(words[1:])
        elif line.startswith("/"):
            self._note(f"There is no command {words[0]}. {COMMANDS}")
        else:
            self._ask(line)

    def _ask(self, text: str) -> None:
        messages = (*self._history, Message("user", text))
        answers = self._answers(messages, self._greedy, self._compare)
        self._history = [*messages, Message("assistant", answers[0])]
        self._candidates, self._with_base = answers, self._compare

    def _retry(self) -> None:
        if not self._history:
            self._note("There is no answer yet to try again.")
            return
        *messages, before = self._history
        sampling = self._greedy._replace(temperature=_RETRY_TEMPERATURE, seed=next(self._seeds))
        [answer] = self._answers(tuple(messages), sampling, with_base=False)
        self._history = [*messages, Message("assistant", answer)]
        self._candidates, self._with_base = [before.content, answer], False

    def _answers(self, messages: tuple[Message, ...], sampling: SamplingParams, with_base: bool) -> list[str]:
        """Both answers are started before the first is read, so that they are generated together."""
        user_id = self._user.user_id
        adapters: dict[str, AdmittedAdapter | None] = {user_id: self._admit(self._user.slug)}
        if with_base:
            adapters["the base"] = None
        return self._terminal.show(
            {
                name: self._policy_filter.answer(self._generator, user_id, adapter, messages, sampling)
                for name, adapter in adapters.items()
            }
        )

    def _pair(self, words: list[str]) -> None:
        """Saves a pair; of an answer and its retry, the retry is the better one by default."""
        if len(self._candidates) < 2:
            self._note("There are no two answers to the last message; /retry asks for a second one.")
        elif words not in (["1"], ["2"], []) or (self._with_base and not words):
            self._note("Say which answer is better: /pair 1 or /pair 2.")
        elif self._candidates[0] == self._candidates[1]:
            self._note("The two answers are the same; nothing is saved.")
        else:
            better = 0 if words == ["1"] else 1
            chosen, rejected = self._candidates[better], self._candidates[1 - better]
            pair = self._saved(chosen, rejected)
            self._history[-1] = Message("assistant", chosen)
            self._candidates = []
            self._note(f"Saved: answer {better + 1} is better than answer {2 - better} ({pair.file}).")

    def _saved(self, chosen: str, rejected: str) -> PreferencePair:
        """A pair added to the ledger of the run. Raises InputError where the user was forgotten meanwhile."""
        with run_lock(self._run, "chat", shared=True, wait=WAIT_SECONDS, tell=self._note):
            if pseudonym(self._user.user_id) in forgotten(self._run):
                sentence = "this user was forgotten, so nothing is saved"
                raise InputError([Problem(str(self._run), None, "--user", sentence)])
            return append_pair(self._run, self._user.user_id, self._history[:-1], chosen, rejected, "chat")
