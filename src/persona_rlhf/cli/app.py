"""Typer app; init, report, version; base and config groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from persona_rlhf.cli.console import (
    ConfigFile,
    Json,
    Overrides,
    RunFolder,
    exit_held_back,
    finish,
    open_run,
    print_guarantee,
    print_json,
    print_table,
    progress_display,
    say,
    verb_group,
    with_exit_codes,
)
from persona_rlhf.cli.data import data_verbs
from persona_rlhf.cli.export import export
from persona_rlhf.cli.policy import policy_verbs
from persona_rlhf.cli.runs import add_life_verbs, audit, recertify, verify
from persona_rlhf.cli.serve import app_verbs
from persona_rlhf.common.version import __version__

# ----------------------------------------------------------------------------------------------------
# The verbs of the command line about the shared base model.
# ----------------------------------------------------------------------------------------------------

base_verbs = verb_group("The shared base model.")

Out = Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty folder.")]


@base_verbs.command("build")
@with_exit_codes
def base_build(
    out: Out, seed: Annotated[int | None, typer.Option(help="Seed of corpus, initial weights and order.")] = None
) -> None:
    """Rebuild the bundled tiny base from its own corpus (an hour or so on two cores)."""
    from persona_rlhf.simulation.tiny_base import SEED, PretrainProgress, build_base

    def progress(now: PretrainProgress) -> None:
        say(f"step {now.step}: {now.tokens:,} of {now.of_tokens:,} completion tokens, loss {now.loss:.3f}")

    build_base(out, SEED if seed is None else seed, progress=progress)
    say(f"Base: {out}")


@base_verbs.command("align")
@with_exit_codes
def base_align(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A transformers folder or a hub id.")],
    out: Out,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Settings, as in YAML (docs/how-to/align.md).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make any causal LM the safety-aligned base: SFT and DPO by TRL, measured before and after."""
    from persona_rlhf.pipeline.inputs import read_alignment

    asked = read_alignment(model, out, overrides or [])  # what is wrong so far is said before torch is loaded
    from persona_rlhf.pipeline import align_base as alignment

    found = alignment.base_align(asked, say)
    print_json(found.to_json()) if as_json else print_table(alignment.render(found))
    say(f"Base: {out}")


# ----------------------------------------------------------------------------------------------------
# The verbs of the command line about configs themselves.
# ----------------------------------------------------------------------------------------------------

config_verbs = verb_group("Configs of experiments.")


@config_verbs.callback()
def config_group() -> None:
    """Keeps the group a group while it has one verb."""


@config_verbs.command("import")
@with_exit_codes
def config_import(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A DPO config of TRL or Axolotl (YAML).")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A new file; else it is printed.")] = None,
) -> None:
    """Read a DPO config of TRL or Axolotl into ours, naming each key that has no counterpart."""
    from persona_rlhf.config.convert import import_config, write_new

    found = import_config(source)
    if out is None:
        typer.echo(found.text, nl=False)
        return
    write_new(found.text, out)
    for line in found.left_out:
        say(line)
    say(f"Config: {out} (keys of {source} without a counterpart: {len(found.left_out)})")


# ----------------------------------------------------------------------------------------------------
# Verbs of later releases: they stand in the help, say so and end with exit code 2.
# ----------------------------------------------------------------------------------------------------


