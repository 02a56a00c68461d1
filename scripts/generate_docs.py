#!/usr/bin/env python3
"""Writes the reference pages from the code: docs/reference/config.md from the config's sections,
docs/reference/cli/ from the command line, docs/reference/python-api.md from the public names.

python scripts/generate_docs.py            # writes them
python scripts/generate_docs.py --check    # exit code 1 where they are not what the code says
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.cli import get_docs_for_click

import persona_rlhf
from persona_rlhf.cli.app import app
from persona_rlhf.config.experiment import Config
from persona_rlhf.config.loader import Section
from persona_rlhf.config.training import AlignSettings

REFERENCE = Path(__file__).parents[1] / "docs/reference"
NOTE = "<!-- Written by scripts/generate_docs.py from the code; change it there. -->\n"
LIMITS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}"}


def pages() -> dict[Path, str]:
    """The text of every generated page, by its path below docs/reference/."""
    found = {Path("config.md"): config_page(), Path("python-api.md"): api_page()}
    for name, verb in verbs(typer.main.get_command(app), ""):
        context = typer.Context(verb, info_name=f"persona-rlhf {name}")
        text = get_docs_for_click(obj=verb, ctx=context, name=f"persona-rlhf {name}")
        found[Path("cli", f"{name.replace(' ', '-')}.md")] = f"{NOTE}\n{text.strip()}\n"
    listed = "".join(f"- [`{page.stem.replace('-', ' ')}`]({page.name})\n" for page in sorted(found) if page.parts[1:])
    found[Path("cli", "README.md")] = f"{NOTE}\n# Verbs\n\n{listed}"
    return found


def verbs(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The commands of the program, by their full names."""
    if hasattr(command, "commands"):
        for word, below in command.commands.items():
            yield from verbs(below, f"{name} {word}".strip())
    else:
        yield name, command


def api_page() -> str:
    """The public names, each with the directive that mkdocstrings fills from its docstring."""
    intro = "`import persona_rlhf as pr` gives these names. Each is loaded when it is first used.\n"
    names = sorted(persona_rlhf.__all__, key=str.lower)
    functions, classes = [name for name in names if name.islower()], [name for name in names if not name.islower()]
    parts = [f"{NOTE}\n# Python API\n\n{intro}", "## Functions\n", *map(directive, functions)]
    return "\n".join([*parts, "## Classes\n", *map(directive, classes)])


def directive(name: str) -> str:
    """Documents a public name under its short name. mkdocstrings reads the module without importing it."""
    home = f"persona_rlhf.{persona_rlhf._HOMES[name]}"
    return f"::: {home}\n    options:\n      heading: pr.{name}\n      toc_label: {name}\n"


def config_page() -> str:
    """Every key of a config: type, default, meaning."""
    parts = [f"{NOTE}\n# Config\n", inspect.cleandoc(Config.__doc__ or "") + "\n"]
    top = {name: field for name, field in Config.model_fields.items() if section_in(field.annotation) is None}
    parts.append(table("", top))
    for name, field in Config.model_fields.items():
        section = section_in(field.annotation)
        if section is not None:
            parts += section_page(name, section)
    parts.append("# Settings of `base align`\n")
    parts.append("Beside `seed`, `base`, `policy` and `lora` (rank 16 and alpha 32 there).\n")
    return "\n".join([*parts, *section_page("align", AlignSettings)])


def section_page(path: str, section: type[Section]) -> list[str]:
    """A section, and those inside it."""
    doc = re.sub(r"^`[\w.]+`: ", "", " ".join(inspect.cleandoc(section.__doc__ or "").split()))
    found = [f"## `{path}`\n", f"{doc[:1].upper()}{doc[1:]}\n", table(f"{path}.", section.model_fields)]
    for name, field in section.model_fields.items():
        inner = section_in(field.annotation)
        if inner is not None:
            found += section_page(f"{path}.{name}", inner)
    return found


def table(prefix: str, fields: dict[str, FieldInfo]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "required" if field.is_required() else f"`{shown(field.default)}`"
        kind = words(field.annotation) + limits(field)
        rows.append(f"| `{prefix}{name}` | {kind} | {default} | {field.description or ''} |".replace(" | |", " |  |"))
    return "\n".join(rows) + "\n"


def words(kind: Any) -> str:
    """A type in words of YAML."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is None or kind is type(None):
        return "null"
    if origin is Annotated:
        return words(inner[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (list, tuple):
        return f"list of {words(inner[0])}"
    if origin is Union or str(origin) == "<class 'types.UnionType'>":
        return " or ".join(dict.fromkeys(words(member) for member in inner))
    if isinstance(kind, type) and issubclass(kind, Section):
        return "section"
    if isinstance(kind, type) and issubclass(kind, PurePath):
        return "path"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}.get(kind, str(kind))


def limits(field: FieldInfo) -> str:
    found = [
        form.format(f"{bound:g}" if bound < 1e6 else bound)
        for limit in field.metadata
        for name, form in LIMITS.items()
        if (bound := getattr(limit, name, None)) is not None
    ]
    return f", {', '.join(found)}" if found else ""


def shown(value: Any) -> str:
    """A default as YAML writes it."""
    if isinstance(value, Section):
        return "its defaults"
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else f"{value}".replace("\n", "\\n")  # a row is one line


def section_in(kind: Any) -> type[Section] | None:
    """The section that a key holds, if it holds one."""
    if isinstance(kind, type) and issubclass(kind, Section):
        return kind
    return next((found for part in get_args(kind) if (found := section_in(part)) is not None), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    made = pages()
    there = [REFERENCE / "config.md", REFERENCE / "python-api.md", *(REFERENCE / "cli").glob("*.md")]
    left_over = sorted(set(there) - {REFERENCE / page for page in made})
    stale = [
        page for page, text in made.items() if not (REFERENCE / page).exists() or (REFERENCE / page).read_text() != text
    ]
    if asked.check:
        wrong = [*map(str, stale), *(str(page.relative_to(REFERENCE)) for page in left_over)]
        sys.exit(f"run scripts/generate_docs.py: {', '.join(wrong)}" if wrong else 0)
    for page, text in made.items():
        (REFERENCE / page).parent.mkdir(exist_ok=True)
        (REFERENCE / page).write_text(text, encoding="utf-8")
    for page in left_over:
        page.unlink()


if __name__ == "__main__":
    main()
