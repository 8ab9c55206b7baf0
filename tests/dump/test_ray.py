"""The Ray engine: its driver, and a cluster of several nodes on this machine, which come and go."""

import itertools
import tarfile
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from stl_offline.cli.main import main
from stl_offline.config import DumpConfig
from stl_offline.dump import dump_labels, dump_on_ray, on_ray
from stl_offline.errors import FormatError, TargetError
from tests.dump.dumping import content, run


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--ray-address", "auto"], "--ray-address needs --engine ray"),
        (["--engine", "ray", "--finish"], "excludes --estimate, --finish, --append and --worker"),
    ],
)
def test_options_that_would_do_nothing(capsys, more, words):
    assert main(["dump-labels", "--data", "x", "--labeler", "y", "--out", "z", *more]) == 2
    assert words in capsys.readouterr().err


class LostError(Exception):
    """An actor is gone."""


class StartError(LostError):
    """The actor's own `__init__` failed."""

    actor_init_failed = True


class TaskError(LostError):
    """The work of an actor failed, by ``cause``."""

    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class Task:
    def __init__(self, shard):
        self.shard = shard


class Ready:
    def __init__(self, fate):
        self.fate = fate


class Driven:
    """What of Ray's interface the driver uses. ``gpus``: at each look; ``fate``: of each try of a shard, or what is
    raised; ``start``: of each actor, likewise, or "never" for one that gets no place. Tasks end in the order in which
    they begin."""

    exceptions = SimpleNamespace(RayError=LostError, RayTaskError=TaskError)

    def __init__(self, gpus, fate, start=lambda actor: None):
        self.gpus, self.fate, self.actors, self.shares, self.written = list(gpus), fate, 0, [], []
        self.start = start

    def cluster_resources(self):
        found = self.gpus.pop(0) if len(self.gpus) > 1 else self.gpus[0]
        return {"CPU": 3.0} | ({"GPU": float(found)} if found else {})

    def remote(self, **share):
        self.shares.append(share)
        return lambda kind: SimpleNamespace(remote=self._start)

    def _start(self, config):
        self.actors += 1
        ready = Ready(self.start(self.actors))
        return SimpleNamespace(write=SimpleNamespace(remote=Task), ready=SimpleNamespace(remote=lambda: ready))

    def wait(self, tasks, num_returns, timeout):
        assert tasks, "as Ray has it"
        ended = [task for task in tasks if getattr(task, "fate", None) != "never"][:1]
        return ended, [task for task in tasks if task not in ended]

    def get(self, task):
        if isinstance(task, Ready):
            if task.fate:
                raise task.fate
            return None
        self.written.append(task.shard)
        if error := self.fate(task.shard, self.written.count(task.shard)):
            raise error
        return 10 + task.shard


def ended(cluster, device="auto", shards=range(5)):
    return list(on_ray._run(cluster, DumpConfig(data="x", labeler="y", out="z", device=device), list(shards)))


def test_actors_take_one_shard_after_another():
    cluster = Driven([2], lambda shard, tries: None)
    # One more than there are places is asked for, so that a cluster that can grow does.
    assert ended(cluster) == [10, 11, 12, 13, 14] and cluster.actors == 3
    assert cluster.shares == [{"max_restarts": 0, "num_gpus": 1}]
    # Never more than there are shards.
    cluster = Driven([0], lambda shard, tries: None)
    assert sorted(ended(cluster, shards=[3, 4])) == [13, 14] and cluster.actors == 2
    assert cluster.shares == [{"max_restarts": 0, "num_cpus": 1}]
    assert ended(Driven([2], None), shards=[]) == []


def test_a_cluster_without_gpus_is_waited_for(caplog):
    """One actor is asked for, with which a cluster that starts nodes on demand begins; then one per GPU that came."""
    cluster = Driven([0, 0, 4], lambda shard, tries: None)
    assert sorted(ended(cluster, "cuda")) == [10, 11, 12, 13, 14] and cluster.actors == 5
    assert "the cluster has no GPU now; waiting for one" in caplog.text
    assert cluster.shares == [{"max_restarts": 0, "num_gpus": 1}]


