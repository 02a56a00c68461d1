"""The commands over a finished run: add, forget, rebase, verify, audit and recertify."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_rlhf.cli.console import (
    Json,
    RunArgument,
    Wait,
    exit_if_withheld,
    note,
    open_run,
    print_guarantee,
    print_json,
    print_json_list,
    print_results,
    print_table,
    progress_display,
)
from persona_rlhf.common.errors import InputError, counted
from persona_rlhf.common.run_lock import WAIT_SECONDS
from persona_rlhf.pipeline.distributed import HELD_BACK

if TYPE_CHECKING:
    from persona_rlhf.pipeline.forget_user import Forgotten


def forget(
    run: RunArgument,
    user: Annotated[str, typer.Option("--user", help="A user_id.")],
    data: Annotated[bool, typer.Option("--data", help="Remove the user's rows from the source files too.")] = False,
    as_json: Json = False,
    wait: Wait = WAIT_SECONDS,
) -> None:
    """Delete one user everywhere and write a proof."""
    from persona_rlhf.common.files import pseudonym
    from persona_rlhf.pipeline import forget_user
    from persona_rlhf.pipeline.background_updates import without_update
    from persona_rlhf.release.deletion_records import proof_file

    with without_update(run, user), open_run(run, "forget", wait):
        with progress_display() as display:
            done = forget_user.forget(run, user, data, display)
        uploads = forget_user.forget_uploads(run)  # last: a hub that does not answer keeps nothing else waiting
    if done is None:
        note(f"`{user}` was forgotten already; the proof is {proof_file(run, pseudonym(user))}")
    else:
        _print_deletion(user, done, as_json)
    for upload in uploads:
        note(upload.sentence)
    if not all(upload.done for upload in uploads):
        raise typer.Exit(HELD_BACK)


def _print_deletion(user: str, done: Forgotten, as_json: bool) -> None:
    if as_json:
        print_json(done.content)
    removed = sum(trace["count"] for trace in done.content["removed"])
    note(f"`{user}` is forgotten: {counted(removed, 'piece')} in {counted(len(done.content['removed']), 'place')}.")
    for sentence in done.remains:
        note(f"Outside the run: {sentence}.")
    note(f"The user stays out, whatever the sources hold; to admit them again, delete the proof.\nProof: {done.proof}")


def add(
    run: RunArgument,
    users: Annotated[
        str, typer.Option("--users", metavar="PATH", help="New or changed users, each with all of their pairs.")
    ],
    keep_earlier: Annotated[
        bool,
        typer.Option("--keep-earlier", help="Set adapters before aside; one stays where no new one is released."),
    ] = False,
    as_json: Json = False,
    wait: Wait = WAIT_SECONDS,
) -> None:
    """Train new or changed users into a finished run; other users' files do not change."""
    with open_run(run, "add", wait, shared=True):
        pass
    from persona_rlhf.pipeline.update_run import add as train
    from persona_rlhf.release.deletion_records import FORGOTTEN

    with progress_display() as display:
        done = train(run, users, display, keep_earlier=keep_earlier, wait=wait, tell=note)
    if done.results or as_json:
        print_results(done.results, as_json)
    else:
        note("No user in it is new or changed.")
    if done.unchanged:
        verb = "is" if done.unchanged == 1 else "are"
        note(f"{counted(done.unchanged, 'user')} {verb} in the run already, with the same pairs.")
    if done.forgotten:
        verb = "stays" if done.forgotten == 1 else "stay"
        forgotten = f"{counted(done.forgotten, 'user')} asked to be forgotten and {verb} out"
        note(f"{forgotten}; the proofs are in {run / FORGOTTEN}.")
    if done.results:
        print_guarantee(run)
    exit_if_withheld(done.results)


