"""What is attacked: files that readers of this package take from others.

A target makes whole files once. `case` damages a copy and reads it: it gives "same" where what is read is what was
written, "changed" where it is not (allowed only where no checksum covers the file, or where it was made anew), and
raises StlError where the file is refused. All else is a fault.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import xxhash
import yaml
from numcodecs import Zstd
from PIL import Image

import stl_offline.models  # noqa: F401  (registers the models)
from stl_offline.config import LabelerConfig, StudentConfig
from stl_offline.errors import StlError
from stl_offline.files import canonical_json
from stl_offline.images.beton import MIN_PAGE_SIZE, BetonWriter, open_beton
from stl_offline.images.encode import encode_image
from stl_offline.images.sources import open_source
from stl_offline.labels.format.tar_shard import _gzip
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.verify import verify
from stl_offline.models import ModelDescription, load_model, save_model
from stl_offline.recipes import recipe_names, resolve
from stl_offline.recipes.reading import FOLDER
from stl_offline.reports.runs import read_runs, setting_rows
from stl_offline.training.run_folder import STATE, RunFolder
from tests.fuzz.mutate import damage_bytes, damage_json, damage_json_text, damage_zip, odd_value
from tests.labels.synthetic import make_spec, write_set


class WrongDataError(Exception):
    """Damage that a checksum covers was read as if nothing were wrong."""


class LabelSets:
    """A label set: the manifest, a shard, or what lies within a shard."""

    def __init__(self, folder: Path, container: str, encoding: str) -> None:
        self.spec = make_spec(samples=24, container=container, encoding=encoding)
        write_set(folder / "whole", self.spec, shards=2)
        self.files = {path.name: path.read_bytes() for path in (folder / "whole").iterdir() if path.is_file()}
        self.shards = sorted(name for name in self.files if name.startswith("labels-"))
        labels = open_label_set(folder / "whole")
        self.arrays = [labels.read_shard(index) for index in range(2)]

    def damage(self, draw: random.Random, folder: Path) -> bool:
        """Write a damaged copy into ``folder``; whether a checksum covers what was changed."""
        files = dict(self.files)
        again = draw.random() < 0.5
        if draw.random() < 0.25:
            covered = False
            files["manifest.json"] = damage_json_text(draw, files["manifest.json"])
        else:
            covered = not again
            name = draw.choice(self.shards)
            inner = damage_zip if name.endswith(".zip") else _damage_label_tar
            files[name] = (inner if draw.random() < 0.7 else damage_bytes)(draw, files[name])
            if again:
                manifest = json.loads(files["manifest.json"])
                record = manifest["shards"][self.shards.index(name)]
                record["sha256"] = hashlib.sha256(files[name]).hexdigest()
                record["bytes"] = len(files[name])
                files["manifest.json"] = canonical_json(manifest)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return covered

    def case(self, draw: random.Random, folder: Path) -> str:
        covered = self.damage(draw, folder)
        labels = open_label_set(folder)
        report = verify(labels, workers=1)
        indexes = []
        for index in labels.present:  # without the shards' checksums, so that each decoder is reached
            with contextlib.suppress(StlError):
                indexes.append(labels.read_index(index))
        arrays = [labels.read_shard(index) for index in labels.present]
        if report.faults:
            # Duplicates across shards, which no single shard shows.
            return "refused"
        same = len(arrays) == 2 and all(map(lambda ours, theirs: ours.equals(theirs), self.arrays, arrays))
        if same or not covered:
            return "same" if same else "changed"
        raise WrongDataError("other labels, under a checksum that fits")


def _damage_label_tar(draw: random.Random, data: bytes) -> bytes:
    """A tar with whole headers and gzip members, but for one member: its record, its name, its size or its kind."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [(info, archive.extractfile(info).read()) for info in archive]
    place = draw.randrange(len(members))
    info, content = members[place]
    kind = draw.randrange(8)
    if place == 0 and kind <= 4:
        content = damage_json_text(draw, content)
    elif kind <= 3:
        content = _gzip(damage_bytes(draw, gzip.decompress(content)))
    elif kind == 4:
        content = damage_bytes(draw, content)
    elif kind == 5:
        info.name = draw.choice((info.name + "x", "../" + info.name, "n" * 300 + ".labels.npy.gz", members[-1][0].name))
    elif kind == 6:
        info.type = draw.choice((b"x", b"g", b"S", b"L", b"K", b"1", b"2", b"5", b"\0", b"7", b"Z"))
    info.size = len(content)
    members[place] = (info, content)
    if kind == 7:
        del members[place]
    for each, body in members:
        if each is info and draw.random() < 0.1:
            each.size = draw.choice((-1, -512, 0, 1, 10**9, 2**62))
        stream.write(each.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + body + bytes(-len(body) % 512))
    return stream.getvalue() + bytes(1024)


def _draw_image(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, *(("JPEG",) if number % 2 else ("PNG",)))
    return stream.getvalue()


