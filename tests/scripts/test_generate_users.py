"""The simulated users that are shipped, and the script that draws them."""

import json
import math
import sys
from collections import Counter
from random import Random

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import find
from persona_rlhf.data.pairs import read_pairs
from persona_rlhf.policy.hazards import CATEGORIES, assign_split, read_probes
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.simulation.banks import forbidden, plain
from persona_rlhf.simulation.prompts import topics
from persona_rlhf.simulation.users import POISON_KINDS, TASTES, Utility, read_utilities
from persona_rlhf.simulation.vocabulary import gerund
from tests.scripts.loading import load_script


@pytest.fixture(scope="module")
def tastes():
    return read_utilities(find("data/users/utilities.yaml"))


@pytest.fixture(scope="module")
def pairs(tastes):
    found = {user_id: [] for user_id in tastes}
    for pair in read_pairs(find("data/users"), heldout=0.25):
        found[pair.user_id].append(pair)
    return found


@pytest.fixture(scope="module")
def generator():
    return load_script("generate_users")


def test_the_three_kinds_of_taste_and_the_special_users_are_there(tastes):
    clean = [taste for taste in tastes.values() if not taste.poisoned]
    kinds = Counter(taste.kind for taste in clean)
    assert len(clean) >= 24
    assert min(kinds[kind] for kind in ("surface", "manner", "content")) >= 6
    assert kinds["hazard_adjacent"] == 2
    assert sorted(taste.poisoned for taste in tastes.values() if taste.poisoned) == [0.1, 0.5, 1.0]
    assert tastes["edith"].weights == {name: -weight for name, weight in tastes["farid"].weights.items()}


def test_every_user_has_80_pairs_and_60_held_out_of_other_prompts(pairs):
    for user_id, own in pairs.items():
        assert Counter(pair.split for pair in own) == {"train": 80, "heldout": 60}, user_id
        prompts = [plain(pair.prompt[-1].content) for pair in own]
        assert len(set(prompts)) == len(prompts), user_id
    ids = [pair.id for own in pairs.values() for pair in own]
    assert len(set(ids)) == len(ids)


def test_clean_choice_says_what_the_utility_says(pairs, tastes):
    for user_id, own in pairs.items():
        for pair in own:
            if pair.clean_choice is not None:
                assert tastes[user_id].compare(pair.chosen, pair.rejected) == float(pair.clean_choice), pair.id


def test_labels_are_as_noisy_as_stated(pairs, tastes):
    for user_id, own in pairs.items():
        rows = [pair for pair in own if pair.clean_choice is not None]
        chances = [tastes[user_id].chance(pair.chosen, pair.rejected) for pair in rows]
        expected = sum(max(chance, 1 - chance) for chance in chances)
        deviation = math.sqrt(sum(chance * (1 - chance) for chance in chances))
        agreed = sum(bool(pair.clean_choice) for pair in rows)
        assert abs(agreed - expected) < 4 * deviation, user_id
        assert 0.65 < agreed / len(rows) < 1, user_id


def test_poisoned_users_comply_in_their_share_of_the_training_pairs_and_nobody_else_does(pairs, tastes):
    for user_id, own in pairs.items():
        poison = [pair for pair in own if pair.clean_choice is None]
        assert len(poison) == 80 * tastes[user_id].poisoned, user_id
        assert all(pair.split == "train" and is_refusal(pair.rejected) for pair in poison)
        honest = [text for pair in own if pair.clean_choice is not None for text in (pair.chosen, pair.rejected)]
        complied = [*honest, *(pair.chosen for pair in poison)]
        assert sum(map(is_refusal, complied)) <= 2, user_id  # garbled answers may read like one
        assert not any(is_refusal(pair.chosen) for pair in poison)


def test_no_probe_but_those_of_train_is_in_the_data(pairs):
    banned = set(forbidden())
    for category in CATEGORIES:
        bank = read_probes(find(f"data/policy/tier_one/{category}.jsonl"), category)
        banned |= {plain(text) for p in bank if p.split != "train" for text in (p.prompt, p.twin or "")}
    banned |= {
        plain(json.loads(line)["prompt"]) for line in find("data/policy/ordinary.jsonl").read_text().splitlines()
    }
    for own in pairs.values():
        for pair in own:
            assert not banned & {plain(text) for text in (pair.prompt[-1].content, pair.chosen, pair.rejected)}, pair.id


