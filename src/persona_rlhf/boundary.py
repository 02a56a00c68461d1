"""The one place where an error becomes a sentence on stderr and an exit code: 1 is our fault, 2 the user's input."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

import typer

from persona_rlhf.inputs.problems import InputError

P = ParamSpec("P")


def bounded(verb: Callable[P, None]) -> Callable[P, None]:
    """A verb that ends in an exit code whatever happens; PERSONA_RLHF_DEBUG=1 shows the traceback of a fault."""

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            verb(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except InputError as fault:
            for problem in fault.problems:
                say(str(problem))
            count = len(fault.problems)
            say(f"{count} problem{'' if count == 1 else 's'} found.")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            say("Interrupted.")
            raise typer.Exit(130) from None
        except Exception as fault:
            if os.environ.get("PERSONA_RLHF_DEBUG") == "1":
                traceback.print_exc()
            last = traceback.extract_tb(fault.__traceback__)[-1]
            what = f"{type(fault).__name__} at {Path(last.filename).name}:{last.lineno}: {fault}"
            say(f"Internal fault, not your input: {what}. PERSONA_RLHF_DEBUG=1 shows the traceback.")
            raise typer.Exit(1) from None

    return run


def say(text: str) -> None:
    """A line for people, on stderr; what their terminal cannot show is escaped."""
    encoding = sys.stderr.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr, flush=True)  # noqa: T201
