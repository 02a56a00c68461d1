from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from persona_rlhf.serving.local_engine import BatchingEngine, sample_tokens
from persona_rlhf.serving.openai_api import APIError, SamplingParams, TextChunk
from persona_rlhf.serving.policy_filter import join_chunks
from tests.models.tiny import VOCABULARY

TOKENS = 8


@pytest.fixture(scope="module")
def engine(fleet):
    engine = BatchingEngine(fleet.adapted, most=16)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    draw = random.Random(0)
    return [tuple(draw.randrange(2, VOCABULARY) for _ in range(draw.randint(3, 14))) for _ in range(6)]


@pytest.fixture(scope="module")
def alone(fleet, prompts) -> dict[tuple[int | None, int], str]:
    """Every user's greedy answer to every prompt, generated alone; None is the base."""
    texts = {}
    for user in [None, *range(8)]:
        flat = None if user is None else fleet.flat[user : user + 1]
        with fleet.adapted.using(flat):
            for place, prompt in enumerate(prompts):
                [[answer]] = fleet.adapted.generate([[prompt]], TOKENS)
                texts[user, place] = fleet.adapted.base.tokenizer.decode(list(answer.ids), skip_special_tokens=True)
    return texts


def adapter(fleet, user):
    return None if user is None else fleet.flat[user]


def test_of_a_thousand_interleaved_requests_none_is_answered_with_anothers_adapter(engine, fleet, prompts, alone):
    distinct = {alone[user, place] for user in [None, *range(8)] for place in range(len(prompts))}
    assert len(distinct) > 0.9 * len(alone)  # else the test could not fail
    draw = random.Random(1)
    orders = [(draw.choice([None, *range(8)]), draw.randrange(len(prompts)), draw.random() < 0.5) for _ in range(1000)]

    def ask(order):
        user, place, stream = order
        return join_chunks(
            engine.generate(adapter(fleet, user), prompts[place], SamplingParams(TOKENS, stream=stream))
        ).text

    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(ask, orders))
    assert answers == [alone[user, place] for user, place, _ in orders]


def test_what_waits_is_written_join_chunks(engine, fleet, prompts, monkeypatch):
    batches = []
    generate = engine._generate
    monkeypatch.setattr(engine, "_generate", lambda batch: (batches.append(len(batch)), generate(batch)))
    monkeypatch.setattr("persona_rlhf.serving.local_engine.WAIT_SECONDS", 0.5)
    answers = [engine.generate(adapter(fleet, user), prompts[0], SamplingParams(2)) for user in range(5)]
    for chunks in answers:
        join_chunks(chunks)
    assert max(batches) > 1
    assert sum(batches) == 5


def test_a_stream_is_the_answer_in_pieces(engine, fleet, prompts, alone):
    chunks = list(engine.generate(fleet.flat[3], prompts[1], SamplingParams(TOKENS, stream=True)))
    assert len(chunks) > 3
    assert "".join(chunk.text for chunk in chunks) == alone[3, 1]
    assert [chunk.finish is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt == len(prompts[1])


def test_an_answer_ends_at_max_tokens_and_before_a_stop_string(engine, fleet, prompts, alone):
    words = alone[0, 2].split()
    short = join_chunks(engine.generate(fleet.flat[0], prompts[2], SamplingParams(3)))
    assert (short.text.split(), short.finish, short.usage.completion) == (words[:3], "length", 3)
    at = next(n for n, word in enumerate(words) if n > 1 and word not in words[:n])
    stopped = join_chunks(
        engine.generate(fleet.flat[0], prompts[2], SamplingParams(TOKENS, stop=(words[at],), stream=True))
    )
    assert stopped.text == " ".join(words[:at]) + " "
    assert stopped.finish == "stop"


def test_an_answer_that_fills_the_context_is_cut(engine, fleet):
    context = fleet.adapted.base.context
    chunk = join_chunks(engine.generate(fleet.flat[1], (5,) * (context - 2), SamplingParams(TOKENS)))
    assert chunk.usage.completion <= 2


def test_a_seed_draws_the_same_answer_whoever_else_is_asked(engine, fleet, prompts, alone):
    warm = SamplingParams(TOKENS, temperature=0.9, top_p=0.9, seed=7)
    lone = join_chunks(engine.generate(fleet.flat[2], prompts[3], warm)).text
    answers = [
        engine.generate(fleet.flat[n], prompts[n % 6], SamplingParams(TOKENS, temperature=1.0)) for n in range(8)
    ]
    among = join_chunks(engine.generate(fleet.flat[2], prompts[3], warm)).text
    others = [join_chunks(chunks).text for chunks in answers]
    assert lone == among
    assert lone != alone[2, 3]
    assert len(set(others)) > 1
    assert lone != join_chunks(engine.generate(fleet.flat[2], prompts[3], warm._replace(seed=8))).text


def test_who_stops_listening_takes_the_request_back(engine, fleet, prompts, monkeypatch):
    steps = []
    monkeypatch.setattr(
        "persona_rlhf.serving.local_engine.sample_tokens", lambda *rows: steps.append(rows) or sample_tokens(*rows)
    )
    leaving = engine.generate(fleet.flat[0], (5, 6), SamplingParams(250, stream=True, temperature=2.0, seed=3))
    next(leaving)
    leaving.close()
    join_chunks(engine.generate(fleet.flat[1], prompts[1], SamplingParams(2)))  # it waits for the batch before it
    assert len(steps) < 60


def test_a_fault_is_told_to_whoever_asked_and_the_engine_lives_on(engine, fleet, prompts, alone, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(engine, "_generate", lambda batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            join_chunks(engine.generate(fleet.flat[0], prompts[0], SamplingParams(TOKENS)))
    assert join_chunks(engine.generate(fleet.flat[0], prompts[0], SamplingParams(TOKENS))).text == alone[0, 0]


def test_what_is_asked_is_finished_before_the_engine_ends(fleet, prompts, alone):
    engine = BatchingEngine(fleet.adapted, most=2)
    answers = [engine.generate(fleet.flat[n], prompts[n], SamplingParams(TOKENS)) for n in range(6)]
    engine.close()
    assert [join_chunks(chunks).text for chunks in answers] == [alone[n, n] for n in range(6)]
    with pytest.raises(APIError) as late:
        engine.generate(fleet.flat[0], prompts[0], SamplingParams(1))
    assert late.value.status == 503
    engine.close()


def test_a_batch_is_bounded_in_tokens(fleet, prompts, alone, monkeypatch):
    monkeypatch.setattr(fleet.adapted, "tokens_per_generation", 2 * (14 + TOKENS))
    engine = BatchingEngine(fleet.adapted)
    batches: list[int] = []
    generate = engine._generate
    monkeypatch.setattr(engine, "_generate", lambda batch: (batches.append(len(batch)), generate(batch)))
    answers = [engine.generate(fleet.flat[n], prompts[n], SamplingParams(TOKENS)) for n in range(6)]
    assert [join_chunks(chunks).text for chunks in answers] == [alone[n, n] for n in range(6)]
    engine.close()
    assert max(batches) <= 4
    assert sum(batches) == 6


def test_an_answer_without_an_end_is_no_answer():
    with pytest.raises(APIError, match="without an end"):
        join_chunks(iter([TextChunk("half")]))
