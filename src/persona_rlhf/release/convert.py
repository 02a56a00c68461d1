"""Merged model, GGUF."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from huggingface_hub import ModelCard
from peft import PeftModel

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_folder, atomic_path, find, is_hub_id, need_vacant
from persona_rlhf.common.version import __version__
from persona_rlhf.models.base import Base
from persona_rlhf.release.card import front_matter, one_line
from persona_rlhf.release.export import HeldBack
from persona_rlhf.release.manifest import MANIFEST, read_manifest
from persona_rlhf.release.render import templates

# ----------------------------------------------------------------------------------------------------
# An adapter as a GGUF file, written by llama.cpp's own converter where it is installed.
# ----------------------------------------------------------------------------------------------------

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
    with atomic_path(to) as temporary:
        done = subprocess.run(
            [sys.executable, str(script), str(adapter), *of_base, "--outfile", str(temporary)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not temporary.is_file():
            why = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
            raise InputError([Problem(str(script), None, None, f"the converter failed: {why}")])
    return to


# ----------------------------------------------------------------------------------------------------
# The base with one released adapter merged into its weights: a model that needs no PEFT.
# ----------------------------------------------------------------------------------------------------


def merge(base: Base, adapter: Path, to: Path) -> Path:
    """Writes W + (lora_alpha / r) B A for every adapted layer, with the tokenizer and a card, as a transformers folder.

    `adapter` verifies. The base's own weights are changed in memory: it is used up. Raises HeldBack where the base is
    not the one that the adapter was judged on, InputError where `to` is taken.
    """
    manifest, faults = read_manifest(adapter / MANIFEST)
    assert manifest is not None, faults
    if (judged_on := manifest["base"]["weights_sha256"]) != base.weights_hash:
        raise HeldBack(
            f"the base {base.name} has other weights (sha256 {base.weights_hash[:16]}...) than the one that this "
            f"adapter was judged on ({judged_on[:16]}...): nothing that was promised would hold of the merged model"
        )
    need_vacant(to, "--to")
    with atomic_folder(to) as half:
        model = PeftModel.from_pretrained(base.model, adapter).merge_and_unload()
        model.config._name_or_path = ""  # the way to the base is nobody's business
        model.save_pretrained(half)
        base.tokenizer.save_pretrained(half)
        (half / "README.md").write_text(_card(adapter, manifest), encoding="utf-8")
    return to


def _card(adapter: Path, manifest: dict[str, object]) -> str:
    """The adapter's own card, but for how to load it."""
    card = ModelCard.load(adapter / "README.md")
    body = (
        templates(html=False)
        .get_template("merged_card.md.j2")
        .render(
            base=manifest["base"],
            on_hub=card.data.base_model is not None,
            manifest_sha256=hashlib.sha256((adapter / MANIFEST).read_bytes()).hexdigest(),
            adapter_card=card.text.partition("## How to load")[0].partition("\n## ")[2],
            version=__version__,
            plain_name=one_line,
        )
    )
    front = front_matter("transformers", "finetune", card.data.base_model, card.data.license or "other", [], [])
    return f"---\n{front}\n---\n\n{body.strip()}\n"
