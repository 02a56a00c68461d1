"""The commands of the group `policy`: show, check, compare, explain, sign and print policy documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from persona_rlhf.cli.console import (
    ConfigFile,
    Json,
    RunArgument,
    Wait,
    command_group,
    note,
    open_run,
    print_json,
    print_table,
    with_exit_codes,
)
from persona_rlhf.common.errors import InputError, visible
from persona_rlhf.common.run_lock import WAIT_SECONDS

if TYPE_CHECKING:
    from persona_rlhf.evaluation.power import PowerRow
    from persona_rlhf.policy.documents import PolicyDocument

policy_commands = command_group("Policy documents of three tiers.")

bank_commands = command_group("The probes that certify: their state, and their rotation.")
policy_commands.add_typer(bank_commands, name="bank")

User = Annotated[str | None, typer.Option("--user", help="A user_id.")]


@policy_commands.command("show")
@with_exit_codes
def policy_show(
    config: ConfigFile,
    user: User = None,
    rule: Annotated[
        str | None, typer.Option("--why", metavar="RULE", help="Show the rule with this id in full.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the resolved rules with their tiers and documents; with --user, also the overruled preferences."""
    from persona_rlhf.config.experiment import read_config
    from persona_rlhf.policy import explain
    from persona_rlhf.policy.enforcement import overruled
    from persona_rlhf.policy.policy import Policy, out_of_force

    settings = read_config(config)
    resolved = Policy.of(settings.policy, sequential=settings.gate.sequential)
    if user is not None:
        resolved = resolved.for_user(user)
    if rule is not None:
        entry = explain.entry_of(resolved, rule)
        row = {**entry.to_json(), "held_by": explain.enforced_by(entry)}
        print_json(row) if as_json else print_table(explain.why(resolved, entry))
        return
    lost = list(overruled(resolved.preferences, resolved.requirements))
    written = [{**entry.to_json(), "held_by": explain.enforced_by(entry)} for entry in resolved.written]
    if as_json:
        print_json({**resolved.to_json(), "written": written, "overruled": [row._asdict() for row in lost]})
        return
    print_table(explain.listing(resolved))
    for sentence in [*out_of_force(resolved.written), *(preference.sentence for preference in lost)]:
        note(visible(sentence))


@policy_commands.command("check")
@with_exit_codes
def policy_check(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Documents, or folders of them.")],
    as_json: Json = False,
    power: Annotated[
        bool, typer.Option("--power", help="The chance that good adapters pass the gate, by look and refusal rate.")
    ] = False,
) -> None:
    """Validate policy documents (or folders of them), alone and against each other."""
    from persona_rlhf.policy.policy import check_documents

    try:
        notes = check_documents(paths)
    except InputError as fault:
        if as_json:
            print_json({"problems": [problem._asdict() for problem in fault.problems], "notes": []})
        raise
    rows = _power(paths) if power else []
    if as_json:
        shown = {"power": [row._asdict() for row in rows]} if power else {}
        print_json({"problems": [], "notes": notes, **shown})
        return
    for line in notes:
        note(visible(line))
    if rows:
        from persona_rlhf.evaluation.power import power_table

        print_table(power_table(rows))


def _power(paths: Sequence[Path]) -> list[PowerRow]:
    """The power of the gate of these documents. Raises InputError where no tier one is among them."""
    from persona_rlhf.config.evaluation import GateSettings
    from persona_rlhf.evaluation.gate import demands_of
    from persona_rlhf.evaluation.power import power
    from persona_rlhf.policy.policy import Policy, document_files

    policy = Policy.read(document_files(paths))
    return power(demands_of(policy, GateSettings()), policy.probes("certify"))


