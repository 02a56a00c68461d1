"""Adapters of other trainers over a base: PEFT is the oracle of the first step, and the bare base is its reference."""

import copy
import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from persona_rlhf.config.training import BaseSettings, DpoSettings, FleetSettings, LoraSettings
from persona_rlhf.evaluation.gate import certify
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.pipeline.prepare import Prepared
from persona_rlhf.release import foreign_fit
from persona_rlhf.release.foreign_adapter import read_foreign
from persona_rlhf.release.foreign_fit import fit_problems
from persona_rlhf.release.manifest import DataInfo
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.engine import Engine
from tests.models.tiny import tiny_base, user_rows
from tests.release.conftest import DEMANDS, pairs_of, refusals
from tests.training.oracles import plain_logp

LORA = LoraSettings(rank=4, alpha=8)
DPO = DpoSettings(epochs=1, pairs_per_step=4, learning_rate=1e-2)
USER = user_rows("ann", 8, seed=1)
ALL = "all-linear"


def foreign(folder, r=4, lora_alpha=8, target_modules=ALL, dtype=torch.float32, **more):
    """Writes an adapter as PEFT saves it, with B away from zero; returns its folder."""
    model = copy.deepcopy(tiny_base().model)
    config = LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules, task_type="CAUSAL_LM", **more)
    wrapped = get_peft_model(model, config)
    draw = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    wrapped.to(dtype).save_pretrained(folder)
    return folder


def ready_of(folder, lora=LORA):
    start = read_foreign(folder, lora.rank)
    parts = {"adapted": AdaptedModel(tiny_base(), lora), "config": SimpleNamespace(lora=lora, seed=7), "start": start}
    return Prepared(*[None] * len(Prepared._fields))._replace(**parts)


def peft_logps(folder):
    model = PeftModel.from_pretrained(copy.deepcopy(tiny_base().model), folder).eval()
    with torch.no_grad():
        return torch.tensor([plain_logp(model, row) for row in rows()])


def rows():
    return [row for pair in USER.train for row in (pair.chosen, pair.rejected)]


def first_steps(ready):
    reference = Reference(ready.adapted)
    reference.add(rows())
    reports = []
    engine = Engine(ready.adapted, [USER], reference, None, DPO, FleetSettings(), 7, begin=ready.first_adapter)
    [trained] = engine.run(lambda step: reports.extend(step))
    return engine, reports, trained


