"""Adapters leave a run by the command line, in processes of their own, and load elsewhere: what a person sees."""

import subprocess
import sys

import pytest

from persona_rlhf.inputs.bundled import find
from persona_rlhf.preferences.identity import pseudonym
from tests.release.hub_server import ADAS_TOKEN, HubServer

from .experiment import command, environment, results

# Loads a run's adapter from the folder, the hub and the merged model; says how far their logits lie from the first.
_ELSEWHERE = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, folder, repo, place, merged = sys.argv[1:]
ids = torch.arange(5, 45).view(2, 20)
def logits(model):
    with torch.no_grad():
        return model.eval()(ids).logits
def loaded(folder):  # in the type that the run computed in, not the one that the base is stored in
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
def adapted(*where, **more):
    return logits(PeftModel.from_pretrained(loaded(base), *where, **more))
here, alone = adapted(folder), logits(loaded(base))
there, model = adapted(repo, subfolder=place), logits(loaded(merged))
print((here - there).abs().max().item(), (here - model).abs().max().item(), (here - alone).abs().max().item())
"""


@pytest.mark.slow
def test_adapters_go_to_the_hub_and_load_from_there_in_another_process(copied, tmp_path):
    hub = HubServer()
    elsewhere = {"HF_ENDPOINT": hub.url, "HF_TOKEN": ADAS_TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    env = environment() | elsewhere | {"HF_HOME": str(tmp_path / "home")}

    def run(*words):
        return subprocess.run(words, cwd=copied, env=env, capture_output=True, text=True, timeout=300, check=False)

    released = [result for result in results(copied / "run") if result["status"] == "released"]
    all_judged = [result for result in results(copied / "run") if result["status"] in ("released", "held_back")]
    sent = run(*command("export", "run", "--all", "--hub", "ada/fleet"))
    assert sent.returncode == (0 if len(released) == len(all_judged) else 3), sent.stderr
    user, path = released[0]["user_id"], released[0]["path"]
    merged = run(*command("export", "run", "--user", user, "--merge", "--to", tmp_path / "model"))
    assert merged.returncode == 0, merged.stderr
    base = next(line.split()[-1] for line in (copied / "run/config.yaml").read_text().splitlines() if "model:" in line)
    words = (str(find(base).resolve()), f"run/{path}", "ada/fleet", f"users/{pseudonym(user)}", str(tmp_path / "model"))
    found = run(sys.executable, "-c", _ELSEWHERE, *words)
    hub.close()
    assert found.returncode == 0, found.stderr
    there, model, alone = map(float, found.stdout.split())
    assert there == 0
    assert model <= 1e-4  # sums in another order, on logits of a size of ten
    assert alone > 1e-2
    told = "".join(done.stdout + done.stderr for done in (sent, merged, found))
    told += "".join(file.read_bytes().decode("latin-1") for file in (copied / "run").rglob("*") if file.is_file())
    assert ADAS_TOKEN not in told
