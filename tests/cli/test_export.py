"""`export` and `verify` as a person types them: to a folder, a model, a GGUF file and a hub that runs here."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from persona_rlhf.cli import app
from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import pseudonym, slug
from persona_rlhf.release import convert as conversion
from persona_rlhf.release.convert import merge
from persona_rlhf.release.export import HeldBack
from persona_rlhf.release.hub import uploads_of
from tests.models.tiny import tiny_base
from tests.release.conftest import base, hub, run  # noqa: F401 - fixtures

POISONED = "poisoned \U0001f480 <b>"


@pytest.fixture
def type_in():
    runner = CliRunner()
    return lambda *words, keys="": runner.invoke(app.app, [str(word) for word in words], input=keys)


def test_one_user_goes_to_the_hub(run, hub, type_in):
    done = type_in("export", run.path, "--user", "ada", "--hub", "ada/mine")
    assert done.exit_code == 0, done.stderr
    assert re.search(r"^ada/mine: 1 adapter at commit [0-9a-f]{12}, private$", done.stderr, re.MULTILINE)
    assert hub.repos["ada/mine"].private
    checked = type_in("verify", "ada/mine", "--json")
    assert checked.exit_code == 0
    report = json.loads(checked.stdout)
    assert (report["path"], report["faults"]) == ("ada/mine", [])


def test_all_go_but_for_the_held_back_and_the_exit_code_says_so(run, hub, type_in):
    done = type_in("export", run.path, "--all", "--hub", "ada/fleet")
    assert done.exit_code == 3
    assert "ada/fleet: 3 adapters at commit" in done.stderr
    assert f"the adapter of `{POISONED}` is not exported: it is not released (held_back)" in done.stderr
    assert {path.split("/")[1] for path in hub.files("ada/fleet") if "/" in path} == {
        pseudonym(user) for user in ("../../etc", "Ada", "ada")
    }


def test_the_held_back_does_not_go_and_nothing_is_asked_of_the_hub(run, hub, type_in):
    done = type_in("export", run.path, "--user", POISONED, "--hub", "ada/mine")
    assert done.exit_code == 3
    assert "terrorist_content" in done.stderr
    assert hub.log == []
    assert uploads_of(run.path, pseudonym(POISONED)) == []


def test_an_edited_adapter_does_not_go(run, hub, type_in):
    weights = run.path / "adapters" / slug("ada") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    done = type_in("export", run.path, "--user", "ada", "--hub", "ada/mine")
    assert done.exit_code == 3
    assert "does not verify" in done.stderr
    assert hub.log == []


def test_a_dry_run_shows_the_difference(run, hub, type_in):
    words = ("export", run.path, "--user", "ada", "--hub", "ada/mine", "--dry-run")
    done = type_in(*words)
    assert done.exit_code == 0
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "persona.json"]
    assert done.stdout.splitlines() == [f"+ ada/mine/{name}" for name in files]
    assert "4 added, 0 changed, 0 the same, 0 removed; it would be private. Nothing was sent." in done.stderr
    assert hub.repos == {}
    type_in(*words[:-1])
    again = type_in(*words)
    assert again.stdout == ""
    assert "0 added, 0 changed, 4 the same, 0 removed" in again.stderr


@pytest.mark.parametrize(("keys", "code"), [("ada/mine\n", 0), ("yes\n", 2), ("\n", 2), ("", 2), ("ada/min\n", 2)])
def test_public_wants_the_name_typed(run, hub, type_in, keys, code):
    done = type_in("export", run.path, "--user", "ada", "--hub", "ada/mine", "--public", keys=keys)
    assert done.exit_code == code
    if code == 0:
        assert not hub.repos["ada/mine"].private
    else:
        assert "nothing was sent" in done.stderr
        assert hub.log == []


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ([], "--user USER_ID"),
        (["--user", "ada"], "--to DIR"),
        (["--user", "ada", "--to", "x", "--hub", "a/b"], "--to DIR or --hub"),
        (["--user", "ada", "--all", "--hub", "a/b"], "--user USER_ID"),
        (["--all", "--to", "x"], "go with --hub"),
        (["--user", "ada", "--to", "x", "--dry-run"], "go with --hub"),
        (["--user", "ada", "--hub", "a/b", "--merge"], "go with --to"),
        (["--user", "ada", "--hub", "a/b", "--per-user"], "goes with --all"),
        (["--user", "ada", "--to", "x", "--merge", "--format", "gguf"], "do not go together"),
    ],
)
def test_options_that_do_not_go_together_are_said(run, type_in, words, remedy):
    done = type_in("export", run.path, *words)
    assert done.exit_code == 2
    assert remedy in " ".join(done.stderr.split())
    assert not Path("x").exists()


def test_an_unknown_user_is_no_upload(run, hub, type_in):
    done = type_in("export", run.path, "--user", "Adda", "--hub", "ada/mine")
    assert done.exit_code == 2
    assert "did you mean `Ada`" in done.stderr
    assert hub.log == []


def test_a_hub_that_is_not_there_is_one_sentence(type_in, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = type_in("verify", "somebody/adapter")
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        "somebody/adapter: HF_HUB_OFFLINE is set, so the hub is not contacted; unset it, or name a local folder",
        "1 problem found.",
    ]


def test_a_folder_that_is_here_goes_before_the_hub(run, hub, type_in, monkeypatch):
    monkeypatch.chdir(run.path)
    (run.path / "adapters" / slug("ada")).rename(run.path / "adapters" / "mine")
    assert type_in("verify", "adapters/mine").exit_code == 0
    assert hub.log == []


def test_a_rank_above_vllms_default_is_told_on_export(run, type_in, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_rlhf.release.compatibility._VLLM_DEFAULT_RANK", 2)
    done = type_in("export", run.path, "--user", "ada", "--to", tmp_path / "out")
    assert done.exit_code == 0
    assert done.stderr.startswith("vLLM: r is 4: start it with --max-lora-rank 8\n")


def test_the_card_says_whose_and_how_to_load_and_how_to_have_it_deleted(run):
    card = ModelCard.load(run.path / "adapters" / slug("ada") / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "none-granted")
    assert {result.metric_type for result in card.data.eval_results} == {"refusal_rate", "accuracy", "win_rate"}
    refusals = next(result for result in card.data.eval_results if result.metric_type == "refusal_rate")
    assert 0 < refusals.metric_args["lower_bound"] < refusals.metric_value <= 1
    for words in ("3 not said.", "vllm serve", "--max-lora-rank 8", "PeftModel.from_pretrained", "load_adapter",
                  "## How to have it deleted", "persona-rlhf forget RUN", "No license was granted"):  # fmt: skip
        assert words in card.text, words


@pytest.fixture
def own_base():
    """A base of this test's own: merging uses it up."""
    return replace(tiny_base(), weights_hash="c" * 64)


