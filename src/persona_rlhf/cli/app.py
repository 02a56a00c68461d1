"""The command-line app: every verb, the groups `base` and `config`, and the main entry point."""

from __future__ import annotations

import atexit
import gc
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from persona_rlhf.cli.base import base_commands
from persona_rlhf.cli.basis import basis_commands
from persona_rlhf.cli.collect import collect
from persona_rlhf.cli.console import (
    ConfigFile,
    Json,
    Overrides,
    RunArgument,
    Wait,
    command_group,
    exit_if_withheld,
    note,
    open_run,
    print_guarantee,
    print_json,
    print_results,
    print_table,
    progress_display,
    with_exit_codes,
)
from persona_rlhf.cli.data import data_commands
from persona_rlhf.cli.export import export
from persona_rlhf.cli.policy import policy_commands
from persona_rlhf.cli.runs import add, audit, forget, rebase, recertify, verify
from persona_rlhf.cli.serve import serving_commands
from persona_rlhf.common.run_lock import WAIT_SECONDS
from persona_rlhf.common.version import __version__

config_commands = command_group("Configs of experiments.")


@config_commands.callback()
def config_group() -> None:
    """Makes typer keep the group although it has one verb."""


@config_commands.command("import")
@with_exit_codes
def config_import(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A DPO config of TRL, Axolotl or LLaMA-Factory.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A new file (default: stdout).")] = None,
) -> None:
    """Read a DPO config of TRL, Axolotl or LLaMA-Factory into ours, naming each key that has no counterpart."""
    from persona_rlhf.config.convert import import_config, write_new

    converted = import_config(source)
    if out is None:
        typer.echo(converted.text, nl=False)
        return
    write_new(converted.text, out)
    for line in converted.left_out:
        note(line)
    note(f"Config: {out} (keys of {source} without a counterpart: {len(converted.left_out)})")


app = command_group("Personalised RLHF within bounds: one DPO adapter per user, tier-one refusals kept.")
app.add_typer(serving_commands)
app.add_typer(data_commands, name="data")
app.add_typer(policy_commands, name="policy")
app.add_typer(base_commands, name="base")
app.add_typer(basis_commands, name="basis")
app.add_typer(config_commands, name="config")


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
    note(f"{folder} holds an experiment; its README.md gives the next steps. To run it:")
    note(f"  cd {folder} && persona-rlhf train experiment.yaml")


@app.command()
@with_exit_codes
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    shape: Annotated[bool, typer.Option("--shape", help="From the base's shape alone: no weights are loaded.")] = False,
    memory: Annotated[float | None, typer.Option(help="With --shape: GiB of the device, for the slots.")] = None,
    tflops: Annotated[float | None, typer.Option(help="With --shape: teraflops a second, for the time.")] = None,
    as_json: Json = False,
) -> None:
    """Print users, pairs, steps, slots, memory and time before anything is trained; nothing is written."""
    if not shape and not (memory is tflops is None):
        raise typer.BadParameter("--memory and --tflops go with --shape")
    from persona_rlhf.config.experiment import read_config
    from persona_rlhf.pipeline.inputs import read_inputs

    settings = read_config(config, overrides or [])
    inputs = read_inputs(settings)  # reports wrong input before torch is imported
    if shape:
        from persona_rlhf.pipeline import plan_offline

        sizes = plan_offline.plan_offline(settings, inputs, memory, tflops)
        print_json(sizes.to_json()) if as_json else print_table(plan_offline.render(sizes))
        return
    from persona_rlhf.pipeline import plan as planning

    with progress_display() as display:
        estimate = planning.plan(settings, inputs, display)
    print_json(estimate.to_json()) if as_json else print_table(planning.render(estimate))


@app.command()
@with_exit_codes
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the run (default: run.dir, or runs/NAME).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    shard: Annotated[str | None, typer.Option(metavar="i/n", help="Train the i-th of n parts of the users.")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Train in shards on a Ray cluster; `local` is this machine.")
    ] = None,
    as_json: Json = False,
    wait: Wait = WAIT_SECONDS,
) -> None:
    """Run the whole pipeline: screen, train one adapter per user, gate, release."""
    from persona_rlhf.cli.train import start

    if ray is not None and shard is not None:
        raise typer.BadParameter("--ray cuts the shards itself; leave --shard out")
    folder, results = start(config, overrides or [], run, resume, shard, as_json, wait, ray)
    if results is None:
        return
    print_results(results, as_json)
    print_guarantee(folder)
    note(f"Report:   {folder / 'report.html'}\nAdapters: {folder / 'adapters'}")
    exit_if_withheld(results)


@app.command()
@with_exit_codes
def sweep(
    path: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep (YAML): config, seeds, grid, arms.")],
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the sweep (default: sweeps/NAME).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted sweep.")] = False,
    as_json: Json = False,
    wait: Wait = WAIT_SECONDS,
) -> None:
    """Train an experiment under many settings and seeds, and compare them in one table."""
    from persona_rlhf.pipeline import sweep as sweeping
    from persona_rlhf.release.comparison import comparison_table, to_json

    with progress_display() as display:
        comparison = sweeping.sweep(path, overrides or [], run, resume, display, wait=wait, tell=note)
    print_json(to_json(comparison)) if as_json else print_table(comparison_table(comparison))


