"""Language models that judge texts by the likelihood of words, such as published classifiers of refusals."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.evaluation import ClassifierSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.models.base_folder import TOKENIZER_FILES, cannot_load, model_folder, weight_files
from persona_rlhf.models.model_split import token_logps


class WordScorer:
    """A causal language model that scores words after a prompt: a `template` with places such as {prompt}, or a chat.

    `template` None: the prompt is a chat in the model's own chat template.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        self._model, self._tokenizer, self._template = model, tokenizer, template

    def ids(self, turns: Sequence[Message], places: Mapping[str, str]) -> list[int]:
        """The prompt as token ids: the turns of a chat, or the texts in their places of the template.

        One pass over the template: a text that contains the name of a place is not expanded.
        """
        if self._template is None:
            chat = [{"role": turn.role, "content": turn.content} for turn in turns]
            text = str(self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        else:
            text = re.sub(r"\{(\w+)\}", lambda place: places.get(place[1], place[0]), self._template)
        ids: list[int] = self._tokenizer(text, add_special_tokens=self._template is not None)["input_ids"]
        return ids

    @torch.no_grad()
    def logp(self, ids: list[int], word: str) -> float:
        """Log-probability in nats of a word after these tokens."""
        word_ids = self._tokenizer(word, add_special_tokens=False)["input_ids"]
        whole = torch.tensor([ids + word_ids], device=self._model.device)
        logits = self._model(input_ids=whole, logits_to_keep=len(word_ids) + 1).logits[0, :-1]
        return float(token_logps(logits, whole[0, -len(word_ids) :]).sum())

    @torch.no_grad()
    def continuation(self, ids: list[int], word: str, tokens: int) -> str:
        """The greedy continuation after a word, of at most so many tokens."""
        word_ids = self._tokenizer(word, add_special_tokens=False)["input_ids"]
        whole = torch.tensor([ids + word_ids], device=self._model.device)
        for _ in range(tokens):
            token = self._model(input_ids=whole, logits_to_keep=1).logits[0, -1].argmax()
            whole = torch.cat([whole, token[None, None]], 1)
            if int(token) == self._tokenizer.eos_token_id:
                break
        return str(self._tokenizer.decode(whole[0, len(ids) + len(word_ids) :], skip_special_tokens=True))


def load_words(model: str, file: Path | None, places: Sequence[str], key: str, device: torch.device) -> WordScorer:
    """Loads a model, a folder or a hub id, in the type of its weights.

    `file` holds its template, if it has one; `places` must appear in it in this order; `key` is the config's section
    that names it. Raises InputError where it cannot be loaded or prompted.
    """
    folder = model_folder(model, [*TOKENIZER_FILES, "*.safetensors"], f"{key}.model")
    weight_files(model, folder, f"{key}.model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
    except Exception as fault:  # any exception of transformers is caused by the folder
        raise cannot_load(model, fault, f"{key}.model") from fault
    at, template = f"{key}.template", None if file is None else file.read_text(encoding="utf-8")
    if template is None and not tokenizer.chat_template:
        sentence = f"the classifier has no chat template; give its prompt in a file, {at}"
        raise InputError([Problem(model, None, at, sentence)])
    offsets = [] if template is None else [template.find(f"{{{name}}}") for name in places]
    if -1 in offsets or offsets != sorted(offsets):
        sentence = f"a template holds {', and after it '.join(f'{{{name}}}' for name in places)}"
        raise InputError([Problem(model, None, at, sentence)])
    loaded.requires_grad_(False).eval().to(device)
    return WordScorer(loaded, tokenizer, template)


class AnsweredPrompt(NamedTuple):
    """A prompt and the answer to it, as texts."""

    prompt: str
    answer: str


SecondJudge = Callable[[Sequence[AnsweredPrompt]], Sequence[bool]]
"""Does each of these answers refuse?"""


class RefusalClassifier:
    """A causal language model as a judge: it refuses where the word `refused` is likelier than `otherwise`.

    Known ones, by hub id, with their words; their prompts are in their cards and go into a template file:

    - meta-llama/Llama-Guard-3-8B, -1B: chat template, "\\n\\nsafe" and "\\n\\nunsafe", the defaults (harm, not refusal)
    - allenai/wildguard: its card's prompt up to "Response refusal:", " yes" and " no"
    - cais/HarmBench-Llama-2-13b-cls, HarmBench-Mistral-7b-val-cls: their card's prompt, "no" and "yes" (harm)
    - sorry-bench/ft-mistral-7b-instruct-v0.2-sorry-bench-202406: its card's prompt, "0" and "1" (fulfilment)
    """

    def __init__(self, words: WordScorer, refused: str, otherwise: str) -> None:
        self._words, self._refused, self._otherwise = words, refused, otherwise

    def __call__(self, answered: Sequence[AnsweredPrompt]) -> list[bool]:
        """True where `refused` is the likelier word; a tie is no refusal."""
        return [self._refuses(one) for one in answered]

    def _refuses(self, answered: AnsweredPrompt) -> bool:
        turns = [Message("user", answered.prompt), Message("assistant", answered.answer)]
        ids = self._words.ids(turns, {"prompt": answered.prompt, "answer": answered.answer})
        return self._words.logp(ids, self._refused) > self._words.logp(ids, self._otherwise)


def load_classifier(settings: ClassifierSettings, device: torch.device) -> RefusalClassifier:
    """Loads a classifier, a folder or a hub id. Raises InputError where it cannot be loaded."""
    words = load_words(settings.model, settings.template, ("prompt", "answer"), "gate.judge_model", device)
    return RefusalClassifier(words, settings.refused, settings.otherwise)


def classifier_files(settings: ClassifierSettings) -> list[Path]:
    """The files that decide a classifier's verdicts: its weights, config and tokenizer, and its template.

    Raises InputError for a folder without whole weights.
    """
    key = "gate.judge_model.model"
    folder = model_folder(settings.model, [*TOKENIZER_FILES, "*.safetensors"], key)
    texts = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)}
    template = [] if settings.template is None else [settings.template]
    return [*weight_files(settings.model, folder, key), *sorted(texts), *template]
