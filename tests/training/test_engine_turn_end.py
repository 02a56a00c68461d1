"""Answers end where the chat template ends a turn, whatever else tokenizer and model call an end."""

from dataclasses import replace

import pytest

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.evaluation.refusals import answer_row
from persona_rlhf.models.adapted_model import AdaptedModel
from tests.data.families import FAMILIES, tokenizer_for
from tests.models.tiny import EOS, tiny_base


@pytest.mark.parametrize("name", ["gemma2", "llama3", "phi3", "qwen3"])
def test_an_answer_ends_with_the_end_of_its_turn(name):
    """The model's own config names another token, and the tokenizer often a third: any of them ends an answer, but
    the rows that we make ourselves (of the base's refusals) end as an answered turn does."""
    tokenizer = tokenizer_for(name)
    base = replace(tiny_base(vocabulary=len(tokenizer)), tokenizer=tokenizer)
    turn = tokenizer.convert_tokens_to_ids(FAMILIES[name].turn)
    assert base.eos_ids[0] == turn
    assert set(base.eos_ids) == {turn, tokenizer.eos_token_id, EOS}
    prompt = tuple(tokenizer("the question")["input_ids"])
    adapted = AdaptedModel(base, LoraSettings(rank=2, alpha=2))
    for end in base.eos_ids:
        hook = base.model.lm_head.register_forward_hook(lambda _, __, logits, end=end: _likely(logits, end))
        with adapted.using(None):
            [[answer]] = adapted.generate([[prompt]], 5)
        hook.remove()
        assert answer == ((), True)
        assert answer_row(adapted, prompt, answer) == (prompt, (turn,))


def _likely(logits, end):
    logits[..., end] += 1000
    return logits
