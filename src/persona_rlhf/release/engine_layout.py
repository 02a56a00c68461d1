"""The layout of adapters for vLLM: a folder per adapter, a zero adapter for the base, and the start script.

An adapter's name is SLUG@HASH, with 12 hex digits of its weights' sha256. A changed adapter has another name, so an
engine never loads one in place of another, and a prefix cache keyed by the name holds no states of other weights.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, find, is_hub_id, sha256_of, write_folder
from persona_rlhf.data.erasure import DataSubject
from persona_rlhf.release.compatibility import CONFIG, WEIGHTS, max_lora_rank

BASE_NAME = "base"
"""The base's model name beside the adapters."""

ZERO_NAME = "base@zero"
"""The zero adapter, through which the base answers beside adapters.

vLLM's CPU engine before 0.33 may apply another row's adapter to a row that has none.
"""

SCRIPT, ADAPTERS, LIST = "vllm.sh", "adapters", "adapters.json"
_DEVICE_ADAPTERS, _MEMORY_ADAPTERS = 8, 256  # adapters on the device at once, and in main memory
_HASH = 12  # hex digits


def engine_name(slug: str, weights_sha256: str) -> str:
    """The name under which an engine knows an adapter."""
    return f"{slug}@{weights_sha256[:_HASH]}"


def slug_of(name: str) -> str:
    """The slug in an adapter's name, here and in layouts of earlier versions."""
    return name.partition("@")[0]


def write_layout(
    folder: Path, base: str, rank: int, adapters: Mapping[str, Path], host: str, port: int, dtype: str | None = None
) -> Path:
    """Writes adapters/SLUG@HASH with PEFT's two files, and the start script; returns the script's path.

    `adapters` are verified folders by slug; other adapters of an earlier layout are removed. Raises InputError if the
    folder holds something else, or there is no adapter to serve.
    """
    if not adapters:
        raise InputError([Problem(str(folder), None, "--to", "no user with a token has an adapter that may be served")])
    earlier = _earlier_layout(folder)
    names = set()
    for slug, source in adapters.items():
        files = {name: (source / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        names.add(name := engine_name(slug, sha256_of(source / WEIGHTS)))
        write_folder(folder / ADAPTERS / name, files)
    write_folder(folder / ADAPTERS / ZERO_NAME, _zero_adapter(next(iter(adapters.values()))))
    for name in earlier - names:
        shutil.rmtree(folder / ADAPTERS / name, ignore_errors=True)
    _write_list(folder, names)
    atomic_write(folder / SCRIPT, _script(command_line(base, rank, sorted(names), host, port, dtype)).encode())
    (folder / SCRIPT).chmod(0o755)
    return folder / SCRIPT


def _write_list(folder: Path, names: set[str]) -> None:
    atomic_write(folder / LIST, (json.dumps(sorted(names), indent=2) + "\n").encode())


def _zero_adapter(source: Path) -> dict[str, bytes]:
    """PEFT's two files of an adapter that changes nothing, in the shape of another one."""
    import numpy as np
    from safetensors.numpy import load_file, save

    weights = {name: np.zeros_like(tensor) for name, tensor in load_file(source / WEIGHTS).items()}
    return {CONFIG: (source / CONFIG).read_bytes(), WEIGHTS: save(weights, {"format": "pt"})}


def command_line(
    base: str, rank: int, names: Sequence[str], host: str, port: int, dtype: str | None = None
) -> list[str]:
    """The vLLM command, to be run in the layout's folder; without a `dtype`, vLLM takes that of the base's files."""
    model = base if is_hub_id(base) else str(find(base).resolve())
    modules = [ZERO_NAME, *names]
    return [
        *("vllm", "serve", model, "--served-model-name", BASE_NAME, "--host", host, "--port", str(port)),
        *(() if dtype is None else ("--dtype", dtype)),
        *("--enable-lora", "--max-lora-rank", str(max_lora_rank(rank))),
        *("--max-loras", str(min(_DEVICE_ADAPTERS, len(modules)))),
        *("--max-cpu-loras", str(min(_MEMORY_ADAPTERS, len(modules)))),
        *("--lora-modules", *(f"{name}={ADAPTERS}/{name}" for name in modules)),
    ]


def _earlier_layout(folder: Path) -> set[str]:
    """The adapters of an earlier layout in a folder. Raises InputError if the folder holds something else."""
    try:
        return layout_adapters(folder)
    except FileNotFoundError:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return set()
    except (OSError, ValueError, TypeError):
        pass
    raise InputError([Problem(str(folder), None, "--to", "something else stands there; name a new or empty folder")])


def layout_adapters(folder: Path) -> set[str]:
    """The names of the adapters of a layout. Raises OSError, ValueError or TypeError for a folder without a list."""
    return set(json.loads((folder / LIST).read_bytes()))


def layout_adapters_of(folder: Path, user: DataSubject) -> set[str]:
    """The adapters of one user in a layout; raises as `layout_adapters`."""
    return {name for name in layout_adapters(folder) if user.owns_slug(slug_of(name))}


def erase_from_layout(folder: Path, user: DataSubject) -> None:
    """Removes a user from a layout: the adapter, the script's argument and, last, the line of the list."""
    names = layout_adapters_of(folder, user)
    for name in names:
        shutil.rmtree(folder / ADAPTERS / name, ignore_errors=True)
    if (script := folder / SCRIPT).exists():
        text = script.read_text(encoding="utf-8")
        for name in names:
            text = text.replace(f" {name}={ADAPTERS}/{name}", "")
        atomic_write(script, text)
        script.chmod(0o755)
    _write_list(folder, layout_adapters(folder) - names)


def _script(command: Sequence[str]) -> str:
    lines = [
        "#!/bin/sh",
        "# Serves the adapters of this folder. Anyone who reaches this port can use every user's adapter: let only",
        "# `persona-rlhf serve RUN --engine vllm --upstream URL` reach it, and give both the same VLLM_API_KEY.",
        'cd "$(dirname "$0")" || exit 1',
        f'exec {shlex.join(command)} "$@"',
    ]
    return "\n".join(lines) + "\n"
