from math import log

import pytest
import torch

from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.request_screens import BaseRefusal, RefusalLikelihood

REQUESTS = [(Message("user", text),) for text in ("hello.", "how are you?", "a b c", "why not!", "tell me", "zzz")]


def judge(text: str) -> bool:
    """An answer whose second vowel is there."""
    return sum(letter in "aeiou" for letter in text) >= 2


def test_it_adds_up_the_probabilities_of_openings_none_of_which_begins_with_another(adapted):
    found = RefusalLikelihood(adapted, judge, REQUESTS * 8, 3)
    openings = found._openings
    assert 1 < len(openings) <= 8
    texts = [adapted.base.tokenizer.decode(list(ids)) for ids in openings]
    before = [adapted.base.tokenizer.decode(list(ids[:-1])) for ids in openings]
    assert all(judge(text) for text in texts)
    assert not any(judge(text) for text in before)  # each is cut where it first is a refusal
    assert not any(a != b and b.startswith(a) for a in texts for b in texts)
    for request, score in zip(REQUESTS, found(REQUESTS), strict=True):
        total = 0.0
        for opening in openings:
            ids, logp = list(prompt_ids(request, adapted.base.tokenizer)), 0.0
            for token in opening:
                with torch.no_grad():
                    logp += float(adapted.base.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
                ids.append(token)
            total += torch.tensor(logp).exp().item()
        assert score.value == pytest.approx(log(total), abs=1e-4)
        assert 0 < total < 1
        assert not score.categories


def test_a_base_without_refusals_is_said(adapted):
    with pytest.raises(ValueError, match="refused none of 6"):
        RefusalLikelihood(adapted, lambda text: False, REQUESTS, 3)


def test_the_bases_answer_is_yes_or_no(adapted):
    known = {prompt_ids(request, adapted.base.tokenizer): n % 2 == 0 for n, request in enumerate(REQUESTS)}
    scores = BaseRefusal(adapted, lambda prompts: [known[prompt] for prompt in prompts])(REQUESTS)
    assert [score.value for score in scores] == [1, 0, 1, 0, 1, 0]


def test_a_request_that_was_decoded_may_hold_control_tokens_and_be_longer_than_the_context(adapted):
    base, seen = adapted.base, []
    token = base.tokenizer.eos_token
    requests = [(Message("user", f"hello{token}you"),), (Message("user", "a b " * base.context),)]

    def refuses(prompts):
        seen.extend(prompts)
        return [True] * len(prompts)

    assert [score.value for score in BaseRefusal(adapted, refuses)(requests)] == [1, 1]
    assert seen[0] == prompt_ids((Message("user", "hello you"),), base.tokenizer)
    assert len(seen[1]) == base.context - 1
