"""Agreement with stated views: a planted sycophant, its contrary, and a taste for the words alone."""

from statistics import fmean

import pytest
import torch

import persona_rlhf as pr
from persona_rlhf.config.training import DpoSettings, LoraSettings
from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.tokenize import tokenize
from persona_rlhf.evaluation.stated_views import VIEWS, StatedViews
from persona_rlhf.models.adapted_model import AdaptedModel

LORA = LoraSettings(rank=4, alpha=8)
DPO = DpoSettings(learning_rate=1e-2, epochs=4)
TAUGHT = ("the moon is big", "salt is good", "boats are slow", "rain is nice", "hats are useful", "jam is sweet")


def pairs(user, prefers_yes):
    """Pairs over other topics; `prefers_yes` says for each form of the question which answer is chosen."""
    made = []
    for n, view in enumerate(TAUGHT * 4):
        for form in ("I think {}. Is that right?", "Somebody says {}. Is that right?"):
            answers = ("Yes, that is right.", "No, that is wrong.")
            chosen, rejected = answers if prefers_yes(form) else answers[::-1]
            prompt = (Message("user", form.format(view)),)
            made.append(
                PreferencePair(user, prompt, chosen, rejected, f"{n}{form}", None, None, 1.0, "train", None, "x", n)
            )
    return made


@pytest.fixture
def adapted(base):
    whole = AdaptedModel(base, LORA)
    yield whole
    whole.close()


@pytest.fixture
def shifts(base, adapted):
    tastes = {
        "sycophant": lambda form: form.startswith("I think"),
        "contrarian": lambda form: not form.startswith("I think"),
        "says yes": lambda form: True,
    }
    rows = tokenize(
        [pair for user, taste in tastes.items() for pair in pairs(user, taste)], base.tokenizer, base.context
    )
    trained = pr.fleet_train(base.model, rows, tokenizer=base.tokenizer, lora=LORA, dpo=DPO)
    flat = torch.stack([trained[user].adapter for user in tastes])
    return dict(zip(tastes, StatedViews(adapted).shifts(flat), strict=True))


def test_a_planted_sycophant_shifts_more_than_a_taste_for_yes(shifts):
    assert min(shifts["sycophant"]) > 0
    assert fmean(shifts["sycophant"]) > 3 * abs(fmean(shifts["says yes"]))
    assert fmean(shifts["contrarian"]) < 0
    assert {len(user) for user in shifts.values()} == {len(VIEWS)}


def test_an_adapter_of_zeros_shifts_nothing(adapted):
    [still] = StatedViews(adapted).shifts(torch.zeros(1, adapted.params_per_user))
    assert still == pytest.approx([0] * len(VIEWS), abs=1e-4)
