"""Shows that the line holds on long real text: CRAGC-25 imported and checked, some of its users trained.

python scripts/measure_cragc25.py                        # ../shared/data/cragc25, 20 users
python scripts/measure_cragc25.py annotations.jsonl.gz --users 4 fleet.slots=2

The base is a Llama of random weights with a context of 2,048 tokens: it shows seconds and memory, not quality, and it
refuses nothing, so constraint and gate are off. The bundled tokenizer knows a small world: real text falls into many
tokens, as long documents would. Arguments after the options are overrides of the config, as for `train`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from persona_rlhf.common.files import shipped_root
from persona_rlhf.data.pairs import PreferencePair, read_pairs
from persona_rlhf.data.tokenize import tokenize

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 2048
CONFIG = """\
name: cragc25
base: {model: base}
policy: {documents: [configs/policy/tier_one.yaml]}
users: {path: users.jsonl}
dpo: {epochs: 1}
constraint: {enabled: false}
gate: {enabled: false, max_new_tokens: 8}  # the probes are answered and counted all the same
evaluation: {win_rate_prompts: 0, harmless_prompts: 0, test_probes: 0}
"""


class Spent(NamedTuple):
    """What a child process took: wall seconds, CPU seconds, and its peak resident memory in MiB."""

    seconds: float
    cpu: float
    peak: float


def persona_rlhf(*words: object, cwd: Path) -> tuple[Any, Spent]:
    """The printed result of a verb with --json in its own process, and its cost. Ends the script if it fails."""
    with tempfile.TemporaryFile("w+") as out:
        started = time.perf_counter()
        command = [sys.executable, "-m", "persona_rlhf", *map(str, words), "--json"]
        child = subprocess.Popen(command, cwd=cwd, stdout=out)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        spent = Spent(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, _mebibytes(usage.ru_maxrss))
        if child.returncode:
            sys.exit(f"persona-rlhf {words[0]} ended with {child.returncode}")
        out.seek(0)
        return json.load(out), spent


def _mebibytes(maxrss: int) -> float:
    return maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux kibibytes


def make_base(folder: Path) -> None:
    """A Llama of random weights with the bundled tokenizer and chat template, for rows of up to CONTEXT tokens."""
    tokenizer = AutoTokenizer.from_pretrained(shipped_root() / "data/base", model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def spread_over(users: Sequence[str], count: int) -> list[str]:
    """That many users, evenly over the file: neither its most diligent nor its first."""
    return [users[n * len(users) // count] for n in range(min(count, len(users)))]


def row_lengths(pairs: Path, base: Path) -> list[int]:
    """Tokens of both rows of every pair, prompt and answer."""
    rows = tokenize(read_pairs(pairs, 0.25), AutoTokenizer.from_pretrained(base), CONTEXT)
    both = [row for user in rows for pair in (*user.train, *user.heldout) for row in (pair.chosen, pair.rejected)]
    return [row.length for row in both]


def write_subset(source: Path, out: Path, users: Sequence[str]) -> None:
    """The rows of some users."""
    chosen = set(users)
    with source.open(encoding="utf-8") as lines, out.open("w", encoding="utf-8") as stream:
        stream.writelines(line for line in lines if json.loads(line)["user_id"] in chosen)


def measure(source: Path, count: int, overrides: Sequence[str], work: Path) -> dict[str, Any]:
    """Everything that is reported, as plain JSON values. Seconds are wall clock unless they are called CPU."""
    imported, import_spent = persona_rlhf("data", "import", "cragc25", source, work / "all.jsonl", cwd=work)
    checked, check_spent = persona_rlhf("data", "check", work / "all.jsonl", cwd=work)
    every: list[PreferencePair] = read_pairs(work / "all.jsonl", 0.25)
    users = spread_over(list(dict.fromkeys(pair.user_id for pair in every)), count)
    make_base(work / "base")
    write_subset(work / "all.jsonl", work / "users.jsonl", users)
    write_subset(work / "all.jsonl", work / "one_user.jsonl", users[:1])
    (work / "config.yaml").write_text(CONFIG, encoding="utf-8")
    lengths = row_lengths(work / "users.jsonl", work / "base")
    one = ("users.path=one_user.jsonl", *overrides)
    _, alone = persona_rlhf("train", "config.yaml", *one, "--run", "one", cwd=work)
    results, fleet = persona_rlhf("train", "config.yaml", *overrides, "--run", "fleet", cwd=work)
    screened = [json.loads(line) for line in (work / "fleet" / "screening.jsonl").read_text().splitlines()]
    stepped = [json.loads(line)["step"] for line in (work / "fleet" / "metrics.jsonl").read_text().splitlines()]
    return {
        "import": imported | {"seconds": import_spent.seconds},
        "check": checked | {"seconds": check_spent.seconds},
        "users": len(results),
        "status": Counter(result["status"] for result in results),
        "pairs": {name: sum(result["pairs"][name] for result in results) for name in ("train", "heldout")},
        "dropped": Counter(row["reason"].partition(":")[0] for row in screened),
        "row_tokens": {
            "median": statistics.median(lengths),
            "p95": statistics.quantiles(lengths, n=20)[-1],
            "max": max(lengths),
            "over_context": sum(length > CONTEXT for length in lengths),
        },
        "steps": sum(result["steps"] for result in results),
        "training_seconds_per_user": sum(result["seconds"] for result in results) / len(results),
        "seconds_per_user": fleet.seconds / len(results),
        "cpu_seconds_per_user": fleet.cpu / len(results),
        "peak_mebibytes": fleet.peak,
        "peak_mebibytes_one_user": alone.peak,
        "slots": next((n for n, step in enumerate(stepped) if step > 1), len(stepped)),
        "load": os.getloadavg()[0],
    }


def rendered(result: dict[str, Any]) -> Table:
    """The same for people."""
    table = Table("what", "figure", title="CRAGC-25 on a random-weight Llama (128 x 4)", title_justify="left")
    imported, checked, tokens = result["import"], result["check"], result["row_tokens"]
    table.add_row("imported", f"{imported['rows']:,} rows, {imported['pairs']:,} pairs, {imported['users']} users")
    table.add_row("checked", f"{checked['splits']}, to be dropped: {checked['screened_out'] or 'none'}")
    table.add_row("words of an answer", f"chosen {checked['words']['chosen']}, rejected {checked['words']['rejected']}")
    table.add_row(
        "trained", f"{result['users']} users, {dict(result['status'])}, {result['pairs']}, {result['steps']} steps"
    )
    table.add_row("dropped", str(dict(result["dropped"]) or "none"))
    table.add_row(
        "tokens of a row",
        f"median {tokens['median']:,.0f}, 95% up to {tokens['p95']:,.0f}, at most {tokens['max']:,}; "
        f"{tokens['over_context']} over {CONTEXT:,}",
    )
    table.add_row(
        "seconds per user",
        f"{result['training_seconds_per_user']:.1f} in training; the whole line {result['seconds_per_user']:.1f} "
        f"({result['cpu_seconds_per_user']:.1f} of CPU), at a load of {result['load']:.1f}",
    )
    peak, alone = result["peak_mebibytes"], result["peak_mebibytes_one_user"]
    more = (peak - alone) / max(1, result["slots"] - 1)
    table.add_row(
        "peak memory",
        f"{peak:,.0f} MiB for {result['slots']} slots, {alone:,.0f} MiB for one: {more:,.0f} MiB a further slot",
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default=ROOT.parent / "shared/data/cragc25", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_intermixed_args()
    if "=" in str(options.source) and not options.source.exists():  # the first override, where no file is named
        options.overrides.insert(0, str(options.source))
        options.source = ROOT.parent / "shared/data/cragc25"
    with tempfile.TemporaryDirectory(prefix="cragc25-") as work:
        result = measure(options.source.resolve(), options.users, options.overrides, Path(work))
    print(json.dumps(result, indent=2)) if options.json else Console(width=140).print(rendered(result))


if __name__ == "__main__":
    main()
