"""The verbs of the command line that check what a run released: its papers, its audit trail, a change of the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona_rlhf.boundary import Json, print_json, print_json_list, print_table, say
from persona_rlhf.opening import open_run
from persona_rlhf.processes import HELD_BACK

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


def verify(
    place: Annotated[
        str, typer.Argument(metavar="DIR", help="An adapter's folder, a run, a sign-off packet, or a hub id.")
    ],
    head: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE|HEAD", help="A head of the run's audit trail, kept elsewhere, that it must hold."),
    ] = None,
    trust: Annotated[
        Path | None, typer.Option(metavar="KEYS", help="Trusted keys (YAML): every issuer's signature is demanded.")
    ] = None,
    revoked: Annotated[
        Path | None, typer.Option(metavar="LIST", help="A list of revocations beside the run's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check hashes, policy, verdict and audit trail again; exit 3 where something is wrong."""
    from persona_rlhf.inputs.bundled import is_hub_id
    from persona_rlhf.release.audit import read_head
    from persona_rlhf.release.hub import verify_remote
    from persona_rlhf.release.packet import packet_faults
    from persona_rlhf.release.revocation import read_list
    from persona_rlhf.release.trust import SELF_DECLARED, read_trust
    from persona_rlhf.release.verify import Witnesses
    from persona_rlhf.release.verify import verify as faults_of

    folder = Path(place)
    if folder.is_file():
        _end(place, packet_faults(folder), [], as_json)
        return
    if folder.exists():
        open_run(folder)
    witnesses = Witnesses(
        [read_head(text) for text in head or []],
        None if trust is None else read_trust(trust),
        {} if revoked is None else read_list(revoked),
    )
    notes = [SELF_DECLARED] if trust is None else []
    remote = is_hub_id(place) and not folder.exists()
    _end(place, verify_remote(place, witnesses) if remote else faults_of(folder, witnesses), notes, as_json)


def _end(place: str, faults: list[str], notes: list[str], as_json: bool) -> None:
    """What was found, in words or as JSON; exit 3 where something is wrong."""
    if as_json:
        print_json({"path": place, "faults": faults, "notes": notes})
    for sentence in (*faults, *notes):
        say(sentence)
    count = f"{len(faults)} fault{'' if len(faults) == 1 else 's'}"
    say(f"{place}: {count if faults else 'verified'}")
    if faults:
        raise typer.Exit(HELD_BACK)


def audit(
    run: RunFolder,
    head: Annotated[bool, typer.Option("--head", help="Print the head alone, to be kept elsewhere.")] = False,
    as_json: Json = False,
) -> None:
    """Print the audit trail of a run, or its head; exit 3 where the chain is broken."""
    from persona_rlhf.release import audit as trail
    from persona_rlhf.release.trail import trail_table

    open_run(run)
    last, faults = trail.need_head(run), trail.faults(run)
    if head:
        print_json(last._asdict()) if as_json else typer.echo(str(last))
    elif as_json:
        print_json_list(entry._asdict() for entry in trail.read(run))
    else:
        print_table(trail_table(trail.read(run)))
    for fault in faults:
        say(fault)
    if faults:
        raise typer.Exit(HELD_BACK)


def recertify(
    run: RunFolder,
    policy: Annotated[
        list[Path], typer.Option("--policy", metavar="DOC", help="A new policy document; give all of them, one by one.")
    ],
    as_json: Json = False,
) -> None:
    """Test every released adapter against new policy documents, without retraining; who fails is revoked (exit 3)."""
    from persona_rlhf import recertification
    from persona_rlhf.release.recertified import recertified_table

    open_run(run)
    found = recertification.recertify(run, policy, say)
    print_json(found.to_json()) if as_json else print_table(recertified_table(found))
    if found.failed:
        raise typer.Exit(HELD_BACK)
