"""The Ray engine on a cluster of several nodes on this machine, which come and go."""

from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest

from stl_offline.cli.main import main
from stl_offline.config import DumpConfig
from stl_offline.dump import dump_on_ray
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
    assert run(work, tmp_path / "undisturbed").returncode == 0
    draw = np.random.default_rng(0)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes, changes = [cluster.add_node(num_cpus=1)], []
    config = DumpConfig(**work, out=str(tmp_path / "set"))
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
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert content(tmp_path / "set") == content(tmp_path / "undisturbed")
    assert 0 in changes and report.samples == 45 and report.labelled >= 45 - 3 * len(changes)
