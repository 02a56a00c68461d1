"""The operator's page of `collect`: users, pairs, agreement and updates in numbers, without users' texts.

It is an app of its own on a port of loopback, so a proxy before the users' page does not lead to it. Its secret is made
at the start, is stored nowhere, and ends with the server. The page changes nothing. It needs the extra `serve`.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal, NamedTuple

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response
from starlette.exceptions import HTTPException

from persona_rlhf.data.choice_ledger import FAULT, FEW, HARM, SAFETY, Update
from persona_rlhf.data.collected_users import CollectedUser
from persona_rlhf.evaluation.statistics import wilson
from persona_rlhf.serving.collect_forms import PageError
from persona_rlhf.serving.collect_guard import PageGuard
from persona_rlhf.serving.collect_views import page, static_file

CAUSES = {
    HARM: "worse by the user's choices than the one before, or no longer like the base",
    SAFETY: "the gate did not release it",
    FEW: "screening left too few pairs",
    FAULT: "the training ended with an error, which the log of `collect` has",
}
"""Causes for which no new adapter came of a training, in the operator's words."""

UpdateState = Literal["training", "failed", "waiting", "released"]
"""Of a user's adapter: a training that has begun, one that brought no adapter, enough choices, none of these."""


class UserUpdate(NamedTuple):
    """The state of the updates of a user's adapter: since when, and the cause where no adapter came of a training."""

    user_id: str
    state: UpdateState
    at: str
    cause: str


def user_updates(users: Sequence[CollectedUser], updates: Sequence[Update], wanted: int) -> list[UserUpdate]:
    """The updates that train, failed, wait for a training, or were released, in this order.

    A user waits with `wanted` preferred answers that are in no source of the run. After a failed training these count
    from there. Users with none of this are left out.
    """
    last = {update.user_id: update for update in updates if update.event != "restored"}
    states = [state for user in users if (state := _state(user, last.get(user.user_id), wanted)) is not None]
    order = ("training", "failed", "waiting", "released")
    return sorted(states, key=lambda update: order.index(update.state))


def _state(user: CollectedUser, last: Update | None, wanted: int) -> UserUpdate | None:
    if last is not None and last.event == "begun":
        return UserUpdate(user.user_id, "training", last.at, "")
    tried = last.choices if last is not None and last.event == "failed" else 0
    if user.waiting >= wanted and user.preferred - tried >= wanted:
        return UserUpdate(user.user_id, "waiting", user.last, "")
    if last is None:
        return None
    if last.event == "released":
        return UserUpdate(user.user_id, "released", last.at, "")
    return UserUpdate(user.user_id, "failed", last.at, CAUSES[last.detail])


class AdminPage:
    """The operator's page. `users` reads the numbers of all users anew, and `updates` the ledger's steps of updates.

    `wanted` choices give an update, which begins by itself where it is `automatic`.
    """

    def __init__(
        self,
        users: Callable[[], Sequence[CollectedUser]],
        updates: Callable[[], Sequence[Update]],
        wanted: int,
        automatic: bool,
        log: Callable[[str], None],
    ) -> None:
        self._users, self._updates, self._wanted, self._automatic = users, updates, wanted, automatic
        self._guard = PageGuard(log)
        self.token = secrets.token_urlsafe(32)
        self._cookie = f"collect-admin-{secrets.token_hex(4)}"  # two servers on one host keep their sessions apart

    def app(self) -> FastAPI:
        """The ASGI app."""
        app = FastAPI(title="persona-rlhf collect, operator", openapi_url=None, docs_url=None, redoc_url=None)
        for path, endpoint in (("/", self._show), ("/enter/{token}", self._enter), ("/static/{name}", static_file)):
            app.add_api_route(path, self._guard.safely(endpoint), methods=["GET"])
        app.add_exception_handler(HTTPException, self._guard.missing)
        return app

    async def _enter(self, request: Request) -> Response:
        """Opens a session by the secret of the link, which leaves the address bar at once."""
        self._need(str(request.path_params["token"]))
        response = RedirectResponse("/", HTTPStatus.SEE_OTHER)
        response.set_cookie(self._cookie, self.token, httponly=True, samesite="strict", path="/")
        return response

    async def _show(self, request: Request) -> Response:
        self._need(request.cookies.get(self._cookie, ""))
        return await run_in_threadpool(self._page)

    def _need(self, token: str) -> None:
        """Raises PageError (401) for another secret than the server's."""
        if not hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self.token.encode()):
            raise PageError(401, "This page opens with the operator's link, which `collect --admin-port` prints.")

    def _page(self) -> Response:
        users = self._users()
        updates = user_updates(users, self._updates(), self._wanted)
        numbers: dict[str, Any] = {"users": users, "sums": _sums(users), "agreement": _agreement(users)}
        settings: dict[str, Any] = {"wanted": self._wanted, "automatic": self._automatic}
        return page("admin", user_id="", updates=updates, **numbers, **settings)


def _sums(users: Collection[CollectedUser]) -> Mapping[str, int]:
    names = ("choices", "preferred", "waiting", "undone", "deletion_wished")
    return {name: sum(int(getattr(user, name)) for user in users) for name in names}


class Agreement(NamedTuple):
    """Of `n` choices that came again, how many were decided alike, with Wilson's interval of the share."""

    alike: int
    n: int
    low: float
    high: float


def _agreement(users: Collection[CollectedUser]) -> Agreement:
    alike, n = sum(user.alike for user in users), sum(user.repeated for user in users)
    return Agreement(alike, n, *wilson(alike, n))
