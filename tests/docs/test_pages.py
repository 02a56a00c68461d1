"""Pages that are written from the code say what the code says."""

import ast
import re
import shlex

import pytest
import typer

import persona_rlhf
from persona_rlhf.cli.app import app
from persona_rlhf.config.experiment import Config
from persona_rlhf.config.loader import parse_yaml, read_section
from persona_rlhf.pipeline.sweep import SweepSettings, arm_runs
from tests.docs.pages import PAGES, ROOT, blocks, page_name
from tests.scripts.loading import load_script

generator = load_script("generate_docs")


def test_the_generated_pages_are_current():
    made = generator.pages()
    there = {page: (generator.REFERENCE / page).read_text() for page in made if (generator.REFERENCE / page).exists()}
    assert there == made, "run scripts/generate_docs.py"
    assert {file.name for file in (generator.REFERENCE / "cli").iterdir()} == {
        p.name for p in made if p.parts[0] == "cli"
    }


def test_every_key_of_a_config_has_a_row_with_its_default():
    page = generator.config_page()
    rows = {key: line for line, key in re.findall(r"^(\| `([\w.]+)` \|.*)$", page, re.MULTILINE)}
    assert rows["dpo.beta"].startswith("| `dpo.beta` | number, > 0 | `0.1` |")
    assert rows["lora.layers.top"].startswith("| `lora.layers.top` | number, > 0, <= 1 | required |")
    assert rows["gate.judge_calibration.compliances"]
    for name, field in Config.model_fields.items():
        section = generator.section_in(field.annotation)
        for key in section.model_fields if section else ():
            assert f"{name}.{key}" in rows


USAGE = typer.BadParameter.__base__


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_command_on_a_page_is_one(page):
    """Verbs and options exist; what they name need not be there."""
    for block in blocks(page, "bash", "console", "sh"):
        for line in block.splitlines():
            for part in re.split(r"&&|#", line):
                words = shlex.split(part) if "persona-rlhf" in part else []
                if words[:1] == ["persona-rlhf"]:
                    parsed(typer.main.get_command(app), words[1:])


def parsed(command, words):
    """Raises typer's own error where the words are not of this command."""
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands.get(name)
        if command is None:
            raise USAGE(f"no verb {name}")
    command.make_context("persona-rlhf", list(words))


def test_a_wrong_command_on_a_page_would_be_noticed():
    for words in (["trian", "x.yaml"], ["train", "x.yaml", "--rum", "y"], ["data", "chek", "x"]):
        with pytest.raises(USAGE):
            parsed(typer.main.get_command(app), words)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_sweep_on_a_page_reads(page):
    for block in blocks(page, "yaml"):
        if "tier:" in block or page_name(page) == "how-to/machines.md" or "kpis_thresholds:" in block:
            continue  # documents, details of cards, files of others: test_policy_page.py, test_machines_page.py
        if block.startswith(("policy:", "gate:", "screening:")):  # a part of a config
            rows = re.findall(r"^\| `([\w.]+)` \|", generator.config_page(), re.MULTILINE)
            tree = parse_yaml(block, page_name(page)).tree
            assert {f"{section}.{key}" for section, keys in tree.items() for key in keys} <= set(rows)
            continue
        assert arm_runs(read_section(SweepSettings, parse_yaml(block, page_name(page))), [])


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_python_block_on_a_page_compiles_and_its_imports_are_there(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "persona_rlhf":
                assert all(hasattr(persona_rlhf, alias.name) for alias in node.names), ast.unparse(node)


def test_every_page_that_a_file_names_is_there():
    pattern = r"(?<![\w./-])docs/(?:(?:how-to|reference|explanation)/[\w/-]+|\w+)\.(?:md|svg)"
    folders = [file for top in ("docs", "src", "configs", "scripts") for file in (ROOT / top).rglob("*")]
    for file in [*ROOT.glob("*.md"), *folders]:
        if file.suffix in (".md", ".py", ".yaml"):
            for named in re.findall(pattern, file.read_text(encoding="utf-8")):
                assert (ROOT / named).exists(), f"{file.relative_to(ROOT)} names {named}"


def test_every_module_that_contributing_names_is_there():
    source, text = ROOT / "src/persona_rlhf", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    packages = [folder.name for folder in source.iterdir() if (folder / "__init__.py").exists()]
    named = re.findall(rf"`((?:tests|scripts|{'|'.join(packages)})/[\w./-]+)`", text)
    places = [[ROOT / name, source / name, source / f"{name}.py"] for name in named]
    assert len(named) > 100
    missing = [name for name, paths in zip(named, places, strict=True) if not any(path.exists() for path in paths)]
    assert not missing
    assert all(f"| `{package}` |" in text for package in packages)
