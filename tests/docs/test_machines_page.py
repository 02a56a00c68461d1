"""The examples on many machines: their commands have options of `train`, their files the keys of their tools."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import SimpleNamespace

import yaml
from typer.testing import CliRunner

from persona_rlhf.cli import app
from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs" / "how-to/machines.md"


def test_every_command_has_options_that_train_has():
    shown = CliRunner().invoke(app.app, ["train", "--help"], env={"COLUMNS": "200"}).output
    options = set(re.findall(r"(?<=persona-rlhf train experiment\.yaml) .*", PAGE.read_text(encoding="utf-8")))
    names = {name for line in options for name in re.findall(r"(?<=\s)--[a-z]+", line)}
    assert names >= {"--run", "--ray", "--shard", "--resume"}
    assert all(name in shown for name in names)


def test_the_python_example_trains_all_shards_and_puts_them_together(monkeypatch):
    ran = list[list[str]]()

    class Executor:
        def __init__(self, folder: str) -> None: ...

        def update_parameters(self, **_: int) -> None: ...

        def submit(self, shard: Callable[[], None]) -> SimpleNamespace:
            return SimpleNamespace(result=shard)

    def command(words: list[str]) -> Callable[[], None]:
        return lambda: ran.append(words)

    helpers = SimpleNamespace(CommandFunction=command)
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Executor, helpers=helpers))
    [code] = blocks(PAGE, "python")
    exec(code, {})
    *shards, last = [words[words.index("runs/first") + 1 :] for words in ran]
    assert shards == [["--shard", f"{n}/16"] for n in range(1, 17)]
    assert last == ["--resume"]


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