@app.command()
@with_exit_codes
def evaluate(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Folder of a run.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[a.b=c ...]", help="Settings of the red team, or for the base."),
    ] = None,
    redteam: Annotated[
        bool, typer.Option("--redteam", help="Attack every released adapter instead; writes RUN/redteam.json.")
    ] = False,
    curve: Annotated[
        bool,
        typer.Option(
            "--data-curve",
            help="Fit each user's labels on growing parts of them instead: pairs needed; writes RUN/data_curve.json.",
        ),
    ] = False,
    model: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Measure a base alone, without a run.")
    ] = None,
    as_json: Json = False,
    wait: Wait = WAIT_SECONDS,
) -> None:
    """Measure a run again, from its released adapters; or attack them; or measure a base before any run."""
    arguments = overrides or []
    if model is not None:
        from persona_rlhf.pipeline import evaluate_base

        if redteam or curve:
            raise typer.BadParameter("--base goes with neither --redteam nor --data-curve")
        with progress_display() as display:
            card = evaluate_base.base_card(model, [*([] if run is None else [str(run)]), *arguments], display)
        print_json(card.to_json()) if as_json else print_table(evaluate_base.render(card))
    elif run is None:
        raise typer.BadParameter("name a run, or a base with --base")
    elif redteam and curve:
        raise typer.BadParameter("--redteam and --data-curve do not go together")
    elif redteam:
        from persona_rlhf.pipeline import reevaluate
        from persona_rlhf.release.redteam_report import redteam_table

        with open_run(run, "evaluate --redteam", wait), progress_display() as display:
            report, file = reevaluate.red_team(run, arguments, display)
        print_json(json.loads(file.read_bytes())) if as_json else print_table(redteam_table(report))
        note(f"Red team: {file}")
    elif arguments:
        raise typer.BadParameter("settings go with --redteam or --base")
    elif curve:
        from persona_rlhf.pipeline.data_curve import data_curve
        from persona_rlhf.release.data_curve_file import data_curve_table

        with open_run(run, "evaluate --data-curve", wait), progress_display() as display:
            curves, file = data_curve(run, display)
        print_json(curves.to_json()) if as_json else print_table(data_curve_table(curves))
        note(f"Curves: {file}")
    else:
        from persona_rlhf.pipeline import reevaluate

        with open_run(run, "evaluate", wait, shared=True), progress_display() as display:
            results = reevaluate.evaluate(run, display)
        print_results(results, as_json)
        exit_if_withheld(results)


@app.command()
@with_exit_codes
def report(
    run: RunArgument,
    other: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A second run: compare both on one page.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="With two runs, the page (default: comparison.html).")
    ] = None,
    impact: Annotated[
        bool, typer.Option("--impact", help="Measure benefits and risks too; writes RUN/impact.json and impact.html.")
    ] = False,
    groups: Annotated[
        Path | None,
        typer.Option("--groups", metavar="FILE", help="Groups for --impact: a JSON object, user_id to group."),
    ] = None,
    ask: Annotated[
        bool, typer.Option("--ask", help="With --impact, ask each adapter about stated views too; loads the base.")
    ] = False,
    wait: Wait = WAIT_SECONDS,
) -> None:
    """Write RUN/report.html, a page that needs no network; of two runs, a page with their differences."""
    from persona_rlhf.release.report import write_report

    if other is None and out is not None:
        raise typer.BadParameter("--out goes with two runs")
    if other is not None:
        if impact or ask or groups is not None:
            raise typer.BadParameter("--impact, --groups and --ask go with one run")
        _compare_runs(run, other, out or Path("comparison.html"), wait)
        return
    if not impact and (ask or groups is not None):
        raise typer.BadParameter("--groups and --ask go with --impact")
    with open_run(run, "report", wait):
        if impact:
            from persona_rlhf.pipeline.impact import impact as measure

            with progress_display() as display:
                page = measure(run, groups, ask, display)
            note(f"Impact: {page}")
        page = write_report(run)
    print_guarantee(run)
    note(f"Report: {page}")


def _compare_runs(run: Path, other: Path, page: Path, wait: float) -> None:
    """Writes the page of two runs. It lies in neither, so that both seals hold."""
    from persona_rlhf.release.run_comparison import compare_runs

    if any(folder.resolve() in page.resolve().parents for folder in (run, other)):
        raise typer.BadParameter(f"the page {page} would lie in a run; name a place outside both with --out")
    with open_run(run, "report", wait, shared=True), open_run(other, "report", wait, shared=True):
        compare_runs(run, other, page)
    note(f"Comparison: {page}")


@app.command()
@with_exit_codes
def bench(
    shape: Annotated[str, typer.Option(help="bundled, 192x4, 256x6 or 512x8.")] = "192x4", as_json: Json = False
) -> None:
    """Time the fleet against TRL's DPOTrainer per user: same base, same pairs, one run."""
    from persona_rlhf.benchmarks.fleet_vs_trl import bench as measure
    from persona_rlhf.benchmarks.fleet_vs_trl import render

    result = measure(shape, log=note)
    print_json(result) if as_json else print_table(render(result))


for verb in (export, verify, audit, recertify, add, forget, rebase, collect):
    app.command()(with_exit_codes(verb))


def main() -> None:
    """The entry point of the console script. Arguments that are no UTF-8 text are wrong input (exit code 2)."""
    for number, argument in enumerate(sys.argv[1:], 1):
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            note(f"Argument {number} is not UTF-8 text: {argument!a}; write it in UTF-8, or rename the file.")
            sys.exit(2)
    # Imports of torch and transformers take a fifth less time, and the end of the process a second less.
    gc.set_threshold(50_000, 20, 20)
    atexit.register(gc.freeze)
    app(prog_name="persona-rlhf")
