"""The commands `serve` and `chat`: use the adapters of a run."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from persona_rlhf.cli.console import RunArgument, Wait, command_group, console, note, open_run, with_exit_codes
from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.run_lock import WAIT_SECONDS
from persona_rlhf.pipeline.distributed import HELD_BACK

if TYPE_CHECKING:
    from persona_rlhf.config.experiment import Config
    from persona_rlhf.policy.policy import Policy
    from persona_rlhf.serving.access import ServedRun
    from persona_rlhf.serving.metrics import ServerMetrics
    from persona_rlhf.serving.policy_filter import PolicyFilter
    from persona_rlhf.serving.watch import LifetimeWatch

serving_commands = command_group("Use the adapters of a run.")
_GIB = 1 << 30
_VLLM_PORT = 8001


@serving_commands.command()
@with_exit_codes
def serve(
    run: RunArgument,
    tokens: Annotated[Path, typer.Option("--tokens", metavar="FILE", help="Hashes of the users' bearer tokens.")],
    make: Annotated[
        bool, typer.Option("--make-tokens", help="Make tokens for released users without one; print them, and end.")
    ] = False,
    make_metrics: Annotated[
        bool, typer.Option("--make-metrics-token", help="Make the token that opens /metrics; print it, and end.")
    ] = False,
    engine: Annotated[Literal["builtin", "vllm"], typer.Option(help="The engine that generates answers.")] = "builtin",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 is any free one.")] = 8000,
    memory: Annotated[float, typer.Option(min=0, help="builtin: GiB of adapters in memory, at most.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 512,
    rate: Annotated[int, typer.Option(min=1, help="Requests of a user per minute, at most.")] = 60,
    concurrent: Annotated[int, typer.Option(min=1, help="Answers generated at the same time, at most.")] = 32,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="vllm: folder for adapters and script.")
    ] = None,
    upstream: Annotated[str | None, typer.Option(metavar="URL", help="vllm: the URL of a running server.")] = None,
    watch: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of requests drawn for the watch, by which a certificate can lapse."),
    ] = 0.0,
    wait: Wait = WAIT_SECONDS,
) -> None:
    """Serve an OpenAI-style API: each user's token opens that user's adapter."""
    if make:
        with open_run(run, "serve --make-tokens", wait):
            _print_new_tokens(run, tokens)
        return
    if make_metrics:
        _print_metrics_token(tokens)
        return
    targets = [target for target in (to, upstream) if target is not None]
    if engine == "vllm" and len(targets) != 1:
        raise typer.BadParameter("--engine vllm takes --to DIR, or --upstream URL of a vLLM that runs already")
    server, connections, metrics = server_modules()
    from persona_rlhf.config.experiment import read_run_config
    from persona_rlhf.policy.enforcement import system_prompt
    from persona_rlhf.release.verify import uncertified_prompts
    from persona_rlhf.serving.access import Limits, read_tokens
    from persona_rlhf.serving.policy_filter import PolicyFilter, policy_of_run

    pool = connections.ConnectionPool(connections.ConnectionLimits().within_files())
    with open_run(run, "serve", wait, shared=True):
        hashes, config = read_tokens(tokens), read_run_config(run)
        policy = policy_of_run(run, config.policy.documents)
        policy_filter = PolicyFilter.of(policy)
        _note_places(run, tokens, *targets)
    limits = Limits(tokens=max_tokens, rate=rate, concurrent=concurrent)
    if host not in ("127.0.0.1", "::1", "localhost"):
        note(f"Warning: {host} can be reached from other machines, and this is plain HTTP: put TLS before it.")
    if engine == "builtin":
        source: AbstractContextManager[ServedRun | None] = _local(run, config, memory)
    else:
        source = _vllm(run, config, hashes.slugs, targets[0], port + 1 if 0 < port < 65535 else _VLLM_PORT)
    with server.bind_socket(host, port) as bound, exit_at_sigterm(), source as served, ExitStack() as stack:
        if served is None:
            return
        for sentence in uncertified_prompts(run, partial(system_prompt, policy)):
            note(sentence)
        figures = metrics.ServerMetrics(served.figures)
        watching = _watching(config, policy, watch, served, policy_filter, figures) if watch > 0 else nullcontext()
        watched = stack.enter_context(watching)
        app = server.Gateway(
            served.generator, served.access, hashes, note, policy_filter, limits, figures, watched
        ).app()
        program = server.http_server(app, note, pool)
        bound.listen()
        note("Certificates cover greedy answers (temperature 0), and no others.")
        note(f"Serving {run} at http://{host}:{bound.getsockname()[1]}/v1; SIGTERM finishes running answers.")
        program.run(sockets=[bound])


def _print_new_tokens(run: Path, file: Path) -> None:
    from persona_rlhf.release.results import RunResults
    from persona_rlhf.serving.access import make_tokens

    released = {one.slug: one.user_id for one in RunResults(run) if one.has_adapter}
    _note_places(run, file)
    for slug, token in make_tokens(file, released).items():
        typer.echo(json.dumps({"user_id": released[slug], "model": slug, "token": token}))
    note(f"Tokens: {file} (hashes only: the tokens printed here are stored nowhere)")


def _print_metrics_token(file: Path) -> None:
    """Prints a new token for `/metrics`, or says that the file has one."""
    from persona_rlhf.serving.access import METRICS_READER, make_tokens

    made = make_tokens(file, [METRICS_READER])
    for token in made.values():
        typer.echo(json.dumps({"metrics": "/metrics", "token": token}))
    if not made:
        note(f"{file} holds a token for /metrics; delete its line (slug: {METRICS_READER}) to make another")


def _note_places(run: Path, tokens: Path, engine: Path | str | None = None) -> None:
    """Notes where slugs of the run's users lie, for `forget`."""
    from persona_rlhf.release.served_places import note_place

    notes = [note_place(run, "tokens", tokens)]
    if engine is not None:
        notes.append(note_place(run, "layout" if isinstance(engine, Path) else "engine", engine))
    for sentence in filter(None, notes):
        note(sentence)


