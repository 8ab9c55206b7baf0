"""The documentation's pages taken apart: fenced blocks, links, and what they name of this repository."""

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import stl_offline
from tests.source_tree import REPOSITORY

FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]\n]*\]\((?P<target>[^)\s]+)\)")
# Files of the repository, from its top or from the package's folder, and tests' modules given to python -m.
PATH = re.compile(r"(?<![\w./{-])(?:[\w.-]+/)+[\w-]+\.(?:py|shard|ya?ml)\b|(?<=-m )tests\.[\w.]+")
COMMAND_ENDS = {"|", "&&", "||", ";", "&", ">", ">>", "<"}


@dataclass(frozen=True)
class Block:
    """A fenced block. ``info`` is the word after the fence: python and sh are checked, text is not."""

    page: str
    line: int
    info: str
    body: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """The pages at the top of the repository and every page below docs/."""
    return [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]


def blocks(page: Path, *infos: str) -> list[Block]:
    """The fenced blocks of a page; all of them, or those of the given kinds."""
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(REPOSITORY)) if page.is_relative_to(REPOSITORY) else page.name
    found = []
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        body = "".join(line[indent:] if line.strip() else line for line in match["body"].splitlines(keepends=True))
        found.append(Block(name, text.count("\n", 0, match.start()) + 1, match["info"].strip(), body))
    return [block for block in found if not infos or block.info in infos]


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block as lists of words: continued lines joined, comments and variables before left out.

    A line of several commands (a pipe, ``&&``) gives several lists.
    """
    found = []
    for line in block.body.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        current: list[str] = []
        for word in [*lexer, ";"]:
            if word not in COMMAND_ENDS:
                current.append(word)
                continue
            while current and re.fullmatch(r"\w+=.*", current[0]):
                current.pop(0)
            if current:
                found.append(current)
            current = []
    return found


def links(page: Path) -> list[str]:
    """Targets of the links of a page, outside fenced blocks."""
    return [match["target"] for match in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8")))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "").lower()).replace(" ", "-") for head in heads}


def named_files(page: Path) -> set[str]:
    """The files of this repository that a page names; ``-m tests.dump.killing`` names tests/dump/killing.py."""
    text = page.read_text(encoding="utf-8")
    return {name if "/" in name else name.replace(".", "/") + ".py" for name in PATH.findall(text)}


def inner_names(block: Block) -> list[str]:
    """What a Python block takes from stl_offline's modules, or under a name that is not in its ``__all__``."""
    found = []
    for node in ast.walk(ast.parse(block.body)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("stl_offline.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stl_offline."):
            found.append(node.module)
        elif isinstance(node, ast.ImportFrom) and node.module == "stl_offline":
            found += [alias.name for alias in node.names if alias.name not in stl_offline.__all__]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "stl_offline":
            found += [] if node.attr in stl_offline.__all__ else [node.attr]
    return found
