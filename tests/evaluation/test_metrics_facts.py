from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import Row, prompt_ids
from persona_rlhf.evaluation.metrics import FactQuestions
from persona_rlhf.evaluation.prompt_sets import Fact
from persona_rlhf.evaluation.records import Facts

PAIRS = zip("abcdefgh", "stuvwxyz", strict=True)
FACTS = [Fact(f"what is {x}", f"{y}{x} q", (f"{x}{y} q", f"{x}{x} {y}.")) for x, y in PAIRS]


def test_a_question_is_right_where_the_right_answer_is_likeliest_per_token(adapted, adapters):
    """The oracle: every answer of every question scored alone, with the end of its turn."""
    quiz = FactQuestions(adapted, FACTS)
    end = adapted.base.tokenizer.eos_token_id

    def alone(user: int) -> int:
        right = 0
        for fact in FACTS:
            prompt = prompt_ids((Message("user", fact.question),), adapted.base.tokenizer)
            means = []
            for answer in (fact.right, *fact.wrong):
                ids = (*adapted.base.tokenizer(answer, add_special_tokens=False)["input_ids"], end)
                with adapted.using(adapters[user : user + 1], None):
                    ((score,),) = adapted.score([[Row(prompt, ids)]])
                means.append(score.logp / len(ids))
            right += means[0] > max(means[1:])
        return right

    with adapted.using(adapters, None):
        found = quiz.ask(5)
    assert [facts.right for facts in found] == [alone(user) for user in range(5)]
    assert all(facts.n == 8 for facts in found)
    assert found[0] == quiz.of_base()  # an adapter of zeros
    assert found[0].right == found[0].base_right == found[0].kept
    assert all(facts.kept <= min(facts.right, facts.base_right) for facts in found)
    assert any(facts.kept < facts.right for facts in found), "one must know something that the base does not"
    assert len({facts.right for facts in found}) > 1, "some adapter must forget something, or the test shows nothing"


def test_fixed_facts_that_an_adapter_changes_are_counted(adapted, adapters):
    for fixed in (False, True):
        quiz = FactQuestions(adapted, FACTS, fixed)
        with adapted.using(adapters, None):
            each = quiz.ask(5)
        assert [facts.broken for facts in each] == [fixed * (facts.base_right - facts.kept) for facts in each]
        assert quiz.of_base().broken == 0
    assert any(facts.broken for facts in each), "some adapter must change a fact, or the test shows nothing"
    assert Facts(40, 38, 39, None, True).broken == 0, "a run of before 0.2 did not count them"


def test_without_questions_nothing_is_asked(adapted):
    assert FactQuestions(adapted, []).ask(2) == [None, None]
    assert FactQuestions(adapted, []).of_base() is None