def test_a_shard_that_is_lost_goes_to_another_actor():
    cluster = Driven([1], lambda shard, tries: LostError("gone") if shard == 2 and tries < 4 else None)
    assert sorted(ended(cluster)) == [10, 11, 12, 13, 14]
    assert cluster.written.count(2) == 4 and cluster.actors == 4
    cluster = Driven([1], lambda shard, tries: LostError("out of memory") if shard == 1 else None)
    with pytest.raises(TargetError, match="shard 1 was lost with its actor 20 times: out of memory"):
        ended(cluster)


def test_shards_go_only_to_actors_that_have_a_place():
    """Half of the cluster is held by another job, which does not end."""
    cluster = Driven([4], lambda shard, tries: None, lambda actor: "never" if actor > 2 else None)
    assert sorted(ended(cluster)) == [10, 11, 12, 13, 14] and cluster.actors == 5


def test_an_actor_that_cannot_start(monkeypatch, caplog):
    """Nowhere: the fault is told. On one node: the others go on, and that place is tried again later."""
    error = StartError("The actor died\nTraceback: ...\nFormatError: labeler.safetensors is cut off\n")
    with pytest.raises(TargetError, match="no worker can be started: FormatError: labeler.safetensors is cut off"):
        ended(Driven([2], lambda shard, tries: None, lambda actor: error))
    assert caplog.text.count("a worker could not be started") == 2  # the last one decides
    caplog.clear()
    first_fails = Driven([3], lambda shard, tries: None, lambda actor: error if actor == 1 else None)
    assert sorted(ended(first_fails, shards=range(4))) == [10, 11, 12, 13]
    caplog.clear()
    clock = itertools.count(0, 25)
    monkeypatch.setattr(on_ray, "_POLL_SECONDS", 0)
    monkeypatch.setattr(on_ray.time, "monotonic", lambda: next(clock))
    cluster = Driven([3], lambda shard, tries: None, lambda actor: error if actor in (2, 4) else None)
    assert sorted(ended(cluster, shards=range(20))) == [10 + shard for shard in range(20)]
    assert 5 <= cluster.actors < 12 and cluster.written.count(3) == 1
    assert caplog.text.count("a worker could not be started: FormatError: labeler.safetensors is cut off") == 2
    # Killed while they start, such as for lack of memory, wherever that is tried.
    with pytest.raises(TargetError, match="no worker can be started: killed"):
        ended(Driven([2], lambda shard, tries: None, lambda actor: LostError("killed")))


def test_what_is_wrong_with_the_work_is_said_as_without_ray():
    error = FormatError("images.beton is cut off")
    with pytest.raises(FormatError, match="cut off"):
        ended(Driven([1], lambda shard, tries: TaskError(error)))
    with pytest.raises(TaskError, match="a bug"):
        ended(Driven([1], lambda shard, tries: TaskError(ValueError("a bug"))))


@pytest.mark.slow
def test_nodes_come_and_go(work, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
    # Ray gives its workers the lowest priority but four: beside other work, actors would not even start.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    assert run(work, tmp_path / "undisturbed").returncode == 0
    draw = np.random.default_rng(0)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes, changes = [cluster.add_node(num_cpus=1)], []
    config = DumpConfig(**work, out=str(tmp_path / "set"))
    images = sorted(Path(work["data"].removesuffix(".beton")).rglob("*.*g"))
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for path in images[number::3]:
                tar.add(path, path.relative_to(path.parents[1]))
    streamed = {name: value for name, value in work.items() if name != "shards"} | {"data": f"{tmp_path}/{{0..2}}.tar"}
    dump_labels(DumpConfig(**streamed, out=str(tmp_path / "tars-undisturbed")))
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        # Nodes are started by the main thread: they set signal handlers.
        with ThreadPoolExecutor(1) as pool:
            dump = pool.submit(dump_on_ray, config)
            while not wait([dump], float(draw.uniform(2, 6))).done:
                if nodes:
                    cluster.remove_node(nodes.pop(), allow_graceful=False)
                else:
                    nodes.append(cluster.add_node(num_cpus=1))
                changes.append(len(nodes))
            report = dump.result()
        ended = dump_on_ray(DumpConfig(**streamed, out=str(tmp_path / "tars")))
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert content(tmp_path / "set") == content(tmp_path / "undisturbed")
    assert content(tmp_path / "tars") == content(tmp_path / "tars-undisturbed")
    assert (ended.samples, ended.labelled) == (45, 45)
    assert 0 in changes and report.samples == 45 and report.labelled >= 45 - 3 * len(changes)
