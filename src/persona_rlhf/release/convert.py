"""Other forms of a released adapter: merged into the base's weights, or GGUF by llama.cpp's own converter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from huggingface_hub import ModelCard
from peft import PeftModel

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import (
    atomic_folder,
    atomic_path,
    find,
    is_hub_id,
    need_room,
    need_vacant,
    sha256_of,
)
from persona_rlhf.models.base import Base
from persona_rlhf.release.card import front_matter, one_line
from persona_rlhf.release.export import HeldBack
from persona_rlhf.release.manifest import MANIFEST, read_manifest
from persona_rlhf.release.render import render_template

CONVERTER = "convert_lora_to_gguf.py"
HOW_TO_GET = (
    f"llama.cpp's {CONVERTER} is missing: git clone https://github.com/ggml-org/llama.cpp, pip install gguf, and set "
    "LLAMA_CPP to that folder (or put it on PATH)"
)


def converter() -> Path:
    """The converter in the folder LLAMA_CPP, or else on PATH. Raises InputError that says how to get it."""
    folder = os.environ.get("LLAMA_CPP")
    if folder:
        script = Path(folder).expanduser() / CONVERTER
        if script.is_file():
            return script
        raise InputError([Problem(str(script), None, "LLAMA_CPP", f"there is no such file; {HOW_TO_GET}")])
    for place in os.get_exec_path():  # shutil.which would demand an executable file
        if (Path(place) / CONVERTER).is_file():
            return Path(place) / CONVERTER
    raise InputError([Problem("--format gguf", None, None, HOW_TO_GET)])


def to_gguf(adapter: Path, base: str, to: Path) -> Path:
    """Writes the adapter to the GGUF file `to`, for llama.cpp's `--lora`; `base` is a folder or a hub id.

    lora_B includes the released alpha; the file holds the scale lora_alpha / r, as llama.cpp applies it. Raises
    InputError if `to` exists, the converter is missing, or it fails.
    """
    if to.exists():
        raise InputError(
            [Problem(str(to), None, "--to", "this file exists, and nothing is overwritten; name a new file")]
        )
    script = converter()
    of_base = ["--base-model-id", base] if is_hub_id(base) else ["--base", str(find(base))]
    to.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(to) as temporary:
        done = subprocess.run(
            [sys.executable, str(script), str(adapter), *of_base, "--outfile", str(temporary)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or temporary.stat().st_size == 0:
            why = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
            raise InputError([Problem(str(script), None, None, f"the converter failed: {why}")])
    return to


def merge(base: Base, adapter: Path, to: Path) -> Path:
    """Writes W + (lora_alpha / r) B A for every adapted layer, with the tokenizer and a card, as a transformers folder.

    `adapter` is a verified folder. The base's weights are changed in memory, so it cannot be used afterwards. Raises
    HeldBack if the adapter was judged on another base, InputError if `to` is not new or empty.
    """
    manifest, faults = read_manifest(adapter / MANIFEST)
    assert manifest is not None, faults
    if (judged_on := manifest["base"]["weights_sha256"]) != base.weights_hash:
        raise HeldBack(
            f"the base {base.name} has other weights (sha256 {base.weights_hash[:16]}...) than those that this adapter "
            f"was judged on ({judged_on[:16]}...): the certified bounds would not hold for the merged model"
        )
    need_vacant(to, "--to")
    need_room(to, sum(weights.nbytes for weights in base.model.parameters()))
    with atomic_folder(to) as folder:
        model = PeftModel.from_pretrained(base.model, adapter).merge_and_unload()
        model.config._name_or_path = ""  # a path of this machine
        model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(_card(adapter, manifest), encoding="utf-8")
    return to


def _card(adapter: Path, manifest: dict[str, object]) -> str:
    """The adapter's card with the loading instructions of a merged model."""
    card = ModelCard.load(adapter / "README.md")
    body = render_template(
        "merged_card.md.j2",
        base=manifest["base"],
        on_hub=card.data.base_model is not None,
        manifest_sha256=sha256_of(adapter / MANIFEST),
        adapter_card=card.text.partition("## How to load")[0].partition("\n## ")[2],
        plain_name=one_line,
    )
    front = front_matter("transformers", "finetune", card.data.base_model, card.data.license or "other", [], [])
    return f"---\n{front}\n---\n\n{body.strip()}\n"
