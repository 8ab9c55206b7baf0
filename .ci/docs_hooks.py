"""Hooks of mkdocs (`make docs`): pages at the top of the repository become pages of the site.

README.md is the front page. Links between these pages and docs/ are made to fit; a link to any other file of the
repository keeps its text alone, since the site does not hold that file.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:!\[[^\]]*\]\([^)]*\)|[^\[\]])*)\]\((?P<target>[^)\s]+)\)")
SOURCE = re.compile(r'(?<=src=")docs/')
FENCE = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)


def on_files(files, config):
    for name, place in PAGES.items():
        files.append(File.generated(config, place, content=(REPOSITORY / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    inside = page.file.src_uri
    is_top = inside in PAGES.values()
    folder = "" if is_top else posixpath.dirname(f"docs/{inside}")

    def fit(match):
        target, _, anchor = match["target"].partition("#")
        text = LINK.sub(fit, match["text"])
        if not target or ":" in target:
            return f"{match['image']}[{text}]({match['target']})"
        path = posixpath.normpath(posixpath.join(folder, target))
        place = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if place is None:
            return text
        place = posixpath.relpath(place, posixpath.dirname(inside) or ".")
        return f"{match['image']}[{text}]({place}{'#' + anchor if anchor else ''})"

    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(fit, part) for part in parts[::2]]
    text = "".join(parts)
    return SOURCE.sub("", text) if is_top else text
