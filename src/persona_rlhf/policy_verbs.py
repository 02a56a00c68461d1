"""The verbs of the command line about policy documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona_rlhf.boundary import Json, bounded, print_json, print_table, say, verbs

policy_verbs = verbs("Policy documents of three tiers.")


@policy_verbs.command("show")
@bounded
def policy_show(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Config of an experiment (YAML).")],
    user: Annotated[str | None, typer.Option("--user", help="A user_id.")] = None,
    as_json: Json = False,
) -> None:
    """Print the resolved rules, each with the tier and document it comes from."""
    from persona_rlhf.config import read_config
    from persona_rlhf.policy.listing import listing
    from persona_rlhf.policy.tiers import Policy

    resolved = Policy.read(read_config(config).policy.documents)
    if user is not None:
        resolved = resolved.for_user(user)
    print_json(resolved.to_json()) if as_json else print_table(listing(resolved))


@policy_verbs.command("check")
@bounded
def policy_check(paths: Annotated[list[Path], typer.Argument(metavar="PATH...")]) -> None:
    """Validate policy documents (or folders of them), alone and against each other."""
    from persona_rlhf.policy.tiers import check_documents

    say(check_documents(paths))


@policy_verbs.command("keygen")
@bounded
def policy_keygen(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new file for the private key.")], as_json: Json = False
) -> None:
    """Make a key to sign documents and manifests with; prints the public key, for a file of trusted keys."""
    from persona_rlhf.release.signing import make_key

    public = make_key(out)
    print_json({"path": str(out), "public_key": public}) if as_json else typer.echo(public)
    say(f"{out} holds the private key: keep it to yourself. The line on stdout goes into keys.yaml, under its role.")


@policy_verbs.command("sign")
@bounded
def policy_sign(
    document: Annotated[Path, typer.Argument(metavar="DOC", help="A policy document, or any file.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="A private key made by `policy keygen`.")],
    as_json: Json = False,
) -> None:
    """Write DOC.sig beside a document: a signature over its bytes, which `verify --trust` demands."""
    from persona_rlhf.release.signing import sign_file

    signature = sign_file(document, key)
    if as_json:
        print_json({"path": str(signature)})
    say(f"Signature: {signature}")


@policy_verbs.command("packet")
@bounded
def policy_packet(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="EARLIER", help="The run that was signed off before.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Default: RUN-packet.html beside it.")
    ] = None,
    approver: Annotated[str | None, typer.Option("--approver", help="Name and role of who is to decide.")] = None,
    as_json: Json = False,
) -> None:
    """Write the sign-off packet of a run: one page with rules, bounds, exceptions, counts and what changed."""
    from persona_rlhf.release.packet import write_packet

    page = out or run.resolve().with_name(f"{run.resolve().name}-packet.html")
    digest = write_packet(run, page, against, approver)
    print_json({"path": str(page), "sha256": digest}) if as_json else typer.echo(digest)
    say(f"Packet: {page}")
