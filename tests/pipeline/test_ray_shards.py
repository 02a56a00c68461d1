"""Shards of a run as tasks: in which order they start, how failures are told, and that nothing needs Ray but Ray."""

from __future__ import annotations

import json
import sys
from threading import Event, Thread
from types import ModuleType, SimpleNamespace

import pytest

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.run_lock import run_lock
from persona_rlhf.config.experiment import Config
from persona_rlhf.config.training import FleetSettings
from persona_rlhf.pipeline import ray_shards
from persona_rlhf.pipeline.distributed import WorkShare
from persona_rlhf.pipeline.ray_shards import FailedShardsError, RayTasks, ShardEnd, ray_tasks, train_shard, train_shards
from persona_rlhf.pipeline.run_dir import RunDir

WELL = ShardEnd([], None)
PROBLEM = Problem("pairs.jsonl", 3, "chosen", "is missing")


class Tasks:
    """Runs one shard at each look, in the order of submission; `ends` are those that do not end well."""

    def __init__(self, run, ends=None, capacity=2, ready_after=1):
        self.run, self.ends, self.capacity, self.ready_after = run, ends or {}, capacity, ready_after
        self.queue, self.submitted, self.looks = [], [], 0

    def submit(self, config, run, share, resume):
        self.submitted.append((share.shard, resume, self.looks))
        self.queue.append(share)

    def ended(self, seconds):
        self.looks += 1
        if self.looks == self.ready_after:
            begin(self.run)
        if self.looks <= self.ready_after or not self.queue:
            return []
        share = self.queue.pop(0)
        for number in share.mine(8):
            RunDir(self.run).chunk(number).mkdir(parents=True, exist_ok=True)
            (RunDir(self.run).chunk(number) / "done").touch()
        return [(share, self.ends.get(share.shard, WELL))]


def begin(run):
    (run / "state").mkdir(parents=True, exist_ok=True)
    (run / "state/identity.json").write_text(json.dumps({"users per chunk": "2"}))
    (run / "state/ready").touch()


@pytest.fixture
def train(tmp_path):
    """Trains 16 users in chunks of two."""

    def begun(ends=None, resume=False, **fleet):
        config = Config.model_construct(fleet=FleetSettings(chunk=2, **fleet))
        tasks, events = Tasks(tmp_path, ends), []
        train_shards(config, tmp_path, 16, tasks, resume=resume, on_progress=events.append)
        tasks.events = events
        return tasks

    return begun


def test_the_first_shard_writes_what_is_shared_before_the_others_begin(train):
    tasks = train()
    assert [shard for shard, _, _ in tasks.submitted] == list(range(8))
    assert [look for _, _, look in tasks.submitted] == [0] + [1] * 7
    assert [event.users_done for event in tasks.events[1:]] == list(range(0, 17, 2))


@pytest.mark.parametrize(("shards", "count"), [("auto", 8), (3, 3), (100, 8)])
def test_there_are_no_more_shards_than_chunks(train, shards, count):
    assert len(train(shards=shards).submitted) == count


def test_a_shard_is_worth_its_start(tmp_path):
    """Without a size of chunks, no shard has fewer than eight users where there are that many."""
    fleet = FleetSettings()
    assert [ray_shards._count(fleet, users, 16, None) for users in (1, 8, 9, 48, 1_000)] == [1, 1, 2, 6, 64]


def test_a_shard_waits_for_the_lock_of_a_lost_machine_and_its_end_is_no_wrong_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_shards, "_LOCK_SECONDS", 0.3)
    monkeypatch.setattr(ray_shards, "train_share", lambda *_, **__: None)
    run, share = tmp_path / "run", WorkShare(1, 4)
    ready, done = Event(), Event()

    def hold() -> None:
        with run_lock(run, "train", part=RunDir(run, share).part):
            ready.set()
            done.wait(10)

    other = Thread(target=hold)
    other.start()
    assert ready.wait(10)
    end = train_shard(Config.model_construct(), run, share, False, str(tmp_path))
    done.set()
    other.join()
    assert not end.problems
    assert "2-of-4" in end.fault
    assert train_shard(Config.model_construct(), run, share, False, str(tmp_path)) == WELL


