"""Pages that are written from the code say what the code says."""

import re

from persona_rlhf.config import Config
from tests.scripts import load_script

generator = load_script("generate_docs")


def test_the_generated_pages_are_current():
    made = generator.pages()
    there = {page: (generator.DOCS / page).read_text() for page in made if (generator.DOCS / page).exists()}
    assert there == made, "run scripts/generate_docs.py"
    assert {file.name for file in (generator.DOCS / "cli").iterdir()} == {p.name for p in made if p.parts[0] == "cli"}


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


def test_verbs_of_later_releases_have_no_page():
    assert not [page for page in generator.pages() if page.stem in ("serve", "forget", "base-align")]