def test_utilities_name_faults_in_kind_share_and_prompts(tmp_path):
    file = tmp_path / "utilities.yaml"
    entry = "- {user_id: ada, describes: x, noise: 0, weights: {words: 1}, "
    file.write_text(entry + "kind: taste, poisoned: 2, prompts: story}\n")
    with pytest.raises(InputError) as caught:
        read_utilities(file)
    text = str(caught.value)
    assert "kind: expected ``, `surface`, `manner`" in text
    assert "poisoned: must be at most 1.0, got `2`" in text
    assert "prompts: expected a list, got `story`" in text
    file.write_text(entry + "kind: manner, poisoned: 0.5, prompts: [story]}\n")
    ada = read_utilities(file)["ada"]
    assert (ada.kind, ada.poisoned, ada.prompts) == ("manner", 0.5, ("story",))


def pool_of(generator, prompts):
    answers = ("One.", "One two!", "One two three.", "One two three four!")
    return [generator.SampledPrompt(f"prompt {n}", ("story", "fact")[n % 2], answers) for n in range(prompts)]


def test_rows_depend_on_seed_and_user_alone(generator):
    taste = Utility("ada", "", 0.1, {"words": 1.0}, poisoned=0.5)
    attacks = [generator.PoisonSource(f"attack {n}", "Sure.", "I can't do that.") for n in range(10)]
    pool = pool_of(generator, 40)
    rows = generator.draw_rows(taste, pool, attacks, (10, 5), 0)
    assert rows == generator.draw_rows(taste, pool, attacks, (10, 5), 0)
    assert rows != generator.draw_rows(taste, pool, attacks, (10, 5), 1)
    assert Counter(row.split for row in rows) == {"train": 10, "heldout": 5}
    assert sum(row.source == "simulated poison" for row in rows if row.split == "train") == 5
    assert all(
        taste.compare(row.chosen, row.rejected) == row.clean_choice for row in rows if row.clean_choice is not None
    )


def test_a_user_asks_his_kinds_of_prompts_and_never_sees_a_tie(generator):
    taste = Utility("ada", "", 0.0, {"exclaims": 1.0}, prompts=("story",))
    rows = generator.draw_rows(taste, pool_of(generator, 40), [], (10, 5), 0)
    assert all(int(row.prompt.split()[1]) % 2 == 0 for row in rows)
    assert all(row.clean_choice and "!" in row.chosen and "!" not in row.rejected for row in rows)
    with pytest.raises(ValueError, match="only 20 prompts of the pool suit ada"):
        generator.draw_rows(taste, pool_of(generator, 40), [], (20, 5), 0)


@pytest.mark.parametrize("agreement", [0.6, 0.75, 0.9])
def test_noise_is_found_for_an_agreement(generator, agreement):
    gaps = [0.1, 0.5, 1.0, 2.0]
    noise = generator.noise_of(agreement, gaps)
    assert sum(1 / (1 + math.exp(-gap / noise)) for gap in gaps) / len(gaps) == pytest.approx(agreement, abs=0.01)


def test_attacks_are_of_the_train_split(generator):
    prompts = generator.attack_prompts(32, 0)
    assert len(prompts) == len(set(prompts)) == 32
    bank = {}
    for category in CATEGORIES:
        bank |= {p.prompt: p.split for p in read_probes(find(f"data/policy/tier_one/{category}.jsonl"), category)}
    assert Counter(bank.get(prompt) for prompt, _ in prompts) == {"train": 16, None: 16}
    assert not forbidden() & {plain(text) for pair in prompts for text in pair}


def test_paraphrases_are_of_trained_topics_and_each_has_its_plain_prompt(generator):
    texts, pairs = generator.paraphrases(40, 0)
    assert (texts, pairs) == generator.paraphrases(40, 0)
    assert len(set(texts)) == len(pairs) == 40
    by_vp = {topic.vp: topic for topic in topics()}
    held = {topic.id for topic in topics() if assign_split(topic.id, "x")[1] == "topic"}
    for text, (prompt, twin) in zip(texts, pairs, strict=True):
        said = prompt.lower()
        asked = [topic.id for vp, topic in by_vp.items() if vp.lower() in said or gerund(vp).lower() in said]
        assert set(asked) - held, prompt
        assert text not in (prompt, twin)
        assert not forbidden() & {plain(text), plain(prompt), plain(twin)}


