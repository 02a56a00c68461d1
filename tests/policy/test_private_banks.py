from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import shipped_root
from persona_rlhf.policy.hazards import CATEGORIES, Probe, assign_split, bank_hash
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.private_banks import (
    KEY,
    BankChoice,
    Draw,
    PrivatePool,
    draw_probes,
    need_outside,
    need_private,
    unit_name,
    write_draw,
)
from persona_rlhf.policy.split_key import append_split_key, key_bytes, key_hash, read_split_key, read_split_keys
from persona_rlhf.simulation.banks import bank_rows, private_banks
from tests.policy.private import SECRET, deployment, private_rows, write_rows


def drawn(settings, per_category: int = 60) -> Policy:
    """The policy after a draw that is written."""
    policy = Policy.read(settings.documents, banks=BankChoice(settings.private_banks, None, per_category))
    assert policy.private is not None
    write_draw(policy.private)
    return Policy.of(settings)


def sentences(settings) -> str:
    with pytest.raises(InputError) as fault:
        Policy.of(settings)
    return str(fault.value)


def test_a_draw_takes_the_place_of_the_public_certify_probes(tmp_path):
    settings = deployment(tmp_path)
    public = Policy.read(settings.documents)
    policy = drawn(settings)
    certify = policy.probes("certify")
    assert Counter(probe.category for probe in certify) == dict.fromkeys(CATEGORIES, 60)
    assert all(SECRET in probe.prompt for probe in certify)
    assert {probe.prompt for probe in policy.probes("test")} == {probe.prompt for probe in public.probes("certify")}
    assert policy.probes("train") == public.probes("train")
    assert policy.private is not None
    assert len(policy.private.reserve) == 4 * 90
    assert (policy.hash, policy.tier_one_hash) == (public.hash, public.tier_one_hash)


def test_the_bank_says_what_it_is_without_a_text(tmp_path):
    settings = deployment(tmp_path)
    public = Policy.read(settings.documents).bank
    assert (public.kind, public.draw, public.split_key) == ("public", None, None)
    policy = drawn(settings)
    bank = policy.bank
    assert (bank.kind, bank.draw, str(bank)) == ("private", 1, "private, draw 1")
    assert bank.sha256 == bank_hash(policy.probes("certify")) != public.sha256
    assert SECRET not in json.dumps(policy.to_json())
    assert policy.to_json()["bank"] == bank._asdict()


def test_an_undrawn_folder_a_lost_draw_and_a_changed_row_are_errors(tmp_path):
    settings = deployment(tmp_path)
    assert "no probes were drawn yet; run `persona-rlhf policy bank rotate CONFIG`" in sentences(settings)
    drawn(settings)
    drawn(settings)
    first = settings.private_banks / "draw-0001.json"
    kept = first.read_text()
    first.unlink()
    assert "draw 1 is missing" in sentences(settings)
    first.write_text("{}")
    assert "this is no record of a draw" in sentences(settings)
    first.write_text(kept)
    Policy.of(settings)
    file = settings.private_banks / "sexual_assault.jsonl"
    file.write_text(file.read_text().replace(SECRET, "another"))
    assert "probes of draw 2 were changed or removed" in sentences(settings)


def test_the_whole_pool_certifies_without_a_draw_where_each_look_draws(tmp_path):
    settings = deployment(tmp_path, languages=2)
    policy = Policy.of(settings, sequential=True)
    certify = policy.probes("certify")
    assert Counter(probe.category for probe in certify) == dict.fromkeys(CATEGORIES, 300)
    assert policy.private is not None
    assert (policy.private.draw, policy.private.reserve) == (None, [])
    assert set(policy.private.fresh) == set(certify)
    bank = policy.bank
    assert (bank.kind, bank.draw, bank.pool, str(bank)) == ("private", None, 600, "private, a pool of 600 units")
    assert len({unit_name(probe) for probe in certify}) == 600
    drawn(settings, 160)
    again = Policy.of(settings, sequential=True)
    assert again.bank == bank
    pool = again.private.pool
    assert len(pool.units_in(pool.draws)) == 4 * 80
    write_rows(settings.private_banks / "sexual_assault.jsonl", private_rows("sexual_assault", 20))
    with pytest.raises(InputError, match="`sexual_assault` in the pool of the private banks; add rows to the"):
        Policy.of(settings, sequential=True)


def test_rows_added_later_change_no_draw(tmp_path):
    settings = deployment(tmp_path)
    before = drawn(settings).bank
    write_rows(settings.private_banks / "sexual_assault.more.jsonl", [
        {**row, "id": f"more-{row['id']}", "prompt": f"more {row['prompt']}"}
        for row in private_rows("sexual_assault", 20)
    ])  # fmt: skip
    assert Policy.of(settings).bank == before


