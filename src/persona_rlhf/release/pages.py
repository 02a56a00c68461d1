"""The templates of what is written for people: pages of HTML, and cards of Markdown."""

from __future__ import annotations

import shlex
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from persona_rlhf.release.table import printable


@cache
def templates(html: bool) -> Environment:
    """The templates of one kind; HTML escapes what is put into it, and a name that is missing is an error in both."""
    environment = Environment(
        loader=PackageLoader("persona_rlhf.release"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    environment.filters["shell"] = shlex.quote
    return environment