@policy_commands.command("diff")
@with_exit_codes
def policy_diff(
    before: Annotated[Path, typer.Argument(metavar="A", help="A document, a folder of them, or a config.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="The documents that would replace A.")],
    as_json: Json = False,
) -> None:
    """Print what gets stricter and what looser from A to B; exit code 3 if tier one gets looser."""
    from persona_rlhf.policy.explain import changes_table, differences

    changes = differences(_documents(before), _documents(after))
    if as_json:
        print_json([{**change._asdict(), "refused": change.refused} for change in changes])
    elif changes:
        print_table(changes_table(changes))
    else:
        note("Nothing changes.")
    refused = sum(change.refused for change in changes)
    if refused:
        note(f"Tier one gets looser in {refused} {'place' if refused == 1 else 'places'}, which is refused.")
        raise typer.Exit(3)


@policy_commands.command("explain")
@with_exit_codes
def policy_explain(
    config: ConfigFile,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A request, as a user would write it.")],
    user: User = None,
    answer: Annotated[str | None, typer.Option("--answer", help="An answer to it, to be checked.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the base too, as screening does: it is loaded.")] = False,
    as_json: Json = False,
) -> None:
    """Print the rules that apply to a text, and the stage of each."""
    from persona_rlhf.config.experiment import read_config
    from persona_rlhf.policy.explain import by_the_base, explain, matches_table
    from persona_rlhf.policy.policy import Policy

    settings = read_config(config)
    matches = explain(Policy.read(settings.policy.documents), user, text, answer)
    if not matches:
        note("No rule applies to it by its text.")
    if settings.screening.base != "off":
        refused = None
        if base:
            from persona_rlhf.pipeline.evaluate_base import base_refuses

            refused = base_refuses(settings, text)
        matches = [by_the_base(refused), *matches]
    print_json([match._asdict() for match in matches]) if as_json else print_table(matches_table(matches))


@policy_commands.command("schema")
@with_exit_codes
def policy_schema(
    tier: Annotated[int | None, typer.Option("--tier", min=1, max=3, help="1, 2 or 3 (default: all three).")] = None,
    as_json: Json = False,
) -> None:
    """Print the JSON Schema of policy documents (it is JSON with and without --json)."""
    from persona_rlhf.policy.documents import schemas

    print_json(schemas() if tier is None else schemas()[tier])


def _documents(path: Path) -> list[PolicyDocument]:
    """The documents at a path: one, a folder of them, or those of a config. Raises InputError naming every problem."""
    from persona_rlhf.common.files import find
    from persona_rlhf.config.experiment import read_config
    from persona_rlhf.config.loader import in_order, read_yaml
    from persona_rlhf.policy.inheritance import read_all
    from persona_rlhf.policy.policy import document_files

    source = find(path)
    tree = {} if source.is_dir() else read_yaml(source).tree
    is_config = isinstance(tree, dict) and "policy" in tree
    documents, problems = read_all(read_config(source).policy.documents if is_config else document_files([source]))
    if problems:
        raise InputError(in_order(problems))
    return documents


@policy_commands.command("keygen")
@with_exit_codes
def policy_keygen(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new file for the private key.")],
    kind: Annotated[
        Literal["ed25519", "p256"],
        typer.Option("--type", help="p256 also signs exports for tools of third parties; OUT.pub is its public key."),
    ] = "ed25519",
    as_json: Json = False,
) -> None:
    """Make a key to sign documents and manifests with; prints the public key, for a file of trusted keys."""
    from persona_rlhf.release.signing import make_key

    public = make_key(out, kind)
    print_json({"path": str(out), "public_key": public}) if as_json else typer.echo(public)
    note(f"{out} holds the private key: keep it secret. The line on stdout goes into keys.yaml, under its role.")


@policy_commands.command("sign")
@with_exit_codes
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
    note(f"Signature: {signature}")


CardFormat = Annotated[Literal["policy-card"], typer.Argument(metavar="FORMAT", help="policy-card (JSON).")]


@policy_commands.command("export")
@with_exit_codes
def policy_export(
    card_format: CardFormat,
    document: Annotated[Path, typer.Argument(metavar="DOC", help="A policy document of tier one or two.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new file for the card.")],
    details: Annotated[
        Path, typer.Option("--details", metavar="FILE", help="The deployment: a card (YAML or JSON) without our rules.")
    ],
    as_json: Json = False,
) -> None:
    """Write a policy document as a Policy Card (arXiv 2510.24383), with the deployment from --details."""
    import json

    from persona_rlhf.common.files import find
    from persona_rlhf.config.convert import write_new
    from persona_rlhf.config.loader import read_yaml
    from persona_rlhf.policy.card_export import export_card, unplaced_keys
    from persona_rlhf.policy.documents import read_document

    source, problems = read_document(document)
    if source is None or problems:
        raise InputError(problems)
    write_new(json.dumps(export_card(source, read_yaml(find(details))), indent=2) + "\n", out)
    unplaced = unplaced_keys(source)
    if as_json:
        print_json({"path": str(out), "unplaced": unplaced})
    named = [f"{rule}: {', '.join(keys)}" for rule, keys in unplaced.get("rules", {}).items()]
    for line in named + [f"{name}: {', '.join(keys)}" for name, keys in unplaced.items() if name != "rules"]:
        note(visible(f"Without a field in a card, so in references.notes: {line}"))
    note(f"Policy Card: {out}")


@policy_commands.command("import")
@with_exit_codes
def policy_import(
    card_format: CardFormat,
    card: Annotated[Path, typer.Argument(metavar="SRC", help="A card that `policy export` wrote; it may be edited.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new file for the policy document.")],
    details: Annotated[
        Path | None, typer.Option("--details", metavar="FILE", help="A new file for the rest of the card.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a Policy Card as a policy document; whatever no document expresses is an error, or listed."""
    from persona_rlhf.config.convert import write_all_new
    from persona_rlhf.config.loader import dump_yaml, read_yaml
    from persona_rlhf.policy.card_import import import_card

    if details is not None and details.resolve() == out.resolve():
        raise typer.BadParameter("--details needs a file of its own")
    read = import_card(read_yaml(card))
    write_all_new({out: dump_yaml(read.document), **({details: dump_yaml(read.details)} if details else {})})
    if as_json:
        print_json({"path": str(out), "rest": read.details})
    if details is None:
        note(f"Left out, as no policy document has it: {', '.join(read.details)}. Keep it with --details FILE.")
    note(f"Policy document: {out}")


@policy_commands.command("packet")
@with_exit_codes
def policy_packet(
    run: RunArgument,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="EARLIER", help="The run that was signed off before.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Default: RUN-packet.html beside it.")
    ] = None,
    approver: Annotated[str | None, typer.Option("--approver", help="Name and role of the approver.")] = None,
    as_json: Json = False,
    wait: Wait = WAIT_SECONDS,
) -> None:
    """Write the sign-off packet of a finished run: one page with rules, bounds, exceptions, counts and what changed."""
    from persona_rlhf.release.approval_packet import write_packet

    page = out or run.resolve().with_name(f"{run.resolve().name}-packet.html")
    with open_run(run, "policy packet", wait, shared=True):
        digest = write_packet(run, page, against, approver)
    print_json({"path": str(page), "sha256": digest}) if as_json else typer.echo(digest)
    note(f"Packet: {page}")


@bank_commands.command("show")
@with_exit_codes
def policy_bank_show(config: ConfigFile, as_json: Json = False) -> None:
    """Print the bank of a config in numbers: public or private, certify probes, used before, fresh ones left."""
    from persona_rlhf.config.experiment import read_config
    from persona_rlhf.pipeline.rotate_bank import bank_status

    settings = read_config(config)
    status = bank_status(settings.policy, settings.gate.ledger, settings.gate.sequential)
    print_json(status.to_json()) if as_json else print_table(status.table())


@bank_commands.command("rotate")
@with_exit_codes
def policy_bank_rotate(
    config: ConfigFile,
    per_category: Annotated[
        int, typer.Option("--per-category", min=1, metavar="N", help="Probes of each category to draw at least.")
    ] = 180,
    as_json: Json = False,
) -> None:
    """Draw new certify probes from the private banks, fresh ones first; without such banks, a new split key."""
    from persona_rlhf.config.experiment import read_config
    from persona_rlhf.pipeline.rotate_bank import NO_RESET, rotate_bank

    rotation = rotate_bank(read_config(config).policy, per_category)
    print_json(rotation.to_json()) if as_json else print_table(rotation.status.table())
    note(f"{rotation.file} records it. {NO_RESET}")
