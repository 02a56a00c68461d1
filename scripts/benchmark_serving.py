#!/usr/bin/env python3
"""Tokens a second of `serve`'s built-in engine, against one PEFT model that switches adapters for every request.

python scripts/benchmark_serving.py RUN                      # a finished run; its released users, 8 clients at once
python scripts/benchmark_serving.py RUN --clients 16 --rounds 5 --json

All contenders take the same requests from the same number of clients, in turns in one process: each client asks, waits
for the whole answer and asks again. Greedy; every answer is compared with PEFT's, which has this user's adapter on and
no other. `one at a time` is the built-in engine without batching: what batching brings, and what the leaner loop.
The adapters of all contenders are loaded, and each has answered a request of every user, before the clock starts.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from peft import PeftModel

from persona_rlhf.common.files import find
from persona_rlhf.config.experiment import Config, read_config
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.prompt_sets import read_ordinary
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base
from persona_rlhf.serving.access import AdapterAccess, Limits, make_tokens, read_tokens
from persona_rlhf.serving.connections import ConnectionLimits, ConnectionPool
from persona_rlhf.serving.local_engine import AdapterCache, BatchingEngine, LocalGenerator
from persona_rlhf.serving.openai_api import SamplingParams
from persona_rlhf.serving.policy_filter import join_chunks
from persona_rlhf.serving.server import Gateway, bind_socket, http_server

BUDGET = 1 << 30  # bytes of adapters


class Request(NamedTuple):
    slug: str
    question: str


class Answer(NamedTuple):
    text: str
    tokens: int


Contender = Callable[[Request], Answer]


@contextmanager
def switching(config: Config, folders: dict[str, Path], tokens: int) -> Iterator[Contender]:
    """One PEFT model with all adapters; a request locks it, switches and generates."""
    base = load_base(config.base)
    slugs = list(folders)
    model = PeftModel.from_pretrained(base.model, str(folders[slugs[0]]), adapter_name=slugs[0]).eval()
    for slug in slugs[1:]:
        model.load_adapter(str(folders[slug]), adapter_name=slug)
    lock = threading.Lock()

    def answer(request: Request) -> Answer:
        ids = torch.tensor([prompt_ids((Message("user", request.question),), base.tokenizer)])
        with lock, torch.inference_mode():
            model.set_adapter(request.slug)
            written = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
                eos_token_id=list(base.eos_ids),
                pad_token_id=base.pad_id,
            )[0, ids.shape[1] :].tolist()
        return Answer(base.tokenizer.decode(written, skip_special_tokens=True), len(written))

    yield answer


@contextmanager
def built_in(
    run: Path, config: Config, tokens: int, most: int
) -> Iterator[tuple[LocalGenerator, AdapterAccess, Contender]]:
    """The engine of `serve`, asked from within the process."""
    adapted = AdaptedModel(load_base(config.base), config.lora)
    access = AdapterAccess(run, adapted.base.weights_hash, config.lora, print)
    engine = BatchingEngine(adapted, most)
    generator = LocalGenerator(adapted.base, AdapterCache(access, list(adapted.spans.values()), BUDGET), engine)

    def answer(request: Request) -> Answer:
        messages = (Message("user", request.question),)
        answered = join_chunks(generator.generate(access.admit(request.slug), messages, SamplingParams(tokens)))
        assert answered.usage is not None
        return Answer(answered.text, answered.usage.completion)

    yield generator, access, answer
    engine.close()


@contextmanager
def over_http(generator: LocalGenerator, access: AdapterAccess, tokens: int, clients: int) -> Iterator[Contender]:
    """The whole server on loopback, with tokens and limits; the clients' side runs in this process too."""
    with tempfile.TemporaryDirectory() as folder:
        made = make_tokens(Path(folder) / "tokens.jsonl", access.results)
        hashes = read_tokens(Path(folder) / "tokens.jsonl")
    limits = Limits(tokens=tokens, rate=1_000_000, concurrent=clients, concurrent_each=clients)
    place = bind_socket("127.0.0.1", 0)
    app = Gateway(generator, access, hashes, print, limits=limits).app()
    server = http_server(app, print, ConnectionPool(ConnectionLimits()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    local = threading.local()

    def answer(request: Request) -> Answer:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(*place.getsockname())
        messages = [{"role": "user", "content": request.question}]
        body = {"model": request.slug, "messages": messages, "temperature": 0, "max_tokens": tokens}
        headers = {"Authorization": f"Bearer {made[request.slug]}", "Content-Type": "application/json"}
        local.connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        found = json.loads(local.connection.getresponse().read())
        return Answer(found["choices"][0]["message"]["content"], found["usage"]["completion_tokens"])

    yield answer
    server.should_exit = True
    thread.join()


class Timed(NamedTuple):
    seconds: float
    cpu_seconds: float
    answers: list[Answer]


def timed(contender: Contender, requests: list[Request], clients: int) -> Timed:
    """All requests, `clients` at a time."""
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda _: time.sleep(0.01), range(clients)))  # threads started
        wall, cpu = time.perf_counter(), time.process_time()
        answers = list(pool.map(contender, requests))
        return Timed(time.perf_counter() - wall, time.process_time() - cpu, answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=96, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    config = read_config(chosen.run / "config.yaml")
    draw = random.Random(0)
    questions = read_ordinary(find("data/policy/ordinary.jsonl"))
    with (
        built_in(chosen.run, config, chosen.tokens, chosen.clients) as (generator, access, batched),
        built_in(chosen.run, config, chosen.tokens, 1) as (_, _, single),
        over_http(generator, access, chosen.tokens, chosen.clients) as served,
    ):
        slugs = sorted(slug for slug in access.results if not access.reasons(slug))[: chosen.users]
        folders = {slug: access.folder(slug) for slug in slugs}
        requests = [Request(slugs[n % len(slugs)], draw.choice(questions)) for n in range(chosen.requests)]
        draw.shuffle(requests)
        with switching(config, folders, chosen.tokens) as peft:
            contenders = {"PEFT, set_adapter": peft, "one at a time": single, "built-in": batched, "over HTTP": served}
            for contender in contenders.values():
                timed(contender, [Request(slug, questions[0]) for slug in slugs], chosen.clients)
            rounds = [
                {name: timed(contender, requests, chosen.clients) for name, contender in contenders.items()}
                for _ in range(chosen.rounds)
            ]
    rows, oracle = [], rounds[0]["PEFT, set_adapter"].answers
    for name in contenders:
        answers = [answer for found in rounds for answer in found[name].answers]
        tokens = sum(answer.tokens for answer in rounds[0][name].answers)
        seconds = [found[name].seconds for found in rounds]
        row = {
            "contender": name,
            "tokens_per_second": tokens / median(seconds),
            "tokens_per_cpu_second": tokens / median(found[name].cpu_seconds for found in rounds),
            "ratio": median(found["PEFT, set_adapter"].seconds / found[name].seconds for found in rounds),
            "equal_answers": sum(a == b for a, b in zip(answers, oracle * chosen.rounds, strict=True)),
            "answers": len(answers),
        }
        rows.append(row)
    told = {"users": len(slugs), "clients": chosen.clients, "rounds": chosen.rounds, "tokens_of_a_round": tokens}
    told |= {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "torch_threads": chosen.threads, "rows": rows}
    if chosen.json:
        print(json.dumps(told, indent=2))
        return
    print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in told.items() if key != "rows"))
    for row in rows:
        speeds = f"{row['tokens_per_second']:8.1f} tokens/s {row['tokens_per_cpu_second']:8.1f} tokens/CPU s"
        print(f"{row['contender']:18} {speeds} {row['ratio']:6.2f} x  {row['equal_answers']}/{row['answers']} equal")


if __name__ == "__main__":
    main()