def rebase(
    run: RunArgument,
    base: Annotated[str, typer.Option("--base", metavar="NEW", help="The new base: a folder or a hub id.")],
    to: Annotated[
        Path | None, typer.Option("--run", metavar="NEWRUN", help="Folder of the new run (default: RUN.rebased).")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Move the old run to RUN.before, and the new run to RUN.")
    ] = False,
    as_json: Json = False,
    wait: Wait = WAIT_SECONDS,
) -> None:
    """Train all users of a run again on a new base, and print the change for each of them."""
    from persona_rlhf.pipeline import update_run
    from persona_rlhf.pipeline.run_dir import before, check_replacement, replace_run
    from persona_rlhf.release.comparison import comparison_table, rebase_table
    from persona_rlhf.release.results import RunResults

    folder = to or run.with_name(f"{run.name}.rebased")
    with open_run(run, "rebase", wait, shared=not replace):
        if replace:
            check_replacement(run, folder)
        with progress_display() as display:
            done = update_run.rebase(run, base, folder, display, wait=wait, tell=note)
        if as_json:
            print_json(done.to_json())
        else:
            print_table(rebase_table(done.users))
            print_table(comparison_table(done.figures))
        if replace:
            replace_run(run, folder)
            note(f"{run} is on the new base now; the old run is {before(run)}.")
    folder = run if replace else folder
    note(f"Report:   {folder / 'report.html'}\nAdapters: {folder / 'adapters'}")
    exit_if_withheld(RunResults(folder))


def verify(
    place: Annotated[
        str, typer.Argument(metavar="DIR", help="An adapter's folder, a run, a sign-off packet, a proof, or a hub id.")
    ],
    head: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE|HEAD", help="A head of the audit trail, kept elsewhere, that the trail must hold."),
    ] = None,
    trust: Annotated[
        Path | None, typer.Option(metavar="KEYS", help="Trusted keys (YAML): every issuer's signature is required.")
    ] = None,
    revoked: Annotated[
        Path | None, typer.Option(metavar="LIST", help="A list of revocations beside the run's own.")
    ] = None,
    root: Annotated[
        list[str] | None,
        typer.Option(metavar="ROOT", help="For a proof by `audit --out`: a Merkle root that was kept elsewhere."),
    ] = None,
    as_json: Json = False,
    wait: Wait = WAIT_SECONDS,
) -> None:
    """Check hashes, policy, verdict and audit trail again; exit 3 if there is a fault, or the adapter is revoked."""
    from persona_rlhf.common.files import is_hub_id
    from persona_rlhf.release import audit_proof
    from persona_rlhf.release.approval_packet import packet_faults
    from persona_rlhf.release.attestation import unchecked_signatures
    from persona_rlhf.release.hub import verify_remote
    from persona_rlhf.release.integrity import read_head
    from persona_rlhf.release.revocation import read_list
    from persona_rlhf.release.signing import SELF_DECLARED, read_trust
    from persona_rlhf.release.verify import (
        TrustedEvidence,
        compositions_of,
        conditions_of,
        is_adapter,
        revocation_notes,
    )
    from persona_rlhf.release.verify import verify as faults_of

    folder = Path(place)
    if folder.is_file() and audit_proof.is_proof(folder):
        roots = [audit_proof.read_root(text, "--root") for text in root or []]
        _report(place, audit_proof.proof_faults(folder, roots), [], as_json)
        return
    if root:
        raise typer.BadParameter("--root goes with a proof that `audit --out` wrote")
    if folder.is_file():
        _report(place, packet_faults(folder), [], as_json)
        return
    witnesses = TrustedEvidence(
        [read_head(text) for text in head or []],
        None if trust is None else read_trust(trust),
        {} if revoked is None else read_list(revoked),
    )
    notes = [SELF_DECLARED] if trust is None else []
    if is_hub_id(place) and not folder.exists():
        faults = verify_remote(place, witnesses)
    elif is_adapter(folder):
        faults = faults_of(folder, witnesses)
        notes += [*(unchecked_signatures(folder) if trust is None else ())]
        notes += [*conditions_of(folder), *compositions_of(folder)]
    else:
        with open_run(folder, "verify", wait, shared=True):
            faults = faults_of(folder, witnesses)
            notes = [*([] if faults else revocation_notes(folder)), *notes]
            notes += [*conditions_of(folder), *compositions_of(folder), *_runs_otherwise(folder)]
    _report(place, faults, notes, as_json)


