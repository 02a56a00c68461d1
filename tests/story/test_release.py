"""Adapters leave a run by the command line, led to a hub by the environment, and load from there by PEFT alone."""

import subprocess
import sys

import pytest

from persona_rlhf.common.files import find, pseudonym
from tests.release.hub_server import ADAS_TOKEN, HubServer
from tests.story.experiment import environment, results

# Exports by the command line; then loads one adapter from its folder, the hub and the merged model, and says how far
# their logits lie from the first's. One process, for most of a process is importing torch.
_ELSEWHERE = """
import sys
base, user, folder, place, merged = sys.argv[1:]
from persona_rlhf.cli.app import app
def export(*words):
    try:
        app(["export", "run", *words], prog_name="persona-rlhf")
    except SystemExit as end:
        return end.code or 0
codes = export("--all", "--hub", "ada/fleet"), export("--user", user, "--merge", "--to", merged)
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids = torch.arange(5, 45).view(2, 20)
def logits(model):
    with torch.no_grad():
        return model.eval()(ids).logits
def loaded(folder):  # in the type that the run computed in, not the one that the base is stored in
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
def adapted(*where, **more):
    return logits(PeftModel.from_pretrained(loaded(base), *where, **more))
here, alone = adapted(folder), logits(loaded(base))
there, model = adapted("ada/fleet", subfolder=place), logits(loaded(merged))
print(*codes, *((here - other).abs().max().item() for other in (there, model, alone)))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_adapters_go_to_the_hub_and_load_from_there_in_another_process(copied, tmp_path):
    judged = [result for result in results(copied / "run") if result["status"] in ("released", "held_back")]
    released = [result for result in judged if result["status"] == "released"]
    user, path = released[0]["user_id"], released[0]["path"]
    hub = HubServer()
    led = {"HF_ENDPOINT": hub.url, "HF_TOKEN": ADAS_TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    words = (find("data/base").resolve(), user, f"run/{path}", f"users/{pseudonym(user)}", tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, *map(str, words)],
        cwd=copied,
        env=environment() | led | {"HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    files = hub.files("ada/fleet")
    hub.close()
    assert done.returncode == 0, done.stderr
    to_hub, to_model, there, model, alone = map(float, done.stdout.splitlines()[-1].split())
    assert to_hub == (0 if len(released) == len(judged) else 3), done.stderr
    assert to_model == 0, done.stderr
    assert len(files) == 4 * len(released) + 1
    assert there == 0
    assert model <= 1e-4  # sums in another order, on logits of a size of ten
    assert alone > 1e-2
    told = done.stdout + done.stderr
    told += "".join(file.read_bytes().decode("latin-1") for file in (copied / "run").rglob("*") if file.is_file())
    assert ADAS_TOKEN not in told
