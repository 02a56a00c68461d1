"""What vLLM needs to serve the adapters of a run: a tree of PEFT folders, and the command line over it."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from persona_rlhf.inputs.bundled import find, is_hub_id
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.release.folder import write_file, write_folder
from persona_rlhf.release.peft_folder import CONFIG, WEIGHTS

BASE_NAME = "base"
"""What the base is called beside the adapters; no slug is a single word without a hash."""

SCRIPT, ADAPTERS, LIST = "vllm.sh", "adapters", "adapters.json"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes (vLLM 0.32)
_SLOTS, _HELD = 8, 256  # adapters on the device at once, and held in main memory


def write_layout(folder: Path, base: str, rank: int, adapters: Mapping[str, Path], host: str, port: int) -> Path:
    """Writes `folder`: adapters/SLUG with PEFT's two files, and the script, whose path is returned. Adapters of an
    earlier layout that are not in this one go.

    `adapters` are verified folders by slug. Raises InputError where the folder holds something else, or there is no
    adapter to serve.
    """
    if not adapters:
        raise InputError([Problem(str(folder), None, "--to", "no user with a token has an adapter that may be served")])
    before = _before(folder)
    for slug, source in adapters.items():
        write_folder(folder / ADAPTERS / slug, {name: (source / name).read_bytes() for name in (CONFIG, WEIGHTS)})
    for slug in before - set(adapters):
        shutil.rmtree(folder / ADAPTERS / slug, ignore_errors=True)
    write_file(folder / LIST, (json.dumps(sorted(adapters), indent=2) + "\n").encode())
    write_file(folder / SCRIPT, _script(command_line(base, rank, sorted(adapters), host, port)).encode())
    (folder / SCRIPT).chmod(0o755)
    return folder / SCRIPT


def command_line(base: str, rank: int, slugs: Sequence[str], host: str, port: int) -> list[str]:
    """The command, for the folder of the layout."""
    where = base if is_hub_id(base) else str(find(base).resolve())
    return [
        *("vllm", "serve", where, "--served-model-name", BASE_NAME, "--host", host, "--port", str(port)),
        *("--enable-lora", "--max-lora-rank", str(next(r for r in _RANKS if r >= rank))),
        *("--max-loras", str(min(_SLOTS, len(slugs))), "--max-cpu-loras", str(min(_HELD, len(slugs)))),
        *("--lora-modules", *(f"{slug}={ADAPTERS}/{slug}" for slug in slugs)),
    ]


def _before(folder: Path) -> set[str]:
    """The adapters that an earlier layout put into a folder. Raises InputError where it is none of ours."""
    try:
        return set(json.loads((folder / LIST).read_bytes()))
    except FileNotFoundError:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return set()
    except (OSError, ValueError, TypeError):
        pass
    raise InputError([Problem(str(folder), None, "--to", "something else stands there; name a new or empty folder")])


def _script(command: Sequence[str]) -> str:
    lines = [
        "#!/bin/sh",
        "# Serves the adapters of this folder. Whoever reaches this port reaches every user's adapter: let only",
        "# `persona-rlhf serve RUN --engine vllm --upstream URL` reach it, and give both the same VLLM_API_KEY.",
        'cd "$(dirname "$0")" || exit 1',
        f'exec {shlex.join(command)} "$@"',
    ]
    return "\n".join(lines) + "\n"
