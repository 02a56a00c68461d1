"""An adapter as a GGUF file, written by llama.cpp's own converter where it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from persona_rlhf.inputs.bundled import find, is_hub_id
from persona_rlhf.inputs.problems import InputError, Problem

CONVERTER = "convert_lora_to_gguf.py"
HOW_TO_GET = (
    f"llama.cpp's {CONVERTER} is not here: git clone https://github.com/ggml-org/llama.cpp, pip install gguf, and set "
    "LLAMA_CPP to that folder (or put it on PATH)"
)


def converter() -> Path:
    """The converter in the folder LLAMA_CPP, or else on PATH. Raises InputError saying how to get it."""
    folder = os.environ.get("LLAMA_CPP")
    if folder:
        found = Path(folder).expanduser() / CONVERTER
        if found.is_file():
            return found
        raise InputError([Problem(str(found), None, "LLAMA_CPP", f"there is no such file; {HOW_TO_GET}")])
    for place in os.get_exec_path():  # it need not be executable, so it is not asked of the shell's search
        if (Path(place) / CONVERTER).is_file():
            return Path(place) / CONVERTER
    raise InputError([Problem("--format gguf", None, None, HOW_TO_GET)])


def to_gguf(adapter: Path, base: str, to: Path) -> Path:
    """Writes the adapter to the file `to`, for llama.cpp's `--lora`; `base` is a folder or a hub id.

    The released alpha is in lora_B and the scale lora_alpha / r in the file, as llama.cpp applies it. Raises InputError
    where the file is there already, the converter is not, or it fails.
    """
    if to.exists():
        raise InputError([Problem(str(to), None, "--to", "something stands there already; name a new file")])
    script = converter()
    of_base = ["--base-model-id", base] if is_hub_id(base) else ["--base", str(find(base))]
    to.parent.mkdir(parents=True, exist_ok=True)
    half = to.with_name(f".{to.name}.half")
    try:
        done = subprocess.run(
            [sys.executable, str(script), str(adapter), *of_base, "--outfile", str(half)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not half.is_file():
            why = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
            raise InputError([Problem(str(script), None, None, f"the converter failed: {why}")])
        half.replace(to)
    finally:
        half.unlink(missing_ok=True)
    return to