def announce(group: typer.Typer, verb: str, does: str) -> None:
    """Puts a verb into a group; its last word is its name there."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}

    @group.command(verb.split()[-1], help=f"(later) {does}.", context_settings=settings, add_help_option=False)
    @with_exit_codes
    def later() -> None:
        say(f"`persona-rlhf {verb}` comes with a later release.")
        raise typer.Exit(2)


# ----------------------------------------------------------------------------------------------------
# The command line: a verb is a function of a few lines over the library; what is heavy is imported when it runs.
# ----------------------------------------------------------------------------------------------------

app = verb_group("Personalised RLHF within bounds: one DPO adapter per user, tier-one refusals kept.")
app.add_typer(app_verbs)
app.add_typer(data_verbs, name="data")
app.add_typer(policy_verbs, name="policy")
app.add_typer(base_verbs, name="base")
app.add_typer(config_verbs, name="config")


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False) -> None:
    if version:
        typer.echo(f"persona-rlhf {__version__}")
        raise typer.Exit


@app.command()
@with_exit_codes
def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")]) -> None:
    """Scaffold a runnable experiment: config, three policy documents, sample users."""
    from persona_rlhf.config.experiment import scaffold

    scaffold(folder)
    say(f"{folder} holds an experiment; its README.md says how to go on. To run it:")
    say(f"  cd {folder} && persona-rlhf train experiment.yaml")


@app.command()
@with_exit_codes
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    shape: Annotated[bool, typer.Option("--shape", help="By the base's shape alone: no weights are loaded.")] = False,
    memory: Annotated[float | None, typer.Option(help="With --shape: GiB of the device, for the slots.")] = None,
    tflops: Annotated[float | None, typer.Option(help="With --shape: teraflops a second, for the time.")] = None,
    as_json: Json = False,
) -> None:
    """Say users, pairs, steps, slots, memory and time before anything is trained; nothing is written."""
    if not shape and not (memory is tflops is None):
        raise typer.BadParameter("--memory and --tflops go with --shape")
    from persona_rlhf.config.experiment import read_config
    from persona_rlhf.pipeline.inputs import read_inputs

    settings = read_config(config, overrides or [])
    materials = read_inputs(settings)  # what is wrong so far is said before torch is loaded
    if shape:
        from persona_rlhf.pipeline import plan_offline

        sizes = plan_offline.plan_offline(settings, materials, memory, tflops)
        print_json(sizes.to_json()) if as_json else print_table(plan_offline.render(sizes))
        return
    from persona_rlhf.pipeline import plan as planning

    found = planning.plan(settings, materials)
    print_json(found.to_json()) if as_json else print_table(planning.render(found))


@app.command()
@with_exit_codes
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the run; else run.dir, else runs/NAME.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    shard: Annotated[str | None, typer.Option(metavar="i/n", help="Train the i-th of n parts of the users.")] = None,
    as_json: Json = False,
) -> None:
    """Run the whole line: screen, train one adapter per user, gate, release."""
    from persona_rlhf.cli.train import start

    folder, results = start(config, overrides or [], run, resume, shard, as_json)
    if results is None:
        return
    finish(results, as_json)
    print_guarantee(folder)
    say(f"Report:   {folder / 'report.html'}\nAdapters: {folder / 'adapters'}")
    exit_held_back(results)


@app.command()
@with_exit_codes
def sweep(
    path: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep (YAML): config, seeds, grid, arms.")],
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the sweep; else sweeps/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a sweep that was interrupted.")] = False,
    as_json: Json = False,
) -> None:
    """Train an experiment under many settings and seeds, and compare them in one table."""
    from persona_rlhf.pipeline import sweep as sweeping
    from persona_rlhf.release.comparison import comparison_table, to_json

    with progress_display() as display:
        found = sweeping.sweep(path, overrides or [], run, resume, display)
    print_json(to_json(found)) if as_json else print_table(comparison_table(found))


@app.command()
@with_exit_codes
def evaluate(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Folder of a run.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Settings of the red team, or for the base.")
    ] = None,
    redteam: Annotated[
        bool, typer.Option("--redteam", help="Attack every released adapter instead; writes RUN/redteam.json.")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Measure a base alone, without a run.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a run again, from its released adapters; or attack them; or measure a base before any run."""
    words = overrides or []
    if model is not None:
        from persona_rlhf.pipeline import evaluate_base

        if redteam:
            raise typer.BadParameter("--base and --redteam do not go together")
        card = evaluate_base.base_card(model, [*([] if run is None else [str(run)]), *words])
        print_json(card.to_json()) if as_json else print_table(evaluate_base.render(card))
    elif run is None:
        raise typer.BadParameter("name a run, or a base with --base")
    elif redteam:
        from persona_rlhf.pipeline import reevaluate
        from persona_rlhf.release.redteam_report import redteam_table

        open_run(run)
        with progress_display() as display:
            found, file = reevaluate.red_team(run, words, display)
        print_json(json.loads(file.read_bytes())) if as_json else print_table(redteam_table(found))
        say(f"Red team: {file}")
    elif words:
        raise typer.BadParameter("settings go with --redteam or --base")
    else:
        from persona_rlhf.pipeline import reevaluate

        open_run(run)
        with progress_display() as display:
            results = reevaluate.evaluate(run, display)
        finish(results, as_json)
        exit_held_back(results)


@app.command()
@with_exit_codes
def report(run: RunFolder) -> None:
    """Write RUN/report.html, a page that needs no network."""
    from persona_rlhf.release.report import write_report

    open_run(run)
    page = write_report(run)
    print_guarantee(run)
    say(f"Report: {page}")


@app.command()
@with_exit_codes
def bench(
    shape: Annotated[str, typer.Option(help="bundled, 192x4, 256x6 or 512x8.")] = "192x4", as_json: Json = False
) -> None:
    """Time the fleet against TRL's DPOTrainer per user: same base, same pairs, one run."""
    from persona_rlhf.benchmarks.fleet_vs_trl import bench as measure
    from persona_rlhf.benchmarks.fleet_vs_trl import render

    result = measure(shape, say=say)
    print_json(result) if as_json else print_table(render(result))


for verb in (export, verify, audit, recertify):
    app.command()(with_exit_codes(verb))

add_life_verbs(app)
announce(app, "collect", "Serve a page that collects feedback")


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="persona-rlhf")
