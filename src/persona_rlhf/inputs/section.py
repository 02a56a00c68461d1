"""A section of a YAML document: strict, frozen, and every mistake in it at once, each with its place and remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from persona_rlhf.inputs.problems import InputError, Problem, did_you_mean
from persona_rlhf.inputs.yaml_text import Document, KeyPath, dotted


class Section(BaseModel):
    """Base of config sections: an unknown key is an error, 1.5 and true are no int, nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=False)


S = TypeVar("S", bound=Section)


def read_section(kind: type[S], document: Document) -> S:
    """Checks a document against a section. Raises InputError with all its problems, in the order of their lines."""
    section, problems = check_section(kind, document)
    if section is None or document.problems or problems:
        raise InputError(in_order([*document.problems, *problems]))
    return section


def check_section(kind: type[S], document: Document, at: KeyPath = ()) -> tuple[S | None, list[Problem]]:
    """Checks what stands at a key path of a document: the section, or None and every problem in it."""
    node: Any = document.tree
    for part in at:
        node = node[part]
    try:
        return kind.model_validate(node), []
    except ValidationError as fault:
        return None, list(_problems(kind, document, at, fault.errors(include_url=False)))


def in_order(problems: list[Problem]) -> list[Problem]:
    """Problems by file and line, each once."""
    return sorted(dict.fromkeys(problems), key=lambda problem: (problem.file, problem.line or 0))


def _problems(kind: type[Section], document: Document, at: KeyPath, errors: list[ErrorDetails]) -> Iterator[Problem]:
    """One problem per key path: the members of a union each complain, people made one mistake."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        by_path.setdefault(_written(document, at, error), []).append(error)
    for path, group in by_path.items():
        place = document.place((*at, *path))
        sentence = " or ".join(dict.fromkeys(_sentence(kind, path, error) for error in group))
        sentence = sentence.replace(" or expected ", " or ")
        value = group[0]["input"]
        shown = group[0]["type"] not in ("missing", "extra_forbidden") and not isinstance(value, dict | list)
        if shown and f"`{_show(value)}`" not in sentence:
            sentence = f"{sentence}, got `{_show(value)}`"
        yield Problem(place.file, place.line, dotted((*at, *path)), sentence)


def _written(document: Document, at: KeyPath, error: ErrorDetails) -> KeyPath:
    """The part of pydantic's location that stands in the document: it adds names of union members."""
    node: Any = document.tree
    for part in at:
        node = node[part]
    path: KeyPath = ()
    for part in error["loc"]:
        missing = error["type"] == "missing" and part == error["loc"][-1]
        if isinstance(node, dict) and (part in node or missing):
            node = node.get(str(part))
        elif isinstance(node, list) and isinstance(part, int):
            node = node[part]
        else:
            continue
        path = (*path, part)
    return path


def _sentence(kind: type[Section], path: KeyPath, error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            return _unknown_key(kind, path)
        case "missing":
            field = _fields_at(kind, path[:-1]).get(str(path[-1]))
            return f"this key is missing ({field})" if field else "this key is missing"
        case "int_type" | "int_from_float" | "int_parsing":
            return "expected a whole number"
        case "float_type" | "float_parsing":
            return "expected a number"
        case "finite_number":
            return "expected a finite number"
        case "bool_type" | "bool_parsing":
            return "expected true or false"
        case "string_type":
            return "expected a text (in quotes, where YAML would read something else)"
        case "path_type":
            return "expected a path"
        case "list_type" | "tuple_type":
            return "expected a list"
        case "model_type" | "model_attributes_type" | "dict_type":
            return "expected a section of `key: value` lines"
        case "literal_error":
            choices = str(context.get("expected", ""))
            known = [word.strip(" '") for word in choices.replace(" or ", ",").split(",")]
            return f"expected {choices.replace(chr(39), '`')}{did_you_mean(_show(error['input']), known)}"
        case "too_short":
            return "expected at least one" if context.get("min_length") == 1 else error["msg"]
        case "string_pattern_mismatch":
            return f"may not look like this (the pattern is {context.get('pattern')})"
        case "string_too_short":
            return "must not be empty"
        case "value_error":
            return str(context["error"])
    limits = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if error["type"] in limits:
        words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
        bound = limits[error["type"]]
        return f"must be {words[bound]} {context[bound]}"
    message = error["msg"]
    return message[:1].lower() + message[1:]


def _unknown_key(kind: type[Section], path: KeyPath) -> str:
    """Names the nearest key of this section, else the section that the key belongs to, else all keys."""
    *parents, key = path
    known = _fields_at(kind, tuple(parents))
    hint = did_you_mean(str(key), known)
    if not hint:
        homes = [f"{name}.{key}" for name in _sections(kind) if str(key) in _fields_at(kind, (name,))]
        if str(key) in kind.model_fields and parents:
            homes.append(str(key))
        hint = f" (did you mean `{homes[0]}`?)" if homes else f"; known keys: {', '.join(known)}"
    return f"unknown key{hint}"


def _fields_at(kind: type[Section], path: KeyPath) -> dict[str, str]:
    """Keys of the section at a path, each with its description."""
    here: Any = kind
    for part in path:
        if isinstance(part, int):
            continue
        fields = here.model_fields
        if part not in fields:
            return {}
        here = _section_in(fields[part].annotation)
        if here is None:
            return {}
    return {field.alias or name: field.description or "" for name, field in here.model_fields.items()}


def _sections(kind: type[Section]) -> list[str]:
    return [name for name, field in kind.model_fields.items() if _section_in(field.annotation)]


def _section_in(annotation: Any) -> type[Section] | None:
    """The section inside an annotation such as `tuple[Rule, ...]` or `Rule | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in (tuple, list, Union, UnionType, Annotated):
        found = (_section_in(part) for part in get_args(annotation))
        return next((section for section in found if section), None)
    return None


def _show(value: object) -> str:
    """A value as YAML would write it, cut where it is long."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str() | int() | float() | PurePath():
            text = str(value)
        case _:
            text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