class Betons:
    """A .beton: header, index, records, pages, table."""

    _RECORDS, _PLACE = 24 + 4 * 1041, 24 + 1041 + 17

    def __init__(self, folder: Path) -> None:
        path = folder / "whole.beton"
        with open(path, "wb") as stream:
            writer = BetonWriter(stream, 4, MIN_PAGE_SIZE)
            for number in range(4):
                writer.add(f"k/{number}", number % 2, encode_image(_draw_image(number)))
            writer.finish(("cat", "dog"), {"kind": "test"})
        self.data = path.read_bytes()
        self.whole = self.read(path)

    def case(self, draw: random.Random, folder: Path) -> str:
        data, again = self.data, draw.random() < 0.5
        if again:
            data = self._with_index(draw, data) if draw.random() < 0.5 else self._with_records(draw, data)
        else:
            data = damage_bytes(draw, data)
        (folder / "x.beton").write_bytes(data)
        same = self.read(folder / "x.beton") == self.whole
        if same or again:
            return "same" if same else "changed"
        raise WrongDataError("other images, under checksums that fit")

    def read(self, path: Path) -> tuple:
        beton = open_beton(path)
        images = [beton.read_image(index).tobytes() for index in range(len(beton))]
        return beton.keys, beton.class_names, beton.class_ids.tolist(), images

    def _with_index(self, draw: random.Random, data: bytes) -> bytes:
        _, _, _, offset, size, _, records = struct.unpack_from("<8sIIQQQQ", data, self._PLACE)
        index = Zstd().decode(data[offset : offset + size])
        packed = Zstd().encode(damage_json_text(draw, bytes(index)))
        if draw.random() < 0.2:
            packed = damage_bytes(draw, packed)
        changed = bytearray(data[:offset] + packed + data[offset + size :])
        struct.pack_into("<QQQ", changed, self._PLACE + 24, len(packed), xxhash.xxh3_64_intdigest(packed), records)
        struct.pack_into("<Q", changed, 16, offset + len(packed))
        return bytes(changed)

    def _with_records(self, draw: random.Random, data: bytes) -> bytes:
        changed = bytearray(data)
        count = struct.unpack_from("<Q", data, 8)[0]
        end = self._RECORDS + 40 * count
        table = struct.unpack_from("<Q", data, 16)[0]
        start, stop = draw.choice(((self._RECORDS, end), (table, len(data)), (0, 24)))
        for _ in range(draw.randrange(1, 4)):
            width = draw.choice((1, 4, 8))
            place = draw.randrange(start, stop - width + 1)
            value = draw.choice((0, 1, 0xFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 2**63, 2**64 - 1, draw.randrange(1 << 16)))
            changed[place : place + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        struct.pack_into("<Q", changed, self._PLACE + 40, xxhash.xxh3_64_intdigest(bytes(changed[self._RECORDS : end])))
        return bytes(changed)


class RunFiles:
    """A run's folder, one of its files damaged; read by the report, by a run that goes on, by whoever loads it."""

    def __init__(self, folder: Path) -> None:
        self.settings = {"epochs": 3, "lr": 0.001, "out": None, "names": ["a", "b"]}
        self.data = {"images": {"fingerprint": "ab"}, "class_names": ["ant", "bee", "cat"]}
        run = folder / "whole"
        runs = RunFolder(run, "student", self.settings, self.data)
        with runs.held():
            runs.open(resume=True, write=True)
        history = [{"epoch": epoch, "top1": 0.1 * epoch, "loss": 3.0 - epoch, "seconds": 1.5} for epoch in range(3)]
        runs.write_log(history)
        (run / "summary.json").write_bytes(canonical_json({"top1": 0.3, "epochs": 3, "seconds": 4.5}))
        torch.manual_seed(0)  # or a case's number would not repeat it
        model = timm.create_model("fan_micro_4_p8_token", num_classes=3, img_size=32)
        description = ModelDescription("fan_micro_4_p8_token", ("ant", "bee", "cat"), 32, "student")
        save_model(run / "weights.safetensors", model.state_dict(), description)
        state = {name: {"value": torch.arange(50)} for name in STATE}
        torch.save(state, run / "state.pt")
        names = ("config.json", "log.jsonl", "summary.json", "weights.safetensors", "state.pt")
        self.files = {name: (run / name).read_bytes() for name in names}
        self.weights = model.state_dict()

    def case(self, draw: random.Random, folder: Path) -> str:
        name = draw.choice(list(self.files))
        files = dict(self.files)
        if name == "state.pt":
            del files["summary.json"]
        damage = damage_bytes if name in ("weights.safetensors", "state.pt") else damage_json_text
        if name == "log.jsonl":
            lines = files[name].splitlines()
            lines[draw.randrange(3)] = damage_json_text(draw, lines[draw.randrange(3)])
            files[name] = b"\n".join(lines)
        elif name == "weights.safetensors" and draw.random() < 0.5:
            length = struct.unpack_from("<Q", files[name])[0]
            header = damage_json_text(draw, files[name][8 : 8 + length])
            files[name] = struct.pack("<Q", len(header)) + header + files[name][8 + length :]
        else:
            files[name] = damage(draw, files[name])
        for each, data in files.items():
            if not each.startswith("weights") or each == name:
                (folder / each).write_bytes(data)
        if name == "weights.safetensors":
            model, _ = load_model(folder)
            found = model.state_dict()
            same = found.keys() == self.weights.keys() and all(map(torch.equal, found.values(), self.weights.values()))
            return "same" if same else "changed"  # a header without a digest is one of the first releases
        if name == "state.pt":
            runs = RunFolder(folder, "student", self.settings, self.data)
            state = runs.open(resume=True, write=False)
            same = state.keys() == STATE and all(
                isinstance(value, dict) and value.keys() == {"value"} and torch.equal(value["value"], torch.arange(50))
                for value in state.values()
            )
            return "same" if same else "changed"
        refused = 0
        for read in (self._report, self._go_on):
            try:
                read(folder)
            except StlError:
                refused += 1
        return "refused" if refused else "changed"

    def _report(self, folder: Path) -> None:
        runs = read_runs([folder])
        setting_rows(runs)
        for run in runs:
            repr((run.epochs, run.status, run.points("top1"), run.result("top1"), run.total("seconds")))

    def _go_on(self, folder: Path) -> None:
        runs = RunFolder(folder, "student", self.settings, self.data)
        runs.look(True)
        runs.summary()


class Recipes:
    """YAML of settings."""

    def __init__(self, folder: Path) -> None:
        self.texts = [(FOLDER / f"{name}.yaml").read_bytes() for name in recipe_names()]

    def case(self, draw: random.Random, folder: Path) -> str:
        text = draw.choice(self.texts)
        if draw.random() < 0.5:
            text = damage_bytes(draw, text)
        else:
            values = damage_json(draw, yaml.safe_load(text))
            if draw.random() < 0.3 and isinstance(values, dict):
                values[draw.choice([field.name for field in dataclasses.fields(StudentConfig)])] = odd_value(draw)
            text = (json.dumps(values) if draw.random() < 0.5 else yaml.safe_dump(values)).encode("utf-8", "replace")
        (folder / "r.yaml").write_bytes(text)
        kind = draw.choice((StudentConfig, LabelerConfig))
        needed = {"data": "a", "out": "b"} | ({"labels": "c"} if kind is StudentConfig else {})
        known = {field.name for field in dataclasses.fields(kind)}
        resolve(kind, str(folder / "r.yaml"), {name: value for name, value in needed.items() if name in known})
        return "changed"


class ImageTars:
    """A tar of images and classes; each image that is read is checked as packing checks it."""

    def __init__(self, folder: Path) -> None:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for number in range(6):
                image = _draw_image(number)
                kind = "jpg" if image[:2] == b"\xff\xd8" else "png"
                for name, data in ((f"{number:03d}.{kind}", image), (f"{number:03d}.cls", b"%d" % (number % 2))):
                    info = tarfile.TarInfo(name if number else "é" * 120 + name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        self.data = stream.getvalue()
        (folder / "whole.tar").write_bytes(self.data)
        self.whole = self._read(folder / "whole.tar")

    def case(self, draw: random.Random, folder: Path) -> str:
        data = damage_bytes(draw, self.data)
        if draw.random() < 0.6:
            data = bytearray(self.data)
            # A field of one header, whose checksum is made anew.
            blocks = [at for at in range(0, len(data) - 512, 512) if data[at + 257 : at + 262] == b"ustar"]
            at = draw.choice(blocks)
            place, width = draw.choice(((0, 100), (124, 12), (156, 1), (257, 8), (345, 155), (100, 8)))
            field = draw.choice(
                (b"%011o" % draw.choice((0, 1, 513, 10**6, 8**11 - 1)), b"\xff" * 12, b"\x80" + bytes(11))
            )
            data[at + place : at + place + width] = draw.choice((field, draw.randbytes(width), b"xgLKS15267"))[
                :width
            ].ljust(width, b"\0")
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        if draw.random() < 0.2:
            data = gzip.compress(bytes(data), 1)
            data = damage_bytes(draw, data) if draw.random() < 0.5 else data
        (folder / "x.tar").write_bytes(bytes(data))
        return "same" if self._read(folder / "x.tar") == self.whole else "changed"

    @staticmethod
    def _read(path: Path) -> tuple:
        source = open_source(path)
        found = []
        for image in source:
            with contextlib.suppress(StlError):  # one image, refused
                found.append((image.key, image.class_id, encode_image(image.data).data))
        return source.class_names, found


READERS: dict[str, Callable[[Path], object]] = {
    **{
        f"labels {container} {encoding}": lambda folder, container=container, encoding=encoding: LabelSets(
            folder, container, encoding
        )
        for container in ("zarr", "webdataset")
        for encoding in ("f16", "q8")
    },
    "beton": Betons,
    "run folder": RunFiles,
    "recipe": Recipes,
    "image tar": ImageTars,
}
