"""Serve a page on loopback, with a token, security headers and live events. Slow parts are computed
in child processes.

| request                                          | what the server does                          |
| the token is missing or wrong                    | 401, without content                          |
| the Host header names another host than loopback | 421: another web site's name may resolve to   |
|                                                  | this machine (DNS rebinding)                  |
| the method is neither GET nor HEAD               | 405                                           |
| no page has this path                            | 404                                           |
| a connection sends no request                    | closed: see connections.py                    |
Guarantee: no header lets another origin read an answer, and every answer's content security policy
lets the page load from this server only. The token is random. The printed address contains it; the
first request stores it in a cookie of the browser (HttpOnly, SameSite=Strict)."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import uvicorn
from jinja2 import Environment, FileSystemLoader
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedtune import __version__
from fedtune.core import boot
from fedtune.core.errors import FedtuneError, InfrastructureError
from fedtune.core.registry.reasons import reason_of
from fedtune.core.registry.rounding import rounded_down, rounded_up
from fedtune.dashboard import work
from fedtune.dashboard.connections import Prompt
from fedtune.dashboard.pages import Page
from fedtune.report.figures import duration, format_short, size_text

HERE = Path(__file__).parent
HOST = "127.0.0.1"
NAMES = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", re.IGNORECASE)
LOOK_SECONDS = 0.5  # pause between two checks whether a page's files changed
REST_SECONDS = 15.0  # shortest time between two computations of a slow part of a page
WORK_SECONDS = 300.0  # its time limit: a folder may be made so that the computation never ends
PING_SECONDS = 15.0
POLICY = "; ".join(
    [
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect", "font")),
        *(f"{kind} 'none'" for kind in ("base-uri", "form-action", "frame-ancestors")),
    ]
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


LAST = {"connection": "close"}  # header of refusals: no connection is kept open for these clients


class Guard:
    """Refuses requests without the token, with a Host other than loopback, or with a method other
    than GET and HEAD. Adds HEADERS to every response."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token
        self._cookie = f"fedtune-{secrets.token_hex(4)}"  # random, since all ports share cookies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                kept = [pair for pair in message["headers"] if pair[0].decode() not in HEADERS]
                message = {**message, "headers": [*kept, *own]}
            await send(message)

        response = self._refusal(scope) or self._admission(scope)
        await (response or self._app)(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = {
            key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
        }
        if not NAMES.fullmatch(headers.get("host", "")):
            return Response("this server answers to 127.0.0.1 and localhost alone\n", 421, LAST)
        if scope["method"] not in ("GET", "HEAD"):
            return Response("pages are only read\n", 405, {"allow": "GET, HEAD"} | LAST)
        return None

    def _admission(self, scope: Scope) -> Response | None:
        """Return None if the request's cookie holds the token. If the address holds the token,
        return a response that sets the cookie and redirects to the address without the token. If
        neither does, return a 401."""
        # http.cookies would raise for names that browsers send, such as those of other programs.
        if self._is_token(HTTPConnection(scope).cookies.get(self._cookie, "")):
            return None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if not self._is_token(given):
            text = "401: open the address that `fedtune dashboard` printed, with its token\n"
            return Response(text, 401, LAST, media_type="text/plain")
        here = "/" + scope["path"].lstrip("/")  # a redirect to "//name/" leads to another server
        response = Response(status_code=303, headers={"location": here})
        response.set_cookie(self._cookie, self._token, httponly=True, samesite="strict")
        return response

    def _is_token(self, value: str) -> bool:
        return secrets.compare_digest(value.encode("utf-8", "replace"), self._token.encode())


class _Result(NamedTuple):
    signature: str
    at: float
    value: dict[str, Any]


class Views:
    """The addresses that the server answers (`routes`), for one page and the runs inside it, and
    how each is answered."""

    def __init__(self, page: Page) -> None:
        self._page, self._locks = page, dict[str, asyncio.Lock]()
        self._results: dict[str, _Result] = {}
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        filters = {
            "epsilon": rounded_up,
            "short": format_short,
            "bytes": size_text,
            "reason": reason_of,
        }
        self._templates.filters |= {
            **filters,
            "duration": duration,
            "moment": _moment,
            "floor3": rounded_down,
        }
        self._templates.globals |= {"version": __version__}

    def routes(self) -> list[Route | Mount]:
        parts: list[Route | Mount] = []
        for prefix in ("", "/runs/{name}"):
            parts += [
                Route(f"{prefix}/", self.page),
                Route(f"{prefix}/live/{{part}}", self.live),
                Route(f"{prefix}/series", self.series),
                Route(f"{prefix}/slow/{{what}}", self.show_slow_part),
                Route(f"{prefix}/events", self.events),
            ]
        return [*parts, Mount("/static", StaticFiles(directory=HERE / "static"))]

    async def page(self, request: Request) -> Response:
        return await self._render(request, "")

    async def live(self, request: Request) -> Response:
        part = request.path_params["part"]
        if part not in self._of(request).parts:
            raise HTTPException(404)
        return await self._render(request, f"_{part}")

    async def series(self, request: Request) -> Response:
        found = await run_in_threadpool(self._of(request).series)
        return JSONResponse(found)

    async def show_slow_part(self, request: Request) -> Response:
        """Show the result of a function of work.py, which a child process computes. The result is
        kept. It is computed again only if the files on which it depends have changed, and only once
        REST_SECONDS have passed since the last time."""
        page, what = self._of(request), request.path_params["what"]
        if what not in page.slow:
            raise HTTPException(404)
        key = f"{page.path} {what}"
        async with self._locks.setdefault(key, asyncio.Lock()):
            known, signature = self._results.get(key), page.signature(page.slow_files())
            rests = known is not None and time.monotonic() - known.at < REST_SECONDS
            if known is None or (known.signature != signature and not rests):
                value = await run_work(what, page)
                known = self._results[key] = _Result(signature, time.monotonic(), value)
        template = self._templates.get_template(f"slow_{what}.html")
        return HTMLResponse(template.render(found=known.value, page=page))

    async def events(self, request: Request) -> Response:
        return StreamingResponse(self._changes(self._of(request)), media_type="text/event-stream")

    async def _changes(self, page: Page) -> AsyncIterator[str]:
        """Yield server-sent events until the browser leaves: "change" if one of the page's `files`
        changed, "slow" if one of its `slow_files` changed. Without a change, yield a comment every
        PING_SECONDS."""

        def state() -> tuple[str, str]:
            return page.signature(page.files()), page.signature(page.slow_files())

        before, told = await run_in_threadpool(state), time.monotonic()
        yield "retry: 1000\n\n"
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = await run_in_threadpool(state)
            kinds = ("change", "slow")
            changed = [kind for kind, a, b in zip(kinds, before, now, strict=True) if a != b]
            if not changed and time.monotonic() - told < PING_SECONDS:
                continue
            before, told = now, time.monotonic()
            yield "".join(f"event: {kind}\ndata: files\n\n" for kind in changed) or ": here\n\n"

    async def _render(self, request: Request, part: str) -> Response:
        page = self._of(request)
        template = self._templates.get_template(f"{page.kind}{part}.html")

        def render() -> str:
            if part == "_rounds":
                page.read_rounds()
            above = self._page.title if page is not self._page else ""
            return template.render(page=page, above=above, **page.read_context())

        return HTMLResponse(await run_in_threadpool(render))

    def _of(self, request: Request) -> Page:
        name = request.path_params.get("name")
        page = self._page if name is None else self._page.child(name)
        if page is None:
            raise HTTPException(404)
        return page


async def run_work(what: str, page: Page) -> dict[str, Any]:
    """Run a function of work.py on a page's path in a child process. Return its result, or
    {"error": …} if it fails or takes longer than WORK_SECONDS. what: the function's name."""
    words = boot.command(work.__name__, what, str(page.path), page.trust)
    child = await asyncio.create_subprocess_exec(
        *words,
        env=boot.environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(WORK_SECONDS):
            printed, _ = await child.communicate()
        found: dict[str, Any] = json.loads(printed)
        return found
    except TimeoutError:
        return {
            "error": f"this takes more than {WORK_SECONDS:g} s; a terminal command has no limit"
        }
    except ValueError:
        return {"error": "this could not be computed; the same command in a terminal says why"}
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


def app_of(page: Page, token: str) -> Starlette:
    """Build the web application that serves one page to browsers with the token."""

    async def show_error(_: Request, error: Exception) -> Response:
        return Response(f"{error}\n", 500, media_type="text/plain")

    handlers: dict[Any, Any] = {FedtuneError: show_error}
    middleware = [Middleware(Guard, token=token)]
    return Starlette(
        routes=Views(page).routes(), middleware=middleware, exception_handlers=handlers
    )


def serve(page: Page, port: int = 0, say: Any = print) -> None:
    """Serve a page on loopback until Ctrl-C. port: 0 for any free port. say: called once with the
    page's address, which holds the token, to show it to the user.

    Errors: InfrastructureError if the port is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()  # before the address is printed, so that it can be opened at once
    except OSError as error:
        listener.close()
        raise InfrastructureError(
            f"port {port} of {HOST} cannot be opened ({error.strerror})",
            todo="choose another port with --port",
        ) from None
    token = secrets.token_urlsafe(24)
    config = uvicorn.Config(
        app_of(page, token),
        http=Prompt,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
    )
    sys.setswitchinterval(0.001)  # so that a page is shown while a thread still reads rounds
    threading.Thread(target=page.read_rounds, daemon=True).start()
    say(f"http://{HOST}:{listener.getsockname()[1]}/?token={token}")
    uvicorn.Server(config).run(sockets=[listener])


def _moment(text: str) -> str:
    """Format a UTC time for people: "2024-01-01T12:00:00Z" becomes "2024-01-01 12:00:00 UTC"."""
    return str(text).replace("T", " ").replace("Z", " UTC")
