"""Self-contained HTML pages: one file with its styles, scripts and images, which asks for nothing from anywhere."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from stl_offline.files import atomic_write

_LOADER = PackageLoader("stl_offline.reports", "templates")
_ENVIRONMENT = Environment(
    loader=_LOADER, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_STYLE, _THEME = "page.css", "theme.js"
_SCRIPTS = ("page.js", "tokens.js", "filters.js")  # one script on the page, in this order


def render_page(template: str, **values: Any) -> bytes:
    """A page of a template; every value is escaped where it is written."""
    scripts = {"script": "\n".join(map(_source, _SCRIPTS)), "theme": _source(_THEME)}
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src "
        f"{' '.join(_digest(text) for text in scripts.values())}; base-uri 'none'; form-action 'none'"
    )
    page = _ENVIRONMENT.get_template(template).render(style=_source(_STYLE), policy=policy, **scripts, **values)
    return page.encode()


def write_page(path: str | Path, page: bytes) -> Path:
    """Write a page, whole or not at all. Raises TargetError."""
    atomic_write(path, page)
    return Path(path)


def _source(name: str) -> str:
    text, _, _ = _LOADER.get_source(_ENVIRONMENT, name)
    return text


def _digest(text: str) -> str:
    """A script's name in a content security policy: the browser runs these scripts and no others."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
