"""Pushing to the Hugging Face hub: few commits, answers that ask to wait, damage. A server counts what is asked."""

import pytest

from stl_offline.errors import FormatError, TargetError
from stl_offline.files import sha256_file
from stl_offline.labels import hub as hub_module
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.transfer import push
from tests.labels.crash import files
from tests.labels.synthetic import make_spec, write_set

# The client hands bytes to httpx in a way that httpx no longer wants.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
PLACE = "hf://datasets/user/labels"


def labels(path, shards):
    write_set(path, make_spec(samples=shards, grid=(2, 3)), shards)
    return open_label_set(path)


def stored(hub):
    return {name: data for name, data in hub.files.items() if not name.startswith(".")}


def test_a_push_is_five_commits_at_most(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module, "_LEAST_SHARDS", 3)
    local = labels(tmp_path / "set", 17)
    report = push(local, PLACE)
    assert (report.sent, report.kept) == (17, 0)
    assert stored(hub) == files(tmp_path / "set")
    assert [len(names) for names in hub.commits] == [5, 5, 5, 2, 2]
    assert set(hub.commits[-1]) == {"README.md", "manifest.json"}
    asked = len(hub.asked)
    # Once more: nothing is sent, and no shard is read back.
    report = push(local, PLACE)
    assert (report.sent, report.kept) == (0, 17) and len(hub.commits) == 5
    assert not [path for _, path in hub.asked[asked:] if "labels-" in path and "resolve" in path]
    assert len(open_label_set(PLACE)) == 17


@pytest.mark.slow
def test_a_thousand_shards(hub, tmp_path):
    local = labels(tmp_path / "set", 1000)
    push(local, PLACE)
    assert len(hub.commits) == 5 and len(stored(hub)) == 1002


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"RateLimit": '"api";r=0;t=55'}, 56),
        ({}, 60),
        ({"Retry-After": "soon"}, 60),
        ({"Retry-After": "nan"}, 60),
        ({"Retry-After": "inf"}, 60),
        ({"Retry-After": "0"}, 1),
    ],
)
def test_it_waits_as_long_as_the_hub_asks(hub, tmp_path, monkeypatch, headers, seconds):
    waits = []
    monkeypatch.setattr(hub_module.time, "sleep", waits.append)
    hub.refusals = [headers, headers]
    push(labels(tmp_path / "set", 2), PLACE)
    assert waits == [seconds, seconds]
    assert stored(hub) == files(tmp_path / "set") and len(hub.commits) == 2


def test_it_does_not_wait_for_ever(hub, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(hub_module.time, "sleep", waits.append)
    hub.refusals = [{"Retry-After": "86400"}] * 2
    with pytest.raises(TargetError, match=r"cannot write hf://datasets/user/labels: .*429"):
        push(labels(tmp_path / "long", 2), PLACE)
    assert waits == [3600]
    hub.refusals = [{"Retry-After": "1800"}] * 9
    with pytest.raises(TargetError, match=r"cannot write hf://datasets/user/labels: .*429"):
        push(labels(tmp_path / "set", 2), PLACE)
    assert len(hub.refusals) == 6 and not hub.commits


def test_an_interrupted_push_goes_on(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module, "_LEAST_SHARDS", 2)
    local = labels(tmp_path / "set", 6)
    create, done = hub_module.HubFolder.commit, []

    def stop(self, files, message):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(message)
        create(self, files, message)

    with monkeypatch.context() as patch:
        patch.setattr(hub_module.HubFolder, "commit", stop)
        with pytest.raises(KeyboardInterrupt):
            push(local, PLACE)
    assert "manifest.json" not in hub.files
    assert push(local, PLACE).sent == 4
    assert stored(hub) == files(tmp_path / "set") and len(hub.commits) == 1 + 2 + 1


def test_a_damaged_shard_is_not_sent(hub, tmp_path):
    local = labels(tmp_path / "set", 3)
    path = tmp_path / "set" / local.shards[1].name
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"{local.shards[1].name} is missing or damaged"):
        push(local, PLACE)
    assert not hub.commits and sha256_file(path) != local.shards[1].sha256