def test_every_failed_shard_is_named_and_the_others_are_trained(train, tmp_path):
    with pytest.raises(FailedShardsError) as told:
        train({2: ShardEnd([], "OSError: no GPU"), 5: ShardEnd([], "the worker died")})
    assert "shard 3 of 8: OSError: no GPU; shard 6 of 8: the worker died" in str(told.value)
    assert "--resume" in str(told.value)
    assert all(RunDir(tmp_path).is_done(number) for number in range(8))


def test_a_problem_of_the_input_is_told_once(train):
    with pytest.raises(InputError) as told:
        train({1: ShardEnd([PROBLEM], None), 4: ShardEnd([PROBLEM], None), 6: ShardEnd([], "a fault too")})
    assert told.value.problems == [PROBLEM]


def test_no_other_shard_begins_where_the_first_fails_before_it_is_ready(tmp_path):
    tasks = Tasks(tmp_path, {0: ShardEnd([PROBLEM], None)}, ready_after=0)
    config = Config.model_construct(fleet=FleetSettings(chunk=2))
    with pytest.raises(InputError):
        train_shards(config, tmp_path, 16, tasks, resume=False, on_progress=lambda event: None)
    assert [shard for shard, _, _ in tasks.submitted] == [0]


class Cluster:
    """Stands for the module `ray`: a cluster of machines with these resources."""

    def __init__(self, *machines):
        self.machines, self.options = machines, None

    def nodes(self):
        lost = {"Resources": {"CPU": 99.0, "GPU": 99.0}, "Alive": False}
        return [lost, *({"Resources": machine, "Alive": True} for machine in self.machines)]

    def remote(self, **options):
        self.options = options
        return lambda function: function


@pytest.mark.parametrize(
    ("machines", "fleet", "on_cpu", "capacity", "gpus"),
    [
        ([{"CPU": 8.0}], {}, False, 8, 0.0),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}], {}, False, 2, 1.0),
        ([{"CPU": 8.0, "GPU": 2.0}], {}, True, 8, 0.0),
        ([{"CPU": 8.0, "GPU": 2.0}], {"shard_gpus": 0.5}, False, 4, 0.5),
        ([{"CPU": 4.0}, {"CPU": 5.0}], {"shard_cpus": 3}, False, 2, 0.0),
    ],
)
def test_a_shard_takes_its_share_of_the_cluster(machines, fleet, on_cpu, capacity, gpus):
    cluster = Cluster(*machines)
    tasks = RayTasks(cluster, FleetSettings(shard_retries=5, **fleet), on_cpu)
    assert tasks.capacity == capacity
    assert cluster.options["num_gpus"] == gpus
    assert cluster.options["max_retries"] == 5


def test_a_shard_that_fits_no_machine_is_wrong_input():
    with pytest.raises(InputError, match=r"no machine has them \(2 CPUs and 0 GPUs; 3 CPUs and"):
        RayTasks(Cluster({"CPU": 2.0}, {"CPU": 3.0}), FleetSettings(shard_cpus=4), False)


@pytest.mark.parametrize("module", [None, ModuleType("ray")], ids=["not installed", "a folder of this name"])
def test_without_ray_the_extra_is_named(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(InputError, match=r"pip install 'persona-rlhf\[ray\]'"),
        ray_tasks("local", Config.model_construct()),
    ):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:x", "nowhere.invalid:6379"])
def test_a_cluster_that_does_not_answer_is_wrong_input_at_once(monkeypatch, address):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=None, shutdown=None))
    with pytest.raises(InputError, match="no cluster answers at"), ray_tasks(address, Config.model_construct()):
        pass


def test_a_fault_of_a_shard_is_an_end_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def broken(*_, **__):
        raise OSError("no such device")

    monkeypatch.setattr(ray_shards, "train_share", broken)
    end = train_shard(Config.model_construct(), tmp_path, WorkShare(1, 4), False, str(tmp_path))
    assert not end.problems
    assert end.fault.startswith("OSError at test_ray_shards.py")