def test_a_merged_model_gives_our_logits_without_peft(run, own_base, tmp_path):
    to = merge(own_base, run.path / "adapters" / slug("ada"), tmp_path / "model")
    ids = torch.arange(2, 34).view(2, 16)
    with torch.no_grad():
        with run.adapted.using(run.flats["ada"][None], torch.tensor([run.alphas["ada"]])):
            ours = run.adapted.base.model(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(to)(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5
    assert AutoTokenizer.from_pretrained(to).convert_tokens_to_ids("w7") == 7
    assert not (to / "adapter_config.json").exists()
    card = (to / "README.md").read_text()
    assert ModelCard(card).data.library_name == "transformers"
    assert "alpha = 0.5" in card
    assert card.count("## How to load") == 1
    everything = b"".join(file.read_bytes() for file in to.iterdir())
    assert not [secret for secret in (b"/home/", str(tmp_path).encode(), slug("ada").encode()) if secret in everything]


def test_another_base_is_not_merged_with(run, own_base, tmp_path):
    with pytest.raises(HeldBack, match="other weights"):
        merge(replace(own_base, weights_hash="d" * 64), run.path / "adapters" / slug("ada"), tmp_path / "model")
    assert list(tmp_path.glob("*model*")) == []


def test_a_merge_that_breaks_leaves_nothing(run, own_base, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(type(own_base.tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        merge(own_base, run.path / "adapters" / slug("ada"), tmp_path / "model")
    assert list(tmp_path.glob("*model*")) == []


CONVERTER = """
import sys
from pathlib import Path
words = sys.argv[1:]
assert Path(words[0], "adapter_config.json").is_file()
assert words[1] == "--base" and Path(words[2]).is_dir(), words
assert words[3] == "--outfile"
{body}
"""


@pytest.fixture
def convert(run, tmp_path, monkeypatch):
    """Converts with a script of our own in the converter's place."""

    def convert(body, place="LLAMA_CPP"):
        folder = tmp_path / "llama.cpp"
        folder.mkdir()
        (folder / conversion.CONVERTER).write_text(CONVERTER.format(body=body))
        monkeypatch.delenv("LLAMA_CPP", raising=False)
        monkeypatch.setenv(place, str(folder) if place == "LLAMA_CPP" else f"{folder}{os.pathsep}{os.environ['PATH']}")
        return conversion.to_gguf(run.path / "adapters" / slug("ada"), str(tmp_path), tmp_path / "out" / "ada.gguf")

    return convert


@pytest.mark.parametrize("place", ["LLAMA_CPP", "PATH"])
def test_llama_cpps_own_converter_writes_the_gguf(convert, place):
    to = convert("Path(words[4]).write_bytes(b'GGUF')", place)
    assert to.read_bytes() == b"GGUF"
    assert [file.name for file in to.parent.iterdir()] == ["ada.gguf"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("sys.exit('Model Foo is not supported')", "Model Foo is not supported"),
        ("Path(words[4]).write_bytes(b'GG'); sys.exit(1)", "it wrote nothing"),
        ("pass", "it wrote nothing"),
    ],
)
def test_a_converter_that_fails_leaves_nothing(convert, tmp_path, body, why):
    with pytest.raises(InputError, match=why):
        convert(body)
    assert list((tmp_path / "out").iterdir()) == []


def test_without_the_converter_it_is_said_how_to_get_it(run, type_in, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    (tmp_path / "model").mkdir()
    monkeypatch.setattr("persona_rlhf.config.experiment.read_run_config", lambda _: _Config)
    done = type_in("export", run.path, "--user", "ada", "--to", tmp_path / "ada.gguf", "--format", "gguf")
    assert done.exit_code == 2
    assert "git clone https://github.com/ggml-org/llama.cpp" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nowhere"):
        conversion.converter()


class _Config:
    class base:  # noqa: N801
        model = "data/base"


def test_a_signed_export_with_its_bill_as_it_is_typed(run, type_in, tmp_path):
    key, out = tmp_path / "key.pem", tmp_path / "out"
    made = type_in("policy", "keygen", key, "--type", "p256")
    assert made.stdout.startswith("p256:")
    assert (tmp_path / "key.pem.pub").read_text().startswith("-----BEGIN PUBLIC KEY-----")
    done = type_in("export", run.path, "--user", "ada", "--to", out, "--sign", key, "--bom")
    assert done.exit_code == 0, done.stderr
    papers = {"model.sig", "certificate.intoto.json", "bom.cdx.json"}
    assert papers < {file.name for file in out.iterdir()}
    (tmp_path / "keys.yaml").write_text(f"releaser: ['{made.stdout.strip()}']\n")
    assert type_in("verify", out, "--trust", tmp_path / "keys.yaml").exit_code == 0
    for option in (("--sign", key), ("--bom",)):
        refused = type_in("export", run.path, "--user", "ada", "--to", tmp_path / "m", "--merge", *option)
        assert refused.exit_code == 2
        assert "--sign and --bom go with --to" in refused.stderr
