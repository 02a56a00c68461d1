"""The card of an aligned base: what was measured, on what, and whose preferences are in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from persona_rlhf.inputs.bundled import is_hub_id
from persona_rlhf.release.card import one_line
from persona_rlhf.release.pages import templates


def base_readme(facts: Mapping[str, Any]) -> str:
    """README.md of an aligned base, from its `alignment.json`: front matter that the hub reads, and a page."""
    name = facts["base"]["name"]
    front = ModelCardData(
        model_name=f"{name}, aligned with persona-rlhf",
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=name if is_hub_id(name) else None,  # a local folder would read as somebody's hub id
        base_model_relation="finetune" if is_hub_id(name) else None,
        tags=["sft", "dpo", "safety", "persona-rlhf"],
    )
    page = templates(html=False).get_template("base.md.j2").render(**facts, share=_share, plain_name=one_line)
    return f"---\n{front.to_yaml().strip()}\n---\n\n{page.strip()}\n"


def _share(counted: Mapping[str, Any]) -> str:
    n, refused = counted["n"], counted["refused"]
    if not n:
        return "nothing asked"
    return f"{refused} of {n}: {refused / n:.1%} ({counted['low']:.1%} to {counted['high']:.1%})"
