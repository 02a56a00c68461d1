"""What the engine promises, held for every family of models against `transformers` and PEFT themselves."""

from functools import partial

import pytest
import torch
from peft import PeftModel

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.training import DpoSettings, FleetSettings, LoraSettings, TopLayers
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.packing import collate
from persona_rlhf.models.target_layers import adaptable_layers
from persona_rlhf.release.adapter import AdapterFiles, read_adapter
from persona_rlhf.release.compatibility import lint
from persona_rlhf.release.manifest import BaseInfo
from persona_rlhf.training.api import fleet_train
from tests.models.architectures import CONFIGS, CONTEXT, LAYERS, VOCABULARY, WINDOW, base_of
from tests.models.tiny import EOS, random_flat, random_row, user_rows
from tests.training.oracles import peft_model, plain_logp, read_flat

USERS = 2
LORA = LoraSettings(rank=4, alpha=8)
TOP = LoraSettings(rank=4, alpha=8, layers=TopLayers(top=(LAYERS - 1) / LAYERS))
PACKS = {
    **dict.fromkeys(CONFIGS, "always"),
    "gemma2": "never",  # its attention caps its scores, which no attention over packed rows does
    "gemma3": "within the window",
    "mistral-window": "within the window",
}
"""Whether a pass shares prompts and saves padding, or takes one row a line."""


class Case:
    """A family's base with the adapters of two users, and PEFT's model of each."""

    def __init__(self, name):
        self.name = name
        self.adapted = AdaptedModel(base_of(name), LORA)
        self.flat = random_flat(self.adapted, USERS, size=0.05)
        self.oracles = [peft_model(self.adapted, LORA, adapter) for adapter in self.flat]


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    return Case(request.param)


def _rows(shared=True):
    """Two users' rows, user-major: two answers to one prompt each, some longer than the windows."""
    draw = torch.Generator().manual_seed(7)
    first, second = random_row(draw, 5, 9, VOCABULARY), random_row(draw, 8, 30, VOCABULARY)
    others = [Row(row.prompt, random_row(draw, 1, 6, VOCABULARY).completion) for row in (first, second)]
    return [first, others[0], second, others[1]] if shared else [first, second]


def _short(rows):
    return [Row(row.prompt, row.completion[-WINDOW + len(row.prompt) :]) for row in rows]


def _full_logits(model, row):
    return model(input_ids=torch.tensor([[*row.prompt, *row.completion]])).logits[0, len(row.prompt) - 1 : -1]


