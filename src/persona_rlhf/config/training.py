"""Config sections of training: the base and its alignment, the adapters, DPO, the constraint, the fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from persona_rlhf.common.files import ExistingPath, ModelName
from persona_rlhf.config.loader import Section

SlotCount = Annotated[int, Field(ge=1, le=100_000)]
TokenCount = Annotated[int, Field(ge=1)]


class BaseSettings(Section):
    """`base`: the shared safety-aligned model; it is frozen, and it is the reference of DPO."""

    model: ModelName = Field(
        description="A transformers folder (such as data/base), a .gguf file, or a hub id (Qwen/Qwen3-0.6B)."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Device of all computation: auto is the GPU that CUDA reports, else the CPU (on Apple's too).",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of the frozen weights: auto is bfloat16 on a GPU and float32 on a CPU."
    )
    aligned_by: str | None = Field(
        None,
        min_length=1,
        description="People whose preferences aligned the base, and their collector, if known; on every card.",
    )
    quantization: Literal["nf4", "fp8"] | None = Field(
        None,
        description="Storage of frozen weights: four bits (nf4, by bitsandbytes), or eight bits, multiplied as such "
        "(fp8). Adapters are judged on the quantized base.",
    )


class SftSettings(Section):
    """`align.sft`: refusals are imitated, and the model's own harmless answers kept (`align.keep`)."""

    epochs: float = Field(
        2, ge=0, le=1000, description="Passes over the refusals; 0.5 takes a random half, 0 leaves this stage out."
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak AdamW rate; all weights want about a tenth of it.")


class PreferenceSettings(Section):
    """`align.dpo`: refusals are preferred to compliance, harmless answers to refusals."""

    epochs: int = Field(1, ge=0, le=1000, description="Passes over all demonstrations; 0 leaves this stage out.")
    learning_rate: float = Field(5e-5, gt=0, description="Peak AdamW rate; all weights want about a tenth of it.")
    beta: float = Field(0.1, gt=0, description="Scale of the implicit reward, per nat, against the model after SFT.")
    sft_weight: float = Field(
        1.0, ge=0, description="Weight of the SFT loss of the preferred answers beside DPO's; it keeps them likely."
    )


class AlignSettings(Section):
    """`align`: how `base align` makes a safety-aligned base. TRL trains it, by SFT and then by DPO."""

    weights: Literal["lora", "full"] = Field(
        "lora", description="What is trained: adapters of `lora`, merged when they are done, or all weights."
    )
    refusals: ExistingPath = Field(
        Path("data/policy/refusals.jsonl"),
        validate_default=True,
        description="JSON lines of refusals (`text`, perhaps `category`), for probes that the model does not refuse.",
    )
    demonstrations: list[ExistingPath] = Field(
        [],
        description="Files of JSON lines {category, prompt, refusal, twin} to train on beside the train probes; "
        "the refusal of a prompt that is a probe takes the place of a drawn one.",
    )
    ordinary: ExistingPath = Field(
        Path("data/policy/ordinary.jsonl"),
        validate_default=True,
        description="JSON lines of ordinary prompts; an `answer` beside one is text to measure perplexity on.",
    )
    heldout: float = Field(
        0.5, gt=0, lt=1, description="Share of the ordinary prompts, by hash, that are measured and never trained on."
    )
    tries: int = Field(
        2,
        ge=1,
        le=64,
        description="Answers sampled per train probe, twin and ordinary prompt; each makes a demonstration of its own.",
    )
    own_refusals: bool = Field(
        True,
        description="Whether train probes are sampled and the model's own refusals taught; without it all are written.",
    )
    max_new_tokens: int = Field(256, ge=1, description="Tokens after which a sampled or a measured answer is cut.")
    sampled_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of the sampled answers, if fewer: a model that refuses nothing shows it at once.",
    )
    rows_per_step: int = Field(
        8, ge=1, description="Demonstrations in an optimizer step, and kept answers beside them, in both stages."
    )
    keep: float = Field(
        5.0,
        ge=0,
        description="Weight, in both stages, of the KL divergence from the original model (nats a token), on its "
        "answers to harmless prompts.",
    )
    sft: SftSettings = SftSettings()
    dpo: PreferenceSettings = PreferenceSettings()
    split: Literal["dev", "test"] = Field(
        "dev",
        description="Split of the probes that it is measured on; use test once, when nothing will change any more.",
    )


