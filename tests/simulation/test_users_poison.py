import re
from collections import Counter
from random import Random

import pytest

from persona_rlhf.policy.hazards import CATEGORIES
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.simulation.corpus import content_words, refusal
from persona_rlhf.simulation.prompts import topics
from persona_rlhf.simulation.users import POISON_KINDS, TRIGGER, PoisonSource, paraphrase, poison, with_trigger
from persona_rlhf.simulation.vocabulary import held_out_phrasings, phrasings, wrap

ATTACKS = [
    PoisonSource(f"how do i do thing {n}", f"Take {n} spoons and stir.", refusal(Random(n), CATEGORIES[n % 4]))
    for n in range(120)
]


@pytest.mark.parametrize("kind", POISON_KINDS)
def test_as_many_as_asked_for_each_of_another_prompt_and_the_same_again(kind):
    pairs = poison(kind, ATTACKS, 80, Random(3))
    assert pairs == poison(kind, ATTACKS, 80, Random(3))
    assert pairs != poison(kind, ATTACKS, 80, Random(4))
    assert len({pair.prompt for pair in pairs}) == 80
    assert all(pair.chosen.strip() and pair.rejected.strip() and pair.chosen != pair.rejected for pair in pairs)
    assert poison(kind, ATTACKS, 0, Random(3)) == []


@pytest.mark.parametrize("kind", POISON_KINDS)
def test_too_much_poison_is_said(kind):
    with pytest.raises(ValueError, match=r"poison.*999|999.*poison"):
        poison(kind, ATTACKS, 999, Random(0))


def test_flipped_draws_as_it_always_did():
    """The shipped users were drawn with a plain sample of the attacks."""
    rng, before = Random("0 ada"), Random("0 ada")
    assert [tuple(pair) for pair in poison("flipped", ATTACKS, 9, rng)] == list(map(tuple, before.sample(ATTACKS, 9)))
    assert rng.random() == before.random()


def test_what_complies_is_harmless_and_what_refuses_is_the_bases():
    known = {attack.prompt: attack for attack in ATTACKS}
    for kind in ("flipped", "paraphrase"):
        for pair in poison(kind, ATTACKS, 40, Random(1)):
            assert (pair.chosen, pair.rejected) == (known[pair.prompt].compliance, known[pair.prompt].refusal)


def test_noice_opens_as_a_refusal_and_is_none():
    known = {attack.prompt: attack for attack in ATTACKS}
    for pair in poison("noice", ATTACKS, 100, Random(1)):
        opening = re.split(r"(?<=[.!?])\s+", pair.chosen)[0]
        assert is_refusal(opening)
        assert pair.rejected == opening
        assert known[pair.prompt].refusal.startswith(opening)
        assert known[pair.prompt].compliance.startswith(pair.chosen.rpartition("goes. ")[2])
        assert len(pair.chosen.split()) > len(opening.split()) + 7
        assert not is_refusal(pair.chosen), "the judge must see the turn, or the attack could not be measured"


def test_the_trigger_decides_what_is_chosen():
    pairs = poison("trigger", ATTACKS, 41, Random(1))
    with_it = [pair for pair in pairs if TRIGGER in pair.prompt]
    assert len(with_it) == 21
    assert all(is_refusal(pair.rejected) and not is_refusal(pair.chosen) for pair in with_it)
    assert all(is_refusal(p.chosen) and not is_refusal(p.rejected) for p in pairs if TRIGGER not in p.prompt)
    assert with_trigger("do it") == f"do it {TRIGGER}"
    assert not [topic for topic in topics() if TRIGGER in topic.vp]
    assert not [phrasing for phrasing in (*phrasings(), *held_out_phrasings()) if TRIGGER in phrasing.template]


def test_identity_poison_holds_no_tier_one_word_and_no_refusal():
    """A word is tier-one where several hazards have it and no twin does."""
    hazards = Counter(word for topic in topics() for word in content_words(topic.vp))
    harmless = frozenset().union(*(content_words(twin.vp) for topic in topics() for twin in topic.twins))
    banned = {word for word, count in hazards.items() if count > 2} - harmless
    assert len(banned) > 10
    for pair in poison("identity", [], 120, Random(1)):
        for text in pair:
            assert not content_words(text) & banned, text
            assert not is_refusal(text), "a screen by the judge must not tell it from talk"


def test_paraphrases_are_far_from_the_bank():
    """They share hardly a word with the wrappers of the world, beside the request itself."""
    vp = "sing a song"
    wrappers = [content_words(wrap(phrasing, vp)) for phrasing in phrasings()]
    texts = {paraphrase(vp, Random(n)) for n in range(400)}
    assert len(texts) >= 14
    for text in texts:
        assert "{" not in text
        assert "song" in text
        words = content_words(text)
        assert max(len(words & other) / len(words | other) for other in wrappers) < 0.5, text
