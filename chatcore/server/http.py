"""HTTP/1.1 on the client port: requests, responses, and the upgrade to WebSocket.

httptools (llhttp) parses. A connection has Python objects only until its upgrade.
The limits answer known attacks on such servers: header floods, bodies on upgrades
(CVE-2026-69243), slow bytes (one deadline in the reactor).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol
from urllib.parse import parse_qsl, unquote

import httptools
import orjson

from ..errors import ChatError

if TYPE_CHECKING:
    from .._fast.reactor import Reactor

log = logging.getLogger("chatcore.http")

MAX_HEADERS: Final = 128
MAX_HEADER_BYTES: Final = 8192  # one line, the request line too
MAX_HEAD_BYTES: Final = 32768  # all of them
# Bytes not yet parsed that a client may send ahead of the answer on one connection.
MAX_PIPELINE_BYTES: Final = 65536
# Bytes parsed at a time. The parser cannot be stopped between two requests of a piece, so this bounds how
# many requests wait as objects; the rest wait as bytes.
PIECE_BYTES: Final = 1024
WEBSOCKET_PATH: Final = "/ws"
_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3

_REASONS: Final = {
    101: "Switching Protocols",
    200: "OK",
    201: "Created",
    204: "No Content",
    304: "Not Modified",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    426: "Upgrade Required",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


@dataclass(slots=True)
class HttpRequest:
    """One request. Header names are lower case."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    peer: str
    version: str = "1.1"


@dataclass(slots=True)
class HttpResponse:
    """One response; ``body`` is JSON unless ``content_type`` says otherwise."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"


def json_response(status: int, value: Any, **headers: str) -> HttpResponse:
    """A response with a JSON body."""
    return HttpResponse(status, orjson.dumps(value), {k.replace("_", "-"): v for k, v in headers.items()})


def error_response(exc: ChatError) -> HttpResponse:
    """The response to a refused request: ``{"code", "message"}`` with the fitting status."""
    headers = {}
    if exc.retry_after_ms is not None:
        headers["Retry-After"] = str(-(-exc.retry_after_ms // 1000))
    if exc.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return HttpResponse(exc.http_status, orjson.dumps({"code": exc.code, "message": exc.message}), headers)


def encode_response(response: HttpResponse, *, keep_alive: bool, head_only: bool = False) -> bytes:
    """The bytes of a response."""
    lines = [f"HTTP/1.1 {response.status} {_REASONS[response.status]}"]
    if response.status not in (204, 304):
        lines.append(f"Content-Type: {response.content_type}")
        lines.append(f"Content-Length: {len(response.body)}")
    lines.extend(f"{name}: {value}" for name, value in response.headers.items())
    if not keep_alive:
        lines.append("Connection: close")
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    return head if head_only or response.status in (204, 304) else head + response.body


class RefusedRequest(Exception):
    """The bytes are no acceptable request: answer with ``response`` and close."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        code = {404: "not_found", 413: "too_large", 414: "too_large", 431: "too_large"}.get(status, "bad_request")
        self.response = json_response(status, {"code": code, "message": message})


class _Parsed(NamedTuple):
    request: HttpRequest
    keep_alive: bool


class HttpApp(Protocol):
    """The user of :class:`HttpConnection`: answers requests and takes upgraded connections."""

    def http_request(self, http: HttpConnection, request: HttpRequest) -> None:
        """Answer by ``http.respond`` now or later."""

    def upgraded(self, conn: int, response: bytes, leftover: bytes) -> None:
        """Take a connection that asked properly for a WebSocket."""