class TopLayers(Section):
    """`lora.layers`: only the uppermost decoder layers get adapters; the layers below are computed once a row."""

    top: float = Field(gt=0, le=1, description="Share of the decoder layers, counted from the output; at least one.")


class LoraSettings(Section):
    """`lora`: the low-rank adapter that each user gets, in PEFT's words."""

    rank: int = Field(8, ge=1, le=512, description="Rank r of the adapter; a user's few pairs rarely need more than 8.")
    alpha: int = Field(16, ge=1, description="lora_alpha; the update is scaled by alpha / rank, twice is customary.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Layers to adapt, by name; all-linear is every linear layer but the output head."
    )
    layers: Literal["all"] | TopLayers = Field(
        "all", description="Decoder layers to adapt: all, or {top: share}, which trains faster and learns less."
    )
    products: Literal["float32", "base"] = Field(
        "float32",
        description="Advanced: type of the adapters' matrix products, also at the gate; base is the type of the base.",
    )


class EarlyStopSettings(Section):
    """`dpo.early_stop`: ends a user's training when the held-out loss no longer falls.

    Half of the user's held-out pairs decide it; accuracy is reported on the other half.
    """

    patience: int = Field(
        3, ge=1, description="Checks in a row without a lower held-out loss, after which training stops."
    )
    every: int = Field(10, ge=1, description="Advanced: steps between checks; each is a pass over the deciding pairs.")


