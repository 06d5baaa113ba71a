"""The server of the page: files come in, answers go out as server-sent events, one at a time."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..media import UnreadableError
from .pair import Pair, StoppedError
from .shelf import FRAMES, Shelf, UploadError

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
# Nothing but the page's own files, and nobody may show it inside another page.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
MOST_ASKED = 16 * 2**10  # bytes of a question
WAIT = 0.2  # seconds between two looks whether the browser is still there

log = logging.getLogger(__name__)


def make_app(pair: Pair, shelf: Shelf, host: str = "127.0.0.1") -> Callable[..., Awaitable[None]]:
    """The page as an ASGI application.

    Args:
        host: that the server listens on, which decides by what names it may be called.
    """
    demo = _Demo(pair, shelf)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        demo.close()

    routes = [Route(path, _page(*of)) for path, of in PAGE.items()]
    routes += [
        Route("/facts", demo.facts),
        Route("/files", demo.upload, methods=["POST"]),
        Route("/files/{name}", demo.preview),
        Route("/ask", demo.ask, methods=["POST"]),
    ]
    handlers: Any = {HTTPException: _said, Exception: _failed}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan), host)


def _page(name: str, media_type: str) -> Callable[[Request], Response]:
    content = (files(__package__) / "page" / name).read_bytes()
    return lambda _: Response(content, media_type=media_type)


def _error(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status_code=status)


def _said(_: Request, error: HTTPException) -> Response:
    return _error(error.status_code, error.detail)


def _failed(_: Request, __: Exception) -> Response:
    return _error(500, "something failed: the terminal that runs `linmu demo` shows what")


class _Guard:
    """Lets through what comes from the page itself, and adds the headers of every answer.

    A page elsewhere can make a browser send requests here. By a name of its own that leads to this machine, it could
    read the answers too. Such a request names another host, or another origin.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], host: str) -> None:
        self.app, self.host = app, host

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        given = {name: value.decode("latin-1") for name, value in scope["headers"] if name in (b"host", b"origin")}
        called, origin = given.get(b"host", ""), given.get(b"origin")
        app = self.app
        if not may_be_called(called, self.host):
            app = _error(403, f"this page is not called {called!r}: open the address that `linmu demo` shows")
        elif origin is not None and origin.lower() not in (f"http://{called.lower()}", f"https://{called.lower()}"):
            app = _error(403, f"requests from {origin!r} are refused: open the page itself")
        await app(scope, receive, with_headers)


def may_be_called(name: str, host: str) -> bool:
    """Whether a request whose Host is `name` was meant for a server that listens on `host`.

    A name that somebody else made lead here is none of its own; an address is always meant.
    """
    try:
        called = urlsplit(f"//{name}").hostname or ""
    except ValueError:
        return False
    if called == "localhost":
        return True
    try:
        return is_loopback(called) or not only_here(host)
    except ValueError:  # a name
        mine = {name.lower() for name in (host, socket.gethostname(), socket.getfqdn())}
        return called in mine and not only_here(host)


