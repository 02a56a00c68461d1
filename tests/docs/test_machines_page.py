"""The examples on many machines: their commands have options of `train`, their files the keys of their tools."""

from __future__ import annotations

import ast
import re

import yaml
from typer.testing import CliRunner

from persona_rlhf.cli import app
from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs/how-to/machines.md"


def test_every_command_has_options_that_train_has():
    shown = CliRunner().invoke(app.app, ["train", "--help"], env={"COLUMNS": "200"}).output
    options = set(re.findall(r"(?<=persona-rlhf train experiment\.yaml) .*", PAGE.read_text(encoding="utf-8")))
    names = {name for line in options for name in re.findall(r"(?<=\s)--[a-z]+", line)}
    assert names >= {"--run", "--ray", "--shard", "--resume"}
    assert all(name in shown for name in names)


def test_the_python_example_is_python():
    [code] = blocks(PAGE, "python")
    assert ast.parse(code)


def test_the_yaml_files_have_the_keys_that_their_tools_need():
    sky, job = (yaml.safe_load(block) for block in blocks(PAGE, "yaml"))
    assert set(sky) <= {"name", "resources", "file_mounts", "setup", "run", "envs", "num_nodes", "workdir"}
    assert "RESUME" in sky["run"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    machines = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for machine in machines:
        volumes = machine["template"]["spec"]["volumes"]
        [container] = machine["template"]["spec"]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in volumes}
    assert "--ray auto" in job["spec"]["entrypoint"]