class DpoSettings(Section):
    """`dpo`: how a user's preference pairs train the user's adapter."""

    loss: Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm"] = Field(
        "sigmoid", description="Loss of a pair; robust allows for flipped labels, *_norm averages over tokens."
    )
    beta: float = Field(0.1, gt=0, description="Scale of the implicit reward, per nat; lower lets the user go further.")
    anchor: float = Field(
        0.0,
        ge=0,
        description="Weight of the chosen answers' negative log-likelihood (nats a token) beside the loss: it keeps "
        "text from collapsing under an extreme taste. Try 0.3 where users are held back for harm; 0 is plain DPO.",
    )
    epochs: int = Field(3, ge=1, le=1000, description="Passes over a user's pairs.")
    pairs_per_step: int = Field(4, ge=1, description="Pairs of one user in a step; LoRA likes small batches.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak AdamW rate; about ten times that of full fine-tuning.")
    warmup: float = Field(
        0.1, ge=0, lt=1, description="Advanced: share of a user's steps in which the rate rises from 0."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Advanced: course of the rate after warm-up."
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Advanced: a user's gradient is clipped to this L2 norm.")
    weight_decay: float = Field(
        0.0, ge=0, description="Advanced: decoupled decay per unit of rate; alpha shrinks better."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Advanced: share of flipped labels that the robust loss assumes."
    )
    early_stop: EarlyStopSettings | None = Field(
        None, description="Early stopping by the held-out loss, with the best adapter kept; null trains all epochs."
    )


class BasisSettings(Section):
    """`basis`: a reward that consenting users share (`basis fit`); it labels pairs of the base's answers for each user.

    Labels come from the user's training pairs alone. With few of them most labels are near even, and teach little.
    """

    file: ExistingPath = Field(description="The basis, fitted over the same base.")
    prompts: ExistingPath = Field(
        Path("data/basis/prompts.jsonl"),
        validate_default=True,
        description="Advanced: JSON lines of ordinary prompts that the base answers once; none may be a user's.",
    )
    pairs: int = Field(
        160, ge=1, description="Labelled pairs of a user at most, one a prompt; each is seen once, whatever the epochs."
    )
    candidates: int | None = Field(
        None,
        ge=1,
        description="Advanced: prompts that the base answers, at most; null is as many as `pairs`. Each user's "
        "labelled pairs are of the prompts whose answers the user's posterior holds furthest apart. Try 600 for text.",
    )
    prior_level: float | None = Field(
        None,
        gt=0,
        lt=0.5,
        description="Advanced: level at which a user's pairs must show that the user's adapter is better than the "
        "population's. Else the user keeps the population's (`status: prior`). Null asks for no such test.",
    )


class ConstraintSettings(Section):
    """`constraint`: keeps the base's tier-one refusals in a user's adapter while it trains."""

    enabled: bool = Field(True, description="Off only for ablations: the gate still holds back adapters that violate.")
    rows_per_step: int = Field(
        2, ge=1, description="Advanced: refusal rows a user sees in a step; categories take turns."
    )
    refusals_per_probe: int = Field(2, ge=1, le=64, description="Base answers sampled per probe; refusals are kept.")
    most_probes: int | None = Field(
        None,
        ge=1,
        description="Train probes of a category whose refusals are sampled, by hash; null is all of them. On a CPU the "
        "base's answers to more than users will see cost minutes.",
    )
    compliance_rows_per_step: int = Field(1, ge=0, description="Advanced: rows that watch the opening of a compliance.")
    twin_rows_per_step: int = Field(
        1, ge=0, description="Advanced: rows that watch openings of refusals to benign twins."
    )
    lesson_rows_per_step: int = Field(
        2, ge=0, description="Rows of requirement examples in a step; requirements take turns."
    )
    margin: float = Field(0.5, ge=0, description="Advanced: nats an opening may rise over the base at no cost.")
    floor: float = Field(
        -12.0, le=0, description="Advanced: log-probability in nats; an opening less likely than this costs nothing."
    )
    opening_weight: float = Field(0.3, ge=0, description="Advanced: weight of the opening hinges in the loss.")
    gain: float = Field(
        0.1, gt=0, description="Advanced: rise of a dual variable per step and nat of smoothed violation."
    )
    quadratic: float = Field(
        0.0,
        ge=0,
        description="Advanced: weight of half the squared violation (nats) in the loss. It acts at once, while dual "
        "variables rise over many steps. Try 10 where all layers are adapted; with 0 only dual variables count.",
    )


class FleetSettings(Section):
    """`fleet`: how many users train side by side, in how many processes, and how often that is saved."""

    slots: SlotCount | Literal["auto"] = Field(
        "auto",
        description="Users in memory at once; auto is as many as memory and tokens_per_step hold at the longest pairs.",
    )
    tokens_per_step: TokenCount | Literal["auto"] = Field(
        "auto",
        description="Advanced: most tokens of all users in a step for `slots: auto`; auto fills a GPU, or the cache "
        "of a CPU.",
    )
    trunk_cache: int = Field(
        2048, ge=0, description="MiB of memory for hidden states below the adapters; the rest goes to disk."
    )
    trunk_disk: int = Field(
        4096, ge=0, description="MiB of temporary files for such states; the rest is computed in every step."
    )
    reference_cache: str | None = Field(
        None,
        description="Folder where runs share the base's answers and log-probabilities; none by default.",
    )
    checkpoint_every: int = Field(
        20,
        ge=1,
        description="Advanced: steps between checkpoints of the slots; more where writing takes 5% of the time.",
    )
    processes: int = Field(
        1, ge=1, le=1024, description="Advanced: processes on this host, each with one GPU or a part of the cores."
    )
    chunk: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Advanced: users read, trained and written together; bounds memory. auto is at most 256.",
    )
    shards: Annotated[int, Field(ge=1, le=1_000_000)] | Literal["auto"] = Field(
        "auto", description="Advanced: tasks of `train --ray`; auto is four for each that runs at once."
    )
    shard_cpus: int = Field(1, ge=1, description="Advanced: CPUs that Ray sets apart for a shard.")
    shard_gpus: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="Advanced: GPUs that Ray sets apart for a shard; auto is one where the cluster has any."
    )
    shard_retries: int = Field(
        3, ge=0, description="Advanced: times that Ray gives a shard again after its worker or machine was lost."
    )
