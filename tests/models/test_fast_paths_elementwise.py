"""Norms and rotary embeddings with hand-written gradients against those of `transformers`."""

import sys
from functools import partial

import pytest
import torch

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.fast_paths import handwritten_patch, rms_norm, rotate
from tests.models.architectures import base_of
from tests.models.tiny import tiny_base

ROTATING = ["llama3", "qwen3", "gemma2", "olmo2"]  # norms of heads, of one plus a weight, behind a layer


def _gradient(model, embedded):
    learning = embedded.clone().requires_grad_()
    logits = model(inputs_embeds=learning, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), learning.grad


@pytest.mark.parametrize("name", ROTATING)
def test_logits_and_gradients_are_the_models_own(name):
    model = base_of(name).model
    embedded = torch.randn(2, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    logits, gradient = _gradient(model, embedded)
    with handwritten_patch(model).on():
        logits_patched, gradient_patched = _gradient(model, embedded)
    assert not torch.equal(gradient_patched, gradient), "nothing was computed in another way"
    assert torch.allclose(logits_patched, logits, rtol=0, atol=1e-5)
    assert (gradient_patched - gradient).norm() <= 1e-5 * gradient.norm()


def test_the_model_is_left_as_it_was_also_when_it_fails():
    model = base_of("llama3").model
    place = sys.modules[type(model).__module__]
    original, ids = place.apply_rotary_pos_emb, torch.tensor([[3, 4, 5]])
    before = model(input_ids=ids).logits

    def fail():
        with handwritten_patch(model).on():
            assert place.apply_rotary_pos_emb is rotate
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert place.apply_rotary_pos_emb is original
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(input_ids=ids).logits, before)


def test_the_gradients_are_right_in_double_precision():
    draw = torch.Generator().manual_seed(5)

    def some(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    weight, angles = some(6), some(1, 5, 3)
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
    x, q, k = (part.requires_grad_() for part in (some(2, 4, 6), some(1, 2, 5, 6), some(1, 1, 5, 6)))
    assert torch.autograd.gradcheck(partial(rms_norm, weight, 1e-5), (x,))
    assert torch.autograd.gradcheck(lambda q, k: rotate(q, k, cos, sin), (q, k))
    turned, _ = rotate(q, k, cos, sin)
    assert torch.allclose(turned.norm(dim=-1), q.norm(dim=-1)), "a rotation keeps lengths"


def test_a_model_that_rotates_in_another_way_computes_as_it_does(monkeypatch):
    """By the equivalence check: here neighbouring numbers are a pair, as in GPT-J, not the halves of a head."""
    base = tiny_base()
    place = sys.modules[type(base.model).__module__]
    assert AdaptedModel(base, LoraSettings()).patch is not None

    def interleaved(q, k, cos, sin, unsqueeze_dim=1):
        half = cos.shape[-1] // 2
        cos, sin = (part[..., :half].repeat_interleave(2, -1).unsqueeze(unsqueeze_dim) for part in (cos, sin))

        def turned(x):
            return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

        return q * cos + turned(q) * sin, k * cos + turned(k) * sin

    monkeypatch.setattr(place, "apply_rotary_pos_emb", interleaved)
    assert AdaptedModel(tiny_base(), LoraSettings()).patch is None


def test_types_that_round_more_are_left_alone():
    assert AdaptedModel(tiny_base(dtype=torch.bfloat16), LoraSettings()).patch is None
