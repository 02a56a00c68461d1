"""The base with one released adapter merged into its weights: a model that needs no PEFT."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import ModelCard
from peft import PeftModel

import persona_rlhf
from persona_rlhf.release.card import front_matter, one_line
from persona_rlhf.release.export import HeldBack, check_free
from persona_rlhf.release.folder import new_folder
from persona_rlhf.release.manifest import MANIFEST, read_manifest
from persona_rlhf.release.pages import templates
from persona_rlhf.training.base import Base


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
    check_free(to)
    with new_folder(to) as half:
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
            version=persona_rlhf.__version__,
            plain_name=one_line,
        )
    )
    front = front_matter("transformers", "finetune", card.data.base_model, card.data.license or "other", [], [])
    return f"---\n{front}\n---\n\n{body.strip()}\n"
