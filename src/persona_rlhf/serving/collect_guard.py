"""Pages instead of exceptions, and the headers of all pages, around every page of `collect`."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path

from fastapi import Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from persona_rlhf.common.errors import InputError
from persona_rlhf.serving.collect_forms import PageError
from persona_rlhf.serving.collect_views import HEADERS, page
from persona_rlhf.serving.openai_api import APIError

_CLIENT_LEFT = 499

Endpoint = Callable[[Request], Awaitable[Response]]


class PageGuard:
    """Endpoints that answer a fault by a page; `log` receives its type and place, for the operator."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log

    def safely(self, endpoint: Endpoint) -> Endpoint:
        """An endpoint whose exceptions become pages, and whose responses carry the headers of all pages."""

        async def respond(request: Request) -> Response:
            try:
                response = await endpoint(request)
            except PageError as error:
                response = error_page(error.status, error.sentence)
            except APIError as error:
                response = error_page(error.status, error.message)
                if error.retry_after is not None:
                    response.headers["Retry-After"] = str(error.retry_after)
            except ClientDisconnect:
                response = Response(status_code=_CLIENT_LEFT)  # nobody reads it
            except InputError as fault:
                self._log(f"Not done: {fault}")
                response = error_page(503, "This could not be done now. Please try again later.")
            except Exception as fault:
                self.log_fault(fault)
                response = error_page(500, "The page failed here, and nothing was saved. Please try again.")
            response.headers.update(HEADERS)
            return response

        return respond

    def log_fault(self, fault: Exception) -> None:
        """Logs type and place of a fault; its message may hold users' text."""
        last = traceback.extract_tb(fault.__traceback__)[-1]
        self._log(f"Internal fault: {type(fault).__name__} at {Path(last.filename).name}:{last.lineno}")

    async def missing(self, _: Request, fault: Exception) -> Response:
        """The page of an address or a method that there is not."""
        status = fault.status_code if isinstance(fault, HTTPException) else 404
        response = error_page(status, "There is nothing here." if status == 404 else f"{HTTPStatus(status).phrase}.")
        response.headers.update(HEADERS)
        return response


def error_page(status: int, sentence: str) -> Response:
    """A page that says why something was not done."""
    return page("error", status, user_id="", sentence=sentence)
