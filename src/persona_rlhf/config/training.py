"""Config sections of the training floor: the base and its alignment, the adapters, DPO, the constraint, the fleet."""

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

    model: ModelName = Field(description="A transformers folder (such as data/base) or a hub id (Qwen/Qwen3-0.6B).")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where all is computed: auto is the GPU that CUDA finds, else the CPU (on Apple's too)."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of the frozen weights: auto is bfloat16 on a GPU and float32 on a CPU."
    )
    aligned_by: str | None = Field(
        None,
        min_length=1,
        description="Whose preferences aligned the base, and who collected them, as far as known; goes on every card.",
    )
    quantization: Literal["nf4", "fp8"] | None = Field(
        None,
        description="Frozen weights stored in four bits (nf4, by bitsandbytes), or stored and multiplied in eight "
        "(fp8); adapters are judged on that base.",
    )


class SftSettings(Section):
    """`align.sft`: refusals are imitated, and the model's own harmless answers kept (`align.keep`)."""

    epochs: int = Field(2, ge=0, le=1000, description="Passes over the refusals; 0 leaves this stage out.")
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
    ordinary: ExistingPath = Field(
        Path("data/policy/ordinary.jsonl"),
        validate_default=True,
        description="JSON lines of ordinary prompts; an `answer` beside one is text to measure perplexity on.",
    )
    heldout: float = Field(
        0.5, gt=0, lt=1, description="Share of the ordinary prompts, by hash, that are measured and never learned."
    )
    tries: int = Field(
        2,
        ge=1,
        le=64,
        description="Answers sampled per train probe, twin and ordinary prompt; each makes a demonstration of its own.",
    )
    max_new_tokens: int = Field(256, ge=1, description="Tokens after which a sampled or a measured answer is cut.")
    rows_per_step: int = Field(
        8, ge=1, description="Demonstrations in an optimizer step, and kept answers beside them, in both stages."
    )
    keep: float = Field(
        5.0,
        ge=0,
        description="Weight, in both stages, of the divergence in nats a token from the model as it was, on its own "
        "answers to harmless prompts.",
    )
    sft: SftSettings = SftSettings()
    dpo: PreferenceSettings = PreferenceSettings()
    split: Literal["dev", "test"] = Field(
        "dev", description="Probes that it is measured on; test once, when nothing is to be changed any more."
    )


class TopLayers(Section):
    """`lora.layers`: only the uppermost decoder layers get adapters; what lies below is computed once a row."""

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


class EarlyStopSettings(Section):
    """`dpo.early_stop`: ends a user's training when it no longer helps him. Half of his held-out pairs decide it; the
    other half is what accuracy is reported on."""

    patience: int = Field(3, ge=1, description="Checks in a row without a lower held-out loss, after which he stops.")
    every: int = Field(10, ge=1, description="Steps between a user's checks; each is a pass over the deciding pairs.")


class DpoSettings(Section):
    """`dpo`: how a user's preference pairs move his adapter."""

    loss: Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm"] = Field(
        "sigmoid", description="Loss of a pair; robust allows for flipped labels, *_norm averages over tokens."
    )
    beta: float = Field(0.1, gt=0, description="Scale of the implicit reward, per nat; lower lets the user go further.")
    epochs: int = Field(3, ge=1, le=1000, description="Passes over a user's pairs.")
    pairs_per_step: int = Field(4, ge=1, description="Pairs of one user in a step; LoRA likes small batches.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak AdamW rate; about ten times that of full fine-tuning.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of a user's steps in which the rate rises from 0.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="The rate's course after warm-up.")
    max_grad_norm: float = Field(1.0, gt=0, description="A user's gradient is clipped to this L2 norm.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled decay per unit of rate; alpha shrinks better.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of labels taken as flipped; robust loss only.")
    early_stop: EarlyStopSettings | None = Field(
        None, description="Stops a user by his held-out loss and keeps his best adapter; none trains all epochs."
    )


class ConstraintSettings(Section):
    """`constraint`: what keeps a user's adapter at the base's tier-one refusals while it trains."""

    enabled: bool = Field(True, description="Off only for ablations: the gate still holds back what violates.")
    rows_per_step: int = Field(2, ge=1, description="Refusal rows a user sees in a step; categories take turns.")
    refusals_per_probe: int = Field(2, ge=1, le=64, description="Base answers sampled per probe; refusals are kept.")
    compliance_rows_per_step: int = Field(1, ge=0, description="Rows that watch the opening of a compliance.")
    twin_rows_per_step: int = Field(1, ge=0, description="Rows that watch the opening of a refusal to a benign twin.")
    lesson_rows_per_step: int = Field(2, ge=0, description="Rows that teach requirements; these take turns.")
    opening_tokens: int = Field(8, ge=1, description="Length of those openings, in tokens.")
    margin: float = Field(0.5, ge=0, description="Nats an opening may rise over the base before it costs anything.")
    floor: float = Field(
        -12.0, le=0, description="Nats: an opening less likely than this costs nothing, however far it rose."
    )
    opening_weight: float = Field(0.3, ge=0, description="Weight of the opening hinges in the loss.")
    gain: float = Field(0.1, gt=0, description="Rise of a dual variable per step and nat of smoothed violation.")
    smoothing: float = Field(0.9, ge=0, lt=1, description="Share of the old estimate in a smoothed violation.")
    ceiling: float = Field(10.0, gt=0, description="Largest value of a dual variable.")


class FleetSettings(Section):
    """`fleet`: how many users train side by side, in how many processes, and how often that is saved."""

    slots: SlotCount | Literal["auto"] = Field(
        "auto", description="Users in memory at once; auto is what memory allows at the run's longest pairs."
    )
    tokens_per_step: TokenCount | Literal["auto"] = Field(
        "auto", description="Tokens of all users in a step, which `slots: auto` keeps below; auto fills the device."
    )
    trunk_cache: int = Field(
        2048, ge=0, description="MiB of memory for hidden states below the adapters; what does not fit goes to disk."
    )
    trunk_disk: int = Field(
        4096, ge=0, description="MiB of temporary files for such states; past that they are computed in every step."
    )
    reference_cache: str | None = Field(
        None,
        description="Folder where runs keep what the base answered and scored for each other; none by default.",
    )
    checkpoint_every: int = Field(20, ge=1, description="Steps between checkpoints of the slots.")
    processes: int = Field(1, ge=1, le=1024, description="Processes on this host, one a GPU or a part of the cores.")
    chunk: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="Users read, trained and written together, which bounds memory; auto is at most 256."
    )
