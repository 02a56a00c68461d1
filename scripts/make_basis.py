#!/usr/bin/env python3
"""Makes prompts for the base, and a reward basis of users with drawn tastes, as in data/basis; none is of data/users.

    python scripts/make_basis.py --out /tmp/basis    # 1,400 users, about 67 pairs each; some ten minutes on one core

The prompts are ordinary ones of the bundled world; none is a prompt of data/users or a probe. The users' pairs are made
by `generate_users.py` in a temporary folder, those of prompts of data/users are left out, and `persona-rlhf basis fit`
fits the basis. The same seed and sizes give the same files on the same machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from generate_users import draw_prompts

from persona_rlhf.common.files import atomic_write, find


def used_prompts() -> set[str]:
    """The prompts of data/users."""
    lines = (line for file in find("data/users").glob("*.jsonl") for line in file.open(encoding="utf-8"))
    return {json.loads(line)["prompt"] for line in lines}


def fresh_prompts(count: int, seed: int) -> list[str]:
    """Ordinary prompts that are not in data/users."""
    used = used_prompts()
    fresh = [prompt for prompt, _ in draw_prompts(2 * count, seed) if prompt not in used]
    return Random(seed).sample(fresh, count)


def leave_out(prompts: set[str], folder: Path) -> None:
    """Drops the pairs of these prompts from the files of a folder."""
    for file in folder.glob("*.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        atomic_write(file, "".join(line for line in lines if json.loads(line)["prompt"] not in prompts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--users", type=int, default=1400)
    parser.add_argument("--pool", type=int, default=3000, help="prompts that the users' pairs are drawn from, at most")
    parser.add_argument("--prompts", type=int, default=1000, help="prompts for the base")
    parser.add_argument("--seed", type=int, default=41)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in fresh_prompts(options.prompts, options.seed + 1))
    atomic_write(options.out / "prompts.jsonl", "".join(lines))
    basis = options.out / "quickstart.safetensors"
    with TemporaryDirectory() as folder:
        sizes = {"users": options.users, "pairs": 100, "heldout": 0, "prompts": options.pool, "seed": options.seed}
        words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        users = Path(__file__).with_name("generate_users.py")
        subprocess.run([sys.executable, str(users), "--out", folder, *words], check=True)
        leave_out(used_prompts(), Path(folder))
        prompts = ["--prompts", str(options.out / "prompts.jsonl")]
        subprocess.run([sys.executable, "-m", "persona_rlhf", "basis", "fit", folder, str(basis), *prompts], check=True)


if __name__ == "__main__":
    main()
