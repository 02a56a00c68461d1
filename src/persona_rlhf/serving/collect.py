"""The FastAPI app of `collect`: pages on which a user compares two answers, without JavaScript, and what forms change.

Every page belongs to a link (`collect_links`): its secret is the session's cookie, and the key of the forms' CSRF
token. Users' texts are escaped on pages, and are never logged. It needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from persona_rlhf.common.clock import now
from persona_rlhf.common.errors import visible
from persona_rlhf.common.files import pseudonym
from persona_rlhf.data.choice_ledger import CONSENTS, DELETIONS, VERDICTS, ChoiceLedger
from persona_rlhf.data.erasure import DataSubject
from persona_rlhf.data.page_rows import append_rows, page_lock
from persona_rlhf.data.wish_documents import WishDesk, document_file
from persona_rlhf.release.deletion_records import forgotten
from persona_rlhf.release.served_places import ledger_choices
from persona_rlhf.serving.access import Limits, RateLimiter
from persona_rlhf.serving.answer_sampler import AnswerSampler
from persona_rlhf.serving.collect_forms import (
    LONGEST_PROMPT,
    Form,
    PageError,
    prompt_fault,
    read_form,
    site_of,
    wish_fields,
    wishes_of,
)
from persona_rlhf.serving.collect_guard import PageGuard
from persona_rlhf.serving.collect_links import Link, Links, Session, remove_links
from persona_rlhf.serving.collect_progress import StopAdvice, UserProgress, change_adapter, never
from persona_rlhf.serving.collect_stream import growing_page
from persona_rlhf.serving.collect_views import page, static_file
from persona_rlhf.serving.comparisons import AnswerPair, OpenComparisons, Suggestions
from persona_rlhf.serving.openai_api import APIError
from persona_rlhf.serving.pair_writing import PairWriting
from persona_rlhf.serving.server import read_body

LIMITS = Limits(body=1 << 18, rate=120, concurrent=24)
_LONGEST_REASON = 1_000

T = TypeVar("T")


class CollectSettings(NamedTuple):
    """The operator's settings: preferred answers that give an update, and the address of links, if any.

    `automatic` updates begin by themselves. `advice` says whether more answers would change little.
    """

    first_update: int = 20
    address: str = ""
    automatic: bool = False
    advice: StopAdvice = never


Handler = Callable[[Session, Form], Awaitable[Response]]


def do_nothing() -> None:
    """Does nothing after a choice."""


class FeedbackPages:
    """The pages and forms of all users of a run. `log` receives faults and deletions, for the operator.

    `on_choice` is called after each choice that was saved.
    """

    def __init__(
        self,
        run: Path,
        sampler: AnswerSampler,
        ledger: ChoiceLedger,
        suggestions: Suggestions,
        comparisons: OpenComparisons,
        desk: WishDesk,
        log: Callable[[str], None],
        settings: CollectSettings | None = None,
        limits: Limits = LIMITS,
        on_choice: Callable[[], None] = do_nothing,
    ) -> None:
        self._run, self._sampler, self._ledger, self._log = run, sampler, ledger, log
        self._suggestions, self._open, self._desk = suggestions, comparisons, desk
        self._settings, self._limits = settings or CollectSettings(), limits
        self._links, self._rate, self._guard = Links(run), RateLimiter(limits), PageGuard(log)
        self._on_choice = on_choice
        updates = self._settings.first_update, self._settings.automatic
        self._user_progress = UserProgress(run, ledger, sampler, *updates, self._settings.advice)
        self._site = site_of(self._settings.address)  # a proxy may put its own Host in place of this one
        self._asking: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._places = asyncio.Semaphore(limits.concurrent)  # for users whose answers are being written
        self._cookie = f"collect-{pseudonym(str(run.resolve()))[:8]}"  # two runs on one host keep their sessions apart

    def app(self) -> FastAPI:
        """The ASGI app."""
        app = FastAPI(title="persona-rlhf collect", openapi_url=None, docs_url=None, redoc_url=None)
        app.add_api_route("/health", self._health, methods=["GET"])
        app.add_api_route("/static/{name}", self._guard.safely(static_file), methods=["GET"])
        app.add_api_route("/enter/{token}", self._guard.safely(self._enter), methods=["GET"])
        pages = (("/", self._home), ("/wishes", self._wishes), ("/data", self._data), ("/choices.json", self._choices))
        for path, show in pages:
            app.add_api_route(path, self._guard.safely(partial(self._shown, show)), methods=["GET"])
        forms: dict[str, Handler] = {
            "/consent": self._consent,
            "/ask": self._ask,
            "/skip": self._skip,
            "/choose": self._choose,
            "/undo": self._undo,
            "/pause": self._pause,
            "/assistant": self._change,
            "/wishes": self._wish,
            "/delete": self._delete,
            "/enter": self._replace,
        }
        for path, handle in forms.items():
            app.add_api_route(path, self._guard.safely(partial(self._handled, handle)), methods=["POST"])
        app.add_exception_handler(HTTPException, self._guard.missing)
        return app

    # Reading pages

    async def _home(self, session: Session, request: Request) -> Response:
        """The pair that the user has before them; without one, the form for a prompt; at first, the consent."""
        consent = await run_in_threadpool(self._ledger.consent, session.user_id)
        if consent is None:
            return self._page(session, "welcome", scope="own")
        comparison = self._open.of(session.user_id)
        notice = request.query_params.get("note", "")
        if comparison is None:
            return await self._prompt_page(session, notice=notice, more=request.query_params.get("more", ""))
        if notice == "paused" and comparison.shown_at is None:
            return self._page(session, "paused")
        if comparison.fault:
            self._open.drop(session.user_id, comparison.id)
            return await self._prompt_page(session, comparison.prompt, comparison.fault, status=503)
        content: dict[str, Any] = {"notice": notice, "form_token": session.form_token, "user_id": session.user_id}
        content |= await self._progress(session)
        if not comparison.finished:
            parts = growing_page(comparison, partial(self._is_open, comparison), **content)
            return StreamingResponse(parts, media_type="text/html; charset=utf-8")
        comparison.show()
        return page("comparison", comparison=comparison, growing=False, **content)

    async def _prompt_page(
        self, session: Session, prompt: str = "", fault: str = "", notice: str = "", more: str = "", status: int = 200
    ) -> Response:
        choices = await run_in_threadpool(self._ledger.choices, session.user_id)
        number = int(more) if more.isascii() and more.isdecimal() and len(more) < 6 else 0
        suggested = self._suggestions.of(session.user_id, {choice.prompt for choice in choices}, number)
        content = {"prompt": prompt, "fault": fault, "notice": notice, "suggested": suggested, "more": number + 1}
        last = choices[-1] if choices else None
        return self._page(session, "prompt", status, **content, last=last, **await self._progress(session))

    async def _progress(self, session: Session) -> dict[str, Any]:
        return await run_in_threadpool(self._user_progress.content, session.user_id)

    async def _wishes(self, session: Session, _: Request) -> Response:
        wishes = await run_in_threadpool(self._desk.saved, session.user_id)
        return self._page(session, "wishes", **wish_fields(self._desk, wishes), faults=[], overruled=[], saved=False)

    async def _data(self, session: Session, _: Request) -> Response:
        consent = await run_in_threadpool(self._ledger.consent, session.user_id)
        content = {"scope": consent or "own", "expires": session.expires, **await self._progress(session)}
        return self._page(session, "data", **content)

    async def _choices(self, session: Session, _: Request) -> Response:
        """All that the ledger holds of the user, to take away."""
        everything = await run_in_threadpool(self._ledger.everything, session.user_id)
        text = json.dumps(everything, indent=2, ensure_ascii=False)
        headers = {"Content-Disposition": 'attachment; filename="choices.json"'}
        return Response(text, media_type="application/json; charset=utf-8", headers=headers)

    # Forms

    async def _consent(self, session: Session, form: Form) -> Response:
        scope = form.get("scope")
        if scope not in CONSENTS:
            raise PageError(400, "Choose one of the two uses of your choices.")
        await run_in_threadpool(
            self._while_linked, session, partial(self._ledger.record_consent, session.user_id, scope)
        )
        return _to("/")

    async def _ask(self, session: Session, form: Form) -> Response:
        """Samples two answers. A form that is sent again meanwhile gets the same two."""
        prompt = form.get("prompt", "").replace("\r\n", "\n").strip()
        if fault := prompt_fault(prompt):
            return await self._prompt_page(session, prompt[:LONGEST_PROMPT], fault, status=400)
        if await run_in_threadpool(self._ledger.consent, session.user_id) is None:
            return _to("/")
        before = self._open.of(session.user_id)
        async with self._asking[session.user_id]:
            comparison = self._open.of(session.user_id)
            if comparison not in (None, before) or (comparison and comparison.being_written(prompt)):
                return _to("/")
            await self._places.acquire()
            try:
                writing = await run_in_threadpool(self._sampler.begin, session.user_id, prompt)
                self._open.put(writing.pair)
            except BaseException as error:
                self._places.release()
                if isinstance(error, APIError) and error.status < 500:
                    return await self._prompt_page(session, prompt, error.message, status=400)
                raise
        response = _to("/")
        response.background = BackgroundTask(self._write, writing)
        return response

    async def _write(self, writing: PairWriting) -> None:
        """Writes the answers of a pair after the response: the page that follows shows them as they grow."""
        try:
            await run_in_threadpool(writing.write, partial(self._is_open, writing.pair))
        except APIError as error:
            writing.pair.fault = error.message
        except Exception as fault:
            self._guard.log_fault(fault)
            writing.pair.fault = "The answers could not be written. Please try again."
        finally:
            self._places.release()

    def _is_open(self, comparison: AnswerPair) -> bool:
        return self._open.of(comparison.user_id) is comparison

    async def _skip(self, session: Session, form: Form) -> Response:
        self._open.drop(session.user_id, form.get("comparison", ""))
        return _to("/")

    async def _choose(self, session: Session, form: Form) -> Response:
        """Saves a choice; the page that follows says so only when it is on the disk."""
        verdict = next((one for one in VERDICTS if one == form.get("verdict")), None)
        reason = form.get("reason", "").replace("\r\n", "\n").strip()
        if verdict is None:
            raise PageError(400, "This form has no choice. Go back, and press one of the four buttons.")
        comparison = self._open.of(session.user_id)
        if comparison is None or comparison.id != form.get("comparison", ""):
            saved = await run_in_threadpool(self._ledger.has, form.get("comparison", ""))
            return _to("/?note=repeated" if saved else "/?note=closed")
        if not comparison.finished:
            return _to("/")
        if comparison.same and verdict in ("left", "right"):
            raise PageError(
                400, "Both answers are the same, so neither can be better. Go back, and press another button."
            )
        consent = await run_in_threadpool(self._ledger.consent, session.user_id)
        if consent is None:
            return _to("/")
        choice = comparison.decided(verdict, reason[:_LONGEST_REASON], consent)
        saved = await run_in_threadpool(self._ledger.append, choice)
        self._open.drop(session.user_id, comparison.id)
        self._on_choice()
        return _to("/?note=saved" if saved else "/?note=repeated")

    async def _undo(self, session: Session, form: Form) -> Response:
        """Takes a choice back, and shows its pair again."""
        choice = await run_in_threadpool(self._ledger.undo, form.get("choice", ""), session.user_id)
        if choice is None:
            return _to("/?note=not-undone")
        self._open.put(AnswerPair.again(choice))
        return _to("/?note=undone")

    async def _pause(self, session: Session, _: Form) -> Response:
        if (comparison := self._open.of(session.user_id)) is not None:
            comparison.pause()
        return _to("/?note=paused")

    async def _change(self, session: Session, form: Form) -> Response:
        """Goes back to the adapter before, or forward again; the pair that is open came from the present one."""
        change = partial(change_adapter, self._run, self._ledger, session.user_id, form.get("adapter", ""))
        await run_in_threadpool(change)
        self._open.drop(session.user_id)
        return _to("/?note=changed")

    async def _wish(self, session: Session, form: Form) -> Response:
        """Writes the user's document of tier three; a wish that a tier above forbids is explained, and not saved."""
        wishes, user_id = wishes_of(form), session.user_id
        if pseudonym(user_id) in forgotten(self._run):
            raise PageError(403, "Your data was deleted, so nothing is saved.")
        faults = await run_in_threadpool(self._desk.faults, user_id, wishes)
        if not faults:
            save = partial(self._desk.save, user_id, wishes)
            file = await run_in_threadpool(self._while_linked, session, save)
            if pseudonym(user_id) in forgotten(self._run):  # meanwhile
                file.unlink()
        overruled = [] if faults else await run_in_threadpool(self._desk.overruled, user_id, wishes)
        fields = wish_fields(self._desk, wishes)
        status = 400 if faults else 200
        return self._page(session, "wishes", status, **fields, faults=faults, overruled=overruled, saved=not faults)

    async def _delete(self, session: Session, form: Form) -> Response:
        """Asks once more; then deletes the user's choices, wishes and links, and notes it for the operator."""
        if form.get("sure") != "yes":
            return self._page(session, "delete")
        await run_in_threadpool(self._erase, session.user_id)
        response = self._page(None, "deleted")
        response.delete_cookie(self._cookie)
        return response

    def _erase(self, user_id: str) -> None:
        append_rows(self._run, DELETIONS, json.dumps({"user_id": user_id, "at": now()}).encode() + b"\n")
        user = DataSubject(pseudonym(user_id))
        self._ledger.erase(user)  # before the links: where it fails, the user can try again
        for trace in ledger_choices(self._run, user):  # of servers with another --ledger
            trace.remove()
        with page_lock(self._run):
            document_file(self._run, user_id).unlink(missing_ok=True)
            remove_links(self._run, user_id)
        self._open.drop(user_id)
        for trace in ledger_choices(self._run, user):  # from another page of the user, meanwhile
            trace.remove()
        self._log(visible(f"A user deleted their choices on the page. For all else: forget RUN --user {user_id!r}"))

    def _while_linked(self, session: Session, write: Callable[[], T]) -> T:
        """Writes while the link holds: a deletion in another tab comes before or after. Raises PageError (401)."""
        with page_lock(self._run):
            self._session_of(session.token)
            return write()

    # Sessions, checks and errors

    async def _health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def _enter(self, request: Request) -> Response:
        """Opens a session by the secret of a link, which leaves the address bar at once."""
        token = str(request.path_params["token"])
        session = self._session_of(token)
        if (present := self._present(request)) is not None and present.user_id != session.user_id:
            return self._page(present, "replace", other=session.user_id, token=token)
        return self._entered(token)

    def _entered(self, token: str) -> Response:
        response = _to("/")
        secure = self._settings.address.startswith("https:")
        response.set_cookie(self._cookie, token, httponly=True, samesite="lax", secure=secure, path="/")
        return response

    async def _replace(self, _: Session, form: Form) -> Response:
        """Opens another user's session in place of the present one, as a link alone must not do."""
        token = form.get("token", "")
        self._session_of(token)
        return self._entered(token)

    def _present(self, request: Request) -> Session | None:
        """The session that a browser has open, if any."""
        try:
            return self._session_of(request.cookies.get(self._cookie))
        except PageError:
            return None

    def _session_of(self, token: str | None) -> Session:
        """Raises PageError (401) unless the secret opens a page now."""
        link: Link | None = self._links.of(token) if token else None
        if token is None or link is None:
            raise PageError(401, "This page opens with your personal link. Open the link that you were given.")
        if link.expired:
            raise PageError(401, "Your link has expired. Your choices are safe; ask for a new link.")
        return Session(link.user_id, token, link.expires[:10])

    async def _shown(self, show: Callable[[Session, Request], Awaitable[Response]], request: Request) -> Response:
        session = self._session_of(request.cookies.get(self._cookie))
        self._rate.count(session.user_id)
        return await show(session, request)

    async def _handled(self, handle: Handler, request: Request) -> Response:
        """A form's response. Raises PageError for a form of another site, of another session, or of another kind."""
        session = self._session_of(request.cookies.get(self._cookie))
        self._rate.count(session.user_id)
        origin = request.headers.get("origin")
        sites = {request.headers.get("host"), self._site} - {""}
        if origin is not None and urlsplit(origin).netloc not in sites:
            raise PageError(403, "This form comes from another site, so nothing was done.")
        form = read_form(request.headers.get("content-type", ""), await read_body(request, self._limits.body))
        if not hmac.compare_digest(form.pop("form_token", "").encode(), session.form_token.encode()):
            raise PageError(403, "This form is not of your session, so nothing was done. Open the page again.")
        return await handle(session, form)

    def _page(self, session: Session | None, name: str, status: int = 200, **content: Any) -> Response:
        who = {"user_id": session.user_id, "form_token": session.form_token} if session else {"user_id": ""}
        return page(name, status, **who, **content)


def _to(path: str) -> Response:
    return RedirectResponse(path, HTTPStatus.SEE_OTHER)