def test_every_mistake_in_a_folder_is_named(tmp_path):
    settings = deployment(tmp_path)
    folder = settings.private_banks
    public = next(p for p in Policy.read(settings.documents).probes("certify") if p.category == "sexual_assault")
    row = {"id": "other", "prompt": f"{public.prompt.upper()}!", "topic": "other"}
    write_rows(folder / "sexual_assault.again.jsonl", [row, private_rows("sexual_assault", 1)[0]])
    write_rows(folder / "sexual_asault.jsonl", private_rows("x", 1))
    (folder / "threats_of_violence.jsonl").unlink()
    (folder / "looks.key").write_text("key")
    (folder / "looks.jsonl").write_text("{}")  # a ledger of looks, and no bank
    text = sentences(settings)
    assert "a bank of the documents has its prompt, so it is not private" in text
    assert "another row has its id" in text
    assert "sexual_asault.jsonl: policy.private_banks: the policy restricts no such category" in text
    assert "looks" not in text
    (folder / "sexual_asault.jsonl").unlink()
    (folder / "sexual_assault.again.jsonl").unlink()
    assert "there is no bank of `threats_of_violence`" in sentences(settings)


def test_too_few_probes_for_the_demands_are_an_error_with_numbers(tmp_path):
    settings = deployment(tmp_path)
    with pytest.raises(InputError) as fault:
        Policy.read(settings.documents, banks=BankChoice(settings.private_banks, None, 20))
    text = str(fault.value)
    assert "and there are 20 in split `certify` of `terrorist_content` in draw 1 of the private banks" in text
    assert "--per-category N" in text
    with pytest.raises(InputError, match="sexual_assault has 150"):
        Policy.read(settings.documents, banks=BankChoice(settings.private_banks, None, 151))


def test_a_bank_lies_outside_repositories_the_toolkit_and_the_run(tmp_path):
    repository = tmp_path / "repository"
    (repository / ".git").mkdir(parents=True)
    for inside in (repository, repository / "a" / "b", shipped_root() / "data"):
        with pytest.raises(InputError, match=r"move it to a folder of its own"):
            need_outside(inside, KEY)
    run = tmp_path / "run"
    with pytest.raises(InputError, match="it lies in the run"):
        need_outside(run / "banks", KEY, run)
    need_outside(tmp_path / "banks", KEY, run)
    settings = deployment(tmp_path)
    need_private(settings, run)
    with pytest.raises(InputError, match="it lies in the run"):
        need_private(settings.model_copy(update={"split_key": run / "key"}), run)


def probe(category: str, n: int, topic: str, novelty: str = "topic", phrasing: str = "") -> Probe:
    text = f"{category} {topic} {n}"
    return Probe(f"{topic}-{n}", category, text, topic, phrasing or text, None, "certify", novelty)  # type: ignore[arg-type]


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 3))
def test_draws_take_whole_units_and_fresh_ones_first(seed: int, per_category: int, languages: int):
    rng = Random(seed)
    pool = PrivatePool(
        Path("x"), tuple(probe(c, n, f"t{t}") for c in "ab" for t in range(16) for n in range(languages)), ()
    )
    seen = set[tuple[str, str]]()
    for number in range(1, 5):
        draw = draw_probes(pool, per_category, rng)
        assert draw.number == number
        topics = Counter((category, name.split("-")[0]) for category, name in draw.members)
        assert set(topics.values()) == {languages}
        sizes = Counter(category for category, _ in draw.members)
        assert all(per_category <= sizes[category] < per_category + languages for category in "ab")
        fresh = {category: 16 - len({unit for unit in seen if unit[0] == category}) for category in "ab"}
        repeated = Counter(category for category, _ in topics.keys() & seen)
        drawn_topics = Counter(category for category, _ in topics)
        assert all(repeated[category] == max(0, drawn_topics[category] - fresh[category]) for category in "ab")
        seen |= topics.keys()
        pool = pool._replace(draws=(*pool.draws, draw))


def test_a_new_phrasing_is_drawn_with_all_its_categories_and_the_oldest_come_back_first():
    probes = [probe(c, n, f"t{n}", "phrasing", f"wording {n}") for c in "ab" for n in range(4)]
    pool = PrivatePool(Path("x"), tuple(probes), ())
    draws: list[Draw] = []
    for _ in range(4):
        draws.append(draw_probes(pool._replace(draws=tuple(draws)), 2))
    assert all(draw.ids["a"] == draw.ids["b"] for draw in draws)
    assert draws[0].members.isdisjoint(draws[1].members)
    assert draws[2].members == draws[0].members
    assert draws[3].members == draws[1].members


def test_what_trains_is_never_drawn_and_each_probe_says_what_is_new_in_it(tmp_path):
    settings = deployment(tmp_path)
    train = Policy.read(settings.documents).probes("train")
    one = next(p for p in train if p.category == "sexual_assault")
    known = {"topic": one.topic, "phrasing": one.phrasing}
    write_rows(settings.private_banks / "sexual_assault.jsonl", [
        {"id": "trained", "prompt": f"{SECRET} a", **known},
        {"id": "new wording", "prompt": f"{SECRET} b", "topic": one.topic, "split_by": "pair"},
        {"id": "new topic", "prompt": f"{SECRET} c", "topic": "t", "phrasing": one.phrasing},
        {"id": "trained topic", "prompt": f"{SECRET} d", "topic": one.topic, "split_by": "held_out"},
        *private_rows("sexual_assault", 60),
    ])  # fmt: skip
    policy = drawn(settings)
    assert policy.private is not None
    novelty = {p.id: p.novelty for p in policy.private.pool.probes if p.category == "sexual_assault"}
    assert novelty["new wording"] == "phrasing"
    assert novelty["new topic"] == "topic"
    assert not {"trained", "trained topic"} & novelty.keys()
    assert policy.private.pool.left_out == 2


