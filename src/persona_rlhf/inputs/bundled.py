"""Files as the user names them: from the working directory, else from those shipped with the toolkit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from persona_rlhf.inputs.problems import InputError, Problem, did_you_mean

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_root() -> Path:
    """The folder that holds `data/` and `configs/`: inside an installed package, or the checkout of an editable one."""
    installed = _PACKAGE / "_bundled"
    return installed if installed.is_dir() else _PACKAGE.parent.parent


def find(path: Path | str) -> Path:
    """The file or folder of that name: in the working directory, or else shipped with the toolkit.

    Raises InputError where it is in neither place.
    """
    try:
        wanted = Path(path).expanduser()
        if wanted.exists():
            return wanted
        if not wanted.is_absolute() and ".." not in wanted.parts and (shipped_root() / wanted).exists():
            return shipped_root() / wanted
    except (OSError, ValueError, RuntimeError) as fault:  # a name too long, with a zero byte, of an unknown user's home
        why = fault.strerror if isinstance(fault, OSError) else fault
        raise InputError([Problem(_shown(path), None, None, f"this is no path that can be opened ({why})")]) from None
    raise InputError([Problem(str(path), None, None, f"no such file or folder{_neighbour(wanted)}")])


def is_hub_id(model: str) -> bool:
    """Whether a model's name is `owner/name` of the hub: two parts, the first of which is no folder here."""
    owner, slash, name = model.partition("/")
    if not slash or not name or "/" in name or owner in ("", ".", "..", "~"):
        return False
    return not Path(owner).is_dir() and not (shipped_root() / owner).is_dir()


def _shown(path: Path | str) -> str:
    text = str(path).encode("unicode_escape").decode()
    return text if len(text) <= 80 else f"{text[:77]}..."


def _neighbour(missing: Path) -> str:
    """A hint at a file of almost that name in the folder where it was looked for."""
    for folder in (missing.parent, shipped_root() / missing.parent):
        if folder.is_dir():
            hint = did_you_mean(missing.name, (entry.name for entry in folder.iterdir()))
            if hint:
                return hint
    return ""


def _existing(path: Path) -> Path:
    try:
        return find(path)
    except InputError as fault:
        raise PydanticCustomError("file", "{sentence}", {"sentence": fault.problems[0].sentence}) from None


def _model(name: str) -> str:
    if is_hub_id(name):
        return name
    _existing(Path(name))
    return name


ExistingPath = Annotated[Path, Field(strict=False), AfterValidator(_existing)]
"""A path of a config that must exist; its value is where it was found."""

ModelName = Annotated[str, AfterValidator(_model)]
"""A model folder that exists, or a hub id; its value stays as written."""
