"""Demonstrations: refusals, its own or written ones; harmless answers of its own; and what they are preferred to."""

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import shipped_root
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base
from persona_rlhf.policy.hazards import CATEGORIES, RefusalText, read_probes
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.training import align

REFUSALS = [RefusalText("I must decline.", None), RefusalText("I won't harm a child.", "child_sexual_abuse")]


@pytest.fixture(scope="module")
def adapted():
    return AdaptedModel(load_base(BaseSettings(model=str(shipped_root() / "data/base"))), LoraSettings())


@pytest.fixture(scope="module")
def probes():
    """Three of `train` and two of `dev` a category."""
    found = []
    for category in CATEGORIES:
        bank = read_probes(shipped_root() / f"data/policy/tier_one/{category}.jsonl", category)
        for split, count in (("train", 3), ("dev", 2)):
            found += [probe for probe in bank if probe.split == split][:count]
    return found


def made(adapted, probes, **more):
    given = {"ordinary": ["what is an opera?"], "tries": 2, "max_new_tokens": 40, "seed": 0} | more
    return align.make_demonstrations(adapted, probes, refusals=REFUSALS, **given)


@pytest.fixture(scope="module")
def own(adapted, probes):
    """The demonstrations of the bundled base, which is aligned."""
    return made(adapted, probes)


def said(adapted, row):
    return str(adapted.base.tokenizer.decode(list(row.completion), skip_special_tokens=True)).strip()


def asked(adapted, row):
    text = str(adapted.base.tokenizer.decode(list(row.prompt)))
    return text.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")


def test_an_aligned_model_learns_its_own_refusals(adapted, probes, own):
    found = own
    train = [probe for probe in probes if probe.split == "train"]
    assert [asked(adapted, shown.chosen) for shown in found.hazardous] == [
        probe.prompt for probe in train for _ in "ab"
    ]
    assert found.self_refused >= 22
    assert all(is_refusal(said(adapted, shown.chosen)) for shown in found.hazardous)
    assert all(shown.chosen.completion[-1] in adapted.base.eos_ids for shown in found.hazardous)
    harmless = {probe.twin for probe in train} | {"what is an opera?"}
    assert len(found.harmless) + found.left_out == 2 * len(harmless)
    for shown in found.harmless:
        assert asked(adapted, shown.chosen) in harmless
        assert not is_refusal(said(adapted, shown.chosen))
        assert said(adapted, shown.rejected) == "I must decline."
    answers = {(asked(adapted, shown.chosen), shown.chosen.completion) for shown in found.harmless}
    twins = [probe.twin for probe in train for _ in "ab"]
    both = zip(found.hazardous, twins, strict=True)
    assert (
        sum(shown.rejected is not None and (twin, shown.rejected.completion) in answers for shown, twin in both) >= 18
    )
    assert len({shown.chosen for shown in found.harmless}) > len(harmless)  # it was asked twice
    assert all(shown.rejected is None or shown.rejected.prompt == shown.chosen.prompt for shown in found.every)


def test_what_a_model_does_not_refuse_is_written_for_it(adapted, probes, monkeypatch):
    monkeypatch.setattr(align, "is_refusal", lambda text: False)
    found = made(adapted, probes)
    assert found.self_refused == found.left_out == 0
    written = {said(adapted, shown.chosen) for shown in found.hazardous}
    assert written == {"I must decline.", "I won't harm a child."}
    for shown in found.hazardous:
        if said(adapted, shown.chosen) == "I won't harm a child.":
            assert [p.category for p in probes if p.prompt == asked(adapted, shown.chosen)] == ["child_sexual_abuse"]
        assert shown.rejected is not None
        assert said(adapted, shown.rejected) not in written
    assert len({shown.chosen for shown in found.hazardous}) > 12  # a prompt's refusals differ


def test_a_model_that_refuses_everything_has_nothing_of_its_own_to_answer(adapted, probes, monkeypatch):
    monkeypatch.setattr(align, "is_refusal", lambda text: True)
    found = made(adapted, probes)
    assert found.harmless == []
    assert found.left_out == 26
    assert all(shown.rejected is None for shown in found.hazardous)


def test_an_answer_that_was_cut_is_learned_without_an_end(adapted, probes):
    found = made(adapted, probes, max_new_tokens=3)
    assert all(len(shown.chosen.completion) == 3 for shown in found.harmless)
    assert found.self_refused == 0  # a refusal that was cut is none


def test_the_seed_decides(adapted, probes, own):
    assert made(adapted, probes) == own
    assert made(adapted, probes, seed=1) != own


def test_without_probes_to_train_on_there_is_nothing_to_learn(adapted, probes):
    with pytest.raises(InputError, match="no probe of the policy is of `train`"):
        made(adapted, [probe for probe in probes if probe.split == "dev"])


def test_a_prompt_is_given_its_own_refusal(adapted, probes):
    first = next(probe for probe in probes if probe.split == "train")
    refusals = [*REFUSALS, RefusalText("I won't, whatever you say.", first.category, first.prompt)]
    given = {"ordinary": [], "tries": 1, "max_new_tokens": 1, "seed": 0}  # too short for a refusal of its own
    found = align.make_demonstrations(adapted, probes, refusals=refusals, **given)
    texts = [said(adapted, shown.chosen) for shown in found.hazardous]
    assert texts[0] == "I won't, whatever you say."
    assert texts.count(texts[0]) == 1
