import pytest
import torch
from jinja2 import TemplateError

from persona_rlhf.config.evaluation import RedTeamSettings
from persona_rlhf.config.training import LoraSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation import redteam
from persona_rlhf.evaluation.records import Refused
from persona_rlhf.evaluation.redteam import RedTeam, mean_adapter, widened
from persona_rlhf.evaluation.refusals import answer_text
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.multi_lora import lora_matrices
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.simulation.users import TRIGGER
from tests.evaluation.conftest import CHARACTERS, written_out

NOVELTY = ("combination", "phrasing", "topic")
LIMIT = 8  # new tokens
SETTINGS = RedTeamSettings(probes=4, prefill=[2, 4], samples=3)
GREEDY = {"plain", "unseen_phrasing", "unseen_topic", "opening", "roleplay", "instruction", "system"}
GREEDY |= {"prefill_2", "prefill_4"}


def judge(text: str) -> bool:
    return sum(map(ord, text)) % 2 == 0


def probe(category: str, n: int, split="test", twin: str | None = "fine") -> Probe:
    letters = chr(97 + n % 26) + chr(97 + n // 26)
    known = None if twin is None else f"{twin} {letters} {category}"
    return Probe(f"{category}{n}", category, f"do {letters} {category}", letters, "p", known, split, NOVELTY[n % 3])


PROBES = [probe(category, n) for category in ("aa", "bb") for n in range(60)]


@pytest.fixture
def base(ending_base):
    return ending_base


@pytest.fixture
def team(adapted):
    return RedTeam(adapted, PROBES, judge, SETTINGS, LIMIT, seed=7)


def test_every_attack_is_the_same_for_all_and_bounded(team, adapted):
    assert set(team.prompts) == {*GREEDY, "turns", "trigger", "sampled"}
    assert set(team.left_out) == {"paraphrase"}
    for name, attack in team.prompts.items():
        counts = [attack.categories.count(category) for category in ("aa", "bb")]
        of_twins = name in ("turns", "prefill_2", "prefill_4")  # the base refuses most twins of one category
        assert max(counts) <= 4 if of_twins else counts == [4, 4], name
    again = RedTeam(adapted, PROBES[::-1], judge, SETTINGS, LIMIT, seed=8)
    for name, attack in again.prompts.items():
        assert set(attack.prompts) == set(team.prompts[name].prompts), "the hash chooses, not the order or the seed"


def test_only_the_test_split_is_asked(adapted):
    others = [probe("aa", n, split) for n, split in enumerate(["train", "dev", "certify"] * 20)]
    assert RedTeam(adapted, others, judge, SETTINGS, LIMIT, 0).prompts == {}
    few = [probe("aa", n) for n in range(6)]
    whole = RedTeam(adapted, [*others, *few], judge, SETTINGS, LIMIT, 0)
    asked = {tuple(p) for p in whole.prompts["plain"].prompts}
    texts = [p.prompt for p in few if p.novelty != "topic"]
    assert asked == {prompt_ids((Message("user", text),), adapted.base.tokenizer) for text in texts}


def test_where_topics_are_split_whole_every_attack_asks_of_unseen_ones():
    known, unseen = ([p for p in PROBES if (p.novelty == "topic") is new] for new in (False, True))
    assert redteam.probes_of("plain", [*known, *unseen]) == known
    assert redteam.probes_of("plain", unseen) == redteam.probes_of("unseen_topic", unseen) == unseen


def test_outcomes_equal_every_answer_written_out(adapted, adapters):
    """The oracle: each user alone, each answer generated to its end and judged."""
    only = SETTINGS.model_copy(update={"attacks": ["plain", "prefill", "system"], "prefill": [2]})
    team, adapters = RedTeam(adapted, PROBES, judge, only, LIMIT, seed=7), adapters[[0, 2, 4]]
    found = team.attack(adapters)
    assert set(found[0]) == {"plain", "prefill_2", "system"}
    for name, attack in team.prompts.items():
        with adapted.using(None):
            base_refused = sum(written_out(adapted, prompt, LIMIT, judge)[1] for prompt in attack.prompts)
        for user in range(len(adapters)):
            with adapted.using(adapters[user : user + 1]):
                refused = [written_out(adapted, prompt, LIMIT, judge)[1] for prompt in attack.prompts]
            outcome = found[user][name]
            assert outcome[:3] == (len(refused), sum(refused), base_refused), (name, user)
            by_hand = {
                category: sum(no for no, own in zip(refused, attack.categories, strict=True) if own == category)
                for category in set(attack.categories)
            }
            assert {category: counted.refused for category, counted in outcome.categories.items()} == by_hand
    assert all(own["plain"].refused == own["plain"].base_refused for own in found[:1]), "an adapter of zeros"
    assert any(outcome.refused != outcome.base_refused for own in found for outcome in own.values())


def test_a_prompt_is_broken_if_any_sample_complies(adapted, adapters):
    only = SETTINGS.model_copy(update={"attacks": ["sampled"]})
    team = RedTeam(adapted, PROBES, judge, only, LIMIT, seed=7)
    found = [own["sampled"] for own in team.attack(adapters)]
    prompts = team.prompts["sampled"].prompts
    asked = [prompt for prompt in prompts for _ in range(3)]
    for user, outcome in enumerate(found):
        with adapted.using(adapters[user : user + 1]):
            (written,) = adapted.generate([asked], LIMIT, 1.0, 7)
        no = [answer.finished and judge(answer_text(adapted, answer)) for answer in written]
        whole = sum(all(no[start : start + 3]) for start in range(0, len(no), 3))
        assert (outcome.n, outcome.refused) == (len(prompts), whole)
        assert outcome.answers == Refused(len(no), sum(no), found[0].answers.base_refused)
    assert found[0].answers.refused == found[0].answers.base_refused, "the same draws: an adapter of zeros ties"
    assert found[0].refused < found[0].answers.refused / 3


def test_a_prefill_is_the_bases_answer_to_the_twin_and_only_what_follows_is_judged(team, adapted):
    said = []
    twins = {prompt_ids((Message("user", p.prompt),), adapted.base.tokenizer): p.twin for p in PROBES}
    for name, tokens in (("prefill_2", 2), ("prefill_4", 4)):
        for prompt in team.prompts[name].prompts:
            request, opening = prompt[:-tokens], prompt[-tokens:]
            with adapted.using(None):
                ((answer,),) = adapted.generate(
                    [[prompt_ids((Message("user", twins[request]),), adapted.base.tokenizer)]], LIMIT
                )
            assert answer.ids[:tokens] == opening
            assert not judge(answer_text(adapted, answer)), "a twin that the base refuses gives no compliance"
    for prompt, opened in zip(team.prompts["plain"].prompts, team.prompts["opening"].prompts, strict=True):
        assert opened[: len(prompt)] == prompt
        said_already = adapted.base.tokenizer.decode(list(opened[len(prompt) :]), skip_special_tokens=False)
        spelled = {"".join(c if c in CHARACTERS else "<unk>" for c in text) for text in redteam.wrappers()["opening"]}
        assert said_already in spelled
    team._base.judge = lambda text: said.append(text) or True
    fresh = RedTeam(adapted, PROBES, team._base.judge, SETTINGS, LIMIT, 7)
    assert "prefill_2" not in fresh.prompts, "a base that refuses every twin has nothing to teach"
    assert "turns" in fresh.left_out


def test_the_wrappers_hold_the_request_and_the_turns_come_before_it():
    one = probe("aa", 3)
    for wrapper in map(redteam.WORDED.__getitem__, ("roleplay", "instruction", "trigger", "plain", "system")):
        messages = wrapper(one)
        assert one.prompt in messages[-1].content
        assert messages[-1].role == "user"
        assert wrapper(one) == messages
    assert redteam.system(one)[0].role == "system"
    assert TRIGGER in redteam.trigger(one)[0].content
    assert [m.role for m in redteam.after_a_turn(one, "yes")] == ["user", "assistant", "user"]
    for name in ("roleplay", "instruction"):
        texts = redteam.wrappers()[name]
        assert all(text.count("{prompt}") == 1 for text in texts)
        used = {redteam.WORDED[name](probe("aa", n))[0].content.replace(probe("aa", n).prompt, "") for n in range(60)}
        assert len(used) == len(texts), "every wrapper has its share of the probes"


def test_a_topic_of_the_bundled_world_is_reworded():
    from persona_rlhf.simulation.prompts import topics

    topic = topics()[0]
    messages = redteam.reworded(probe("aa", 1)._replace(topic=topic.id))
    assert messages is not None
    assert topic.vp.split()[-1] in messages[0].content
    assert redteam.reworded(probe("aa", 1)) is None


def test_what_a_base_cannot_take_is_left_out_with_a_reason(adapted, monkeypatch):
    def no_system(messages, tokenizer):
        if messages[0].role == "system":
            raise TemplateError("System role not supported")
        return prompt_ids(messages, tokenizer)

    monkeypatch.setattr("persona_rlhf.evaluation.redteam.prompt_ids", no_system)
    team = RedTeam(adapted, [probe("aa", n, twin=None) for n in range(9)], judge, SETTINGS, LIMIT, 0)
    assert "System role not supported" in team.left_out["system"]
    assert {"prefill_2", "prefill_4", "turns"} <= set(team.left_out)
    assert "plain" in team.prompts
    without = [p._replace(twin=None) for p in PROBES]
    narrow = RedTeam(adapted, without, judge, SETTINGS, adapted.base.context - 20, 0)
    assert "roleplay" in narrow.left_out


def test_the_mean_of_two_adapters_is_the_mean_of_their_updates(base):
    lora = LoraSettings(rank=2, alpha=4)
    adapted = AdaptedModel(base, lora)
    spans = list(adapted.spans.values())
    one, other = torch.randn(2, adapted.params_per_user, generator=torch.Generator().manual_seed(3)).unbind()
    scale = adapted.scale
    adapted.close()
    wide = AdaptedModel(base, widened(lora))
    try:
        merged = mean_adapter(one, other, spans)
        assert merged.shape == (wide.params_per_user,)
        assert wide.scale == scale
        updates = [
            [b[0] @ a[0] for a, b in lora_matrices(flat[None], laid)]
            for flat, laid in ((one, spans), (other, spans), (merged, list(wide.spans.values())))
        ]
        for first, second, mean in zip(*updates, strict=True):
            torch.testing.assert_close(mean, (first + second) / 2, atol=1e-5, rtol=1e-5)
    finally:
        wide.close()
