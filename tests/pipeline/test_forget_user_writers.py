"""Every module that writes personal data lists its traces, unless they are rows, and `forget` collects them."""

from __future__ import annotations

import ast
from pathlib import Path

import persona_rlhf
from persona_rlhf.common.files import pseudonym
from persona_rlhf.data.erasure import DataSubject
from persona_rlhf.pipeline import forget_user
from persona_rlhf.pipeline.forget_user import traces
from tests.pipeline.test_forget_user import ID, base, planted, run  # noqa: F401  # fixtures

SOURCE = Path(persona_rlhf.__file__).parent
WRITES = {"write_folder", "write_text", "write_bytes", "writelines"}
WRITES |= {"atomic_write", "atomic_path", "atomic_folder", "save_file"}

# Modules that write rows with a `user_id` (JSON lines), which forget looks for in every file of a run
ROWS = {
    "data.feedback",
    "pipeline.monitoring",
    "pipeline.update_run",
    "release.results",
}

# Modules that know user ids and write files, yet keep no personal data of a user in a run
EXEMPT = {
    "common.files": "writes content that other modules give",
    "data.erasure": "erases",
    "data.imported_pairs": "writes a new source file, named by the user",
    "data.importers": "writes new source files, named by the user",
    "data.preference_export": "writes a new file for an annotation tool, named by the user",
    "pipeline.export_choices": "writes a new source file, named by the user",
    "pipeline.curate": "draft writes a new source file; review writes by data.feedback",
    "release.adapter": "adapter folders; their traces are in release.deletion_records, which needs no torch",
    "release.audit_proof": "a file that leaves the run; pseudonyms only",
    "release.approval_packet": "a page that leaves the run; it names no user",
    "release.comparison": "figures of sweeps and rebased runs",
    "release.export": "copies that leave the run",
    "release.integrity": "pseudonyms only",
    "release.report": "a page, written again by every deletion",
    "release.run_comparison": "a page outside both runs, named by the user",
    "release.revocation": "pseudonyms only",
    "training.reward_basis": "numbers of a whole population; no run holds one, and removal is a refit",
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


def _tracing() -> dict[str, str]:
    """Functions that list traces, with their modules; `row_traces` lists rows of any file."""
    return {
        node.name: name
        for name, module in _modules().items()
        for node in module.body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_traces") and node.name != "row_traces"
    }


def test_forget_calls_every_function_that_lists_traces():
    called = {
        node.func.id
        for node in ast.walk(ast.parse(Path(forget_user.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("_traces")
    }
    assert called == {*_tracing(), "row_traces"}


def test_each_module_that_writes_data_of_users_lists_traces_or_writes_rows_or_is_exempt():
    writing = {name for name, module in _modules().items() if _writes_of_users(module)}
    assert writing - {*_tracing().values(), "pipeline.forget_user"} == EXEMPT.keys() | ROWS


def test_rows_are_traced_in_every_file_that_holds_any(planted):
    (planted / "copies").mkdir()
    (planted / "copies/of pairs.csv").write_text(f"user_id,prompt\n{ID},a\nAda,b\n", encoding="utf-8")
    rows = {
        trace.path.relative_to(planted).as_posix(): trace.pieces
        for trace in traces(planted, DataSubject(pseudonym(ID)))
        if trace.what == "lines"
    }
    assert rows == {
        "copies/of pairs.csv": 1,
        "ledger.jsonl": 3,
        "metrics.jsonl": 3,
        "results.jsonl": 1,
        "screening.jsonl": 1,
        "state/chunks/000000/results.jsonl": 1,
        "state/chunks/000000/screening.jsonl": 1,
        "state/data/pairs.jsonl": 3,
        "state/metrics-1-of-2.jsonl": 3,
    }