class HttpConnection:
    """A connection before its upgrade; one request at a time, in order."""

    def __init__(self, app: HttpApp, reactor: Reactor, conn: int, max_body_bytes: int, deadline_ms: int) -> None:
        self._app = app
        self._reactor = reactor
        self._conn = conn
        self._max_body_bytes = max_body_bytes
        self._deadline_ms = deadline_ms
        # The parser holds this object for its callbacks: a circle that `over` cuts.
        self._parser: Any = httptools.HttpRequestParser(self)
        self._queue: deque[_Parsed] = deque()  # complete, not begun
        self._busy = False  # a request is being answered
        self._ended = False
        self._pending = bytearray()  # not parsed yet
        self._last: HttpResponse | None = None  # to be sent when the queue is empty, before the end
        self._leftover: bytes | None = None  # bytes behind a request for an upgrade; None: there was none
        self._head_only = False
        self._keep_alive = True
        self.on_message_begin()

    # --- bytes ------------------------------------------------------------------
    def feed(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._ended:
            return
        self._pending += data
        if self._busy:
            if len(self._pending) > MAX_PIPELINE_BYTES:
                self._end(RefusedRequest(413, "too much sent ahead").response)
            return
        self._go_on()

    def _go_on(self) -> None:
        """Parse pending bytes until there is a request, and begin with it; requests are answered one at a time."""
        while not (self._ended or self._busy):
            if self._queue:
                self._begin(self._queue.popleft())
            elif self._last is not None:
                self._end(self._last)
            elif self._leftover is not None:
                self._try_upgrade(self._leftover + self._pending)
            elif self._pending:
                piece = bytes(self._pending[:PIECE_BYTES])
                del self._pending[:PIECE_BYTES]
                self._parse(piece)
            else:
                return

    def _parse(self, piece: bytes) -> None:
        try:
            self._parser.feed_data(piece)
            if self._in_head:
                self._fed += len(piece)
                if self._fed > MAX_HEAD_BYTES:
                    self._last = RefusedRequest(431, "the head of the request is too large").response
        except httptools.HttpParserUpgrade as exc:
            self._leftover = piece[exc.args[0] :]
        except httptools.HttpParserCallbackError as exc:
            cause = exc.__context__
            self._last = (
                cause.response if isinstance(cause, RefusedRequest) else RefusedRequest(400, "bad request").response
            )
        except httptools.HttpParserError as exc:
            self._last = RefusedRequest(400, f"not HTTP/1.1: {exc}").response

    def _begin(self, parsed: _Parsed) -> None:
        self._busy = True
        self._keep_alive = parsed.keep_alive
        self._head_only = parsed.request.method == "HEAD"
        # The deadline so far was for the request; the answer has its own.
        self._reactor.http_deadline(self._conn, self._deadline_ms)
        self._app.http_request(self, parsed.request)

    def _try_upgrade(self, leftover: bytes) -> None:
        if self._headers.get("upgrade", "").lower() != "websocket" and "content-length" not in self._headers:
            # Another protocol (h2c): a server may ignore the offer (RFC 9110, 7.8). The parser stopped at it.
            self._leftover = None
            self._begin(_Parsed(self._request(), False))
            return
        try:
            response = self._handshake()
        except RefusedRequest as exc:
            self._end(exc.response)
            return
        self.over()
        self._app.upgraded(self._conn, response, leftover)

    def over(self) -> None:
        """Ignore further input, and cut the cycle of references with the parser."""
        self._ended = True
        self._parser = None

    def _end(self, response: HttpResponse) -> None:
        self.over()
        self._reactor.write(self._conn, encode_response(response, keep_alive=False), True)

    def close_idle(self) -> None:
        """Close the connection, unless a request is being answered or received."""
        if not (self._busy or self._queue or self._pending or self._fed or self._ended):
            self.over()
            self._reactor.write(self._conn, b"", True)

    # --- callbacks of the parser ----------------------------------------------------
    def on_message_begin(self) -> None:
        self._url = b""
        self._head_bytes = 0
        self._headers: dict[str, str] = {}
        self._count = 0
        self._body = bytearray()
        self._in_head = True
        self._fed = 0  # bytes of the head as they were received: the parser keeps an unfinished line to itself

    def on_url(self, url: bytes) -> None:
        self._grow(len(url))
        self._url += url
        if len(self._url) > MAX_HEADER_BYTES:
            raise RefusedRequest(414, "the request line is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: nothing here uses one
        self._grow(len(name) + len(value))
        self._count += 1
        if self._count > MAX_HEADERS or len(name) + len(value) > MAX_HEADER_BYTES:
            raise RefusedRequest(431, "too many or too long headers")
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1")
        if key in self._headers:
            if key in ("host", "content-length", "authorization", "sec-websocket-key", "sec-websocket-version"):
                raise RefusedRequest(400, f"{key}: given twice")
            text = f"{self._headers[key]}, {text}"
        self._headers[key] = text

    def _grow(self, n: int) -> None:
        self._head_bytes += n
        if self._head_bytes > MAX_HEAD_BYTES:
            raise RefusedRequest(431, "the head of the request is too large")

    def on_headers_complete(self) -> None:
        self._in_head = False
        length = self._headers.get("content-length")
        if length is not None and int(length) > self._max_body_bytes:
            raise RefusedRequest(413, f"body: at most {self._max_body_bytes} bytes")
        if self._headers.get("expect", "").lower() == "100-continue" and not (self._busy or self._queue):
            self._reactor.write(self._conn, b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body += body
        if len(self._body) > self._max_body_bytes:
            raise RefusedRequest(413, f"body: at most {self._max_body_bytes} bytes")

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade():
            return
        self._queue.append(_Parsed(self._request(), self._parser.should_keep_alive()))
        self._fed = 0

    def _request(self) -> HttpRequest:
        path, query = self._target()
        method = self._parser.get_method().decode("latin-1")
        peer = self._reactor.peer(self._conn)
        return HttpRequest(method, path, query, self._headers, bytes(self._body), peer)

    def _target(self) -> tuple[str, dict[str, str]]:
        try:
            url = httptools.parse_url(self._url)
            path = unquote((url.path or b"/").decode("ascii"), errors="strict")
            pairs = parse_qsl((url.query or b"").decode("ascii"), keep_blank_values=True, max_num_fields=32)
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError, ValueError):
            raise RefusedRequest(400, "the request target is not valid") from None
        return path, dict(pairs)

    # --- answers ----------------------------------------------------------------------
    def respond(self, response: HttpResponse, *, last: bool = False) -> None:
        """Answer the current request. ``last``: then close; otherwise go on with requests that were sent ahead."""
        if self._ended or not self._busy:
            return
        keep = self._keep_alive and not last
        data = encode_response(response, keep_alive=keep, head_only=self._head_only)
        if not keep:
            self.over()
            self._reactor.write(self._conn, data, True)
            return
        self._reactor.write(self._conn, data)
        self._busy = False
        self._reactor.http_deadline(self._conn, self._deadline_ms)
        self._go_on()

    # --- RFC 6455, 4.2 --------------------------------------------------------------------
    def _handshake(self) -> bytes:
        headers = self._headers
        path, _ = self._target()
        if self._parser.get_method() != b"GET" or self._parser.get_http_version() != "1.1":
            raise RefusedRequest(400, "an upgrade is a GET of HTTP/1.1")
        if headers.get("upgrade", "").lower() != "websocket":
            raise RefusedRequest(400, "only an upgrade to websocket is known")
        if "transfer-encoding" in headers or int(headers.get("content-length", "0")) != 0:
            raise RefusedRequest(400, "an upgrade has no body")
        if path != WEBSOCKET_PATH:
            raise RefusedRequest(404, f"WebSocket connections go to {WEBSOCKET_PATH}")
        if headers.get("sec-websocket-version") != "13":
            version = RefusedRequest(426, "only version 13 is known")
            version.response.headers["Sec-WebSocket-Version"] = "13"
            version.response.headers["Upgrade"] = "websocket"
            raise version
        key = headers.get("sec-websocket-key", "").strip()
        try:
            valid = len(base64.b64decode(key, validate=True)) == 16
        except (binascii.Error, ValueError):
            valid = False
        if not valid:
            raise RefusedRequest(400, "sec-websocket-key: 16 bytes in base64")
        accept = base64.b64encode(hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest())
        offered = [token.strip() for token in headers.get("sec-websocket-protocol", "").split(",")]
        chosen = b"Sec-WebSocket-Protocol: chatcore.v1\r\n" if "chatcore.v1" in offered else b""
        return (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: %b\r\n%b\r\n" % (accept, chosen)
        )


def bearer(request: HttpRequest) -> str | None:
    """The token of the Authorization header."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def not_modified(request: HttpRequest, response: HttpResponse) -> HttpResponse:
    """Add the ETag to the response to a GET; 304 instead if the client has that already (RFC 9110, 13.1.2)."""
    tag = '"' + hashlib.blake2b(response.body, digest_size=12).hexdigest() + '"'
    response.headers["ETag"] = tag
    response.headers["Cache-Control"] = "private, no-cache"
    known = [token.strip().removeprefix("W/") for token in request.headers.get("if-none-match", "").split(",")]
    if tag in known or "*" in known:
        return HttpResponse(304, b"", response.headers)
    return response
