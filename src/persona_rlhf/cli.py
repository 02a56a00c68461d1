"""The command line: a verb is a function of a few lines over the library; what is heavy is imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from persona_rlhf import __version__
from persona_rlhf.app_verbs import app_verbs
from persona_rlhf.base_verbs import base_verbs
from persona_rlhf.boundary import ConfigFile, Json, Overrides, bounded, console, print_json, print_table, say, verbs
from persona_rlhf.config_verbs import config_verbs
from persona_rlhf.data_verbs import data_verbs
from persona_rlhf.ending import exit_held_back, finish, say_promise
from persona_rlhf.export_verbs import export
from persona_rlhf.later import announce
from persona_rlhf.life_verbs import add_life_verbs
from persona_rlhf.opening import open_run
from persona_rlhf.policy_verbs import policy_verbs
from persona_rlhf.release_verbs import audit, recertify, verify

app = verbs("Personalised RLHF within bounds: one DPO adapter per user, tier-one refusals kept.")
app.add_typer(app_verbs)
app.add_typer(data_verbs, name="data")
app.add_typer(policy_verbs, name="policy")
app.add_typer(base_verbs, name="base")
app.add_typer(config_verbs, name="config")

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False) -> None:
    if version:
        typer.echo(f"persona-rlhf {__version__}")
        raise typer.Exit


@app.command()
@bounded
def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")]) -> None:
    """Scaffold a runnable experiment: config, three policy documents, sample users."""
    from persona_rlhf.scaffold import scaffold

    scaffold(folder)
    say(f"{folder} holds an experiment; its README.md says how to go on. To run it:")
    say(f"  cd {folder} && persona-rlhf train experiment.yaml")


@app.command()
@bounded
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
    from persona_rlhf.config import read_config
    from persona_rlhf.materials import read_materials

    settings = read_config(config, overrides or [])
    materials = read_materials(settings)  # what is wrong so far is said before torch is loaded
    if shape:
        from persona_rlhf import sizing

        sizes = sizing.sizes(settings, materials, memory, tflops)
        print_json(sizes.to_json()) if as_json else print_table(sizing.render(sizes))
        return
    from persona_rlhf import plan as planning

    found = planning.plan(settings, materials)
    print_json(found.to_json()) if as_json else print_table(planning.render(found))


@app.command()
@bounded
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
    from persona_rlhf.starting import start

    folder, results = start(config, overrides or [], run, resume, shard, as_json)
    if results is None:
        return
    finish(results, as_json)
    say_promise(folder)
    say(f"Report:   {folder / 'report.html'}\nAdapters: {folder / 'adapters'}")
    exit_held_back(results)


@app.command()
@bounded
def sweep(
    path: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep (YAML): config, seeds, grid, arms.")],
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the sweep; else sweeps/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a sweep that was interrupted.")] = False,
    as_json: Json = False,
) -> None:
    """Train an experiment under many settings and seeds, and compare them in one table."""
    from persona_rlhf import sweep as sweeping
    from persona_rlhf.release.comparison import comparison_table, to_json

    found = sweeping.sweep(path, overrides or [], run, resume, console(people=True))
    print_json(to_json(found)) if as_json else print_table(comparison_table(found))


@app.command()
@bounded
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
        from persona_rlhf import base_card

        if redteam:
            raise typer.BadParameter("--base and --redteam do not go together")
        card = base_card.base_card(model, [*([] if run is None else [str(run)]), *words])
        print_json(card.to_json()) if as_json else print_table(base_card.render(card))
    elif run is None:
        raise typer.BadParameter("name a run, or a base with --base")
    elif redteam:
        from persona_rlhf import redteaming
        from persona_rlhf.release.redteam import redteam_table

        open_run(run)
        found, file = redteaming.red_team(run, words, say)
        print_json(json.loads(file.read_bytes())) if as_json else print_table(redteam_table(found))
        say(f"Red team: {file}")
    elif words:
        raise typer.BadParameter("settings go with --redteam or --base")
    else:
        from persona_rlhf import line

        open_run(run)
        results = line.evaluate(run)
        finish(results, as_json)
        exit_held_back(results)


@app.command()
@bounded
def report(run: RunFolder) -> None:
    """Write RUN/report.html, a page that needs no network."""
    from persona_rlhf.release.report import write_report

    open_run(run)
    page = write_report(run)
    say_promise(run)
    say(f"Report: {page}")


@app.command()
@bounded
def bench(
    shape: Annotated[str, typer.Option(help="bundled, 192x4, 256x6 or 512x8.")] = "192x4", as_json: Json = False
) -> None:
    """Time the fleet against TRL's DPOTrainer per user: same base, same pairs, one run."""
    from persona_rlhf.evaluation.benchmark import bench as measure
    from persona_rlhf.evaluation.benchmark import render

    result = measure(shape, say=say)
    print_json(result) if as_json else print_table(render(result))


for verb in (export, verify, audit, recertify):
    app.command()(bounded(verb))

add_life_verbs(app)
announce(app, "collect", "Serve a page that collects feedback")


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="persona-rlhf")
