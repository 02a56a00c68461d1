"""Strict YAML: the 1.2 meaning of every scalar, the line of every key and value, and no duplicate keys."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml

from persona_rlhf.inputs.problems import InputError, Problem

KeyPath = tuple[str | int, ...]
Scalar = str | int | float | bool | None
Tree = Scalar | list[Any] | dict[str, Any]

_MAX_DEPTH = 32
_MAX_BYTES = 4 << 20


class Place(NamedTuple):
    """Where something was written: a file (or `override a.b=c`) and a line, counted from 1, where there is one."""

    file: str
    line: int | None


class Document(NamedTuple):
    """A parsed text: plain values, the place of each key path, and mistakes that did not stop the reading."""

    name: str
    tree: Tree
    places: dict[KeyPath, Place]
    problems: list[Problem]

    def place(self, path: KeyPath) -> Place:
        """The place of a key path, or of the nearest thing above it that was written."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return Place(self.name, None)


def dotted(path: KeyPath) -> str | None:
    """A key path as people write it: `rules[0].limit`; nothing for the whole document."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or None


def read_yaml(path: Path) -> Document:
    """Reads a YAML file whose top is a mapping. Raises InputError where it cannot be read as one."""
    name = str(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)  # a device may have no size, and no end
        if len(content) > _MAX_BYTES:
            raise InputError([Problem(name, None, None, f"the file is larger than {_MAX_BYTES >> 20} MB")])
        text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
    except UnicodeDecodeError as fault:
        raise InputError([Problem(name, None, None, f"the file is not UTF-8 (byte {fault.start})")]) from None
    except FileNotFoundError:
        raise InputError([Problem(name, None, None, "no such file")]) from None
    except IsADirectoryError:
        raise InputError([Problem(name, None, None, "this is a folder; a YAML file is wanted")]) from None
    except OSError as fault:
        raise InputError([Problem(name, None, None, f"cannot be read ({fault.strerror})")]) from None
    document = parse_yaml(text, name)
    if document.tree is None:
        raise InputError([Problem(name, None, None, "the file is empty")])
    if not isinstance(document.tree, dict):
        raise InputError([Problem(name, 1, None, "the file must hold `key: value` lines at its top")])
    return document


def parse_yaml(text: str, name: str) -> Document:
    """Parses YAML 1.2 scalars, lists and mappings; no tags, no aliases. Raises InputError where the syntax is broken.

    Only `true` and `false` are booleans, `5e-6` is a number, `2026-11-01`, `yes`, `12:30` and `1_000` are texts.
    """
    loader = _Loader(text) if _printable(text, name) else None
    assert loader is not None
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        what = " ".join(part for part in (fault.context, fault.problem) if part)
        raise InputError([Problem(name, mark.line + 1 if mark else None, None, f"not valid YAML: {what}")]) from None
    finally:
        loader.dispose()
    document = Document(name, None, {}, [])
    if node is None:
        return document
    return document._replace(tree=_build(node, (), document))


def dump_yaml(tree: object) -> str:
    """A tree as YAML that reads back as it is, in the order of its keys."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _printable(text: str, name: str) -> bool:
    """YAML allows no control characters; PyYAML names them by offset, people look for lines."""
    bad = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if bad:
        line = text.count("\n", 0, bad.start()) + 1
        sentence = f"not valid YAML: the character U+{ord(bad.group()):04X} is not allowed"
        raise InputError([Problem(name, line, None, sentence)])
    return True


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner and parser with the resolver of YAML 1.2's core schema, without aliases, bounded in depth."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # type: ignore[misc]
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise self._error("aliases (`*name`) are not supported; write it out")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._error(f"nested deeper than {_MAX_DEPTH} levels")
        node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[arg-type]
        self._depth -= 1
        return node

    def _error(self, sentence: str) -> yaml.MarkedYAMLError:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        return yaml.MarkedYAMLError(problem=sentence, problem_mark=mark)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.2 would misread, beside those that YAML 1.1 would."""


_CORE = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
for _tag, _pattern, _first in _CORE:
    _regex = re.compile(rf"(?:{_pattern})\Z")
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _regex, [*_first, *([""] if _tag == "null" else [])])


def _build(node: yaml.Node, path: KeyPath, document: Document) -> Tree:
    document.places.setdefault(path, Place(document.name, node.start_mark.line + 1))
    if isinstance(node, yaml.MappingNode):
        _plain_tag(node, "map", path, document)
        return _mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode):
        _plain_tag(node, "seq", path, document)
        return [_build(child, (*path, index), document) for index, child in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node, path, document)


def _mapping(node: yaml.MappingNode, path: KeyPath, document: Document) -> dict[str, Tree]:
    values: dict[str, Tree] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(Problem(document.name, line, dotted(path), "a key must be a text"))
            continue
        key = key_node.value
        here = (*path, key)
        if key in values:
            first = document.places[here].line
            sentence = f"the key is written twice, on line {first} and here; keep one"
            document.problems.append(Problem(document.name, line, dotted(here), sentence))
            continue
        if key_node.tag != "tag:yaml.org,2002:str":
            document.problems.append(Problem(document.name, line, dotted(here), f'a key must be a text; write "{key}"'))
            continue
        document.places[here] = Place(document.name, line)
        values[key] = _build(value_node, here, document)
    return values


def _scalar(node: yaml.ScalarNode, path: KeyPath, document: Document) -> Scalar:
    text: str = node.value
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    match kind:
        case "str":
            return text
        case "null":
            return None
        case "bool" if text.lower() in ("true", "false"):
            return text.lower() == "true"
        case "int" | "float":
            try:
                return _number(text, kind)
            except ValueError:
                pass
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    sentence = f"the tag or value `{shown}` ({node.tag}) is not supported; write a plain text, number, true or false"
    document.problems.append(Problem(document.name, node.start_mark.line + 1, dotted(path), sentence))
    return None if kind in ("int", "float", "bool") else text  # a text that is tagged is still one


def _number(text: str, kind: str) -> int | float:
    if kind == "int":
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(
        text.replace(".inf", "inf")
        .replace(".Inf", "inf")
        .replace(".INF", "inf")
        .replace(".nan", "nan")
        .replace(".NaN", "nan")
        .replace(".NAN", "nan")
    )


def _plain_tag(node: yaml.Node, kind: str, path: KeyPath, document: Document) -> None:
    if node.tag != f"tag:yaml.org,2002:{kind}":
        sentence = f"the tag `{node.tag}` is not supported; leave it away"
        document.problems.append(Problem(document.name, node.start_mark.line + 1, dotted(path), sentence))
