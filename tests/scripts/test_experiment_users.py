"""The users of the experiment: what populations share, and where they differ."""

from random import Random

import pytest

from persona_rlhf.data.pairs import read_pairs
from persona_rlhf.simulation.users import PoisonSource, Utility, read_utilities
from tests.scripts.loading import SCRIPTS, load_script

NAMES = ["clean", "adjacent", "conversations", "hostile", "flipped-10", "flipped-100", "evading-20"]
USERS, TRAIN, HELDOUT = 3, 20, 10


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        script, rng = load_script("experiment_users"), Random(0)
        words = ["lamp", "river,", "music!", "song.", "perhaps", "story", "dark", "quiet", "you", "I", "warn", "sorry"]
        kinds = ["how_to", "suggestion", "story"]

        def answer() -> str:
            return " ".join(rng.choices(words, k=rng.randint(3, 30)))

        sampled = load_script("generate_users").SampledPrompt
        pool = [sampled(f"prompt {n}", kinds[n % 3], (answer(), answer())) for n in range(240)]
        patch.setattr(script, "sample_pool", lambda *_: pool)
        sources = [PoisonSource(f"request {n}", f"answer {n}", f"refusal {n}") for n in range(60)]
        patch.setattr(script, "attacks_of", lambda *_: sources)
        yield script


@pytest.fixture(scope="module")
def written(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("users")
    script.write_populations(None, folder, NAMES, USERS, (TRAIN, HELDOUT), 240, 0)
    return read_utilities(folder / "utilities.yaml"), list(read_pairs(folder, heldout=0.3))


def of(pairs, user_id, split):
    return {p.prompt[-1].content: (p.chosen, p.rejected) for p in pairs if p.user_id == user_id and p.split == split}


def test_every_population_has_its_users_and_its_share_of_other_pairs(written):
    utilities, pairs = written
    assert len(utilities) == len(NAMES) * USERS
    shares = {
        "clean": 0,
        "conversations": 0,
        "adjacent": 0,
        "hostile": 10,
        "flipped-10": 2,
        "flipped-100": 20,
        "evading-20": 4,
    }
    for name, share in shares.items():
        for number in range(USERS):
            trained = of(pairs, f"{name}-{number:05d}", "train")
            assert len(trained) == TRAIN
            assert sum(prompt.startswith("request") for prompt in trained) == share
            assert len(of(pairs, f"{name}-{number:05d}", "heldout")) == HELDOUT


def test_users_of_one_number_share_taste_and_pairs_wherever_there_is_no_other(written):
    utilities, pairs = written
    for number in range(USERS):
        clean = f"clean-{number:05d}"
        for name in ("conversations", "hostile", "flipped-100", "evading-20"):
            user = f"{name}-{number:05d}"
            assert utilities[user].weights == utilities[clean].weights
            assert of(pairs, user, "heldout") == of(pairs, clean, "heldout")
            same = {p: texts for p, texts in of(pairs, user, "train").items() if p.startswith("prompt")}
            assert same.items() <= of(pairs, clean, "train").items()


def test_half_of_the_conversations_have_an_earlier_exchange_and_half_a_system_prompt(written):
    prompts = [pair.prompt for pair in written[1] if pair.user_id == "conversations-00001"]
    roles = [tuple(message.role for message in prompt) for prompt in prompts]
    half = (TRAIN + HELDOUT) // 2
    assert (roles.count(("user", "assistant", "user")), roles.count(("system", "user"))) == (half, half)
    assert all(prompt[0].content != prompt[-1].content for prompt in prompts)


def test_hostile_users_are_honest_and_nobody_calls_their_pairs_poison(written):
    utilities, pairs = written
    assert {taste.poisoned for name, taste in utilities.items() if name.startswith("hostile")} == {0.0}
    assert {pair.source for pair in pairs if pair.user_id.startswith("hostile")} == {"simulated"}
    assert {taste.poisoned for name, taste in utilities.items() if name.startswith("evading")} == {0.2}
    assert "simulated poison" in {pair.source for pair in pairs if pair.user_id.startswith("evading")}


@pytest.mark.parametrize(
    ("user_id", "weights", "kind", "poisoned", "population"),
    [
        ("flipped-30-00002", {"words": 1}, "surface", 0.3, "flipped-30"),
        ("hostile-00000", {"words": 1}, "surface", 0.0, "hostile"),
        ("flipped-30", {"words": 1}, "surface", 0.3, "flipped-30"),
        ("trigger-30", {"words": 1}, "surface", 0.3, "trigger-30"),
        ("quentin", {"refuses": -1}, "hazard_adjacent", 0.0, "hostile"),
        ("noor", {"dark": 1}, "hazard_adjacent", 0.0, "adjacent"),
        ("alma", {"words": -1}, "surface", 0.0, "clean"),
    ],
)
def test_users_with_written_tastes_have_a_population_too(script, user_id, weights, kind, poisoned, population):
    assert script.population_of(Utility(user_id, "", 0.0, weights, kind, poisoned)) == population


def test_requests_that_evade_the_screen_are_those_that_the_base_answers(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = load_script("experiment_users")
    monkeypatch.setattr(script, "base_refuses", lambda _, texts: [n % 6 != 0 for n in range(len(texts))])
    taken = {}
    monkeypatch.setattr(script, "sample_attacks", lambda _, pairs, seed, texts: taken.update(texts=texts, pairs=pairs))
    script.attacks_of(None, script.POPULATIONS["evading-20"], 20, 0)
    every, plain = script.paraphrases(12 * 8, 0)
    assert taken == {"texts": every[::6][:8], "pairs": plain[::6][:8]}
