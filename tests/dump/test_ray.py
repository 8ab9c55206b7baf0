"""The Ray engine on a cluster of several nodes on this machine, which come and go."""

import tarfile
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest

from stl_offline.cli.main import main
from stl_offline.config import DumpConfig
from stl_offline.dump import dump_labels, dump_on_ray
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