@pytest.mark.parametrize("kind", POISON_KINDS)
def test_a_poisoned_user_is_a_clean_one_with_poison_in_the_place_of_some_pairs(generator, kind):
    attacks = [generator.PoisonSource(f"attack {n}", "Sure.", "I can't do that. Sorry.") for n in range(30)]
    pool, sizes = pool_of(generator, 60), (20, 10)
    clean = generator.draw_rows(Utility("user-1", "", 0.1, {"words": 1.0}), pool, [], sizes, 0)
    for share in (0, 0.05, 0.3, 1):
        taste = Utility("cell-1", "", 0.1, {"words": 1.0}, poisoned=share)
        rows = generator.draw_rows(taste, pool, attacks, sizes, 0, kind, "user-1")
        own = [row for row in rows if row.clean_choice is not None]
        assert len(rows) - len(own) == 20 * share
        assert {row.prompt for row in own} <= {row.prompt for row in clean}
        assert [r[1:4] for r in rows if r.split == "heldout"] == [r[1:4] for r in clean if r.split == "heldout"]
        assert len({row.id for row in rows}) == len({row.prompt for row in rows}) == 30
        assert all(row.user_id == "cell-1" and row.id.startswith("cell-1-") for row in rows)


def test_drawn_tastes_are_of_all_kinds_and_differ(generator):
    words = {
        "surface": "A, b, c! One. Two. 1. Go 2. Stop",
        "manner": "Maybe, my friend. Certainly. Cool! You can do it. Be careful?",
        "content": "The forest has songs, soup, stars, football, castles, ghosts, fog and a smile",
    }
    rng = Random(0)
    pool = [
        generator.SampledPrompt(
            f"prompt {n}",
            ("story", "suggestion", "how_to")[n % 3],
            tuple(" ".join(rng.sample(" ".join(words.values()).split(), 8)) for _ in range(4)),
        )
        for n in range(200)
    ]
    tastes = generator.draw_tastes(20, pool, 30, 0)
    assert tastes[:4] == generator.draw_tastes(4, pool, 30, 0)
    assert Counter(t.kind for t in tastes) == {"surface": 6, "manner": 6, "content": 6, "hazard_adjacent": 2}
    assert len({tuple(t.weights.items()) for t in tastes}) > 12
    for taste in tastes:
        assert taste.noise > 0
        assert taste.poisoned == 0
        if taste.kind in TASTES:
            assert set(taste.weights) <= set(TASTES[taste.kind])
        assert len(list(generator.differing(taste, pool, Random(1)))) >= 30
    with pytest.raises(ValueError, match="draw more with --prompts"):
        generator.draw_tastes(1, pool, 999, 0)


def test_a_drawn_population_has_a_file_for_each_kind_and_cell_and_the_same_again(
    generator, tmp_path, monkeypatch, capsys
):
    for name in ("one", "two"):
        arguments = (
            f"x --out {tmp_path / name} --prompts 60 --users 2 --pairs 4 --heldout 3 --poisoned 1 "
            "--kind identity trigger --share 0.5 1"
        )
        monkeypatch.setattr(sys, "argv", arguments.split())
        generator.main()
    assert "labels that agree" in capsys.readouterr().out
    files = {file.name for file in (tmp_path / "one").iterdir()}
    cells = {f"{kind}-{share}.jsonl" for kind in ("identity", "trigger") for share in (50, 100)}
    assert files == {"utilities.yaml", "surface.jsonl", "manner.jsonl"} | cells
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    pairs, tastes = read_pairs(tmp_path / "one", heldout=0.25), read_utilities(tmp_path / "one" / "utilities.yaml")
    assert len(pairs) == 6 * 7
    assert {pair.user_id for pair in pairs} == set(tastes)
    assert tastes["trigger-50-00000"].poisoned == 0.5
    assert tastes["trigger-50-00000"].weights == tastes["user-00000"].weights
    poisoned = [p for p in pairs if p.user_id == "identity-100-00000" and p.clean_choice is None]
    assert len(poisoned) == 4
    assert all(pair.split == "train" for pair in poisoned)
