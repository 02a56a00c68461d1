"""The base's greedy answers to probes and harmless prompts, kept in a run: a command that goes on reads them again."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import torch
import transformers
from pydantic import Field, TypeAdapter

from persona_rlhf.common.files import atomic_write
from persona_rlhf.common.version import __version__
from persona_rlhf.evaluation.evaluator import Evaluator
from persona_rlhf.policy.policy import Policy

_Kind = dict[str, tuple[list[Annotated[int, Field(ge=0)]], bool]]
_ANSWERS = TypeAdapter(tuple[_Kind, _Kind, _Kind])


def read_answers(evaluator: Evaluator, file: Path) -> None:
    """Gives an evaluator the answers in a file, which need not exist.

    Answers of another base, computation, gate or version are left out, and so is a damaged file: they are written anew.
    """
    try:
        content = json.loads(file.read_bytes())
        if content["of"] == _origin(evaluator):
            answers = _ANSWERS.validate_python(content["answers"])
            embedding = evaluator.base.model.get_input_embeddings().weight
            assert isinstance(embedding, torch.Tensor)
            if all(token < len(embedding) for kept in answers for ids, _ in kept.values() for token in ids):
                for of_kind, kept in zip(evaluator.base_answers, answers, strict=True):
                    of_kind.keep(kept)
    except (OSError, ValueError, LookupError, TypeError):
        return


def write_answers(evaluator: Evaluator, policy: Policy, file: Path) -> None:
    """Writes the evaluator's answers of the base. Under a policy with a private bank, nothing is written."""
    if policy.private is None:
        content = {"of": _origin(evaluator), "answers": [of_kind.to_json() for of_kind in evaluator.base_answers]}
        atomic_write(file, json.dumps(content).encode())


def _origin(evaluator: Evaluator) -> str:
    """A hash of everything that decides the answers: weights, end tokens, computation, limits, judges, versions."""
    base, gate = evaluator.base, evaluator.gate.model_dump(mode="json")
    versions = [__version__, torch.__version__, transformers.__version__]
    parts = [base.weights_hash, *base.eos_ids, *evaluator.conditions, gate, *versions]
    return sha256(json.dumps(parts).encode()).hexdigest()
