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

    for line in check_documents(paths):
        say(line)
