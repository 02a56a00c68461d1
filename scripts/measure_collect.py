#!/usr/bin/env python3
"""Times of the feedback page while many users ask and choose at once.

python scripts/measure_collect.py RUN                     # 100 users, three choices each
python scripts/measure_collect.py RUN --update-after 3    # the same, while adapters are trained in the background

RUN gets new users in its ledger and its links; take a copy. Users have no pause between a page and the next click.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles

import httpx

from persona_rlhf.common.files import find
from persona_rlhf.serving.collect_links import make_links

PROMPTS = find("data/prompts/everyday.jsonl")


@contextmanager
def server(run: Path, tokens: int, update_after: int | None) -> Iterator[str]:
    """The address of a page of the run, in a process of its own."""
    words = ["collect", str(run), "--user", "user 0", "--port", "0", "--max-tokens", str(tokens)]
    if update_after is not None:
        words += ["--update-after", str(update_after)]
    process = subprocess.Popen([sys.executable, "-m", "persona_rlhf", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["link"].partition("/enter/")[0]
    finally:
        process.terminate()
        process.communicate()


async def visit(address: str, token: str, prompts: list[str], times: dict[str, list[float]]) -> None:
    """One user, from the link to the last choice."""

    async def load(kind: str, method: str, path: str, **fields: str) -> str:
        start = time.perf_counter()
        response = await client.request(method, address + path, data=fields or None)
        response.raise_for_status()
        times.setdefault(kind, []).append(time.perf_counter() - start)
        return response.text

    async def ask(**fields: str) -> str:
        """The page of two answers, with the time to the first words of both and to the end."""
        start, page = time.perf_counter(), ""
        async with client.stream("POST", address + "/ask", data=fields) as response:
            response.raise_for_status()
            async for part in response.aiter_text():
                if '<div class="pair">' not in page and '<div class="pair">' in page + part:
                    times.setdefault("first words of both", []).append(time.perf_counter() - start)
                page += part
        times.setdefault("both answers whole", []).append(time.perf_counter() - start)
        return page

    async with httpx.AsyncClient(follow_redirects=True, timeout=600) as client:
        page = await load("open the page", "GET", f"/enter/{token}")
        form_token = re.findall('name="form_token" value="(.*?)"', page)[0]
        await load("agree", "POST", "/consent", form_token=form_token, scope="own")
        for prompt in prompts:
            page = await ask(form_token=form_token, prompt=prompt)
            comparison = re.findall('name="comparison" value="(.*?)"', page)[0]
            verdict = "left" if 'value="left"' in page else "tie"  # equal answers have no better one
            fields = {"form_token": form_token, "comparison": comparison, "verdict": verdict}
            page = await load("choose", "POST", "/choose", **fields)
            assert "Saved." in page


async def measure(address: str, tokens: dict[str, str], choices: int) -> dict[str, list[float]]:
    """Seconds of each kind of page."""
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    times: dict[str, list[float]] = {}
    visits = [
        visit(address, token, [prompts[(number * choices + n) % len(prompts)] for n in range(choices)], times)
        for number, token in enumerate(tokens.values())
    ]
    await asyncio.gather(*visits)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--choices", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--update-after", type=int)
    arguments = parser.parse_args()
    tokens = make_links(arguments.run, [f"user {number}" for number in range(arguments.users)], days=1)
    with server(arguments.run, arguments.max_tokens, arguments.update_after) as address:
        start = time.perf_counter()
        times = asyncio.run(measure(address, tokens, arguments.choices))
        seconds = time.perf_counter() - start
    print(f"{arguments.users} users at once, {arguments.choices} choices each, {os.cpu_count()} cores: {seconds:.0f} s")
    print("| page | requests | median (s) | p95 (s) | longest (s) |\n|---|---|---|---|---|")
    for kind, values in times.items():
        cuts = quantiles(values if len(values) > 1 else values * 2, n=20)
        print(f"| {kind} | {len(values)} | {cuts[9]:.2f} | {cuts[18]:.2f} | {max(values):.2f} |")


if __name__ == "__main__":
    main()
