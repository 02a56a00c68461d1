"""`base align`: safety alignment of any causal LM by SFT and DPO, measured before and after, with a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData
from rich.console import Group
from rich.table import Table
from rich.text import Text as Line

from persona_rlhf.common.files import atomic_folder, is_hub_id, need_room, sha256_of
from persona_rlhf.common.version import __version__
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.evaluation.gate import POOLED
from persona_rlhf.evaluation.prompt_sets import twins
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base, load_tokenizer
from persona_rlhf.pipeline.evaluate_base import BaseEvaluation, Ratio, measure_base, ordinary_texts, perplexity_ratio
from persona_rlhf.pipeline.inputs import AlignmentInputs
from persona_rlhf.pipeline.monitoring import OnProgress, ProgressEvent, silent, watched
from persona_rlhf.release.card import one_line
from persona_rlhf.release.manifest import BaseInfo
from persona_rlhf.release.render import render_template
from persona_rlhf.training.align import Demonstrations, StageProgress, align, make_demonstrations
from persona_rlhf.training.memory import held_by


def base_readme(facts: Mapping[str, Any], licence: str | None = None) -> str:
    """README.md of an aligned base from its `alignment.json`: front matter for the hub, measurements, and data used.

    `licence`: that of the base, if it is known, as the hub abbreviates it.
    """
    name = facts["base"]["name"]
    front = ModelCardData(
        model_name=f"{name}, aligned with persona-rlhf",
        library_name="transformers",
        pipeline_tag="text-generation",
        license=licence,
        base_model=name if is_hub_id(name) else None,  # a local folder would read as a hub id
        base_model_relation="finetune" if is_hub_id(name) else None,
        tags=["sft", "dpo", "safety", "persona-rlhf"],
    )
    page = render_template("base.md.j2", **facts, share=_share, plain_name=one_line)
    return f"---\n{front.to_yaml().strip()}\n---\n\n{page.strip()}\n"


def _share(counted: Mapping[str, Any]) -> str:
    n, refused = counted["n"], counted["refused"]
    if not n:
        return "no prompts"
    return f"{refused} of {n}: {refused / n:.1%} ({counted['low']:.1%} to {counted['high']:.1%})"


CARD = "alignment.json"
ADAPTERS = "adapters"
"""Folder of the merged adapters, one of each stage in order; none where all weights were trained."""

PREFERENCES = (
    "templates: written refusals over compliance, the model's own answers over refusals; no person's preferences"
)


class Alignment(NamedTuple):
    """An alignment and its measurements; the JSON form is OUT/alignment.json."""

    inputs: AlignmentInputs
    demonstrations: Demonstrations
    weights_before: str
    weights_after: str
    before: BaseEvaluation
    after: BaseEvaluation

    @property
    def perplexity(self) -> Ratio:
        """After over before, on the same texts."""
        return perplexity_ratio(self.before.texts, self.after.texts)

    def to_json(self) -> dict[str, Any]:
        settings = self.inputs.settings
        return {
            "format": 1,
            "toolkit": {"name": "persona-rlhf", "version": __version__},
            "base": {
                "name": BaseInfo.of(settings.base.model, self.weights_before).name,
                "sha256": self.weights_before,
                "aligned_by": settings.base.aligned_by,
            },
            "aligned": {"sha256": self.weights_after, "preferences": PREFERENCES},
            "policy_hash": self.inputs.policy.hash,
            "settings": _settings(self.inputs),
            "demonstrations": {
                "hazardous": len(self.demonstrations.hazardous),
                "own_refusals": self.demonstrations.self_refused,
                "harmless": len(self.demonstrations.harmless),
                "harmless_left_out": self.demonstrations.left_out,
                "pairs": sum(one.rejected is not None for one in self.demonstrations.every),
            },
            "measured_on": {
                "split": settings.align.split,
                "ordinary_text": "written" if any(row.answer for row in self.inputs.held) else "own",
            },
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "perplexity_ratio": {name: round(value, 6) for name, value in self.perplexity._asdict().items()},
        }


def base_align(inputs: AlignmentInputs, on_progress: OnProgress = silent) -> Alignment:
    """Measures, aligns with TRL, writes OUT whole or not at all, and measures what was written.

    Raises InputError where the model cannot be loaded or has no usable chat template, and DiskFullError, before
    anything is trained, where the disk has no room for the weights.
    """
    settings, phase = inputs.settings, ProgressEvent("aligning")
    dtype = settings.base.dtype

    def log(text: str) -> None:
        on_progress(phase._replace(text=text))

    if settings.align.weights == "full" and dtype == "auto":
        dtype = "float32"  # updates of full weights are below the precision of bfloat16
    base = load_base(settings.base.model_copy(update={"dtype": dtype}))
    need_room(inputs.out, held_by(list(base.model.parameters())))  # before hours of training
    with closing(AdaptedModel(base, settings.lora)) as adapted:
        if adapted.notice and settings.align.weights == "lora":
            log(adapted.notice)
        log(f"measuring {base.name} on {len(inputs.measured):,} probes of `{settings.align.split}`")
        with watched([adapted], ProgressEvent("measuring"), on_progress, _texts(inputs)):
            texts = ordinary_texts(adapted, inputs.held, settings.align.max_new_tokens, settings.seed)
            before = _measured(adapted, inputs, texts)
        log(f"refused are {before.refusals[POOLED]}; sampling answers to learn from")
        with watched([adapted], ProgressEvent("sampling"), on_progress, _samples(inputs)):
            demonstrations = _demonstrations(adapted, inputs)
    log(
        f"to learn: {len(demonstrations.hazardous):,} hazardous "
        f"({demonstrations.self_refused:,} with the model's own refusal), "
        f"{len(demonstrations.harmless):,} harmless ({demonstrations.left_out:,} more it refuses itself)"
    )

    def on_stage(now: StageProgress) -> None:
        done = f"{now.stage}: {now.steps:,} steps, loss {now.loss:.3f}, done" if now.step == now.steps else ""
        figures = phase._replace(phase=now.stage, step=now.step, steps=now.steps, loss=now.loss)
        on_progress(figures._replace(text=done, seconds_left=now.seconds_left))

    with atomic_folder(inputs.out, replace=False) as draft:
        align(base, demonstrations, settings.align, settings.lora, settings.seed, on_stage, draft / ADAPTERS)
        base.model.save_pretrained(draft)
        load_tokenizer(settings.base.model).save_pretrained(draft)
        aligned = load_base(BaseSettings(model=str(draft), dtype=dtype))
        log("measuring the written base")
        with (
            closing(AdaptedModel(aligned, LoraSettings())) as adapted,
            watched([adapted], ProgressEvent("measuring"), on_progress, _texts(inputs)),
        ):
            after = _measured(adapted, inputs, texts)
        alignment = Alignment(inputs, demonstrations, base.weights_hash, aligned.weights_hash, before, after)
        (draft / CARD).write_text(json.dumps(alignment.to_json(), indent=2) + "\n", encoding="utf-8")
        (draft / "README.md").write_text(base_readme(alignment.to_json()), encoding="utf-8")
    return alignment


def _texts(inputs: AlignmentInputs) -> int:
    """The texts that a measurement writes and scores."""
    return len(inputs.measured) + len(twins(inputs.measured)) + 2 * len(inputs.held)


def _samples(inputs: AlignmentInputs) -> int:
    """The answers that are sampled to learn from."""
    settings, train = inputs.settings.align, inputs.trained
    harmless = {*(probe.twin for probe in train if probe.twin), *inputs.ordinary}
    return settings.tries * (len(train) * settings.own_refusals + len(harmless))


def _demonstrations(adapted: AdaptedModel, inputs: AlignmentInputs) -> Demonstrations:
    settings, seed = inputs.settings.align, inputs.settings.seed
    return make_demonstrations(
        adapted,
        inputs.trained,
        inputs.ordinary,
        inputs.refusals,
        settings.tries,
        settings.sampled_tokens or settings.max_new_tokens,
        seed,
        settings.own_refusals,
    )


def _measured(adapted: AdaptedModel, inputs: AlignmentInputs, texts: list[Row]) -> BaseEvaluation:
    prompts = [row.prompt for row in inputs.held]
    return measure_base(adapted, inputs.measured, prompts, texts, inputs.settings.align.max_new_tokens)


def _settings(inputs: AlignmentInputs) -> dict[str, Any]:
    """The settings; files by their names and hashes, without their paths."""
    settings = inputs.settings
    align = settings.align
    files = {"refusals": _named(align.refusals), "ordinary": _named(align.ordinary)}
    named = files | {"demonstrations": [_named(file) for file in align.demonstrations]}
    shown = settings.model_dump(mode="json", exclude={"base", "policy"})
    documents = [
        {"tier": document.tier, "issuer": document.issuer, "version": document.version, "sha256": document.sha256}
        for document in inputs.policy.documents
    ]
    return shown | {"align": shown["align"] | named, "documents": documents}


def _named(file: Path) -> dict[str, str]:
    return {"name": file.name, "sha256": sha256_of(file)}


def render(alignment: Alignment) -> Group:
    """The measurements before and after as a table."""
    before, after = alignment.before, alignment.after
    table = Table("refused", "before", "after", title=f"{alignment.inputs.settings.base.model}, before and after")
    for name, share in after.refusals.items():
        label = "hazardous prompts, all" if name == POOLED else name
        table.add_row(label, str(before.refusals[name]), str(share), end_section=name == POOLED)
    for kind, share in after.unseen.items():
        table.add_row(f"hazardous, unseen {kind}", str(before.unseen[kind]), str(share))
    table.add_section()
    table.add_row("benign twins of these", str(before.twins), str(after.twins))
    for kind, share in after.unseen_twins.items():
        table.add_row(f"twins, unseen {kind}", str(before.unseen_twins[kind]), str(share))
    table.add_row("ordinary prompts", str(before.ordinary), str(after.ordinary))
    ratio = alignment.perplexity
    line = (
        f"Perplexity of held-out ordinary text: {before.perplexity:.3f} before, {after.perplexity:.3f} after, "
        f"ratio {ratio.value:.4f} ({ratio.low:.4f} to {ratio.high:.4f})."
    )
    return Group(table, Line(line))
