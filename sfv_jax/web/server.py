"""HTTP around sessions, uploads and generation (Starlette and uvicorn, of the extra `demo`). Nothing asks outside."""

import asyncio
import contextlib
import ipaddress
import json
import logging
import socket
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfv_jax import choices
from sfv_jax.errors import UserError
from sfv_jax.web.generation import generate
from sfv_jax.web.models import Models
from sfv_jax.web.request import BESIDE, NUMBERS, Limits, RequestError, parse
from sfv_jax.web.sessions import Session, SessionEnded, Sessions
from sfv_jax.web.turns import Job, Turns, sentence
from sfv_jax.web.uploads import data_url, receive, too_many_bytes

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
HEADERS = {
    # Nothing from elsewhere, nothing inline, in no frame of another page.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
MOST_REQUEST = 20_000  # bytes of the JSON of a request
UPLOAD_SECONDS = 120.0
GRACE = 30.0  # seconds that the server may take to end, a busy machine included
UPLOADS = 4  # received and decoded at a time
PULSE = 10.0  # seconds after which a line is sent though nothing happened
LOG = logging.getLogger(__name__)


class Page:
    """The application: its pages, its sessions, and the thread that generates.

    Args:
      models: what is offered.
      limits: limits of uploads and of what is kept.
      host: address that the server listens at; on a loopback address, requests for other names are refused.
      parent: folder for the folder of all files; default: the system's for temporary files.
    """

    def __init__(self, models: Models, limits: Limits, host: str = "127.0.0.1", parent: Path | None = None):
        self.models, self.limits = models, limits
        self.sessions = Sessions(limits, parent)
        self.turns = Turns(limits.waiting, lambda error: LOG.error("generation failed", exc_info=error))
        self._uploads = asyncio.Semaphore(UPLOADS)
        one = "/api/session/{session}"
        routes = [
            *(Route(path, self.page) for path in FILES),
            Route("/api/session", self.begin, methods=["POST"]),
            Route(f"{one}/alive", self.alive, methods=["POST"]),
            Route(f"{one}/end", self.end, methods=["POST"]),
            Route(f"{one}/image", self.image, methods=["PUT"]),
            Route(f"{one}/videos", self.videos, methods=["POST"]),
            Route(f"{one}/files/{{name}}", self.file),
        ]
        app = Starlette(routes=routes, exception_handlers={UserError: _refused}, lifespan=self._lifespan)
        self.app: ASGIApp = _Guard(app, own=is_loopback(host))

    def close(self) -> None:
        """Ends what runs, and deletes all files."""
        self.turns.close()
        self.sessions.close()

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None, None]:
        async def sweep() -> None:
            while True:
                await asyncio.sleep(min(self.limits.idle / 4, 30))
                await asyncio.to_thread(self.sessions.sweep)

        task = asyncio.create_task(sweep())
        yield
        task.cancel()

    async def page(self, request: HTTPRequest) -> Response:
        name, kind = FILES[request.url.path]
        return FileResponse(PAGE / name, media_type=kind)

    async def begin(self, _: HTTPRequest) -> Response:
        session = self.sessions.begin()
        return JSONResponse(about(self.models, self.limits) | {"session": session.id}, 201)

    async def alive(self, request: HTTPRequest) -> Response:
        self._session(request)
        return Response(status_code=204)

    async def end(self, request: HTTPRequest) -> Response:
        await asyncio.to_thread(self.sessions.end, request.path_params["session"])
        return Response(status_code=204)

    async def image(self, request: HTTPRequest) -> Response:
        session = self._session(request)
        _refuse_busy(session)
        name = request.query_params.get("name", "image")
        async with self._uploads:
            content = await _body(request, self.limits.upload_bytes, too_many_bytes(self.limits))
            height, width, preview = await asyncio.to_thread(receive, session, name, content, self.limits)
        size = self.models.size(height, width)
        return JSONResponse({"height": height, "width": width, "preview": preview, "video": size})

    async def videos(self, request: HTTPRequest) -> Response:
        session = self._session(request)
        _refuse_busy(session)
        try:
            content = json.loads(await _body(request, MOST_REQUEST, RequestError("The request is too long.")))
        except (ValueError, RecursionError) as error:
            raise error if isinstance(error, RequestError) else RequestError("The request is no JSON.") from error
        asked = parse(content, self.models.offer, self.models.defaults)
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def emit(event: dict[str, Any]) -> None:
            if event["event"] in ("end", "error"):
                session.busy = False
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        def work(job: Job) -> None:
            generate(self.models, session, asked, self.limits, job)

        _refuse_busy(session)  # once more, after the wait for the body
        job, session.busy = Job(work, emit), True
        try:
            self.turns.add(job)
        except RequestError:
            session.busy = False
            raise
        return StreamingResponse(self._lines(session, job, events), media_type="application/x-ndjson")

    async def _lines(self, session: Session, job: Job, events: asyncio.Queue) -> AsyncGenerator[str, None]:
        """Yields the events of a job as lines; cancels the job when the page is gone."""
        event: dict[str, Any] = {}
        try:
            while event.get("event") not in ("end", "error"):
                try:
                    event = await asyncio.wait_for(events.get(), PULSE)
                except TimeoutError:
                    event = {"event": "pulse"}
                with contextlib.suppress(SessionEnded):
                    self.sessions.find(session.id)  # it is alive
                yield json.dumps(event) + "\n"
        finally:
            self.turns.cancel(job)

    async def file(self, request: HTTPRequest) -> Response:
        path = self._session(request).file(request.path_params["name"])
        kind = "video/mp4" if path.suffix == ".mp4" else "application/json"
        return FileResponse(path, media_type=kind, filename=path.name)

    def _session(self, request: HTTPRequest) -> Session:
        return self.sessions.find(request.path_params["session"])


