import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.models.model_split import token_logps
from persona_rlhf.training.losses import PairLogps, PairTokens, anchor_losses, pair_losses, reward_margins, user_means

BETA, FLIPPED = 0.3, 0.2
# Two pairs of one user: log-probabilities under the adapter and the base, and completion lengths.
CHOSEN, REJECTED = (-3.0, -9.0), (-7.0, -4.0)
BASE_CHOSEN, BASE_REJECTED = (-5.0, -8.0), (-6.0, -6.5)
CHOSEN_TOKENS, REJECTED_TOKENS = (4.0, 5.0), (2.0, 10.0)
KINDS = ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm")


def _made() -> tuple[PairLogps, PairTokens]:
    logps = PairLogps(*(torch.tensor([v], dtype=torch.float64) for v in (CHOSEN, REJECTED, BASE_CHOSEN, BASE_REJECTED)))
    tokens = PairTokens(*(torch.tensor([v], dtype=torch.float64) for v in (CHOSEN_TOKENS, REJECTED_TOKENS)))
    return logps, tokens


def _softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def _by_hand(kind: str) -> list[float]:
    found = []
    for n in range(2):
        chosen, rejected = CHOSEN[n] - BASE_CHOSEN[n], REJECTED[n] - BASE_REJECTED[n]
        margin = BETA * (chosen - rejected)
        mean = chosen / CHOSEN_TOKENS[n] - rejected / REJECTED_TOKENS[n]
        found.append(
            {
                "sigmoid": _softplus(-margin),
                "hinge": max(0.0, 1 - margin),
                "robust": ((1 - FLIPPED) * _softplus(-margin) - FLIPPED * _softplus(margin)) / (1 - 2 * FLIPPED),
                "ipo": (mean - 1 / (2 * BETA)) ** 2,
                "sigmoid_norm": _softplus(-BETA * mean),
            }[kind]
        )
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_is_its_formula(kind):
    logps, tokens = _made()
    assert pair_losses(kind, logps, tokens, BETA, FLIPPED).losses[0].tolist() == pytest.approx(
        _by_hand(kind), rel=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_an_uncertain_label_is_the_mean_over_both_orders(kind):
    (chosen, rejected, base_chosen, base_rejected), (chosen_tokens, rejected_tokens) = _made()
    turned = PairLogps(rejected, chosen, base_rejected, base_chosen), PairTokens(rejected_tokens, chosen_tokens)
    certain, other = (pair_losses(kind, *made, BETA, FLIPPED) for made in (_made(), turned))
    probability = torch.tensor([[0.9, 0.5]], dtype=torch.float64)
    ours = pair_losses(kind, *_made(), BETA, FLIPPED, probability)
    by_hand = [0.9 * certain.losses[0, 0] + 0.1 * other.losses[0, 0], (certain.losses + other.losses)[0, 1] / 2]
    assert ours.losses[0].tolist() == pytest.approx([value.item() for value in by_hand], rel=1e-12)
    assert torch.equal(ours.margins, certain.margins)


def test_a_label_of_probability_p_teaches_the_margin_log_odds_of_p():
    margin = torch.tensor([[math.log(0.8 / 0.2)]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    logps, tokens = PairLogps(margin, zero, zero, zero), PairTokens(zero + 1, zero + 1)
    [gradient] = torch.autograd.grad(pair_losses("sigmoid", logps, tokens, 1.0, 0.0, 0.8).losses.sum(), [margin])
    assert gradient.item() == pytest.approx(0, abs=1e-12)


def test_reward_margin_by_hand():
    # (-3 + 5) - (-7 + 6) = 3 and (-9 + 8) - (-4 + 6.5) = -3.5, in units of beta
    assert reward_margins(_made()[0], BETA)[0].tolist() == pytest.approx([3 * BETA, -3.5 * BETA])


@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_is_that_of_trl(kind):
    """TRL 1.x, `DPOTrainer._compute_loss`, is run on the same log-probabilities through a stand-in for the model."""
    logps, tokens = _made()
    assert pair_losses(kind, logps, tokens, BETA, FLIPPED).losses.mean().item() == pytest.approx(_trl(kind), rel=1e-6)


def test_the_anchor_is_the_sft_loss_of_trl():
    logps, tokens = _made()
    anchor = anchor_losses(logps.chosen, tokens.chosen, torch.ones_like(tokens.chosen))
    assert anchor.item() == pytest.approx(_trl("sft"), rel=1e-6) == pytest.approx(12 / 9)


def test_the_anchor_weighs_pairs_and_is_0_without_one():
    chosen, tokens = torch.tensor([[-2.0, -9.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([[4.0, 3.0, 0.0], [0.0] * 3])
    weights = torch.tensor([[0.25, 0.5, 0.0], [0.0] * 3])
    assert anchor_losses(chosen, tokens, weights).tolist() == pytest.approx([5 / 2.5, 0.0])


def _trl(kind: str) -> float:
    from collections import defaultdict
    from types import SimpleNamespace

    from trl import DPOTrainer

    logps, tokens = _made()
    lengths = torch.cat([*tokens.chosen, *tokens.rejected]).long()
    width = int(lengths.max())
    mask = (torch.arange(width + 1) > 0) & (torch.arange(width + 1) <= lengths[:, None])
    per_token = mask[:, 1:] * (torch.cat([*logps.chosen, *logps.rejected]) / lengths)[:, None]
    outputs = SimpleNamespace(
        log_probs=per_token,
        entropy=torch.zeros_like(per_token),
        mean_logits=torch.zeros_like(per_token),
        is_top1=torch.zeros_like(mask[:, 1:]),
        loss=None,
    )
    trainer: DPOTrainer = object.__new__(DPOTrainer)
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = SimpleNamespace(
        device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x, parallelism_config=None
    )
    trainer.aux_loss_enabled, trainer.ld_alpha, trainer.use_weighting = False, None, False
    trainer.precompute_ref_logps, trainer.f_divergence_type = True, "reverse_kl"
    trainer.loss_types, trainer.loss_weights = [kind], [1.0]
    trainer.beta, trainer.label_smoothing = BETA, FLIPPED
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = {"train": defaultdict(list)}, 0, 1
    trainer.args = SimpleNamespace(discopop_tau=0.05)
    inputs = {
        "input_ids": torch.zeros_like(mask, dtype=torch.long),
        "attention_mask": torch.ones_like(mask, dtype=torch.long),
        "completion_mask": mask.long(),
        "ref_chosen_logps": logps.reference_chosen[0],
        "ref_rejected_logps": logps.reference_rejected[0],
    }
    return float(trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False))


def loss_at_zero(kind: str, beta: float, label_smoothing: float = 0.0) -> float:
    """The loss of the zero adapter: all margins are 0."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    tokens = PairTokens(zero + 1, zero + 1)
    return pair_losses(kind, PairLogps(zero, zero, zero, zero), tokens, beta, label_smoothing).losses.item()


def test_zero_adapter_has_the_loss_that_theory_says():
    assert loss_at_zero("sigmoid", BETA) == pytest.approx(math.log(2))
    assert loss_at_zero("sigmoid_norm", BETA) == pytest.approx(math.log(2))
    assert loss_at_zero("hinge", BETA) == 1
    assert loss_at_zero("ipo", BETA) == pytest.approx(1 / (4 * BETA**2))
    assert loss_at_zero("robust", BETA, FLIPPED) == pytest.approx(math.log(2))


@given(
    margin=st.floats(-20, 20, allow_subnormal=False),
    flipped=st.floats(0, 0.45),
)
def test_robust_is_unbiased_under_flipped_labels(margin, flipped):
    """Its mean over labels flipped with that probability is the clean sigmoid loss (Chowdhury et al. 2024)."""
    zero = torch.zeros(1, 1, dtype=torch.float64)

    def loss(kind: str, signed: float) -> float:
        logps = PairLogps(zero + signed, zero, zero, zero)
        return pair_losses(kind, logps, PairTokens(zero + 1, zero + 1), 1.0, flipped).losses.item()

    mean = (1 - flipped) * loss("robust", margin) + flipped * loss("robust", -margin)
    assert mean == pytest.approx(loss("sigmoid", margin), abs=1e-9)


def test_robust_without_smoothing_is_sigmoid():
    logps, tokens = _made()
    robust, sigmoid = (pair_losses(kind, logps, tokens, BETA).losses for kind in ("robust", "sigmoid"))
    assert torch.equal(robust, sigmoid)


def test_mean_is_each_users_own_and_weighted():
    losses = torch.tensor([[1.0, 5.0, 99.0], [2.0, 4.0, 6.0], [7.0, 7.0, 7.0]])
    weights = torch.tensor([[1.0, 3.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert user_means(losses, weights).tolist() == [4.0, 4.0, 0.0]


def test_a_user_without_pairs_has_no_gradient_and_no_nan():
    losses = torch.ones(2, 3, requires_grad=True)
    user_means(losses, torch.tensor([[0.0] * 3, [1.0] * 3])).sum().backward()
    assert losses.grad is not None
    assert losses.grad[0].tolist() == [0, 0, 0]
    assert losses.grad[1].tolist() == pytest.approx([1 / 3] * 3)


def test_token_logps_are_log_softmax_in_full_precision():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 3, 10, 5, 5])
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(5), targets]
    assert torch.allclose(token_logps(logits, targets).double(), expected, atol=1e-6)
    assert token_logps(logits.double(), targets).dtype == torch.float64
    half = logits.bfloat16()
    assert token_logps(half, targets).dtype == torch.float32
    exact = torch.log_softmax(half.double(), -1)[torch.arange(5), targets]
    assert torch.allclose(token_logps(half, targets).double(), exact, atol=1e-6)


def test_one_graph_can_be_gone_back_through_twice():
    """As gradient surgery does; what is kept for the way back is not written over."""
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    total = token_logps(logits, torch.tensor([1, 2, 3])).sum()
    first, second = (torch.autograd.grad(total, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