def only_here(host: str) -> bool:
    """Whether a server that listens on `host` can be reached from this machine only; of a name other than localhost it
    is not known."""
    try:
        return is_loopback(host)
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it.

    Raises:
        ValueError: it is a name other than localhost.
    """
    return host == "localhost" or ipaddress.ip_address(host).is_loopback


class _Demo:
    def __init__(self, pair: Pair, shelf: Shelf) -> None:
        self.pair, self.shelf = pair, shelf
        self.busy = threading.Lock()  # held while an answer is made; let go by the thread that makes it
        self.stops: set[threading.Event] = set()
        # One thread each, which live as long as the server: PyTorch keeps threads of its own for each.
        self.answering = ThreadPoolExecutor(1, "linmu-demo-answer")
        self.reading = ThreadPoolExecutor(1, "linmu-demo-read")

    def close(self) -> None:
        """Stop what is under way."""
        for stop in list(self.stops):
            stop.set()
        self.answering.shutdown()
        self.reading.shutdown()

    def facts(self, _: Request) -> Response:
        examples = [
            {"title": example.title, "question": example.question, **self.shelf[name].facts()}
            for name, example in self.shelf.named.items()
        ]
        return JSONResponse(
            {
                "teacher": self.pair.teacher.label,
                "student": self.pair.student.label,
                "takes_media": self.pair.takes_media,
                "most_frames": FRAMES,
                "max_bytes": self.shelf.max_bytes,
                "examples": examples,
            }
        )

    async def upload(self, request: Request) -> Response:
        """The body is the file; nothing else of it, no name, is taken."""
        length = request.headers.get("content-length")
        try:
            path = await self.shelf.receive(request.stream(), int(length) if length and length.isdecimal() else None)
            loop = asyncio.get_running_loop()
            media_type = request.headers.get("content-type", "")
            item = await loop.run_in_executor(self.reading, self.shelf.add, path, media_type)
        except (UploadError, UnreadableError) as error:
            return _error(400, str(error))
        except MemoryError:
            return _error(400, "the file takes more memory than there is: choose a smaller one")
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except OSError as error:
            return _error(507, f"the file cannot be kept: {error.strerror or error}")
        return JSONResponse(item.facts())

    def preview(self, request: Request) -> Response:
        try:
            return Response(self.shelf[request.path_params["name"]].preview, media_type="image/png")
        except UploadError as error:
            return _error(404, str(error))

    async def ask(self, request: Request) -> Response:
        try:
            asked = await _question(request)
            item = None if asked["file"] is None else self.shelf[asked["file"]]
        except (_AskError, UploadError) as error:
            return _error(400, str(error))
        except ClientDisconnect:
            return Response(status_code=400)
        if not self.busy.acquire(blocking=False):
            return _error(409, "another question is being answered: ask again in a moment")
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        loop, stop = asyncio.get_running_loop(), threading.Event()
        self.stops.add(stop)

        def tell(event: dict[str, Any] | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, event)

        def work() -> None:
            try:
                clip = None
                if item is not None:
                    clip = item.read(asked["frames"], asked["fps"], self.shelf.max_pixels)
                    count, height, width = clip.frames.shape[:3]
                    tell({"what": "seen", "kind": item.kind, "frames": count, "height": height, "width": width})
                self.pair.answer(asked["question"], clip, stop, tell)
            except StoppedError:
                pass
            except Exception as error:
                tell({"what": "error", "text": why(error)})
            finally:
                self.stops.discard(stop)
                self.busy.release()
                tell(None)

        try:
            self.answering.submit(work)
        except RuntimeError:  # the server is closing
            self.busy.release()
            return _error(503, "the server is closing")
        return _Events(_events(request, queue), stop)


async def _events(request: Request, queue: asyncio.Queue[dict[str, Any] | None]) -> AsyncIterator[str]:
    while True:
        try:
            event = await asyncio.wait_for(queue.get(), WAIT)
        except TimeoutError:
            if await request.is_disconnected():
                return
            continue
        if event is None:
            return
        yield f"data: {json.dumps(event)}\n\n"


class _Events(StreamingResponse):
    """Events as they come. However the connection ends, the answer ends with it."""

    def __init__(self, content: AsyncIterator[str], stop: threading.Event) -> None:
        super().__init__(content, media_type="text/event-stream")
        self.stop = stop

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.stop.set()


class _AskError(ValueError):
    pass


async def _question(request: Request) -> dict[str, Any]:
    """What is asked: {"question", "file", "frames", "fps"}."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise _AskError("a question must be JSON")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_ASKED:
            raise _AskError(f"a question must have at most {MOST_ASKED} bytes")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _AskError("a question must be JSON") from error
    if not isinstance(asked, dict) or not isinstance(asked.get("question"), str):
        raise _AskError("a question must have words")
    file, frames, fps = asked.get("file"), asked.get("frames", 64), asked.get("fps", 2)
    if not isinstance(file, str | None):
        raise _AskError("file must be the id of one")
    if type(frames) is not int or not 1 <= frames <= FRAMES:
        raise _AskError(f"frames must be a whole number from 1 to {FRAMES}")
    if type(fps) not in (int, float) or not 0.01 <= fps <= 240:
        raise _AskError("frames a second must be a number from 0.01 to 240")
    return {"question": asked["question"], "file": file, "frames": frames, "fps": float(fps)}


def why(error: Exception) -> str:
    """What the page says of an error, in one line; what is not foreseen goes to the terminal."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "the answer takes more memory than there is: ask with fewer frames, or a smaller picture"
    if isinstance(error, (ValueError, OSError, ImportError)):
        return (str(error).strip().splitlines() or [type(error).__name__])[0].removeprefix("generate: ")
    log.error("an answer failed", exc_info=error)
    return "the answer failed: the terminal that runs `linmu demo` shows why"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free.

    Raises:
        ValueError: the host is not of this machine, or the port is taken.
    """
    try:
        named = host or " "  # an empty name would be every address
        family, kind, protocol, _, address = socket.getaddrinfo(named, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"demo: --host must be an address or a name of this machine, got {host!r}") from error
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
        found.listen(64)
    except OSError as error:
        found.close()
        reason = error.strerror or error
        raise ValueError(f"demo: --host and --port must be free to listen on, got {host}:{port}: {reason}") from error
    return found


def serve(pair: Pair, shelf: Shelf, host: str, listening: socket.socket) -> None:
    """Answer until the process is told to end."""
    make_server(pair, shelf, host).run(sockets=[listening])


def make_server(pair: Pair, shelf: Shelf, host: str) -> Any:
    """The server, not running yet."""
    import uvicorn

    config = uvicorn.Config(
        make_app(pair, shelf, host), log_level="warning", access_log=False, server_header=False, ws="none",
        timeout_graceful_shutdown=1, proxy_headers=False,
    )  # fmt: skip
    return uvicorn.Server(config)
