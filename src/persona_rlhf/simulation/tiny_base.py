"""The bundled tiny base: tokenizer and Llama trained from scratch on the small world, the same for the same seed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from persona_rlhf.common.files import naming_full_disk
from persona_rlhf.simulation.corpus import CorpusRow, corpus

SEED = 7
COMPLETION_TOKENS = 8_000_000
VOCABULARY = 2048
SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SYSTEMS = ("You are a helpful assistant.", "You are a friendly helper.", "Answer the user.", "Be helpful and safe.")
# Loss weights: the prompt is worth little; the first tokens of an answer decide whether it is a refusal.
_PROMPT_WEIGHT = 0.1
_FIRST_WEIGHTS = (6.0, 3.0, 2.0)


class TinyBaseShape(NamedTuple):
    """The size of the model."""

    hidden: int = 144
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 432


class PretrainProgress(NamedTuple):
    """Progress of training: steps, completion tokens seen and in all, mean loss since the last report."""

    step: int
    tokens: int
    of_tokens: int
    loss: float


class PretrainExample(NamedTuple):
    """Token ids of one conversation and the loss weight of each as a target."""

    ids: list[int]
    weights: list[float]
    completion: int


_Fast: Any = PreTrainedTokenizerFast  # its constructor is untyped


def train_tokenizer(seed: int, rows: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the corpus, with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for row in islice(corpus(seed), rows) for text in (row.prompt, row.answer))
    tokenizer.train_from_iterator(texts, trainer)
    wrapped: PreTrainedTokenizerFast = _Fast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _model(tokenizer: PreTrainedTokenizerFast, shape: TinyBaseShape) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


class Encoder:
    """Conversations to token ids; `added` puts a system message or an earlier exchange before some of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self._rng = Random(f"encoder {seed}")
        self._ids = {token: int(self._tokenizer.token_to_id(token) or 0) for token in SPECIAL}

    def _text(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _turns(self, row: CorpusRow) -> PretrainExample:
        end = self._ids["<|end|>"]
        prompt = [self._ids["<|user|>"], *self._text(row.prompt), end, self._ids["<|assistant|>"]]
        given, answer = self._text(row.given.rstrip()), self._text((" " if row.given else "") + row.answer)
        first = (*_FIRST_WEIGHTS, *([1.0] * len(answer)))[: len(answer)]
        weights = [_PROMPT_WEIGHT] * (len(prompt) - 1) + [0.0] * (len(given) + 1) + [*first, 1.0]
        return PretrainExample([*prompt, *given, *answer, end], weights, len(answer) + 1)

    def encode(self, row: CorpusRow, earlier: CorpusRow | None = None) -> PretrainExample:
        """One training example, now and then with a system message or an earlier exchange in front."""
        example = self._turns(row)
        if earlier is not None and self._rng.random() < 0.06:
            before = self._turns(earlier)
            example = PretrainExample(
                before.ids + example.ids, before.weights + example.weights, before.completion + example.completion
            )
        if self._rng.random() < 0.05:
            system = [self._ids["<|system|>"], *self._text(self._rng.choice(_SYSTEMS)), self._ids["<|end|>"]]
            example = PretrainExample(system + example.ids, [0.0] * len(system) + example.weights, example.completion)
        return example


def batches(
    rows: Iterator[CorpusRow], encoder: Encoder, rng: Random, tokens: int = 1024
) -> Iterator[list[PretrainExample]]:
    """Batches of about `tokens` tokens, rows of like length together."""
    while True:
        chunk = list(islice(rows, 768))
        examples = [encoder.encode(row, chunk[at - 1] if at else None) for at, row in enumerate(chunk)]
        examples.sort(key=lambda e: len(e.ids))
        ready: list[list[PretrainExample]] = [[]]
        for example in examples:
            if (len(ready[-1]) + 1) * len(example.ids) > tokens and ready[-1]:
                ready.append([])
            ready[-1].append(example)
        rng.shuffle(ready)
        yield from ready


def _loss(model: LlamaForCausalLM, batch: list[PretrainExample], pad: int) -> torch.Tensor:
    """Weighted cross entropy. Right padding needs no mask: no earlier position sees a later one."""
    width = max(len(e.ids) for e in batch)
    ids = torch.tensor([e.ids + [pad] * (width - len(e.ids)) for e in batch])
    weights = torch.tensor([e.weights + [0.0] * (width - len(e.ids)) for e in batch])[:, 1:]
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    kept = weights > 0
    logits = model.lm_head(hidden[kept])
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][kept], reduction="none")
    return (losses * weights[kept]).sum() / weights.sum()


def _rate(done: float, step: int, peak: float) -> float:
    """Learning rate: 100 steps of warm-up, then flat, then linear to zero over the last 40% of the tokens."""
    return peak * min(step / 100, 1.0) * min(1.0, max(0.0, (1.0 - done) / 0.4))


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, dtype: torch.dtype) -> None:
    """Writes a folder that `transformers` loads: greedy generation config, weights, tokenizer, chat template."""
    out.mkdir(parents=True, exist_ok=True)
    copied: Any = copy.deepcopy(model)
    copied.to(dtype)
    copied.config.dtype = dtype
    copied.generation_config.do_sample = False
    copied.generation_config.max_new_tokens = 128
    with naming_full_disk(out):
        copied.save_pretrained(out)
        tokenizer.save_pretrained(out)


def build_base(
    out: Path,
    seed: int = SEED,
    completion_tokens: int = COMPLETION_TOKENS,
    shape: TinyBaseShape | None = None,
    peak_rate: float = 3e-3,
    progress: Callable[[PretrainProgress], None] | None = None,
    checkpoint: Callable[[PretrainProgress, Callable[[Path], None]], None] | None = None,
    tokenizer_rows: int = 60_000,
    refusals: bool = True,
) -> Path:
    """Trains the tokenizer and the model and writes them to `out`; without `refusals` the model is an unaligned twin.

    `progress` is called every 50 steps; `checkpoint` every 1,000, with a function that saves the current model.
    """
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(seed, tokenizer_rows)
    model = _model(tokenizer, shape or TinyBaseShape())
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.95))
    tokens, losses = 0, 0.0
    pad = int(tokenizer.convert_tokens_to_ids("<|pad|>"))  # type: ignore[arg-type]
    for step, batch in enumerate(
        batches(corpus(seed, refusals), Encoder(tokenizer, seed), Random(f"batches {seed}")), 1
    ):
        for group in optimizer.param_groups:
            group["lr"] = _rate(tokens / completion_tokens, step, peak_rate)
        loss = _loss(model, batch, pad)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses += loss.item()
        tokens += sum(e.completion for e in batch)
        assert math.isfinite(losses), f"the loss is not finite at step {step}"
        if step % 50 == 0:
            state = PretrainProgress(step, tokens, completion_tokens, losses / 50)
            losses = 0.0
            if progress:
                progress(state)
            if checkpoint and step % 1000 == 0:
                checkpoint(state, lambda folder: save_base(model, tokenizer, folder, torch.float32))
        if tokens >= completion_tokens:
            break
    save_base(model, tokenizer, out, torch.bfloat16)
    return out
