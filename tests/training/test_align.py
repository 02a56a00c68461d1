"""A base aligned with TRL: what it is to answer gets likelier than what it is not, what it is to keep stays as it was,
and nothing but weights changes."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from persona_rlhf.config.training import AlignSettings, LoraSettings, PreferenceSettings, SftSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.merge import merge_adapter
from persona_rlhf.training.align import Demonstration, Demonstrations, KlToBase, align
from tests.models.architectures import base_of
from tests.models.tiny import random_row
from tests.training.oracles import plain_logp

LORA = LoraSettings(rank=4, alpha=8)


def demonstrations(count: int = 8) -> list[Demonstration]:
    """Random ones; the last has nothing to unlearn."""
    draw = torch.Generator().manual_seed(3)
    made = []
    for n in range(count):
        chosen = random_row(draw, 4 + n % 3, 6)
        rejected = None if n == count - 1 else Row(chosen.prompt, random_row(draw, 1, 5).completion)
        made.append(Demonstration(chosen, rejected))
    return made


def settings(**more: object) -> AlignSettings:
    rate = 5e-3 if more.get("weights") != "full" else 1e-3
    given = {"sft": SftSettings(epochs=4, learning_rate=rate), "dpo": PreferenceSettings(epochs=4, learning_rate=rate)}
    return AlignSettings(rows_per_step=4, **{**given, **more})  # type: ignore[arg-type]


def hazards(taught: list[Demonstration]) -> Demonstrations:
    return Demonstrations(taught, [], 0, 0)


def logps(base, rows):
    with torch.no_grad():
        return torch.stack([plain_logp(base.model, row) for row in rows])


@pytest.mark.parametrize(
    ("name", "weights"), [("llama3", "lora"), ("llama3", "full"), ("gpt2", "lora"), ("qwen3-moe", "lora")]
)
def test_chosen_answers_rise_and_above_the_rejected_ones(name, weights):
    base, reports, taught = base_of(name), [], demonstrations()
    config, tokenizer = base.model.config.to_dict(), copy.deepcopy(base.tokenizer)
    names = dict(base.model.named_parameters()).keys()
    chosen, rejected = [r.chosen for r in taught], [r.rejected for r in taught if r.rejected]
    before = logps(base, chosen), logps(base, rejected)
    align(base, hazards(taught), settings(weights=weights), LORA, 0, reports.append)
    after = logps(base, chosen), logps(base, rejected)
    assert (after[0] > before[0] + 1).all()
    assert (after[0] - before[0])[:-1].mean() > (after[1] - before[1]).mean() + 1
    assert base.model.config.to_dict() == config
    assert base.tokenizer.pad_token == tokenizer.pad_token
    assert dict(base.model.named_parameters()).keys() == names  # adapters are merged, wrappers gone
    assert "forward" not in vars(base.model)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert list(dict.fromkeys(report.stage for report in reports)) == ["SFT", "DPO"]
    dpo = [report for report in reports if report.stage == "DPO"]
    assert [(report.step, report.steps) for report in dpo] == [(step, 8) for step in range(1, 9)]
    assert [report.seconds_left == 0 for report in dpo] == [False] * 7 + [True]
    assert dpo[-1].loss > 0


@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_the_written_adapters_merge_to_the_same_bits(name, tmp_path):
    base, again = base_of(name), base_of(name)
    for one in (base, again):
        one.model.bfloat16()
    align(base, hazards(demonstrations()), settings(), LORA, 0, adapters_to=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-sft", "2-dpo"]
    model, original = again.model, copy.deepcopy(again.model.state_dict())
    for adapter in sorted(tmp_path.iterdir()):
        before = copy.deepcopy(model.state_dict())
        matrices = load_file(adapter / "adapter_model.safetensors")
        assert {matrix.dtype for matrix in matrices.values()} == {torch.bfloat16}
        model = merge_adapter(PeftModel.from_pretrained(model, adapter))
        for key in (key for key in matrices if "lora_A" in key):  # by hand
            layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            change = 2 * (matrices[key.replace("lora_A", "lora_B")].double() @ matrices[key].double())
            change = change.T if name == "gpt2" else change
            weight = f"{layer}.weight"
            assert torch.equal(model.state_dict()[weight], (before[weight].double() + change).bfloat16())
    merged = base.model.state_dict()
    assert all(torch.equal(merged[key], weights) for key, weights in model.state_dict().items())
    assert any(not torch.equal(merged[key], weights) for key, weights in original.items())
    assert str(tmp_path) not in (tmp_path / "1-sft/adapter_config.json").read_text()


def test_a_stage_can_be_left_out_and_each_does_its_part():
    taught = demonstrations()
    rejected = [demonstration.rejected for demonstration in taught if demonstration.rejected]
    chosen = [demonstration.chosen for demonstration in taught]
    base = base_of("llama3")
    before = logps(base, chosen), logps(base, rejected)
    align(base, hazards(taught), settings(sft=SftSettings(epochs=0), dpo=PreferenceSettings(epochs=0)), LORA, 0)
    assert torch.equal(logps(base, chosen), before[0])
    reports = []
    align(base, hazards(taught), settings(dpo=PreferenceSettings(epochs=0)), LORA, 0, reports.append)
    assert {report.stage for report in reports} == {"SFT"}
    imitated = logps(base, chosen).mean() - before[0].mean()
    assert imitated > 1
    other = base_of("llama3")
    preferring = PreferenceSettings(epochs=4, learning_rate=5e-3, sft_weight=0.0)
    align(other, hazards(taught), settings(sft=SftSettings(epochs=0), dpo=preferring), LORA, 0, reports.append)
    assert reports[-1].stage == "DPO"
    margin = logps(other, chosen)[:-1].mean() - logps(other, rejected).mean()
    assert margin > before[0][:-1].mean() - before[1].mean() + 1


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone():
    found = []
    for seed in (1, 1, 2):
        base = base_of("llama3")
        state = torch.random.get_rng_state()
        align(base, hazards(demonstrations()), settings(), LORA, seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        found.append(logps(base, [demonstrations()[0].chosen]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def divergence(was, now, rows):
    """KL(was || now) in nats a completion token, a row at a time and over the whole vocabulary."""
    found = []
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.completion]])
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1) for model in (was, now))
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found).mean()


def test_the_divergence_is_of_completions_and_from_the_model_as_it_was():
    base, other = base_of("llama3"), base_of("llama3")
    draw = torch.Generator().manual_seed(5)
    rows = [random_row(draw, 3 + n % 4, 2 + n % 3) for n in range(7)]
    kept = KlToBase(base.model, rows, 7, 0)
    assert kept.divergence(base.model).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=draw)
    base.model.requires_grad_(True)
    found = kept.divergence(base.model)
    assert found.item() == pytest.approx(divergence(other.model, base.model, rows).item(), rel=1e-4)
    assert found > 0.01
    found.backward()
    assert all(parameter.grad is not None for parameter in base.model.parameters())


def test_every_answer_is_kept_in_turn():
    base = base_of("llama3")
    draw = torch.Generator().manual_seed(5)
    rows = [random_row(draw, 3, 4) for _ in range(10)]
    kept = KlToBase(base.model, rows, 4, 0)
    passes = [[row for _ in range(3) for row in next(kept._batches)] for _ in range(2)]
    assert all(sorted(one) == sorted(rows) for one in passes)
    assert passes[0] != passes[1]


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_refusals_are_learned_and_the_other_answers_stay_as_they_were(weights):
    taught, moved = demonstrations(), {}
    refusals, answers = taught[:4], taught[4:7]
    for keep in (0.0, 20.0):
        base, was = base_of("llama3"), base_of("llama3")
        before = logps(base, [shown.chosen for shown in refusals])
        preferring = PreferenceSettings(epochs=2, learning_rate=1e-3)
        asked = settings(weights=weights, keep=keep, dpo=preferring)
        align(base, Demonstrations(refusals, answers, 0, 0), asked, LORA, 0)
        assert (logps(base, [shown.chosen for shown in refusals]) > before + 0.5).all()
        moved[keep] = divergence(was.model, base.model, [shown.chosen for shown in answers])
    assert moved[20.0] < moved[0.0] / 2
