import pytest
import torch

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.packing import EMPTY, collate, pack
from tests.models.tiny import VOCABULARY, random_flat, random_row, tiny_base
from tests.training.oracles import peft_model, plain_logp

LORA = LoraSettings(rank=4, alpha=8)
USERS = 3


@pytest.fixture(scope="module")
def adapted():
    return AdaptedModel(tiny_base(), LORA)


@pytest.fixture(scope="module")
def flat(adapted):
    return random_flat(adapted, USERS)


@pytest.fixture(scope="module")
def oracles(adapted, flat):
    return [peft_model(adapted, LORA, adapter) for adapter in flat]


def _prompts(counts=(4, 2, 3)):
    draw = torch.Generator().manual_seed(3)
    return [
        [tuple(torch.randint(2, VOCABULARY, (3 + 2 * n,), generator=draw).tolist()) for n in range(count)]
        for count in counts
    ]


def _greedy(oracle, prompt, limit):
    """What `transformers` itself writes for one prompt without any padding."""
    ids = torch.tensor([prompt])
    written = oracle.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        pad_token_id=0,
        eos_token_id=1,
    )
    return tuple(written[0, len(prompt) :].tolist())


def test_right_padding_without_a_mask_changes_nothing(adapted, flat):
    """The padding's length and content are free: real positions never look to their right."""
    draw = torch.Generator().manual_seed(1)
    row = random_row(draw, 5, 6)
    longer = [random_row(draw, 8, length) for length in (3, 20, 60)]
    device = adapted.base.device
    with torch.no_grad(), adapted.using(flat[:1]):
        alone = adapted.row_logps(collate([row], 0, device))[0, :6]
        for other in longer:
            assert torch.allclose(adapted.row_logps(collate([row, other], 0, device))[0, :6], alone, rtol=0, atol=2e-6)
        expected = adapted.row_logps(collate([row, longer[1]], 0, device))[0]
        for pad in (1, 95):
            assert torch.equal(adapted.row_logps(collate([row, longer[1]], pad, device))[0], expected)
    with torch.no_grad(), adapted.using(flat[:2]):
        expected = adapted.row_logps(pack([row, longer[1]], 2, 0, device))
        assert torch.allclose(expected[0, :6], alone, rtol=0, atol=2e-6)
        for pad in (1, 95):
            assert torch.equal(adapted.row_logps(pack([row, longer[1]], 2, pad, device)), expected)


def test_packed_rows_are_rows_one_by_one(adapted, flat):
    """Values and gradients; prompts shared by two and three rows, a user with fewer rows, one with none."""
    draw = torch.Generator().manual_seed(6)
    made = [random_row(draw, 3 + n, 4 + 5 * n) for n in range(4)]
    shared = [Row(made[0].prompt, row.completion) for row in made[1:]]
    rows = [made[0], *shared[:2], made[3], made[1], shared[2], EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, EMPTY]
    scales = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    results = []
    assert adapted.packs_rows
    device = adapted.base.device
    layouts = pack(rows, USERS, 0, device, equal_lines=False), pack(rows, USERS, 0, device), collate(rows, 0, device)
    for batch in layouts:
        learning = flat.clone().requires_grad_()
        with adapted.using(learning):
            logps = adapted.row_logps(batch)
            (logps.sum(1) * scales).sum().backward()
        results.append((logps.detach(), learning.grad))
    *packed, (plain, expected) = results
    for logps, gradient in packed:
        assert torch.allclose(logps, plain, rtol=0, atol=5e-6)
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()
        assert (gradient[2] == 0).all()


@pytest.mark.parametrize(("prompt", "other", "apart"), [(40, 20, True), (2, 60, False)])
def test_attention_in_several_calls_is_attention_over_whole_rows(adapted, flat, prompt, other, apart):
    """Rows of like length together, and with long prompts each prompt once: same values, same gradients."""
    draw = torch.Generator().manual_seed(8)
    rows = []
    for n in range(3 * 6):
        first = random_row(draw, prompt - n % 2, 43 + n - prompt)
        rows += [first, Row(first.prompt, random_row(draw, 1, other - n).completion)]
    results = []
    for even in (False, True):
        batch = pack(rows, USERS, 0, adapted.base.device, even)
        learning = flat.clone().requires_grad_()
        with adapted.using(learning):
            logps = adapted.row_logps(batch)
            logps.sum().backward()
        results.append((logps.detach(), learning.grad))
        assert batch.layout is not None
        assert len(batch.layout.calls) == (1 if even else 6 if apart else 5)
    (several, gradient), (one, expected) = results
    assert torch.allclose(several, one, rtol=0, atol=5e-6)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("breaks", ["window", "attention"])
