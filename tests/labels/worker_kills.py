"""Kills, suspends and restarts workers of a label set at random moments, and counts what that cost.

The workers are processes without a labeler: they claim shards, wait as long as labelling would take, and write bytes
that were made before. So a worker costs milliseconds, and many can be killed. Each finished set is compared
with an undisturbed one, byte for byte. With ``--s3`` the set lies in a server of the S3 protocol that cuts connections
and answers 503, sometimes after it has done what was asked; with ``--store`` in a bucket of any store, such as that of
Google's testbench of Cloud Storage (github.com/googleapis/storage-testbench, STORAGE_EMULATOR_HOST). With ``--tars`` it
is written as that of streamed tars is, whose sizes are not known beforehand. With ``--append`` the workers add their
shards to a complete set.

    python -m tests.labels.worker_kills --kills 1000 --out runs/kills [--s3 | --store ADDRESS] [--tars] [--append]

A shard is counted as labelled twice if its labels were complete in the memory of two workers:

- lost with a worker that was killed between its last label and its record, so that another had to label the shard;
- late, of a worker that was suspended for longer than a claim lives, and was relieved meanwhile;
- needless, of two workers of which neither was killed nor suspended.

A shard that a killed worker had begun and not finished is counted as begun again.
"""

import argparse
import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from stl_offline import remote
from stl_offline.labels.append import AppendWriter, OldImages, TarAppendWriter, added_source, remove_leftovers
from stl_offline.labels.arrays import ShardArrays, concatenate
from stl_offline.labels.format import encode_shard
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.store import claims, open_storage
from stl_offline.labels.tar_writer import TarLabelWriter
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.crash import run
from tests.labels.synthetic import make_arrays, make_spec

CROWDS = (1, 2, 4, 8, 16, 32, 64)
# A worker's client of a store takes a second of a core to start.
STORE_CROWDS = (4, 8, 2, 1)
# Of the server: seconds from one connection that is cut to the next, and the share of writes that it refuses.
CUT_SECONDS, REFUSED_SHARE = 1.0, 0.01


