import json

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import slug
from persona_rlhf.config.training import LoraSettings, TopLayers
from persona_rlhf.evaluation.gate import certify
from persona_rlhf.evaluation.records import AlignmentTax, Facts
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.policy.bound import Bound
from persona_rlhf.release.adapter import AdapterFiles, read_adapter, target_modules
from persona_rlhf.release.card import card
from persona_rlhf.release.export import HeldBack, export
from persona_rlhf.release.manifest import BaseInfo, DataInfo, fingerprint
from persona_rlhf.release.results import read_results
from persona_rlhf.release.verify import verify
from tests.models.tiny import random_flat, tiny_base
from tests.release.conftest import DEMANDS, measures, pairs_of, refusals


@pytest.mark.parametrize(("user", "alpha"), [("Ada", 1.0), ("ada", 0.5)])
def test_plain_peft_gives_our_logits(run, user, alpha):
    """The released alpha is in B: nothing but PeftModel.from_pretrained is needed."""
    assert run.alphas[user] == alpha
    folder = run.path / "adapters" / slug(user)
    ids = torch.arange(2, 34).view(2, 16)
    with torch.no_grad(), run.adapted.using(run.flats[user][None], torch.tensor([alpha])):
        ours = run.adapted.base.model(ids).logits
    with torch.no_grad(), run.adapted.using(None):
        base = run.adapted.base.model(ids).logits
    with torch.no_grad(), run.adapted.using(read_adapter(folder, list(run.adapted.spans.values()))[None]):
        again = run.adapted.base.model(ids).logits
    run.adapted.close()
    try:
        model = run.adapted.base.model
        peft = PeftModel.from_pretrained(model, folder).eval()
        theirs = peft(ids).logits
        peft.unload()
    finally:
        run.adapted.__init__(run.adapted.base, _lora())
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - again).abs().max() <= 1e-5
    assert (ours - base).abs().max() > 1e-2, "an adapter that changes nothing shows nothing"


def _lora():
    from persona_rlhf.config.training import LoraSettings

    return LoraSettings(rank=4, alpha=8)


