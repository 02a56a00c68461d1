"""Files of JSON lines whose rows are named tuples: every bad line is a problem, and all are raised at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from persona_rlhf.common.errors import InputError, Problem

Row = TypeVar("Row")
Text = Annotated[str, Field(pattern=r"\S")]
"""A text with a visible character."""


def read_json_lines(
    file: Path, kind: type[Row], sentence: str, check: Callable[[int, Row], Iterable[tuple[str, str]]] | None = None
) -> list[Row]:
    """The rows of a file, each checked against the fields of `kind`; other keys and empty lines are ignored.

    Raises InputError with every line that is no such row, and `sentence`, which describes one; and with the faults
    (key, sentence) that `check` gives of a row and the number of its line.
    """
    adapter: TypeAdapter[Row] = TypeAdapter(kind)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also split at U+2028 in a text
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError([Problem(str(file), None, None, f"the file cannot be read ({fault})")]) from fault
    rows: list[Row] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            valid = adapter.validate_python({key: row[key] for key in kind.__annotations__ if key in row})
        except ValidationError as fault:
            problems.append(Problem(str(file), number, str(fault.errors()[0]["loc"][0]), sentence))
        except (ValueError, TypeError, RecursionError):  # RecursionError: brackets in brackets
            problems.append(Problem(str(file), number, None, sentence))
        else:
            rows.append(valid)
            problems += [Problem(str(file), number, *fault) for fault in (check(number, valid) if check else ())]
    if problems:
        raise InputError(problems)
    return rows