@dataclass(frozen=True)
class Plan:
    """What the workers write: ``shards`` shards, each of which takes ``seconds``, of streamed tars or not, to a new set
    or after the shards of a complete one."""

    shards: int
    seconds: float
    tars: bool
    append: bool

    @property
    def before(self) -> int:
        """The shards of the set that is appended to."""
        return max(1, self.shards // 4) if self.append else 0


class Job:
    """A label set at ``place``, and the processes that work on it now."""

    def __init__(self, plan: Plan, place: str, log: Path) -> None:
        self.plan, self.place, self.log = plan, place, log
        self.spec = make_spec(samples=plan.shards)
        # Of a set that is appended to, the first are there already.
        self.arrays, self.encoded = make_shards(plan.before + plan.shards)
        self.running: list[int] = []
        self.killed: set[int] = set()
        self.suspended: set[int] = set()

    def prepare(self) -> None:
        """Write the set that is appended to."""
        if self.plan.append:
            with self._new_writer(self.plan.before) as writer:
                self._write(writer, lambda index: None, range(self.plan.before))

    def _new_writer(self, shards: int) -> LabelSetWriter:
        if self.plan.tars:
            return TarLabelWriter(self.place, self.spec, [tar_of(index) for index in range(shards)])
        return LabelSetWriter(self.place, make_spec(samples=shards), shards)

    def open_writer(self) -> LabelSetWriter | None:
        """None where the set is complete, which it is to be appended to."""
        plan = self.plan
        if not plan.append:
            return self._new_writer(plan.shards)
        base = open_label_set(self.place)
        if len(base.shards) > plan.before:
            remove_leftovers(base)
            return None
        if plan.tars:
            return TarAppendWriter(base, [tar_of(index) for index in range(plan.before, plan.before + plan.shards)])
        new = concatenate(self.arrays[plan.before :])
        source = added_source(base, OldImages.of(base), new.keys, new.class_id, new.content_hash)
        return AppendWriter(base, [1] * plan.shards, source)

    def work(self) -> None:
        """What a worker does."""
        writer = self.open_writer()
        if writer is not None:
            with writer:
                self._write(writer, self._label, writer.claim_shards())

    def _label(self, index: int) -> None:
        self.note(index, "begun")
        time.sleep(self.plan.seconds)
        self.note(index, "labelled")

    def _write(self, writer: LabelSetWriter, label: Callable[[int], None], shards: Iterable[int]) -> None:
        for index in shards:
            label(index)
            if self.plan.tars:
                writer.write_shard(index, self.arrays[index])
            else:
                writer.write_encoded(index, self.encoded[index])
            self.note(index, "written")
        writer.finish()

    def note(self, index: int, event: str) -> None:
        with open(self.log, "a") as stream:
            stream.write(f"{os.getpid()} {index} {event} {time.monotonic():.4f} .\n")

    def events(self) -> list[tuple[int, int, str, float]]:
        """Process, shard, event and time of each `note`."""
        lines = (line.split() for line in self.log.read_text().splitlines())
        return [(int(line[0]), int(line[1]), line[2], float(line[3])) for line in lines if len(line) == 5]

    def storing(self) -> list[float]:
        """Seconds from a shard's last label to its record, of workers that were not suspended."""
        ended = {(pid, index): seconds for pid, index, event, seconds in self.events() if event == "labelled"}
        return [
            seconds - ended[pid, index]
            for pid, index, event, seconds in self.events()
            if event == "written" and (pid, index) in ended and pid not in self.suspended
        ]

    def counts(self) -> Counter:
        """Of a set that was finished: what was done more than once, and why."""
        pids: dict[tuple[int, str], list[int]] = {}
        for pid, index, event, _ in self.events():
            pids.setdefault((index, event), []).append(pid)
        found: Counter = Counter()
        for index in range(self.plan.before, self.plan.before + self.plan.shards):
            begun, labelled = pids[index, "begun"], pids[index, "labelled"]
            lost = self.killed.intersection(labelled).difference(pids.get((index, "written"), []))
            kept = set(labelled) - lost
            late = self.suspended & kept
            # A worker that was killed right after its record was written did not lose it.
            surplus = len(labelled) - 1
            lost_count = min(surplus, len(lost))
            late_count = min(surplus - lost_count, len(late))
            found["shards"] += 1
            found["begun again"] += len(begun) - len(labelled)
            found["labelled twice"] += surplus
            found["labelled twice: lost with its worker"] += lost_count
            found["labelled twice: late"] += late_count
            found["labelled twice: needless"] += surplus - lost_count - late_count
        return found

    def start(self) -> None:
        child = os.fork()
        if child:
            self.running.append(child)
            return
        code = 1
        try:
            self.work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def reap(self) -> None:
        """Take note of the workers that have ended; raises where one failed that nobody killed."""
        for child in list(self.running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                self.running.remove(child)
                assert status == 0, f"a worker that nobody killed ended with {os.waitstatus_to_exitcode(status)}"

    def kill(self, child: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        self.running.remove(child)
        self.killed.add(child)
        os.waitpid(child, 0)


@cache
def make_shards(count: int) -> tuple[list[ShardArrays], list[bytes]]:
    """Shards of one image each, and their bytes."""
    spec = make_spec(samples=count)
    arrays = [make_arrays(spec, index, index + 1) for index in range(count)]
    return arrays, [encode_shard(each, spec) for each in arrays]


def tar_of(index: int) -> str:
    return f"images-{index:05d}.tar"


def stored(place: str) -> dict[str, bytes]:
    """Everything below a place, by name."""
    here = open_storage(place)
    assert not here.names(".partial")
    return {name: here.read(name) for name in here.names() if name != ".partial"}


def check(job: Job, expected: dict[str, bytes]) -> None:
    """Compare a finished set with an undisturbed one, once the files that the last kill left are removed."""
    # A worker that was killed at the very end leaves files of `.partial`, which the next one removes.
    writer = job.open_writer()
    if writer is not None:
        with writer:
            assert writer.complete
    found = stored(job.place)
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        print(f"not the bytes of an undisturbed set: {wrong}", file=sys.stderr, flush=True)
        raise AssertionError


def disturb(job: Job, crowd: int, most: int, draw: np.random.Generator, counts: Counter) -> None:
    """Keep ``crowd`` workers on a set until it is complete; at most ``most`` of them are killed."""
    for _ in range(crowd):
        job.start()
    suspended: list[tuple[float, int]] = []
    # Kills by progress, not by time: on a busy machine workers would be killed before they began.
    moments = np.sort(draw.uniform(0, job.plan.shards, most))
    kills, due = 0, math.inf
    deadline = time.monotonic() + 1200
    while job.running:
        assert time.monotonic() < deadline, "the workers do not come to an end"
        time.sleep(float(draw.uniform(0.2, 1)) * job.plan.seconds / min(crowd, 8))
        for until, child in list(suspended):
            if time.monotonic() > until:
                suspended.remove((until, child))
                os.kill(child, signal.SIGCONT)
        job.reap()
        if kills >= most:
            continue
        events = job.events()
        waiting = {each for _, each in suspended}
        working = sorted({pid for pid, *_ in events}.intersection(job.running) - waiting)
        if working and len({index for _, index, event, _ in events if event == "labelled"}) >= moments[kills]:
            # Not at once: that shard's worker is about to write it.
            due = min(due, time.monotonic() + float(draw.uniform(0, 2)) * job.plan.seconds)
        if not working or time.monotonic() < due:
            continue
        due = math.inf
        child = int(draw.choice(working))
        if draw.random() < 0.05:
            os.kill(child, signal.SIGSTOP)
            job.suspended.add(child)
            suspended.append((time.monotonic() + 1.5 * claims.LIFE_SECONDS, child))
            counts["suspended for longer than a claim lives"] += 1
            continue
        job.kill(child)
        job.start()
        kills += 1
        counts["kills"] += 1
        counts[f"kills among {crowd} workers"] += 1


def survive(out: Path, place: str, kills: int, seed: int, plan: Plan) -> tuple[Counter, list[float]]:
    """Kill so many workers, and compare every set that was finished with an undisturbed one.

    Gives what was counted, and how long each shard took to store, in seconds.
    """
    draw = np.random.default_rng(seed)
    counts: Counter = Counter()
    storing: list[float] = []
    # Alone and without waiting; in a process of its own, as all that work.
    undisturbed = Job(replace(plan, seconds=0.0), str(out / "undisturbed"), out / "log")
    assert run(undisturbed.prepare) == 0 and run(undisturbed.work) == 0
    expected = {path.name: path.read_bytes() for path in (out / "undisturbed").iterdir()}
    while counts["kills"] < kills:
        job = Job(plan, f"{place}/set-{counts['sets finished']}", out / "log")
        assert run(job.prepare) == 0
        job.log.write_text("")
        crowds = STORE_CROWDS if "://" in place else CROWDS
        crowd = crowds[counts["sets finished"] % len(crowds)]
        disturb(job, crowd, min(kills - counts["kills"], 1 + plan.shards // 12), draw, counts)
        # In a process of its own: what a store's client keeps cannot be forked.
        assert run(lambda job=job: check(job, expected)) == 0
        counts["sets finished"] += 1
        counts += job.counts()
        storing += job.storing()
        print(dict(counts), flush=True)
    return counts, storing


def serve() -> None:
    """Run an S3 server, and a proxy before it, until standard input ends. Prints the proxy's address."""
    from moto.s3.exceptions import S3ClientError
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    from tests.labels.conftest import FlakyWay, alone

    draw = np.random.default_rng(0)

    class SlowDown(S3ClientError):
        code = 503

        def __init__(self) -> None:
            super().__init__("SlowDown", "Please reduce your request rate.")

    put_object = alone(S3Response.put_object)

    def unreliable(self: S3Response) -> object:
        luck = draw.random()
        if luck < REFUSED_SHARE / 2:
            raise SlowDown
        answer = put_object(self)
        if luck < REFUSED_SHARE:
            raise SlowDown
        return answer

    S3Response.put_object = unreliable
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    way = FlakyWay(f"http://{host}:{port}")
    print(way.address, flush=True)
    while True:
        time.sleep(CUT_SECONDS)
        way.break_next(1, int(draw.integers(0, 2000)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=240, help="of each set; a twelfth of them are killed workers")
    parser.add_argument("--seconds", type=float, default=0.1, help="that labelling a shard takes")
    parser.add_argument("--seed", type=int, default=0)
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--s3", action="store_true")
    place.add_argument("--store", help="address of an empty bucket")
    parser.add_argument("--tars", action="store_true")
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
    os.environ |= {"STL_OFFLINE_QUIET": "1", "OMP_NUM_THREADS": "1"}
    claims.RENEW_SECONDS, claims.LIFE_SECONDS = 1.0, 5.0
    remote.FIRST_WAIT_SECONDS, remote.TRIES = 0.05, 8
    out = Path(options.out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    started = time.monotonic()
    arguments = (options.kills, options.seed, Plan(options.shards, options.seconds, options.tars, options.append))
    if options.s3:
        line = [sys.executable, "-m", "tests.labels.worker_kills", "--serve"]
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            address = server.stdout.readline().strip()
            os.environ |= {
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": address,
            }
            try:
                # By a process of its own: what a store's client keeps must not be forked.
                make = "import fsspec; fsspec.filesystem('s3').mkdir('labels')"
                subprocess.run([sys.executable, "-c", make], check=True)
                counts, storing = survive(out, "s3://labels", *arguments)
            finally:
                server.kill()
    else:
        counts, storing = survive(out, options.store or str(out), *arguments)
    for name, count in sorted(counts.items()):
        print(f"{name}: {count}")
    print(f"labelled twice: {100 * counts['labelled twice'] / counts['shards']:.2f} %")
    if storing:
        median, most = 1e3 * np.quantile(storing, [0.5, 0.9])
        print(f"from a shard's last label to its record: {median:.0f} ms (median), 90 % at most {most:.0f} ms")
    print(f"{time.monotonic() - started:,.0f} s", flush=True)


if __name__ == "__main__":
    main()
