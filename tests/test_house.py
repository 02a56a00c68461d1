"""House rules that no linter holds: packages, names, sizes, and where a test lives."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "persona_rlhf"
TESTS = Path(__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
PACKAGES = {"cli", "pipeline", "serving", "release", "benchmarks", "evaluation", "training"} | {
    "models", "simulation", "data", "policy", "config", "common"
}  # fmt: skip
LIGHT = sorted(
    ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
    for file in [
        *(file for package in ("common", "config", "policy", "data", "cli") for file in SOURCE.glob(f"{package}/*.py")),
        *(SOURCE / name for name in ("__init__.py", "pipeline/inputs.py", "pipeline/distributed.py")),
        SOURCE / "pipeline" / "run_dir.py",
    ]
)
VAGUE_NAMES = {"found", "own", "asked", "known", "told", "said", "his", "him", "he"}
STORIES = {"story", "docs", "scripts", "gpu"}  # tests of whole runs, of pages, of scripts, on a pretended GPU


def named(file):
    return str(file.relative_to(SOURCE))


def parsed(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def public_classes():
    places = defaultdict(list)
    for file in MODULES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(named(file))
    return places


def documented(tree):
    """The module, classes and functions of a file that have a docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", "module"), text


def names_of(tree):
    """Every name that a file gives to a variable, a parameter, an attribute, a function or a class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno


def test_light_modules_import_no_torch_and_no_datasets():
    code = f"import sys\nfor name in {LIGHT!r}: __import__(name)\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "datasets", "peft", "trl", "accelerate", "pandas"} & set(loaded)


def test_every_module_is_in_one_of_the_packages():
    assert {file.name for file in SOURCE.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {file.parent.name for file in SOURCE.glob("*/__init__.py")} == PACKAGES
    assert not list(SOURCE.glob("*/*/*.py")), "a package holds modules, no packages"


@pytest.mark.parametrize("file", sorted(SOURCE.glob("*/__init__.py")), ids=lambda file: file.parent.name)
def test_the_init_of_a_package_is_empty(file):
    assert file.read_text() == ""


def test_a_module_is_short_enough_to_read():
    """A soft cap: a longer module is two ideas, or needs a reason here."""
    lines = {named(file): len(file.read_text(encoding="utf-8").splitlines()) for file in MODULES}
    assert not {file: count for file, count in lines.items() if count > 420}


def test_a_public_class_name_stands_for_one_class():
    assert not {name: files for name, files in public_classes().items() if len(files) > 1}


@pytest.mark.parametrize("file", MODULES, ids=named)
def test_a_docstring_says_first_what_the_thing_is(file):
    """Its first line is a noun phrase or a verb, and no question."""
    vague = [
        (name, text.splitlines()[0]) for name, text in documented(parsed(file)) if re.match(r"What\b|Whoever\b", text)
    ]
    assert not vague


@pytest.mark.parametrize("file", MODULES, ids=named)
def test_names_are_nouns_of_the_field(file):
    assert not [(name, line) for name, line in names_of(parsed(file)) if name.strip("_") in VAGUE_NAMES]


@pytest.mark.parametrize("file", MODULES, ids=named)
def test_people_are_they_and_things_are_it(file):
    """In docstrings, comments and messages; what simulated people write is their affair."""
    text = file.read_text(encoding="utf-8")
    if file.parent.name == "simulation":
        text = "\n".join([*(text for _, text in documented(parsed(file))), *re.findall(r"#.*", text)])
    assert not re.findall(r"\b(?:he|his|him|she|her)\b", text, re.IGNORECASE)


def test_a_test_is_named_after_the_module_that_it_tests():
    strays = []
    for file in TESTS.glob("*/test_*.py"):
        package = file.parent.name
        modules = {module.stem for module in SOURCE.glob(f"{package}/*.py")}
        stem = file.stem.removeprefix("test_")
        if package not in STORIES and not any(stem == module or stem.startswith(f"{module}_") for module in modules):
            strays.append(str(file.relative_to(TESTS)))
    assert not strays
    assert {file.name for file in TESTS.glob("test_*.py")} == {"test_house.py", "test_typechecker.py"}


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