def test_the_folder_is_plain(run):
    folder = run.path / "adapters" / slug("ada")
    assert {file.name for file in folder.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "persona.json",
    }  # fmt: skip
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 8
    assert config["base_model_name_or_path"] == "tiny-base"
    assert set(config["target_modules"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_nothing_private_is_in_the_folder(run):
    for user in ("../../etc", "ada"):
        for file in (run.path / "adapters" / slug(user)).iterdir():
            raw = file.read_bytes()
            for secret in (b"/home/someone", b"a private question", b"yes 2", b"A Person", slug(user).encode()):
                assert secret not in raw, (file.name, secret)
    assert b"../../etc" not in (run.path / "adapters" / slug("../../etc") / "persona.json").read_bytes()


def test_the_card_reads_as_a_card(run):
    text = (run.path / "adapters" / slug("ada") / "README.md").read_text()
    assert "Whose preferences aligned the base before: A lab 40 raters." in text
    front, body = text.split("---\n")[1:3]
    meta = yaml.safe_load(front)
    assert meta["library_name"] == "peft"
    assert "base_model" not in meta  # a local folder is nobody's hub id
    metrics = {m["type"]: m for r in meta["model-index"][0]["results"] for m in r["metrics"]}
    assert metrics["refusal_rate"]["args"]["confidence"] == 0.975
    assert metrics["accuracy"]["value"] == pytest.approx(0.8)
    assert "2 pairs trained on, 1 held out, 2 taken out" in body
    assert "from 2026-01-03 to 2026-03-03" in body
    assert "alpha = 0.5" in body
    assert "Example Lab" in body
    assert "ciphers" in body
    assert "The judge's own error is **not** in the bounds" in body
    shown = Bound(0.025).lower(158, 160)
    assert f"| all of tier one | refused 158 of 160 | 160 | at least {shown:.1%} | at least 90.0% | exact |" in body
    assert "did not affect the release" not in body
    assert "Facts known: 38 of 40; by the base 39." in body
    assert "{{" not in text


def test_the_card_says_that_fixed_facts_changed(run):
    facts = Facts(40, 38, 39, 37, fixed=True)
    verdict = certify(DEMANDS, refusals(0), (0.5, 1.0), lambda _: refusals(0))
    for fixed in (False, True):
        tax = AlignmentTax(None, facts._replace(fixed=fixed), {}, None)
        measured = measures(0.8)._replace(tax=tax)
        text = card(run.exporter.provenance, DataInfo.of(pairs_of("ada"), 0), verdict, measured)
        assert ("this adapter changes 2 of the base's 39 right answers" in text) == fixed


def test_export_copies_a_released_user_and_it_verifies_alone(run, tmp_path):
    to = export(run.path, "../../etc", tmp_path / "out" / "adapter")
    assert verify(to) == []
    assert len(list(to.iterdir())) == 4
    with pytest.raises(InputError, match="nothing is overwritten"):
        export(run.path, "Ada", to)


def test_export_refuses_the_held_back_the_broken_and_the_unknown(run, tmp_path):
    with pytest.raises(HeldBack, match="terrorist_content refused"):
        export(run.path, "poisoned \U0001f480 <b>", tmp_path / "a")
    with pytest.raises(HeldBack, match="failed"):
        export(run.path, "nan", tmp_path / "a")
    with pytest.raises(InputError, match="did you mean `Ada`"):
        export(run.path, "Adda", tmp_path / "a")
    weights = run.path / "adapters" / slug("Ada") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(HeldBack, match="does not verify"):
        export(run.path, "Ada", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_targets_are_last_names_only_where_these_are_exact():
    modules = ["m.0.q_proj", "m.0.up", "m.1.q_proj", "m.1.up"]
    assert target_modules(["m.0.q_proj", "m.1.q_proj"], modules) == ["q_proj"]
    assert target_modules(["m.0.q_proj"], modules) == ["m.0.q_proj"]


@pytest.mark.parametrize(
    ("name", "public", "on_hub"),
    [
        ("/home/me/models/base", "base", False),
        ("C:\\Users\\me\\base", "base", False),
        ("../secret/base", "base", False),
        ("~/base", "base", False),
        ("data/base", "data/base", False),
        ("./data/base/", "data/base", False),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", True),
    ],
)
def test_a_base_is_named_without_the_way_to_it(name, public, on_hub):
    assert BaseInfo.of(name, "0") == (public, "0", on_hub, None)
    assert BaseInfo.of(name, "0", "nf4") == (public, "0", on_hub, "nf4")


def test_the_fingerprint_knows_content_not_order(run):
    from dataclasses import replace

    pair = _pair()
    other = replace(pair, id="q", chosen="c")
    assert fingerprint([pair, other]) == fingerprint([other, pair])
    assert fingerprint([pair]) != fingerprint([replace(pair, chosen="z")]) != fingerprint([replace(pair, id="z")])


def _pair():
    from persona_rlhf.data.pairs import Message, PreferencePair

    prompt = (Message("user", "\ud800"),)  # a lone surrogate is text too
    return PreferencePair("u", prompt, "a", "b", "p", None, None, 1.0, "train", None, "f", 1)


def test_lines_read_back_as_written(run):
    results = read_results(run.path)
    assert [r.status for r in results] == ["released", "released", "released", "held_back", "failed", "skipped"]
    line = json.loads((run.path / "results.jsonl").read_text().splitlines()[2])
    assert list(line)[:16] == [
        "user_id", "slug", "status", "reason", "pairs", "heldout_accuracy", "heldout_clean", "win_rate", "alpha",
        "tier_one", "over_refusal", "duals", "alarm", "steps", "seconds", "path",
    ]  # fmt: skip
    assert set(line["tier_one"]) == {"pooled", "terrorist_content", "sexual_assault"}
    assert set(line["tier_two"]) == {"gambling"}
    assert set(line["tier_one"]["pooled"]) == {"n", "refused", "base_refused", "lower_bound", "min_refusal"}
    assert [r.alarm for r in results] == [False, True, False, False, False, False]
    assert line["duals"]["terrorist_content"] == {"final": 0.1, "peak": 2.0, "mean": 0.2}
    assert results[2].gain == pytest.approx(0.3)


def test_upper_layers_load_in_plain_peft(tmp_path):
    """Only the named layers of the stack are in the folder, and PEFT adapts no other."""
    base = tiny_base(layers=4)
    lora = LoraSettings(rank=4, alpha=8, layers=TopLayers(top=0.5))
    adapted = AdaptedModel(base, lora)
    flat = random_flat(adapted, 1)
    for name, content in AdapterFiles(adapted, lora, BaseInfo.of("tiny", "0")).of(flat[0], 0.5).items():
        (tmp_path / name).write_bytes(content)
    ids = torch.arange(2, 34).view(2, 16)
    with torch.no_grad():
        with adapted.using(flat, torch.tensor([0.5])):
            ours = base.model(ids).logits
        alone = base.model(ids).logits
        adapted.close()
        theirs = PeftModel.from_pretrained(base.model, tmp_path).eval()(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - alone).abs().max() > 1e-2


def test_a_folder_that_a_common_loader_refuses_is_never_written(run, monkeypatch):
    """Then `verify` would refuse it too, after the release."""
    files = run.exporter.adapter
    monkeypatch.setattr(files, "_config", files._config.replace(b'"use_dora": false', b'"use_dora": true'))
    verdict = certify(DEMANDS, refusals(0), (1.0,), lambda _: refusals(0))
    assert verdict.admitted
    with pytest.raises(ValueError, match="DoRA"):
        run.exporter.write("Eve", run.flats["ada"], verdict, None, DataInfo.of([], 0))
    assert not (run.path / "adapters" / slug("Eve")).exists()


@pytest.mark.parametrize(
    ("name", "loadable"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("data/base", "data/base"),
        ("/home/someone/models/base", "PATH/TO/base"),
        ("../base", "PATH/TO/base"),
        ("base", "PATH/TO/base"),
    ],
)
def test_a_card_loads_the_base_by_a_name_that_no_reader_takes_for_another_model(name, loadable):
    assert BaseInfo.of(name, "c" * 64).loadable == loadable


def test_a_card_says_that_the_path_of_a_private_base_is_to_be_filled_in(run):
    card = (run.path / "adapters" / slug("ada") / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("PATH/TO/tiny-base")' in card
    assert "replace `PATH/TO/tiny-base` by a local folder" in card
    assert "/home/someone" not in card