def test_a_base_whose_attention_cannot_see_rows_is_given_one_row_a_line(breaks, monkeypatch):
    """A window that rows do not tell of, or a layer that mixes neighbouring tokens: detected, and still exact."""
    base = tiny_base()
    if breaks == "window":
        base.model.config.sliding_window = 4
    else:
        layer = base.model.model.layers[1].mlp
        layer.register_forward_hook(lambda _, __, out: out + torch.nn.functional.pad(out, (0, 0, 1, 0))[:, :-1])
    adapted = AdaptedModel(base, LORA)
    assert not adapted.packs_rows
    draw = torch.Generator().manual_seed(0)
    row, other = random_row(draw, 4, 5), random_row(draw, 4, 9)
    with torch.no_grad(), adapted.using(None):
        [[score, _]] = adapted.score([[row, other]])
    assert score.logp == pytest.approx(plain_logp(base.model, row).item(), abs=1e-4)
    assert base.model.config._attn_implementation == "sdpa"


def test_empty_rows_fill_places_without_a_trace(adapted, flat):
    draw = torch.Generator().manual_seed(2)
    rows = [random_row(draw, 5, 6), EMPTY, EMPTY]
    learning = flat.clone().requires_grad_()
    with adapted.using(learning):
        logps = adapted.row_logps(collate(rows, 0, adapted.base.device)).sum(1)
        logps.sum().backward()
    assert logps[1:].tolist() == [0, 0]
    assert learning.grad is not None
    assert learning.grad[0].norm() > 0
    assert (learning.grad[1:] == 0).all()


def test_scores_are_those_of_each_users_peft_model(adapted, flat, oracles):
    draw = torch.Generator().manual_seed(4)
    rows = [[random_row(draw, 3 + n, 2 + 5 * n) for n in range(count)] for count in (4, 1, 3)]
    rows[1].append(Row((5, 6), ()))
    with adapted.using(flat):
        scores = adapted.score(rows)
    with torch.no_grad():
        for user_rows, oracle, user_scores in zip(rows, oracles, scores, strict=True):
            assert len(user_scores) == len(user_rows)
            for row, score in zip(user_rows, user_scores, strict=True):
                expected = plain_logp(oracle, row).item() if row.completion else 0.0
                assert score.logp == pytest.approx(expected, abs=2e-4)
                assert score.tokens == len(row.completion)


def test_scores_do_not_depend_on_the_size_of_a_pass(adapted, flat, monkeypatch):
    draw = torch.Generator().manual_seed(5)
    rows = [[random_row(draw, 3 + n, 2 + 3 * n) for n in range(count)] for count in (7, 2, 5)]
    with adapted.using(flat):
        whole = adapted.score(rows)
        for budget in (1, 60, 200):
            monkeypatch.setattr(adapted, "tokens_per_pass", budget)
            for user_scores, again in zip(whole, adapted.score(rows), strict=True):
                assert [score.logp for score in again] == pytest.approx([score.logp for score in user_scores], abs=1e-4)
                assert [score[1:] for score in again] == [score[1:] for score in user_scores]


@pytest.mark.parametrize("budget", [16_384, 40])
def test_greedy_answers_are_those_of_transformers_generate(adapted, flat, oracles, budget, monkeypatch):
    """PEFT + `generate`, one prompt at a time without padding, is the oracle; ours is one left-padded batch."""
    monkeypatch.setattr(adapted, "tokens_per_pass", budget)
    prompts = _prompts()
    with adapted.using(flat):
        answers = adapted.generate(prompts, 12)
    ends = set()
    for user_prompts, oracle, user_answers in zip(prompts, oracles, answers, strict=True):
        assert len(user_answers) == len(user_prompts)
        for prompt, answer in zip(user_prompts, user_answers, strict=True):
            expected = _greedy(oracle, prompt, 12)
            assert answer.finished == (1 in expected)
            assert answer.ids == expected[: expected.index(1) if 1 in expected else None]
            ends.add(answer.finished)
    assert {answer.ids for answer in answers[0]} != {answer.ids for answer in answers[1]}


def test_rows_that_end_early_leave_and_the_others_write_on(adapted, flat, oracles):
    """The end token is any token that some rows write soon: the batch shrinks, and every answer stays exact."""
    prompts = _prompts((6, 5, 6))
    with adapted.using(flat):
        free = adapted.generate(prompts, 14)
    firsts = [answer.ids for user_answers in free for answer in user_answers]
    ender = max(range(2, VOCABULARY), key=lambda token: sum(token in ids for ids in firsts))
    config = adapted.base.model.generation_config
    config.eos_token_id = [1, ender]
    try:
        with adapted.using(flat):
            cut = adapted.generate(prompts, 14)
    finally:
        config.eos_token_id = 1
    assert len({len(answer.ids) for user_answers in cut for answer in user_answers}) > 2
    for whole, short in zip(
        (a for user_answers in free for a in user_answers),
        (a for user_answers in cut for a in user_answers),
        strict=True,
    ):
        stop = whole.ids.index(ender) if ender in whole.ids else len(whole.ids)
        assert short.ids == whole.ids[:stop]
        assert short.finished == (ender in whole.ids or whole.finished)