def _local(run: Path, config: Config, gibibytes: float) -> AbstractContextManager[ServedRun]:
    from persona_rlhf.serving.local_engine import local_run

    return local_run(run, config.judged_base, config.lora, int(gibibytes * _GIB), note)


def _watching(
    config: Config,
    policy: Policy,
    share: float,
    served: ServedRun,
    policy_filter: PolicyFilter,
    figures: ServerMetrics,
) -> AbstractContextManager[LifetimeWatch]:
    from persona_rlhf.evaluation.answer_judge import judges_of
    from persona_rlhf.models.base import select_device
    from persona_rlhf.serving.watch import LifetimeWatch, WatchSettings

    judges = judges_of(config.gate, select_device(config.judged_base))
    settings = WatchSettings(share, judges, config.gate.max_new_tokens, policy.certify)
    note(f"Watching {share:.0%} of the requests: certificates lapse by what is served.")
    return closing(LifetimeWatch(settings, served.generator, served.access, policy_filter, figures, note))


def _vllm(
    run: Path, config: Config, slugs: Collection[str], target: Path | str, port: int
) -> AbstractContextManager[ServedRun | None]:
    from persona_rlhf.models.base import weights_hash
    from persona_rlhf.serving.access import AdapterAccess
    from persona_rlhf.serving.vllm_process import vllm_run

    if (stored := config.base.quantization) is not None:
        sentence = f"its adapters were judged on weights stored as {stored}; --engine builtin serves them"
        raise InputError([Problem(str(run), None, "--engine", sentence)])
    access = AdapterAccess(run, weights_hash(config.base), config.lora, note, slugs)
    return vllm_run(access, config.base.model, config.lora.rank, target, port, note)


@serving_commands.command()
@with_exit_codes
def chat(
    run: RunArgument,
    user: Annotated[str, typer.Option("--user", help="A user_id.")],
    compare: Annotated[
        Literal["base"] | None, typer.Option(help="Show the base's answers beside the adapter's.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 256,
    wait: Wait = WAIT_SECONDS,
) -> None:
    """Chat with one user's adapter in the terminal; `/pair` saves a preference to the run's ledger."""
    from persona_rlhf.release.export import find_user, refusals_to_release

    with open_run(run, "chat", wait, shared=True):
        result = find_user(run, user)
        reasons = refusals_to_release(run, result)  # before the base is loaded
    if reasons:
        note(f"This adapter cannot be used: {'; '.join(reasons)}")
        raise typer.Exit(HELD_BACK)
    from persona_rlhf.config.experiment import read_run_config
    from persona_rlhf.serving.chat import COMMANDS, Chat, ChatTerminal
    from persona_rlhf.serving.local_engine import local_run
    from persona_rlhf.serving.policy_filter import PolicyFilter, policy_of_run

    config = read_run_config(run)
    policy_filter = PolicyFilter.of(policy_of_run(run, config.policy.documents))
    with local_run(run, config.judged_base, config.lora, _GIB, note) as served:
        if reasons := served.access.reasons(result.slug):
            note(f"This adapter cannot be used: {'; '.join(reasons)}")
            raise typer.Exit(HELD_BACK)
        terminal = ChatTerminal(console(people=False))
        note(f"Chat with the adapter of {user}. {COMMANDS}")
        note("Its certificate covers greedy answers; /retry samples one.")
        access, generator = served.access, served.generator
        Chat(
            run,
            result,
            access.admit,
            generator,
            policy_filter,
            terminal,
            note,
            max_tokens,
            with_base=compare is not None,
        ).run(_lines())


@contextmanager
def exit_at_sigterm() -> Iterator[None]:
    """SIGTERM exits the program in the normal way, so that it also ends what it started."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _lines() -> Iterator[str]:
    """The lines of stdin, with a prompt in a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)  # noqa: T201
        line = sys.stdin.buffer.readline()  # decoded alone, so that a bad line costs one line
        if not line:
            return
        try:
            yield line.decode(sys.stdin.encoding or "utf-8")
        except UnicodeDecodeError:
            note("This line is not UTF-8 text; write it again.")


def server_modules() -> tuple[ModuleType, ModuleType, ModuleType]:
    """The HTTP server, its connections and its figures. Raises InputError if its libraries are not installed."""
    try:
        from persona_rlhf.serving import connections, metrics, server
    except ModuleNotFoundError as fault:
        sentence = f"the server needs {fault.name}: pip install 'persona-rlhf[serve]'"
        raise InputError([Problem("serve", None, None, sentence)]) from fault
    return server, connections, metrics