SAVED = {
    "as the config": {},
    "another alpha": {"lora_alpha": 20},
    "lower rank": {"r": 2, "lora_alpha": 3},
    "rslora": {"use_rslora": True},
    "lower rank with rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "fewer layers": {"target_modules": ["q_proj", "v_proj"]},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED)
def test_a_user_begins_where_peft_ends(tmp_path, saved):
    """`users.start`: the engine's first step has PEFT's log-probabilities, and its reference is the bare base."""
    folder = foreign(tmp_path, **saved)
    ready = ready_of(folder)
    with ready.adapted.using(ready.first_adapter("ann")[None]), torch.no_grad():
        [scores] = ready.adapted.score([rows()])
    expected, model = peft_logps(folder), tiny_base().model
    assert torch.allclose(torch.tensor([score.logp for score in scores]).double(), expected, atol=2e-4)
    with torch.no_grad():
        bare = torch.tensor([plain_logp(model, row) for row in rows()])
    assert not torch.allclose(bare, expected, atol=0.1)
    rewards = DPO.beta * (expected - bare)
    engine, reports, _ = first_steps(ready)
    order = [pair.pair.id for pair in engine.schedules["ann"].pairs(0)]
    places = [n for n, pair in enumerate(USER.train) if pair.pair.id in order]
    margins = [rewards[2 * n] - rewards[2 * n + 1] for n in places]
    assert reports[0].margin == pytest.approx(float(torch.stack(margins).mean()), abs=2e-4)


@pytest.mark.parametrize("saved", [SAVED["lower rank"], SAVED["fewer layers"]], ids=["ranks", "layers"])
def test_ranks_and_layers_that_the_adapter_lacks_are_trained(tmp_path, saved):
    ready = ready_of(foreign(tmp_path, **saved))
    before, (_, _, trained) = ready.first_adapter("ann"), first_steps(ready)
    moved = (trained.adapter - before).abs()
    for span in ready.adapted.spans.values():
        up = moved[span.b_start : span.stop].view(span.outputs, span.rank)
        assert (up.amax(0) > 0).all(), span.name


def problems(folder, base="tiny", base_hash="0" * 64, lora=LORA):
    adapted = AdaptedModel(tiny_base(), lora)
    settings = BaseSettings.model_construct(model=base)
    return [
        str(problem) for problem in fit_problems(read_foreign(folder, lora.rank), settings, base_hash, adapted.spans)
    ]


def named(folder, base):
    """Lets the adapter name this base."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    return folder


def test_an_adapter_of_the_base_fits_by_whatever_path_it_is_named(tmp_path):
    assert problems(foreign(tmp_path)) == []
    assert problems(named(tmp_path, "org/Tiny")) == []


def test_another_base_is_refused_by_its_name_and_by_its_weights(tmp_path):
    [problem] = problems(named(foreign(tmp_path / "named"), "org/other"))
    assert "users.start: was trained over org/other, and base.model is tiny (sha256 0000000000000000)" in problem
    adapter = read_foreign(foreign(tmp_path / "hashed"), 4)._replace(base_sha256="1" * 64)
    spans = AdaptedModel(tiny_base(), LORA).spans
    for base_hash, count in (("0" * 64, 1), ("1" * 64, 0)):
        assert len(fit_problems(adapter, BaseSettings.model_construct(model="tiny"), base_hash, spans)) == count


def test_a_base_in_a_folder_here_is_compared_by_its_weights(tmp_path):
    tiny_base().model.save_pretrained(tmp_path / "base")
    from persona_rlhf.models.base import weights_hash

    there = weights_hash(BaseSettings(model=str(tmp_path / "base")))
    folder = named(foreign(tmp_path / "adapter"), tmp_path / "base")
    assert problems(folder, "renamed", there) == []
    assert "was trained over the weights in" in problems(folder, "base")[0]


def test_layers_and_shapes_and_values_that_do_not_fit_are_named_together(tmp_path):
    folder = foreign(tmp_path, target_modules=["q_proj", "up_proj"])
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in tensors:
        if "q_proj.lora_A" in name:
            tensors[name] = torch.full((4, 16), torch.nan)
    save_file(tensors, folder / "adapter_model.safetensors")
    outside, shape, values = problems(folder, lora=LORA.model_copy(update={"target_modules": ["q_proj"]}))
    assert "adapts 2 layers that the run does not, such as `model.layers.0.mlp.up_proj`" in outside
    assert "let lora.target_modules and lora.layers cover up_proj" in outside
    assert "takes 16 inputs to 32 outputs, and 32 to 32 in tiny: it is an adapter of another base" in shape
    assert "holds values that are not finite" in values


def test_a_scale_that_float32_cannot_hold_is_refused(tmp_path):
    [problem] = problems(foreign(tmp_path, lora_alpha=10**300))
    assert "times the scale 2.5e+299 holds values that are not finite" in problem


def test_the_weights_are_read_once_for_all_users(tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(foreign_fit, "load_file", lambda file: reads.append(file) or load_file(file))
    ready = ready_of(foreign(tmp_path))
    for user_id in ("ann", "bob"):
        ready.first_adapter(user_id)
    assert len(reads) == 1


@pytest.mark.parametrize("prior", [False, True])
def test_manifest_and_card_name_the_start_unless_the_adapter_is_the_populations(run, tmp_path, prior):
    folder = foreign(tmp_path / "start")
    exporter = replace(run.exporter, start=read_foreign(folder, 4).sha256)
    verdict = certify(DEMANDS, refusals(0), (1.0,), lambda _: refusals(0))
    data = DataInfo.of(pairs_of("new"), 0)
    written = exporter.write("new", next(iter(run.flats.values())), verdict, None, data, prior=prior)
    weights = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    manifest = json.loads((run.path / written.path / "persona.json").read_text())
    assert manifest.get("start") == (None if prior else {"sha256": weights})
    assert (weights in (run.path / written.path / "README.md").read_text()) is not prior