def _runs_otherwise(folder: Path) -> list[str]:
    """A sentence where `serve` and `chat` would run a run on this machine in another way than the gate did."""
    if not (folder / "config.yaml").is_file():
        return []
    from persona_rlhf.config.experiment import read_run_config
    from persona_rlhf.models.base import select_device, select_dtype
    from persona_rlhf.policy.enforcement import system_prompt
    from persona_rlhf.release.deletion_records import adapter_folders
    from persona_rlhf.release.manifest import MANIFEST, read_manifest, uncertified
    from persona_rlhf.release.verify import uncertified_prompts
    from persona_rlhf.serving.policy_filter import policy_of_run

    try:
        config = read_run_config(folder)
        base, policy = config.judged_base, policy_of_run(folder, config.policy.documents)
        device = select_device(base)
    except InputError:  # it names files or devices that this machine lacks: nothing can be served here
        return []
    running = {"dtype": str(select_dtype(base, device)).removeprefix("torch."), "device": device.type}
    manifests = (read_manifest(adapter / MANIFEST)[0] or {} for adapter in adapter_folders(folder))
    otherwise = sorted({f"Here: {sentence}." for content in manifests if (sentence := uncertified(content, running))})
    return otherwise + uncertified_prompts(folder, partial(system_prompt, policy))


def _report(place: str, faults: list[str], notes: list[str], as_json: bool) -> None:
    """Prints the faults as text or JSON; ends with exit code 3 if there are any."""
    if as_json:
        print_json({"path": place, "faults": faults, "notes": notes})
    for sentence in (*faults, *notes):
        note(sentence)
    count = f"{len(faults)} fault{'' if len(faults) == 1 else 's'}"
    note(f"{place}: {count if faults else 'verified'}")
    if faults:
        raise typer.Exit(HELD_BACK)


def audit(
    run: RunArgument,
    head: Annotated[bool, typer.Option("--head", help="Print only the head, to be kept elsewhere.")] = False,
    root: Annotated[bool, typer.Option("--root", help="Print only the Merkle root, to be kept elsewhere.")] = False,
    user: Annotated[
        str | None, typer.Option("--user", help="With --out: prove the lines of this user_id, without the others.")
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="ROOT", help="With --out: prove growth since this Merkle root.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A new file for the proof.")] = None,
    as_json: Json = False,
    wait: Wait = WAIT_SECONDS,
) -> None:
    """Print the audit trail of a run, its head or its root, or write a proof; exit 3 if the chain is broken."""
    if [user, since].count(None) != (2 if out is None else 1):
        raise typer.BadParameter("--out goes with either --user or --since")
    from persona_rlhf.release import audit_proof
    from persona_rlhf.release import integrity as trail
    from persona_rlhf.release.integrity import audit_table

    with open_run(run, "audit", wait, shared=True):
        last, faults = trail.need_head(run), trail.faults(run)
        if root or out is not None:
            if out is None:
                tree_head = audit_proof.merkle_root(run)
            elif user is not None:
                tree_head = audit_proof.prove_user(run, user, out)
            else:
                tree_head = audit_proof.prove_growth(run, audit_proof.read_root(since or "", "--since"), out)
            print_json(tree_head._asdict()) if as_json else typer.echo(str(tree_head))
        elif head:
            print_json(last._asdict()) if as_json else typer.echo(str(last))
        elif as_json:
            print_json_list(entry._asdict() for entry in trail.read(run))
        else:
            print_table(audit_table(trail.read(run)))
    for fault in faults:
        note(fault)
    if faults:
        raise typer.Exit(HELD_BACK)


def recertify(
    run: RunArgument,
    policy: Annotated[
        list[Path],
        typer.Option("--policy", metavar="DOC", help="A new policy document; repeat it for all of them."),
    ],
    as_json: Json = False,
    wait: Wait = WAIT_SECONDS,
) -> None:
    """Test every released adapter against new policy documents, without training; failing ones are revoked (exit 3)."""
    from persona_rlhf.pipeline import reevaluate
    from persona_rlhf.release.revocation import recertified_table

    with open_run(run, "recertify", wait), progress_display() as display:
        outcome = reevaluate.recertify(run, policy, display)
    print_json(outcome.to_json()) if as_json else print_table(recertified_table(outcome))
    if outcome.failed:
        raise typer.Exit(HELD_BACK)
