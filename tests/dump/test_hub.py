"""``dump-labels --out hf://…``: a spool on this machine, and few commits at the end."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from stl_offline.config import DumpConfig
from stl_offline.dump import dump_labels, dump_on_ray
from stl_offline.errors import InputError, TargetError
from stl_offline.labels import hub as hub_module
from tests.dump.dumping import content

# The client hands bytes to httpx in a way that httpx no longer wants.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_workers_of_one_machine_make_two_commits(hub, work, tmp_path, monkeypatch):
    config = DumpConfig(**work | {"shards": 3}, out="hf://datasets/user/labels")
    # Stopped before its push, it goes on from its spool.
    with monkeypatch.context() as patch:
        patch.setattr(hub_module.HubFolder, "commit", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dump_labels(config)
    assert not hub.commits and (tmp_path / "cache" / "spool").is_dir()
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(dump_labels, [config, config]))
    assert [report.labelled for report in reports] == [0, 0] and reports[0].path == config.out
    assert [len(names) for names in hub.commits] == [3, 2]
    dump_labels(DumpConfig(**work | {"shards": 3}, out=str(tmp_path / "set")))
    assert {name: data for name, data in hub.files.items() if name[0] != "."} == content(tmp_path / "set")
    assert not [path for path in (tmp_path / "cache" / "spool").iterdir() if path.is_dir()]
    # Done already; and other settings for the same place.
    assert dump_labels(config).labelled == 0 and len(hub.commits) == 2
    with pytest.raises(TargetError, match="top_k is 1 and 2"):
        dump_labels(DumpConfig(**work | {"shards": 3, "top_k": 1}, out=config.out))


def test_a_stop_while_the_spool_is_removed(hub, work, tmp_path, monkeypatch):
    config = DumpConfig(**work | {"shards": 3}, out="hf://datasets/user/labels")

    def remove_some(folder, **_):
        (folder / "manifest.json").unlink(missing_ok=True)
        if folder.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", remove_some)
        with pytest.raises(KeyboardInterrupt):
            dump_labels(config)
    assert dump_labels(config).labelled == 0 and len(hub.commits) == 2
    assert not [path for path in (tmp_path / "cache" / "spool").iterdir() if path.is_dir()]


def test_what_the_hub_cannot_do(work):
    config = DumpConfig(**work, out="hf://datasets/user/labels")
    with pytest.raises(InputError, match="append to a copy of hf://datasets/user/labels on this machine"):
        dump_labels(config, append=True)
    with pytest.raises(InputError, match="several machines cannot share hf://"):
        dump_on_ray(config)


def test_other_files_of_a_repository_are_refused_before_labelling(hub, work, monkeypatch):
    hub.files["data.parquet"] = b"x"
    monkeypatch.setattr("stl_offline.dump.job.prepare", lambda *_: pytest.fail("it labels"))
    with pytest.raises(TargetError, match="is not empty and holds something else .data.parquet lies there"):
        dump_labels(DumpConfig(**work, out="hf://datasets/user/labels"))