def about(models: Models, limits: Limits) -> dict[str, Any]:
    """Returns what a page must know to show itself, as JSON."""
    return {
        "models": models.about(),
        "defaults": asdict(models.defaults),
        "ranges": {name: bounds[1:] for name, bounds in NUMBERS.items()},
        "choices": {
            "sampler": choices.SAMPLERS,
            "fit": choices.FITS,
            "decoder": models.offer.decoders,
            "beside": BESIDE if models.other else BESIDE[:2],
        },
        "limits": {"bytes": limits.upload_bytes, "pixels": limits.upload_pixels, "idle": limits.idle},
        "examples": [data_url(frame) for frame in models.examples],
    }


async def _body(request: HTTPRequest, most: int, refusal: RequestError) -> bytes:
    """Returns the body of a request; stops to read it as soon as it is longer than `most` bytes.

    Raises:
      RequestError: `refusal`; or if the body does not arrive.
    """
    told = request.headers.get("content-length", "")
    if told.isdigit() and int(told) > most:
        raise refusal
    content = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > most:
                    raise refusal
    except (TimeoutError, ClientDisconnect) as error:
        raise RequestError("The upload was cut off.") from error
    return bytes(content)


def _refuse_busy(session: Session) -> None:
    if session.busy:
        raise RequestError("This page makes a video already: wait for it, or stop it.")


async def _refused(_: HTTPRequest, error: Exception) -> Response:
    return JSONResponse({"message": sentence(error)}, 410 if isinstance(error, SessionEnded) else 400)


class _Guard:
    """Refuses requests that come from pages of other origins, and adds the headers to all responses.

    Args:
      app: the application.
      own: whether only names of this machine are served: another page could otherwise have its own name point here.
    """

    def __init__(self, app: ASGIApp, own: bool):
        self.app, self.own = app, own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        outside = self.own and not is_loopback(_split(f"//{host}")[1] or "")
        foreign = outside or origin is not None and _split(origin)[0] != host
        refusal = JSONResponse({"message": "This server answers its own page only."}, 403)
        await (refusal if foreign else self.app)(scope, receive, with_headers)


def _split(address: str) -> tuple[str | None, str | None]:
    """Returns the host of an address with and without its port; (None, None) of what is no address."""
    try:
        found = urlsplit(address)
        return found.netloc, found.hostname
    except ValueError:
        return None, None


def is_loopback(host: str) -> bool:
    """Returns whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound(host: str, port: int) -> socket.socket:
    """Returns a socket bound to an address, before the work of loading a model.

    Raises:
      UserError: if that is not possible.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except (OSError, UnicodeError) as error:
        cause = (getattr(error, "strerror", None) or str(error)).lower()
        raise UserError(f"cannot listen at {host}, port {port}: {cause}; give another --port or --host") from error
    return made


def serve(page: Page, listener: socket.socket, ready: Callable[[], None], halt: threading.Event | None = None) -> None:
    """Serves a page until KeyboardInterrupt, SystemExit or `halt`, then deletes all files.

    Args:
      page: the application.
      listener: a bound socket.
      ready: called when it is reachable.
      halt: ends the server when it is set.

    Raises:
      UserError: if the server ends by itself, which has logged why.
    """
    config = uvicorn.Config(
        page.app,
        log_level="warning",
        access_log=False,  # addresses of sessions are secret
        server_header=False,
        timeout_graceful_shutdown=1,
        lifespan="on",
        http="h11",
        ws="none",
    )
    server = uvicorn.Server(config)

    def run() -> None:
        try:
            server.run([listener])
        except RuntimeError:  # it needs a thread to end, and none can be started when the command is ending itself
            if not server.should_exit:
                raise

    # In a thread, where uvicorn leaves signals to the command.
    thread = threading.Thread(target=run, name="server", daemon=True)
    thread.start()
    said = False
    try:
        while thread.is_alive() and not (halt and halt.is_set()):
            thread.join(0.2)
            if server.started and not said:
                said = True
                ready()
        if not thread.is_alive():
            raise UserError("the server ended by itself; the lines above tell why")
    finally:
        server.should_exit = True
        page.close()
        thread.join(GRACE)
