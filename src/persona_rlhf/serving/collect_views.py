"""The look of the feedback page: templates, static files, and the policy that lets a browser load nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment

from persona_rlhf.common.errors import counted
from persona_rlhf.release.render import environment
from persona_rlhf.serving.collect_forms import PageError

CSP = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
"""No inline script or style runs, and nothing comes from elsewhere."""

HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # an address with a secret goes nowhere else; `no-referrer` makes the Origin null
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Headers of all responses."""

_ACTIVE = {
    "comparison": "home",
    "prompt": "home",
    "paused": "home",
    "wishes": "wishes",
    "data": "data",
}  # entries of the navigation
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_KINDS = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}


class StaticFile(NamedTuple):
    """A file that a page loads."""

    content: bytes
    kind: str


STATIC: Mapping[str, StaticFile] = {
    name: StaticFile((files("persona_rlhf.serving") / "templates" / name).read_bytes(), _KINDS[name.rpartition(".")[2]])
    for name in ("collect.css", "collect.js", "collect.svg")
}


def page(name: str, status: int = 200, **content: Any) -> Response:
    """A page of a template."""
    return HTMLResponse(render(name, **content), status)


def render(name: str, **content: Any) -> str:
    """The text of a template, with the texts in it escaped."""
    return _environment().get_template(f"collect_{name}.html.j2").render(content, active=_ACTIVE.get(name, ""))


async def static_file(request: Request) -> Response:
    """A file that a page loads. Raises PageError (404) for another one."""
    file = STATIC.get(str(request.path_params["name"]))
    if file is None:
        raise PageError(404, "There is nothing here.")
    return Response(file.content, media_type=file.kind)


@cache
def _environment() -> Environment:
    pages = environment("persona_rlhf.serving", html=True)
    pages.filters |= {"shown": _shown, "counted": counted}
    return pages


def _shown(text: str) -> str:
    """A text of several lines, in which control characters are replaced."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
