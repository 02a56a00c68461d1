"""Every module that writes personal data exports its traces, and `forget` collects them."""

from __future__ import annotations

import ast
from pathlib import Path

import persona_rlhf
from persona_rlhf.common.files import pseudonym
from persona_rlhf.data.erasure import DataSubject
from persona_rlhf.pipeline.forget_user import WRITERS, _traces_of, traces
from tests.pipeline.test_forget_user import ID, base, planted, run  # noqa: F401  # fixtures

SOURCE = Path(persona_rlhf.__file__).parent
OUTSIDE_RUN = "training.cache"  # `fleet.reference_cache`, which forget reads from the config
WRITES = {"write_folder", "write_text", "write_bytes", "writelines"}
WRITES |= {"atomic_write", "atomic_path", "atomic_folder", "save_file"}

# Modules that know user ids and write files, yet keep no personal data of a user in a run
EXEMPT = {
    "common.files": "writes content that other modules give",
    "data.erasure": "erases",
    "data.importers": "writes new source files, named by the user",
    "pipeline.curate": "draft writes a new source file; review writes by data.feedback",
    "release.adapter": "adapter folders; their traces are in release.deletion_records, which needs no torch",
    "release.approval_packet": "a page that leaves the run; it names no user",
    "release.comparison": "figures of sweeps and rebased runs",
    "release.export": "copies that leave the run",
    "release.integrity": "pseudonyms only",
    "release.report": "a page, written again by every deletion",
    "release.revocation": "pseudonyms only",
}


def _modules() -> dict[str, ast.Module]:
    return {
        ".".join(file.relative_to(SOURCE).with_suffix("").parts): ast.parse(file.read_text(encoding="utf-8"))
        for file in SOURCE.rglob("*.py")
    }


def _writes_of_users(module: ast.Module) -> bool:
    called = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for node in ast.walk(module)
        if isinstance(node, ast.Call)
    }
    modes = {
        node.args[0].value
        for node in ast.walk(module)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "open"
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    users = {node.attr for node in ast.walk(module) if isinstance(node, ast.Attribute)}
    users |= {node.arg for node in ast.walk(module) if isinstance(node, ast.arg)}
    users |= {node.value for node in ast.walk(module) if isinstance(node, ast.Constant) and node.value == "user_id"}
    return "user_id" in users and bool(called & WRITES or any(set("awx") & set(mode) for mode in modes))


def test_each_module_with_traces_is_registered():
    exporting = {
        name
        for name, module in _modules().items()
        if any(isinstance(node, ast.FunctionDef) and node.name == "traces" for node in module.body)
    }
    assert exporting - {"pipeline.forget_user"} == {*WRITERS, OUTSIDE_RUN}


def test_each_module_that_writes_data_of_users_is_registered_or_exempt():
    writing = {name for name, module in _modules().items() if _writes_of_users(module)}
    assert writing - {*WRITERS, OUTSIDE_RUN, "pipeline.forget_user"} == EXEMPT.keys()


def test_every_file_but_sources_is_claimed_by_a_writer(planted):
    user = DataSubject(pseudonym(ID))
    claimed = {trace.path for module in WRITERS for trace in _traces_of(module, planted, user)}
    left = {trace.path.relative_to(planted).as_posix() for trace in traces(planted, user) if trace.path not in claimed}
    assert left == {"state/data/pairs.jsonl"}
    assert len(claimed) >= 12
