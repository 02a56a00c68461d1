"""The output head some tokens at a time."""

import pytest
import torch

from persona_rlhf.models import model_split
from persona_rlhf.models.model_split import token_logps
from tests.models.architectures import base_of

TOKENS = 23


@pytest.mark.parametrize("name", ["llama3", "gemma2", "granite"])  # plain, capped and scaled logits
def test_pieces_are_the_whole_and_no_more_logits_are_held_than_allowed(name, monkeypatch):
    model = base_of(name).model
    halves = model_split.split_model(model)
    assert halves is not None
    draw = torch.Generator().manual_seed(2)
    hidden = torch.randn(TOKENS, model.config.hidden_size, generator=draw)
    targets = torch.randint(0, model.config.vocab_size, (TOKENS,), generator=draw)
    scales = torch.linspace(-1, 2, TOKENS)

    def taken():
        learning = hidden.clone().requires_grad_()
        logps = halves.head.logps(learning, targets)
        (logps * scales).sum().backward()
        return logps.detach(), learning.grad

    whole, gradient = taken()
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _, x, __: seen.append(x[0].shape[-2]))
    monkeypatch.setattr(model_split, "_MIN_TOKENS", 4)
    monkeypatch.setitem(model_split._MAX_LOGITS, "cpu", 5 * model.config.vocab_size)
    ours, chunked = taken()
    assert seen == [5, 5, 5, 4, 4]
    assert torch.allclose(ours, whole, rtol=0, atol=1e-5)
    assert torch.allclose(chunked, gradient, rtol=1e-4, atol=1e-6)
    assert torch.allclose(whole, token_logps(halves.head(hidden), targets), rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(halves.head.logps(hidden, targets), ours)
    monkeypatch.setitem(model_split._MAX_LOGITS, "cpu", 1)
    seen.clear()
    taken()
    assert seen == [4, 4, 4, 4, 4, 3], "a product with a large matrix is never for a token alone"


def test_what_is_not_a_number_stays_with_its_token(monkeypatch):
    model = base_of("llama3").model
    halves = model_split.split_model(model)
    assert halves is not None
    monkeypatch.setattr(model_split, "_MIN_TOKENS", 4)
    monkeypatch.setitem(model_split._MAX_LOGITS, "cpu", 1)
    hidden = torch.randn(8, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    hidden[2] = torch.nan
    learning = hidden.requires_grad_()
    halves.head.logps(learning, torch.arange(8)).sum().backward()
    assert learning.grad is not None
    assert learning.grad.isfinite().all(1).tolist() == [n != 2 for n in range(8)]
