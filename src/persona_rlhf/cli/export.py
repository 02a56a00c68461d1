"""The command `export`: copy adapters out of a run, to a folder, a file or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from persona_rlhf.cli.console import RunArgument, Wait, note, open_run
from persona_rlhf.common.run_lock import WAIT_SECONDS
from persona_rlhf.pipeline.distributed import HELD_BACK

if TYPE_CHECKING:
    from persona_rlhf.release.hub import RepositoryUpload
    from persona_rlhf.release.hub_repository import UploadDifference

_SHOWN = 50  # paths printed of a difference


def export(
    run: RunArgument,
    user: Annotated[str | None, typer.Option("--user", help="A user_id.")] = None,
    all_users: Annotated[bool, typer.Option("--all", help="With --hub: every adapter that may be exported.")] = False,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="A new or empty folder; for gguf a new file.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="With --to: a whole model, the adapter in its weights.")
    ] = False,
    form: Annotated[
        Literal["peft", "gguf"], typer.Option("--format", help="With --to: a PEFT folder, or llama.cpp's GGUF.")
    ] = "peft",
    sign: Annotated[
        Path | None,
        typer.Option("--sign", metavar="KEY", help="With --to: add the certificate and a signature of the folder."),
    ] = None,
    bom: Annotated[bool, typer.Option("--bom", help="With --to: add a bill of materials (CycloneDX 1.7).")] = False,
    hub: Annotated[
        str | None, typer.Option("--hub", metavar="OWNER/NAME", help="A repository of the hub; a new one is private.")
    ] = None,
    revision: Annotated[str, typer.Option(metavar="R", help="With --hub: the branch.")] = "main",
    per_user: Annotated[
        bool, typer.Option("--per-user", help="With --all: one repository per user, named OWNER/NAME-PSEUDONYM.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --hub: print what would change there; nothing is sent.")
    ] = False,
    public: Annotated[
        bool, typer.Option("--public", help="With --hub: make it readable by everybody; asks for its name again.")
    ] = False,
    wait: Wait = WAIT_SECONDS,
) -> None:
    """Copy released adapters out of a run: to a folder, as a model or a GGUF file, or to the hub."""
    _check_options(user, all_users, to, hub, merge or form != "peft", per_user, dry_run or public or revision != "main")
    if merge and form == "gguf":
        raise typer.BadParameter("--merge and --format gguf do not go together")
    if (sign is not None or bom) and (hub is not None or merge or form != "peft"):
        raise typer.BadParameter("--sign and --bom go with --to and a PEFT folder")
    from persona_rlhf.release.export import HeldBack

    try:
        with open_run(run, "export", wait, shared=True):  # an upload only appends to the audit trail
            if hub is not None:
                _to_hub(run, user, hub, revision, per_user, dry_run, public)
            elif user is not None and to is not None:
                _to_folder(run, user, to, merge, form, sign, bom)
    except HeldBack as reason:
        note(str(reason))
        raise typer.Exit(HELD_BACK) from None


def _check_options(
    user: str | None,
    all_users: bool,
    to: Path | None,
    hub: str | None,
    folder_only: bool,
    per_user: bool,
    hub_only: bool,
) -> None:
    if (user is None) != all_users:
        raise typer.BadParameter("give either --user USER_ID or --all (--all needs --hub)")
    if (to is None) == (hub is None):
        raise typer.BadParameter("give either --to DIR or --hub OWNER/NAME")
    if to is not None and (all_users or hub_only):
        raise typer.BadParameter("--all, --revision, --dry-run and --public go with --hub")
    if hub is not None and folder_only:
        raise typer.BadParameter("--merge and --format go with --to")
    if per_user and not all_users:
        raise typer.BadParameter("--per-user goes with --all")


def _to_folder(run: Path, user: str, to: Path, merge: bool, form: str, sign: Path | None, bom: bool) -> None:
    from persona_rlhf.release.compatibility import lint
    from persona_rlhf.release.export import admitted, find_user
    from persona_rlhf.release.export import export as write

    if not merge and form == "peft":
        write(run, user, to, sign, bom)
        for finding in lint(to):
            note(str(finding))
        note(f"Adapter of {user}: {to}")
        return
    adapter = admitted(run, find_user(run, user))
    from persona_rlhf.common.errors import InputError, Problem
    from persona_rlhf.common.files import need_vacant
    from persona_rlhf.config.experiment import read_run_config

    base = read_run_config(run).base
    if form == "gguf":
        from persona_rlhf.release.convert import to_gguf

        note(f"Adapter of {user}: {to_gguf(adapter, base.model, to)}")
        return
    if base.quantization is not None:
        sentence = f"its adapters were judged on weights stored as {base.quantization}; a merged model is another model"
        raise InputError([Problem(str(run), None, "--merge", sentence)])
    need_vacant(to, "--to")  # before the base is loaded
    from persona_rlhf.models.base import load_base
    from persona_rlhf.release.convert import merge as write_merged

    note(f"Model of {user}: {write_merged(load_base(base), adapter, to)}")


def _to_hub(run: Path, user: str | None, hub: str, revision: str, per_user: bool, dry_run: bool, public: bool) -> None:
    from persona_rlhf.release.export import admitted, exportable, find_user
    from persona_rlhf.release.hub import LocalAdapter, preview, repository_uploads, upload

    if user is not None:
        adapters, held_back = [LocalAdapter(user, admitted(run, find_user(run, user)))], list[str]()
    else:
        folders, held_back = exportable(run)
        adapters = [LocalAdapter(*item) for item in folders.items()]
    uploads = (
        repository_uploads(hub, adapters, shared=user is None, per_user=per_user, revision=revision) if adapters else []
    )
    if dry_run:
        for repository in uploads:
            _print_difference(repository, preview(run, repository, public), public)
    else:
        if public and uploads:
            _confirm(hub)
        for repository in uploads:
            commit = upload(run, repository, public, note)
            count = f"{len(repository.adapters):,} adapter{'' if len(repository.adapters) == 1 else 's'}"
            note(f"{repository.repository.id}: {count} at commit {commit[:12]}, {'public' if public else 'private'}")
    for reason in held_back:
        note(reason)
    if held_back:
        raise typer.Exit(HELD_BACK)


def _print_difference(upload: RepositoryUpload, change: UploadDifference, public: bool) -> None:
    """Prints the changes that an upload would make to a repository, one path per line on stdout."""
    rows = [
        (sign, path)
        for sign, paths in zip("+~-", (change.added, change.changed, change.removed), strict=True)
        for path in paths
    ]
    for sign, path in rows[:_SHOWN]:
        typer.echo(f"{sign} {upload.repository.id}/{path}")
    if len(rows) > _SHOWN:
        typer.echo(f"... and {len(rows) - _SHOWN:,} more")
    note(f"{upload.repository.id}: {change}; it would be {'public' if public else 'private'}. Nothing was sent.")


def _confirm(hub: str) -> None:
    """Asks for the repository's name before an adapter becomes public; ends the program if it differs."""
    note(f"Everybody will be able to read {hub}: adapters of persons, which reveal their preferences.")
    try:
        typed = typer.prompt("Type its name to continue", err=True, default="", show_default=False)
    except typer.Abort:
        typed = ""
    if typed.strip() != hub:
        note("That is not its name; nothing was sent.")
        raise typer.Exit(2)
