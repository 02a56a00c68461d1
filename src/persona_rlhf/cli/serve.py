"""The verbs of the command line with which people use the adapters of a run: serve and chat."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import typer

from persona_rlhf.cli.console import RunFolder, console, open_run, say, verb_group, with_exit_codes
from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.pipeline.distributed import HELD_BACK

app_verbs = verb_group("The adapters of a run in use.")
_GIB = 1 << 30
_VLLM_PORT = 8001


@app_verbs.command()
@with_exit_codes
def serve(
    run: RunFolder,
    tokens: Annotated[Path, typer.Option("--tokens", metavar="FILE", help="Hashes of the users' bearer tokens.")],
    make: Annotated[
        bool, typer.Option("--make-tokens", help="Make tokens for released users who have none; print them, and end.")
    ] = False,
    engine: Annotated[Literal["builtin", "vllm"], typer.Option(help="What writes the answers.")] = "builtin",
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000,
    memory: Annotated[float, typer.Option(min=0, help="Built-in: GiB of adapters held at once.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 512,
    rate: Annotated[int, typer.Option(min=1, help="Requests of a user in a minute, at most.")] = 60,
    concurrent: Annotated[int, typer.Option(min=1, help="Answers written at the same time, at most.")] = 32,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="vllm: for adapters and command.")] = None,
    upstream: Annotated[str | None, typer.Option(metavar="URL", help="vllm: one that runs already.")] = None,
) -> None:
    """Serve an OpenAI-style API: with his token, each user reaches his own adapter."""
    from persona_rlhf.release.results import RunResults
    from persona_rlhf.serving.access import make_tokens, read_tokens

    if make:
        released = {one.slug: one.user_id for one in RunResults(run) if one.status == "released"}
        for slug, token in make_tokens(tokens, released).items():
            typer.echo(json.dumps({"user_id": released[slug], "model": slug, "token": token}))
        say(f"Tokens: {tokens} (hashes only: what is printed here is nowhere else)")
        return
    given = [place for place in (to, upstream) if place is not None]
    if engine == "vllm" and len(given) != 1:
        raise typer.BadParameter("--engine vllm takes --to DIR, or --upstream URL of a vLLM that runs already")
    gateway = _gateway()
    from persona_rlhf.config.experiment import read_run_config
    from persona_rlhf.models.base import weights_hash
    from persona_rlhf.serving import vllm
    from persona_rlhf.serving.access import AdapterAccess, Limits, ServedRun
    from persona_rlhf.serving.local_engine import local_run
    from persona_rlhf.serving.policy_filter import PolicyFilter, policy_of_run

    open_run(run)
    known, config = read_tokens(tokens), read_run_config(run)
    base, lora, guard = config.base, config.lora, PolicyFilter.of(policy_of_run(run, config.policy.documents))
    if host not in ("127.0.0.1", "::1", "localhost"):
        say(f"Warning: {host} can be reached from other machines, and this is plain HTTP: put TLS before it.")
    source: AbstractContextManager[ServedRun | None]
    if engine == "builtin":
        source = local_run(run, base, lora, int(memory * _GIB), say)
    else:
        if base.quantization is not None:
            sentence = (
                f"its adapters were judged on weights stored as {base.quantization}; --engine builtin serves them"
            )
            raise InputError([Problem(str(run), None, "--engine", sentence)])
        admitted = AdapterAccess(run, weights_hash(base), lora, say, known.slugs)
        behind = port + 1 if 0 < port < 65535 else _VLLM_PORT
        source = vllm.vllm_run(admitted, base.model, lora.rank, given[0], behind, say)
    with gateway.bind_socket(host, port) as door, _ended_by_sigterm(), source as served:
        if served is None:
            return
        limits = Limits(tokens=max_tokens, rate=rate, concurrent=concurrent)
        app = gateway.Gateway(served.generator, served.access, known, say, guard, limits).app()
        door.listen()
        say(f"Serving {run} at http://{host}:{door.getsockname()[1]}/v1; SIGTERM finishes what runs.")
        gateway.serve_until_stopped(app, door)


@app_verbs.command()
@with_exit_codes
def chat(
    run: RunFolder,
    user: Annotated[str, typer.Option("--user", help="A user_id.")],
    compare: Annotated[
        Literal["base"] | None, typer.Option(help="Answers of the base beside those of the adapter.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 256,
) -> None:
    """Chat with one user's adapter in the terminal; `/pair` saves a preference to the run's ledger."""
    from persona_rlhf.release.export import find_user

    open_run(run)
    result = find_user(run, user)
    from persona_rlhf.config.experiment import read_run_config
    from persona_rlhf.serving.chat import COMMANDS, Chat, ChatTerminal
    from persona_rlhf.serving.local_engine import local_run
    from persona_rlhf.serving.policy_filter import PolicyFilter, policy_of_run

    config = read_run_config(run)
    guard = PolicyFilter.of(policy_of_run(run, config.policy.documents))
    with local_run(run, config.base, config.lora, _GIB, say) as served:
        if reasons := served.access.reasons(result.slug):
            say(f"Nobody chats with this adapter: {'; '.join(reasons)}")
            raise typer.Exit(HELD_BACK)
        screen = ChatTerminal(console(people=False))
        say(f"Chat with the adapter of {user}. {COMMANDS}")
        Chat(
            run, result, served.access.admit, served.generator, guard, screen, say, max_tokens, compare is not None
        ).run(_lines())


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the program as it would end by itself, and with it whatever it started."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _lines() -> Iterator[str]:
    """What a person types, or a pipe holds."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)  # noqa: T201
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def _gateway() -> ModuleType:
    """The HTTP server. Raises InputError where its libraries are not installed."""
    try:
        from persona_rlhf.serving import server
    except ModuleNotFoundError as fault:
        sentence = f"the server needs {fault.name}: pip install 'persona-rlhf[serve]'"
        raise InputError([Problem("serve", None, None, sentence)]) from fault
    return server