def test_each_users_logits_are_those_of_peft_and_without_adapters_the_base_s(case):
    adapted, bare = case.adapted, base_of(case.name).model
    rows = _rows()
    with torch.no_grad():
        batch = adapted.batch(rows, USERS)
        with adapted.using(case.flat):
            logits = adapted.logits(batch)
        reference = adapted.logits(batch)
        expected = torch.cat([_full_logits(case.oracles[n // 2], row) for n, row in enumerate(rows)])
        plain = torch.cat([_full_logits(bare, row) for row in rows])
    assert torch.allclose(logits, expected, rtol=0, atol=3e-5)
    assert torch.allclose(reference, plain, rtol=0, atol=3e-5)
    assert (expected - plain).abs().mean() > 0.02, "adapters that change nothing show nothing"
    ids = torch.tensor([rows[2].completion])
    with torch.no_grad():
        assert torch.equal(adapted.base.model(input_ids=ids).logits, bare(input_ids=ids).logits)


def test_each_users_gradient_is_that_of_peft(case):
    adapted, rows = case.adapted, _rows()
    learning = case.flat.clone().requires_grad_()
    scales = torch.tensor([1.0, -2.0, 0.5, 3.0])
    with adapted.using(learning):
        (adapted.row_logps(adapted.batch(rows, USERS)).sum(1) * scales).sum().backward()
    assert learning.grad is not None
    for user, oracle in enumerate(case.oracles):
        oracle.zero_grad()
        sum(plain_logp(oracle, rows[n]) * scales[n] for n in (2 * user, 2 * user + 1)).backward()
        expected = read_flat(oracle, list(adapted.spans.values()), gradients=True)
        assert (learning.grad[user] - expected).norm() <= 1e-5 * expected.norm()


def test_logits_are_computed_only_where_a_completion_is_predicted(case):
    """Also where the model scales or caps them after the head: a whole vocabulary for every token would fill a GPU."""
    adapted, seen = case.adapted, []
    batch = adapted.batch(_rows(), USERS)
    hook = adapted.base.model.get_output_embeddings().register_forward_hook(lambda _, x, __: seen.append(x[0].shape))
    with torch.no_grad(), adapted.using(case.flat):
        adapted.logits(batch)
    hook.remove()
    assert [shape[:-1].numel() for shape in seen] == [len(batch.targets)]


def test_rows_are_packed_where_that_is_exact(case):
    adapted = case.adapted
    assert adapted.packs_rows == (PACKS[case.name] != "never")
    for rows, packed in ((_rows(), PACKS[case.name] == "always"), (_short(_rows()), adapted.packs_rows)):
        batch = adapted.batch(rows, USERS)
        assert (batch.layout is not None) == packed
        with torch.no_grad(), adapted.using(case.flat):
            together = adapted.row_logps(batch)
            for n, row in enumerate(rows):
                with adapted.using(case.flat[n // 2][None]):
                    alone = adapted.row_logps(collate([row], 0, adapted.base.device))[0]
                assert torch.allclose(together[n, : len(alone)], alone, rtol=0, atol=1e-5)
                assert (together[n, len(alone) :] == 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_training_that_starts_above_the_frozen_layers_is_exact(name):
    adapted, rows = AdaptedModel(base_of(name), TOP), _rows()
    states = [adapted.prefix_states(rows[:2]), adapted.prefix_states(rows[2:])]
    assert set(states[0]) == set(rows[:2]), "every family can be started above"
    results = []
    for below in (states, ()):
        flat = random_flat(adapted, USERS).requires_grad_()
        with adapted.using(flat):
            logps = adapted.row_logps(adapted.batch(rows, USERS), below)
            logps.sum().backward()
        results.append((logps.detach(), flat.grad))
    (above, gradient), (whole, expected) = results
    assert torch.allclose(above, whole, rtol=0, atol=1e-5)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_greedy_answers_are_those_of_peft(case):
    """Unequal prompts in one left-padded batch, the longest beyond the windows; rows that end early leave it."""
    adapted, draw = case.adapted, torch.Generator().manual_seed(3)
    prompts = [random_row(draw, length, 1, VOCABULARY).prompt for length in (3, WINDOW + 6, 11, 7)]
    expected = [_greedy(oracle, prompt) for oracle in case.oracles for prompt in prompts]
    written = [token for answer in expected for token in answer[2:6]]
    ends = [EOS, max(written, key=written.count)]
    config = adapted.base.model.generation_config
    config.eos_token_id = ends
    try:
        with adapted.using(case.flat):
            answers = adapted.generate([prompts] * USERS, 14)
    finally:
        config.eos_token_id = EOS
    assert [answer.ids for user_answers in answers for answer in user_answers] == [
        _cut(answer, ends) for answer in expected
    ]
    assert len({len(answer.ids) for user_answers in answers for answer in user_answers}) > 1
    assert [answer.ids for answer in answers[0]] != [answer.ids for answer in answers[1]]


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_an_answer_that_fills_the_context_is_cut_there(name):
    """GPT-2 knows no position beyond it; a prompt beside it has all the room it asks for."""
    adapted, draw = AdaptedModel(base_of(name), LORA), torch.Generator().manual_seed(3)
    long, short = (random_row(draw, length, 1, VOCABULARY).prompt for length in (CONTEXT - 4, 5))
    with adapted.using(None):
        [[cut, whole]] = adapted.generate([[long, short]], 14)
    assert cut == (_cut(_greedy(adapted.base.model, long, 4), [EOS]), False)
    assert whole.ids == _cut(_greedy(adapted.base.model, short), [EOS])
    assert len(whole.ids) == 14


def _greedy(model, prompt, limit=14):
    ids = torch.tensor([prompt])
    written = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit, pad_token_id=0
    )
    return tuple(written[0, len(prompt) :].tolist())


def _cut(answer, ends):
    return next((answer[:n] for n, token in enumerate(answer) if token in ends), answer)


def test_the_released_folder_gives_our_logits_in_peft(case, tmp_path):
    adapted = case.adapted
    for name, content in AdapterFiles(adapted, LORA, BaseInfo.of(case.name, "0")).of(case.flat[0], 0.5).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\npipeline_tag: text-generation\n---\n")
    assert [finding for finding in lint(tmp_path) if finding.refused] == []
    theirs = PeftModel.from_pretrained(base_of(case.name).model, tmp_path).eval()
    row = _rows()[2]
    with torch.no_grad():
        with adapted.using(case.flat[:1], torch.tensor([0.5])):
            ours = adapted.logits(collate([row], 0, adapted.base.device))
        assert torch.allclose(_full_logits(theirs, row), ours, rtol=0, atol=1e-5)
        with adapted.using(read_adapter(tmp_path, list(adapted.spans.values()))[None]):
            assert torch.equal(adapted.logits(collate([row], 0, adapted.base.device)), ours)


def test_what_cannot_be_adapted_is_named_in_one_sentence(case):
    left = {
        "qwen2-moe": [
            "model.layers.*.mlp.experts (a Qwen2MoeExperts is no plain linear layer)",
            "model.layers.*.mlp.gate (a Qwen2MoeTopKRouter is no plain linear layer)",
        ],
        "qwen3-moe": [
            "model.layers.*.mlp.down_proj (PEFT would take it for a fused expert)",
            "model.layers.*.mlp.experts (a Qwen3MoeExperts is no plain linear layer)",
            "model.layers.*.mlp.gate (a Qwen3MoeTopKRouter is no plain linear layer)",
            "model.layers.*.mlp.gate_proj (PEFT would take it for a fused expert)",
            "model.layers.*.mlp.up_proj (PEFT would take it for a fused expert)",
        ],
    }.get(case.name)
    prefix = "Layers without adapters, which stay as the base has them: "
    assert case.adapted.notice == (None if left is None else prefix + ", ".join(left))
    if left is None:
        matrices = {
            n.removesuffix(".frozen.weight") for n, p in case.adapted.base.model.named_parameters() if p.dim() > 1
        }
        assert len(matrices - set(case.adapted.spans)) <= 3, "embeddings and the head"


def test_a_layer_that_cannot_be_adapted_is_no_target():
    for target, why in {
        "experts": "a Qwen3MoeExperts is no plain linear layer",
        "gate_up_proj": "it is no plain linear layer",
        "up_proj": "PEFT would take it for a fused expert",
    }.items():
        with pytest.raises(InputError, match=f"lora.target_modules: .*{why}.*; leave `{target}` out"):
            adaptable_layers(base_of("qwen3-moe").model, ["q_proj", target])
    assert len(adaptable_layers(base_of("gpt2").model, ["c_attn", "mlp.c_proj"])) == 2 * LAYERS


@pytest.mark.parametrize("name", CONFIGS)
def test_users_trained_side_by_side_are_users_trained_alone(name):
    """Two steps each, of short and of long rows; whatever the neighbour makes of the layout of a pass."""
    users = [user_rows("short", 4, 1), user_rows("long", 4, 2)]
    draw = torch.Generator().manual_seed(5)
    pair = users[1].train[0]
    users[1].train[0] = pair._replace(chosen=Row(pair.chosen.prompt, random_row(draw, 1, 30).completion))
    base, dpo = base_of(name), DpoSettings(epochs=1, pairs_per_step=2, learning_rate=0.01)
    alike = {"tokenizer": base.tokenizer, "dpo": dpo, "lora": TOP, "fleet": FleetSettings(slots=2)}
    train = partial(fleet_train, base.model, **alike)
    together = train(users)
    for user in users:
        alone = train([user])[user.user_id].adapter
        trained = together[user.user_id].adapter
        assert (trained - alone).abs().max() <= 1e-5
        assert trained.abs().max() > 1e-3
