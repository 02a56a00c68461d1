"""A finished run on a tiny random Llama that lies in a folder of its own, so that it can be served from its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from persona_rlhf.common.files import find, slug
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base, load_base
from persona_rlhf.policy.policy import Policy
from persona_rlhf.serving.access import AdapterAccess
from tests.models.tiny import random_flat, tiny_base
from tests.release.conftest import Run, run  # noqa: F401 - the fixture

TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w4', 'user': 'w2', 'assistant': 'w3'}[m.role] }} {{ m.content }} <end> "
    "{% endfor %}{% if add_generation_prompt %}w3 {% endif %}"
)
LORA = LoraSettings(rank=4, alpha=8)
RELEASED = ("../../etc", "Ada", "ada")


class Fleet(NamedTuple):
    """Eight users' adapters over a tiny base that none of the tests closes."""

    adapted: AdaptedModel
    flat: object


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tiny = tiny_base()
    tiny.tokenizer.chat_template = TEMPLATE
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(base_folder) -> Base:
    return load_base(BaseSettings(model=str(base_folder)))


@pytest.fixture(scope="module")
def fleet(base_folder) -> Fleet:
    adapted = AdaptedModel(load_base(BaseSettings(model=str(base_folder))), LORA)
    return Fleet(adapted, random_flat(adapted, 8, size=0.15))


@pytest.fixture
def served_run(run: Run, base_folder) -> Run:
    """The run, with a config from which it can be served."""
    config = {
        "name": "tiny",
        "base": {"model": str(base_folder)},
        "policy": {"documents": [find("configs/policy/tier_one.yaml")]},
        "users": {"path": "data/users"},
        "lora": LORA.model_dump(mode="json"),
    }
    (run.path / "config.yaml").write_text(json.dumps(config, default=str))
    policy = Policy.read(config["policy"]["documents"])
    (run.path / "policy.json").write_text(json.dumps(policy.to_json()))
    return run


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def access(run: Run, base: Base, log: list[str]) -> AdapterAccess:
    return AdapterAccess(run.path, base.weights_hash, LORA, log.append)


def slugs() -> list[str]:
    return [slug(user_id) for user_id in RELEASED]
