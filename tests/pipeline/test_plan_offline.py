"""`plan --shape`: a run of a hub model, counted where its weights are not."""

import json

import pytest
from typer.testing import CliRunner

from persona_rlhf.cli import app


def asked(*words):
    return CliRunner().invoke(app.app, ["plan", *words])


@pytest.fixture(scope="module")
def sized():
    ended = asked("configs/llama-3.2-1b.yaml", "--shape", "--memory", "80", "--tflops", "400", "--json")
    assert ended.exit_code == 0, ended.stderr
    return json.loads(ended.stdout)


def test_a_run_of_a_hub_model_is_counted_offline(sized):
    assert sized["parameters"] == 1_235_814_400
    assert (sized["users"], sized["pairs"]) == (3, 10)
    assert sized["steps"] == 9  # three epochs of one step for each of three users
    assert sized["slots"] == 3  # all of them fit
    assert sized["memory_mib"]["base"] == pytest.approx(2 * 1_235_814_400 / 2**20, abs=1e-2)
    assert sized["memory_mib"]["user_state"] == pytest.approx(16 * sized["adapter_parameters"] / 2**20, abs=1e-2)
    flops = sized["petaflops"]
    assert flops["total"] == pytest.approx(flops["reference"] + flops["training"] + flops["judging"], abs=2e-3)
    assert sized["seconds"]["judging"] == pytest.approx(1e15 * flops["judging"] / 400e12, rel=1e-2)


def test_a_larger_base_takes_more(sized):
    large = json.loads(asked("configs/qwen3-8b.yaml", "--shape", "--json").stdout)
    assert large["slots"] is None
    assert large["seconds"] is None
    assert large["petaflops"]["training"] > 4 * sized["petaflops"]["training"]
    assert large["memory_mib"]["user_activations"] > 2 * sized["memory_mib"]["user_activations"]


def test_the_page_for_people():
    page = asked("configs/smollm2-135m.yaml", "--shape", "--memory", "8")
    assert page.exit_code == 0
    assert "134,515,008 parameters" in page.stdout
    assert "times are floors" in page.stdout


def test_dials_of_the_shape_go_with_it():
    assert asked("configs/qwen3-8b.yaml", "--memory", "80").exit_code == 2