def test_a_completion_is_greedy_exactly_where_greedy_decoding_writes_it(adapted, flat):
    """Both ways: the answer itself is greedy, and one changed token (or one token more) is not."""
    prompts = _prompts()
    with adapted.using(flat):
        answers = adapted.generate(prompts, 6)
        rows = []
        for user_rows, written in zip(prompts, answers, strict=True):
            ends = [answer.ids + ((1,) if answer.finished else ()) for answer in written]
            rows.append([Row(prompt, ids) for prompt, ids in zip(user_rows, ends, strict=True)])
        assert all(reading.greedy for user_rows in adapted.score_greedy(rows) for reading in user_rows)
        for place in (0, 3, -1):
            wrong = []
            for user_rows in rows:
                wrong.append([])
                for prompt, ids in user_rows:
                    changed = list(ids)
                    changed[min(place, len(ids) - 1)] = 2 + (changed[min(place, len(ids) - 1)] + 1) % 90
                    wrong[-1].append(Row(prompt, tuple(changed)))
            assert not any(reading.greedy for user_rows in adapted.score_greedy(wrong) for reading in user_rows)
    with adapted.using(flat.flip(0)):
        others = [reading.greedy for user_rows in adapted.score_greedy(rows) for reading in user_rows]
    assert not all(others)


def test_a_sampled_answer_is_the_same_whoever_else_is_asked(adapted, flat):
    prompts = _prompts((5, 4, 5))
    with adapted.using(flat):
        together = adapted.generate(prompts, 10, temperature=1.0, seed=11)
        again = adapted.generate(prompts, 10, temperature=1.0, seed=11)
        other = adapted.generate(prompts, 10, temperature=1.0, seed=12)
    assert together == again
    assert together != other
    for user in range(USERS):
        with adapted.using(flat[user : user + 1]):
            [alone] = adapted.generate([prompts[user]], 10, temperature=1.0, seed=11)
            [fewer] = adapted.generate([prompts[user][:2]], 10, temperature=1.0, seed=11)
        assert alone == together[user]
        assert fewer == together[user][:2]


def test_samples_have_the_models_own_frequencies(adapted):
    """First tokens of many samples against the softmax, at two temperatures (chi-square, far in the tail)."""
    prompt, count = (7, 8, 9), 4000
    with torch.no_grad():
        logits = adapted.base.model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    for temperature in (1.0, 0.5):
        with adapted.using(None):
            [answers] = adapted.generate([[prompt] * count], 1, temperature=temperature, seed=5)
        counts = torch.zeros(VOCABULARY, dtype=torch.float64)
        for answer in answers:
            counts[answer.ids[0] if answer.ids else 1] += 1
        expected = torch.softmax(logits / temperature, -1) * count
        common = expected > 5
        statistic = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
        freedom = int(common.sum())
        assert statistic < freedom + 6 * (2 * freedom) ** 0.5
        assert statistic > freedom - 6 * (2 * freedom) ** 0.5


def test_left_padding_is_exact(adapted, flat):
    """A short prompt beside a long one is answered as it is alone."""
    short, long = (5, 6, 7), tuple(range(2, 60))
    with adapted.using(flat[:1]):
        [alone] = adapted.generate([[short]], 16)
        [padded] = adapted.generate([[short, long]], 16)
        [sampled] = adapted.generate([[short]], 16, temperature=1.0, seed=3)
        [beside] = adapted.generate([[short, long]], 16, temperature=1.0, seed=3)
    assert padded[0] == alone[0]
    assert beside[0] == sampled[0]


def test_no_prompts_no_answers(adapted, flat):
    with adapted.using(flat):
        assert adapted.generate([[], [], []], 4) == [[], [], []]
        assert adapted.score([[], [], []]) == [[], [], []]
        assert [len(answers) for answers in adapted.generate([[], [(5, 6)], []], 4)] == [0, 1, 0]


@pytest.mark.parametrize("bent", ["after the head", "after the model", "in one piece"])
def test_a_base_that_bends_its_logits_is_scored_as_it_is(bent):
    """Whatever comes after the decoder belongs to the model; one that has no separate decoder is run whole."""
    base = tiny_base()
    if bent == "after the head":
        base.model.lm_head.register_forward_hook(lambda _, __, logits: logits * 2)
    elif bent == "after the model":
        base.model.register_forward_hook(lambda _, __, output: setattr(output, "logits", output.logits.tanh()))
    else:
        base.model.base_model_prefix = ""
    adapted = AdaptedModel(base, LORA)
    assert (adapted._split is None) == (bent == "in one piece")
    row = random_row(torch.Generator().manual_seed(0), 4, 5)
    with torch.no_grad(), adapted.using(None):
        logp = adapted.row_logps(collate([row], 0, base.device)).sum().item()
    assert logp == pytest.approx(plain_logp(base.model, row).item(), abs=1e-4)
