"""The command `collect`: serve the feedback page of a run, count its choices, or export them as pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_rlhf.cli.console import Json, RunArgument, Wait, note, open_run, print_json, print_table
from persona_rlhf.cli.serve import exit_at_sigterm, server_modules
from persona_rlhf.common.errors import InputError, Problem, counted, visible
from persona_rlhf.common.run_lock import WAIT_SECONDS

if TYPE_CHECKING:
    from socket import socket

    from rich.table import Table

    from persona_rlhf.config.experiment import Config
    from persona_rlhf.data.choice_ledger import ChoiceLedger
    from persona_rlhf.data.collected_users import CollectedUser
    from persona_rlhf.policy.policy import Policy

_GIB = 1 << 30
_ADMIN_CONNECTIONS = 16


def collect(
    run: RunArgument,
    user: Annotated[
        str | None, typer.Option("--user", help="A user_id, perhaps a new one: a new link is made for it.")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The ledger of choices (default: RUN/state/choices.db).")
    ] = None,
    prompts: Annotated[Path, typer.Option(metavar="FILE", help="Suggested prompts, JSON lines of `prompt`.")] = Path(
        "data/prompts/everyday.jsonl"
    ),
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 is any free one.")] = 8010,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="The page's address in links, where a proxy stands before it.")
    ] = None,
    days: Annotated[float, typer.Option(min=0.001, help="Days after which a new link expires.")] = 7.0,
    first_update: Annotated[
        int, typer.Option(min=1, help="Choices that the page names as enough for a first update.")
    ] = 20,
    update_after: Annotated[
        int | None,
        typer.Option(min=1, help="New choices after which a user's adapter is trained in the background."),
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Serve the operator's page on this port of 127.0.0.1; 0 is any free one."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 256,
    candidates: Annotated[
        int, typer.Option(min=2, max=8, help="Answers sampled for a prompt; the two that differ most are shown.")
    ] = 4,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the choices as pairs to a new *.jsonl for `add`, and end."),
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="With --export: only choices that may be shared, for `basis fit`.")
    ] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Print users and the numbers of their choices, and end.")
    ] = False,
    as_json: Json = False,
    wait: Wait = WAIT_SECONDS,
) -> None:
    """Serve a page on which users compare two answers; their choices are kept in a ledger."""
    if shared and export is None:
        raise typer.BadParameter("--shared goes with --export")
    from persona_rlhf.config.experiment import read_run_config
    from persona_rlhf.data.choice_ledger import CHOICES, ChoiceLedger
    from persona_rlhf.pipeline.run_dir import RunDir
    from persona_rlhf.release.deletion_records import forgotten
    from persona_rlhf.release.served_places import note_place

    with open_run(run, "collect", wait, shared=True):
        RunDir(run).need_finished("its users give feedback")
        config = read_run_config(run)
        if ledger is not None and (sentence := note_place(run, "ledger", ledger)) is not None:
            note(sentence)
        choices = ChoiceLedger(ledger or run / CHOICES, lambda: forgotten(run))
    try:
        if status:
            _print_status(run, choices, as_json)
        elif export is not None:
            _export(run, config, choices, export, shared, as_json)
        else:
            _serve(
                run,
                config,
                choices,
                user,
                prompts,
                (host, port, address),
                days,
                (first_update, update_after),
                (max_tokens, candidates),
                admin_port,
            )
    finally:
        choices.close()


def _export(run: Path, config: Config, choices: ChoiceLedger, out: Path, shared: bool, as_json: bool) -> None:
    from persona_rlhf.pipeline.export_choices import export_choices

    done = export_choices(run, config, choices, out, shared)
    if as_json:
        print_json({**done._asdict(), "path": str(out)})
    note(
        f"{counted(done.chosen, 'pair')} from choices of {counted(done.users, 'user')}, after {done.earlier} that the "
        f"run has of them: {out}"
    )
    if done.users and not shared:
        note(f"To train them: persona-rlhf add {run} --users {out}")


def _print_status(run: Path, choices: ChoiceLedger, as_json: bool) -> None:
    from persona_rlhf.data.collected_users import collected_users
    from persona_rlhf.pipeline.export_choices import trained_ids

    users = collected_users(run, choices, trained_ids(run))
    if as_json:
        print_json([user._asdict() for user in users])
        return
    print_table(_status_table(users))
    for user in users:
        if user.deletion_wished:
            note(visible(f"{user.user_id} deleted their choices on the page; for all else, give `forget`"))


def _status_table(users: list[CollectedUser]) -> Table:
    from rich.table import Table
    from rich.text import Text

    heads = ("user", "choices", "with a better answer", "not trained yet", "repeated alike", "undone", "last", "update")
    table = Table(*heads)
    for one in users:
        alike = f"{one.alike} of {one.repeated}" if one.repeated else ""
        figures = (one.choices, one.preferred, one.waiting, alike, one.undone, one.last, one.update)
        table.add_row(Text(visible(one.user_id)), *map(str, figures))
    return table


def _serve(
    run: Path,
    config: Config,
    choices: ChoiceLedger,
    user: str | None,
    prompts: Path,
    place: tuple[str, int, str | None],
    days: float,
    updates: tuple[int, int | None],
    sampling: tuple[int, int],
    admin_port: int | None,
) -> None:
    server, connections, _ = server_modules()
    from persona_rlhf.data.wish_documents import WishDesk
    from persona_rlhf.pipeline.background_updates import BackgroundUpdates
    from persona_rlhf.pipeline.stop_advice import stop_advice
    from persona_rlhf.release.deletion_records import forgotten
    from persona_rlhf.serving.answer_sampler import AnswerSampler
    from persona_rlhf.serving.collect import CollectSettings, FeedbackPages, do_nothing
    from persona_rlhf.serving.collect_links import make_links
    from persona_rlhf.serving.collect_progress import never
    from persona_rlhf.serving.comparisons import OpenComparisons, Suggestions
    from persona_rlhf.serving.policy_filter import PolicyFilter, policy_of_run

    host, port, address = place
    _need_user_id(run, user)
    pool = connections.ConnectionPool(connections.ConnectionLimits().within_files())
    policy = policy_of_run(run, config.policy.documents)
    suggestions = Suggestions(_suggested(prompts, config, policy))
    if host not in ("127.0.0.1", "::1", "localhost"):
        note(f"Warning: {host} can be reached from other machines, and this is plain HTTP: put TLS before it.")
    from persona_rlhf.serving.local_engine import local_run

    first_update, update_after = updates
    background = None if update_after is None else BackgroundUpdates(run, config, choices, update_after, note)
    with (
        server.bind_socket(host, port) as bound,
        _admin_socket(admin_port) as admin_bound,
        exit_at_sigterm(),
        local_run(run, config.judged_base, config.lora, _GIB, note) as served,
    ):
        address = (address or f"http://{host}:{bound.getsockname()[1]}").rstrip("/")
        sampler = AnswerSampler(
            served.generator, served.access, PolicyFilter.of(policy), served.access.weights_hash, *sampling
        )
        settings = CollectSettings(
            update_after or first_update, address, update_after is not None, stop_advice(run, config) or never
        )
        desk = WishDesk(run, tuple(config.policy.documents), policy)
        pages = FeedbackPages(
            run,
            sampler,
            choices,
            suggestions,
            OpenComparisons(lambda: forgotten(run)),
            desk,
            note,
            settings,
            on_choice=background.wake if background is not None else do_nothing,
        )
        program = server.http_server(pages.app(), note, pool)
        bound.listen()
        for user_id, token in make_links(run, _users_without_link(run, user), days).items():
            typer.echo(json.dumps({"user_id": user_id, "link": f"{address}/enter/{token}"}))
        note(f"Links expire after {days:g} days, and are stored nowhere; --user USER_ID makes another one.")
        note("Answers are sampled (temperature 0.8); certificates cover greedy ones.")
        note(f"Serving the feedback page of {run} at {address}; SIGTERM finishes running answers.")
        with (
            background.going_on() if background is not None else nullcontext(),
            nullcontext() if admin_bound is None else _admin_page(run, choices, admin_bound, updates),
        ):
            program.run(sockets=[bound])


def _admin_socket(port: int | None) -> AbstractContextManager[socket | None]:
    server, _, _ = server_modules()
    return nullcontext() if port is None else server.bind_socket("127.0.0.1", port, "--admin-port")


@contextmanager
def _admin_page(run: Path, choices: ChoiceLedger, bound: socket, updates: tuple[int, int | None]) -> Iterator[None]:
    """Serves the operator's page beside the users', and prints its link."""
    server, connections, _ = server_modules()
    from persona_rlhf.data.collected_users import collected_users
    from persona_rlhf.pipeline.export_choices import trained_ids
    from persona_rlhf.serving.collect_admin import AdminPage

    first_update, update_after = updates

    def users() -> list[CollectedUser]:
        return collected_users(run, choices, trained_ids(run))

    admin = AdminPage(users, choices.updates, update_after or first_update, update_after is not None, note)
    pool = connections.ConnectionPool(connections.ConnectionLimits(connections=_ADMIN_CONNECTIONS))
    bound.listen()
    typer.echo(json.dumps({"admin": f"http://127.0.0.1:{bound.getsockname()[1]}/enter/{admin.token}"}))
    with server.served_beside(admin.app(), bound, note, pool):
        yield


def _need_user_id(run: Path, user: str | None) -> None:
    """Raises InputError for a text that is no user id, and for a forgotten user."""
    from persona_rlhf.common.files import pseudonym
    from persona_rlhf.data.columns import user_id_fault
    from persona_rlhf.release.deletion_records import forgotten

    if user is None:
        return
    if (fault := user_id_fault(user)) is not None:
        raise InputError([Problem("collect", None, "--user", fault.sentence)])
    if pseudonym(user) in forgotten(run):
        raise InputError([Problem(str(run), None, "--user", "this user was forgotten; delete the proof to admit them")])


def _users_without_link(run: Path, user: str | None) -> list[str]:
    """The one user; else all users of the run without a link that opens their page."""
    from persona_rlhf.release.results import RunResults
    from persona_rlhf.serving.collect_links import Links

    if user is not None:
        return [user]
    linked = Links(run).users()
    return [result.user_id for result in RunResults(run) if result.user_id not in linked]


def _suggested(file: Path, config: Config, policy: Policy) -> list[str]:
    """The prompts of a file, without those whose pairs would be screened out as near copies."""
    from persona_rlhf.common.files import find
    from persona_rlhf.data.near_copies import NearCopyIndex
    from persona_rlhf.evaluation.prompt_sets import read_ordinary
    from persona_rlhf.pipeline.inputs import ordinary_of

    near_copies = NearCopyIndex.of(policy, ordinary_of(config))
    prompts = read_ordinary(find(file))
    kept = [prompt for prompt in prompts if near_copies.find(prompt) is None]
    if len(kept) < len(prompts):
        note(f"{len(prompts) - len(kept)} suggested prompts are near copies of probes, and are left out.")
    return kept