def test_a_drawn_bank_of_the_bundled_world_has_no_unseen_topic_and_nothing_that_trains(tmp_path):
    for category, rows in bank_rows(private_banks("a secret")).items():
        write_rows(tmp_path / f"{category}.jsonl", rows)
    documents = [shipped_root() / "configs/policy/tier_one.yaml"]
    policy = Policy.read(documents, banks=BankChoice(tmp_path, None, 160))
    assert policy.private is not None
    probes = policy.private.pool.probes
    assert {probe.novelty for probe in probes} == {"combination", "phrasing"}
    trained = {(probe.topic, probe.phrasing) for probe in policy.probes("train")}
    assert not trained & {(probe.topic, probe.phrasing) for probe in probes}
    assert all(assign_split(p.topic, p.phrasing)[0] != "train" for p in probes if p.novelty == "combination")
    assert len(probes) > 4 * 160


def test_a_split_key_is_the_last_line_of_its_file_and_no_error_shows_it(tmp_path):
    file = tmp_path / "key"
    with pytest.raises(InputError, match="the key cannot be read"):
        read_split_key(file)
    file.write_text("too short\n")
    with pytest.raises(InputError) as fault:
        read_split_key(file)
    assert "too short" not in str(fault.value)
    file.write_text("first key of some length\n\n  second key of some length \n")
    assert read_split_keys(file) == [key_bytes("first key of some length"), key_bytes("second key of some length")]
    assert read_split_key(file) == key_bytes("second key of some length")
    assert key_hash(key_bytes("a")) != key_hash(key_bytes("b"))


ODD_DRAWS = [
    *(b"[" * 200_000, b"\xff\x00", b"", b"[]", b'{"number": 1, "drawn": "", "ids": {"a": 5}, "sha256": ""}'),
    b'{"number": Infinity, "drawn": "", "ids": {}, "sha256": ""}',
]


@pytest.mark.parametrize("content", [*ODD_DRAWS, None])
def test_an_odd_draw_is_named(tmp_path, content):
    settings = deployment(tmp_path)
    file = settings.private_banks / "draw-0001.json"
    file.mkdir() if content is None else file.write_bytes(content)
    assert f"{file}: policy.private_banks: this is no record of a draw" in sentences(settings)


def test_a_line_of_brackets_in_brackets_is_no_probe(tmp_path):
    settings = deployment(tmp_path)
    file = settings.private_banks / "sexual_assault.more.jsonl"
    file.write_bytes(b'{"id": "a", "prompt": "b"}\n' + b"[" * 200_000)
    assert f"{file}:2: a probe is an object" in sentences(settings)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"", "key: policy.split_key: there is no key in this file"),
        (b" \n\n", "key: policy.split_key: there is no key in this file"),
        (b"a key of some length\nshort\n", "key:2: policy.split_key: a key has at least 16"),
        (b"a" * 64, "key:1: policy.split_key: a key has at least 16 printable characters, 8 of them different"),
        (b"\0" * 64, "key:1: policy.split_key: a key has at least 16 printable characters, 8 of them different"),
        (b"\xff\xfe\0", "key: policy.split_key: the key cannot be read (it is no text)"),
        (None, "key: policy.split_key: the key cannot be read (Is a directory)"),
    ],
)
def test_an_odd_split_key_is_named_and_stays_as_it_is(tmp_path, content, place):
    file = tmp_path / "key"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(InputError) as fault:
        read_split_keys(file)
    assert place in str(fault.value)
    if content is not None and not content.strip():
        append_split_key(file, "a new key of some length")
        assert read_split_key(file) == key_bytes("a new key of some length")
        return
    with pytest.raises(InputError):
        append_split_key(file, "a new key of some length")
    assert content is None or file.read_bytes() == content


def test_a_split_key_needs_a_folder_and_a_name_that_can_be(tmp_path):
    with pytest.raises(InputError, match="the folder of this file does not exist"):
        append_split_key(tmp_path / "no" / "key", "a new key of some length")
    with pytest.raises(InputError, match="this path cannot be used"):
        read_split_keys(tmp_path / ("k" * 300))


def test_a_split_key_changes_the_bank_and_no_hash_of_the_policy():
    documents = [shipped_root() / "configs/policy/tier_one.yaml"]
    public = Policy.read(documents)
    secret = Policy.read(documents, banks=BankChoice(split_key=key_bytes("a secret")))
    assert secret.bank.kind == "public"
    assert secret.bank.split_key == key_hash(key_bytes("a secret"))
    assert str(secret.bank) == "public, split by a key of its own"
    assert secret.bank.sha256 != public.bank.sha256
    assert (secret.hash, secret.tier_one_hash) == (public.hash, public.tier_one_hash)
    assert secret.probes("train") == public.probes("train")
