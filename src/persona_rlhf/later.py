"""Verbs of later releases: they stand in the help, say so and end with exit code 2."""

from __future__ import annotations

import typer

from persona_rlhf.boundary import bounded, say


def announce(group: typer.Typer, verb: str, does: str) -> None:
    """Puts a verb into a group; its last word is its name there."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}

    @group.command(verb.split()[-1], help=f"(later) {does}.", context_settings=settings, add_help_option=False)
    @bounded
    def later() -> None:
        say(f"`persona-rlhf {verb}` comes with a later release.")
        raise typer.Exit(2)
