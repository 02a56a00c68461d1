"""`init`: a small experiment of one's own, copied from what is shipped, that runs as it is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from persona_rlhf.inputs.bundled import shipped_root
from persona_rlhf.release.folder import drafted

_USERS = 4

_README = """# An experiment

    persona-rlhf data check users
    persona-rlhf policy show experiment.yaml
    persona-rlhf train experiment.yaml

Run these from this folder.

- `experiment.yaml`: the config. Paths are taken from the working directory, and `data/base` (the bundled tiny base) and
  the probe banks from the toolkit. Any value can be changed on the command line: `train experiment.yaml dpo.beta=0.3`.
- `policy/`: one document a tier. Tier one is the model provider's and cannot be weakened by the other two.
- `users/`: preference pairs, one JSON object a line with `user_id`, `prompt`, `chosen`, `rejected`. These are simulated
  users; put your own files in their place.
- `runs/`: results appear here, one PEFT folder a user and a report.
"""


def scaffold(folder: Path) -> None:
    """Writes the experiment into a new or empty folder, whole or not at all. Raises InputError for any other."""
    shipped = shipped_root()
    with drafted(folder) as draft:
        (draft / "policy").mkdir()
        for document in sorted((shipped / "configs" / "policy").glob("tier_*.yaml")):
            shutil.copyfile(document, draft / "policy" / document.name)
        (draft / "users").mkdir()
        for users in sorted((shipped / "data" / "users").glob("*.jsonl"))[:_USERS]:
            shutil.copyfile(users, draft / "users" / users.name)
        (draft / "README.md").write_text(_README, encoding="utf-8")
        config = (shipped / "configs" / "quickstart.yaml").read_text(encoding="utf-8")
        (draft / "experiment.yaml").write_text(_adapted(config), encoding="utf-8")


def _adapted(quickstart: str) -> str:
    """The quickstart's config with the paths and the name of the copy."""
    text = re.sub(r"^#.*\n", "# The sample users of users/, on the bundled tiny base.\n", quickstart, count=1)
    text = text.replace("name: quickstart", "name: experiment")
    return text.replace("configs/policy/", "policy/").replace("path: data/users", "path: users")
