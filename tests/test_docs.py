"""The documentation is right: its Python runs, its commands exist with the options they are given, its links lead on,
and the files and names that it names exist.

Python blocks of a page run in their order and share their names. They run in a folder that holds what the pages speak
of: images/train, images/val, train.beton, val.beton, labels (a label set of images/train) and runs/student.
"""

import dataclasses
import json
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import yaml

import stl_offline
from stl_offline.cli.main import COMMANDS, group
from tests.documentation import Block, anchors, blocks, commands, inner_names, links, named_files, pages
from tests.forks import Fork
from tests.labels.synthetic import make_arrays, make_spec
from tests.source_tree import REPOSITORY

KINDS = {"python", "sh", "text", "json", "yaml"}
WITH_PYTHON = [page for page in pages() if blocks(page, "python")]


def relative(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.fixture(scope="session")
def documented_folder(tmp_path_factory) -> Path:
    """The folder that the pages' Python runs in."""
    import timm

    from stl_offline.demo.shapes import write_shapes
    from stl_offline.images.beton import open_beton
    from stl_offline.images.pack import pack
    from stl_offline.labels.writer import LabelSetWriter
    from stl_offline.models import (
        WEIGHTS_NAME,
        Fan,  # noqa: F401  registers the models
        ModelDescription,
        save_model,
    )

    folder = tmp_path_factory.mktemp("documented")
    write_shapes(folder / "images", train=20, val=10)
    for split in ("train", "val"):
        pack(str(folder / "images" / split), folder / f"{split}.beton", workers=1)
    beton = open_beton(folder / "train.beton")
    spec = make_spec(
        len(beton),
        len(beton.class_names),
        (8, 8),
        class_names=beton.class_names,
        source={"samples": len(beton), "fingerprint": beton.fingerprint},
    )
    with LabelSetWriter(folder / "labels", spec, 2) as writer:
        for shard in range(2):
            first, last = writer.shard_range(shard)
            own = slice(first, last)
            arrays = dataclasses.replace(
                make_arrays(spec, first, last),
                keys=list(beton.keys[own]),
                content_hash=beton.content_hashes[own].astype("u8"),
                class_id=beton.class_ids[own].astype("u4"),
            )
            writer.write_shard(shard, arrays)
        writer.finish()
    name = "fan_micro_4_p8_token"
    model = timm.create_model(name, num_classes=len(beton.class_names))
    run = folder / "runs" / "student"
    run.mkdir(parents=True)
    save_model(run / WEIGHTS_NAME, model.state_dict(), ModelDescription(name, beton.class_names, 64, "student"))
    return folder


@pytest.mark.parametrize("page", WITH_PYTHON, ids=relative)
def test_python_blocks_run(page, documented_folder, tmp_path):
    # In a process of its own: a page may change the working directory, thread counts and warnings as it likes.
    script = tmp_path / "page.py"
    lines = ["" for _ in range(page.read_text().count("\n") + 1)]
    for block in blocks(page, "python"):
        for offset, text in enumerate(block.body.splitlines()):
            lines[block.line + offset] = text
    script.write_text("\n".join(lines))
    done = Fork(script, folder=documented_folder, env={"PYTHONPATH": str(REPOSITORY), "MPLBACKEND": "agg"})
    _, error = done.communicate()
    # Lines of the script are lines of the page, so the traceback points there.
    assert done.returncode == 0, f"{relative(page)} fails at the line that this names:\n{error}"


def check_command(words: list[str]) -> None:
    """Parse a stl-offline command line as click would, without running it."""
    command: click.Command = group
    context = click.Context(command, info_name="stl-offline")
    words = words[1:]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, *words = words
        inner = command.get_command(context, name)
        if inner is None:
            raise click.UsageError(f"no command {name!r}")
        command, context = inner, click.Context(inner, parent=context, info_name=name)
    if set(words) & {"--help", "-h", "--version"}:
        return
    command.make_context(context.info_name, list(words), parent=context.parent)


def problems(block: Block) -> list[str]:
    """What is wrong with the commands of a shell block."""
    found = []
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for words in commands(block):
        name = words[0].rpartition("/")[2]
        if name == "stl-offline":
            try:
                check_command(words)
            except click.ClickException as error:
                found.append(f"{block}: {' '.join(words)}: {error.format_message()}")
        elif name == "make":
            unknown = [word for word in words[1:] if "=" not in word and word not in targets]
            found += [f"{block}: make has no target {word}" for word in unknown]
    return found


@pytest.mark.parametrize("page", pages(), ids=relative)
def test_commands_parse(page):
    found = [problem for block in blocks(page, "sh") for problem in problems(block)]
    assert not found, found


@pytest.mark.parametrize("page", pages(), ids=relative)
def test_commands_named_in_the_text_exist(page):
    named = set(re.findall(r"`(?:\.venv/bin/)?stl-offline ([a-z][\w-]*)", page.read_text(encoding="utf-8")))
    assert named <= set(COMMANDS)


@pytest.mark.parametrize("page", pages(), ids=relative)
def test_every_block_says_its_kind_and_data_parse(page):
    for block in blocks(page):
        assert block.info in KINDS, f"{block} is of the kind {block.info!r}; known: {sorted(KINDS)}"
        if block.info == "json":
            json.loads(block.body)
        elif block.info == "yaml":
            yaml.safe_load(block.body)


@pytest.mark.parametrize("page", pages(), ids=relative)
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{relative(page)} links to {link}, which is not there"
        assert target.resolve().is_relative_to(REPOSITORY), f"{relative(page)} links out of the repository: {link}"
        if anchor:
            assert anchor in anchors(target), f"{relative(page)} links to {link}: no such heading"


@pytest.mark.parametrize("page", pages(), ids=relative)
def test_named_files_exist(page):
    roots = (REPOSITORY, REPOSITORY / "stl_offline")
    missing = [name for name in sorted(named_files(page)) if not any((root / name).is_file() for root in roots)]
    assert not missing, f"{relative(page)} names files that are not there: {missing}"


@pytest.mark.parametrize("page", WITH_PYTHON, ids=relative)
def test_python_blocks_use_the_public_names(page):
    found = {str(block): names for block in blocks(page, "python") if (names := inner_names(block))}
    assert not found, f"names outside stl_offline.__all__: {found}"


PAGE = """# A page

```sh
# a comment
FLAG=1 stl-offline pack images/train \\
    train.beton --workers 2 && make demo
stl-offline pack images/train
.venv/bin/stl-offline train-labeler --data x --out y --epoch 3 | tee log
stl-offline fly
make tea
```

```python
import stl_offline
from stl_offline import View, no_such
from stl_offline.files import cache_dir

stl_offline.View, stl_offline.nothing
```

See [it](#a-page) and [that](nowhere.md), `labels/writer.py`, `tests/labels/data/x.shard`, python -m tests.dump.killing
and https://example.org/a/b.py.
"""


def test_the_checks_see_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    (block,) = blocks(page, "sh")
    assert block.line == 3
    found = problems(block)
    assert len(found) == 4
    for problem, words in zip(found, ("Missing argument 'DEST'", "--epoch", "no command 'fly'", "tea"), strict=True):
        assert words in problem
    assert commands(block)[1] == ["make", "demo"]
    assert links(page) == ["#a-page", "nowhere.md"]
    assert anchors(page) == {"a-page"}
    assert named_files(page) == {"labels/writer.py", "tests/labels/data/x.shard", "tests/dump/killing.py"}
    (block,) = blocks(page, "python")
    assert sorted(inner_names(block)) == ["no_such", "nothing", "stl_offline.files"]


def test_the_api_page_has_every_public_name():
    named = re.findall(r"^::: stl_offline\.(\w+)$", (REPOSITORY / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted([*named, "__version__"]) == sorted(stl_offline.__all__)


def test_every_page_is_in_the_sites_navigation():
    # mkdocs.yml may hold tags of Python objects, which a safe loader refuses: its navigation is plain.
    named = re.findall(r"^ +- (\S+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE)
    top = {"index.md", *(path.name for path in REPOSITORY.glob("*.md"))} - {"README.md"}
    below = {str(path.relative_to(REPOSITORY / "docs")) for path in (REPOSITORY / "docs").rglob("*.md")}
    assert sorted(named) == sorted(top | below)


def scripts(value: object) -> list[str]:
    """The strings of a YAML document that run commands."""
    if isinstance(value, str):
        return [value] if "stl-offline dump-labels" in value else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [script for each in inner for script in scripts(each)]


def test_examples_for_clusters_are_scripts_that_start_a_dump():
    page = REPOSITORY / "docs" / "scale.md"
    found = [block.body for block in blocks(page, "sh")]
    found += [script for block in blocks(page, "yaml") for script in scripts(yaml.safe_load(block.body))]
    assert len(found) == 9
    for body in found:
        done = subprocess.run(["bash", "-n"], input=body, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        # Also a command in the quotes of another one; addresses have quotes of their own.
        command = r"(?:stl-offline|stl_offline\.cli) (dump-labels (?:[^'\"&>]|'\w+://[^']*')*)"
        words = re.search(command, body.replace("\\\n", " "))
        check_command(["stl-offline", *shlex.split(words[1])])
