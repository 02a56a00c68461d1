"""What a chat shows: answers as they are written, one below or beside the other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import zip_longest

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from persona_rlhf.apps.writing import Piece

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Screen:
    """Answers go to `console`. A terminal shows two side by side while both are written; a pipe gets one after the
    other. Nothing that a model writes moves the cursor."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def show(self, answers: Mapping[str, Iterator[Piece]]) -> list[str]:
        """Shows named answers to the end; their texts. Raises Declined where an engine fails."""
        if len(answers) > 1 and self._console.is_terminal:
            return self._side_by_side(answers)
        return [self._one(name, pieces) for name, pieces in answers.items()]

    def _one(self, name: str, pieces: Iterator[Piece]) -> str:
        whole = ""
        self._print(f"{name}> ")
        for piece in pieces:
            whole += piece.text
            self._print(piece.text)
        self._print("\n")
        return whole

    def _side_by_side(self, answers: Mapping[str, Iterator[Piece]]) -> list[str]:
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
