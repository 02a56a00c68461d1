import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "persona_rlhf"
LIGHT = sorted(
    ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
    for file in [
        *SOURCE.glob("common/*.py"),
        *SOURCE.glob("config/*.py"),
        *SOURCE.glob("policy/*.py"),
        *SOURCE.glob("data/*.py"),
        *SOURCE.glob("cli/*.py"),
        *(SOURCE / name for name in ("__init__.py", "pipeline/inputs.py", "pipeline/distributed.py")),
        SOURCE / "pipeline" / "run_dir.py",
    ]
)


def test_light_modules_import_no_torch_and_no_datasets():
    code = f"import sys\nfor name in {LIGHT!r}: __import__(name)\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "datasets", "peft", "trl", "accelerate", "pandas"} & set(loaded)


@pytest.mark.parametrize("file", sorted(SOURCE.glob("*/__init__.py")), ids=lambda file: file.parent.name)
def test_the_init_of_a_package_is_empty(file):
    assert file.read_text() == ""


def test_files_are_small():
    long = {str(file): n for file in SOURCE.rglob("*.py") if (n := len(file.read_text().splitlines())) > 420}
    assert not long


def _writes_by_itself(node: ast.AST) -> bool:
    """Whether a call is `fsync`, `os.replace` or the `replace` of a path (one argument)."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    module = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
    replaces = module == "os" or (len(node.args) == 1 and not node.keywords)
    return node.func.attr in ("fsync", "fdatasync") or (node.func.attr == "replace" and replaces)


def test_only_common_files_makes_writes_atomic():
    others = {
        f"{file.relative_to(SOURCE)}:{node.lineno}"
        for file in SOURCE.rglob("*.py")
        if file != SOURCE / "common" / "files.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if _writes_by_itself(node)
    }
    assert not others, "use atomic_write, atomic_path or flush of common/files"
