"""Accounts over plain HTTP: register, log in, log out, find a user by name."""

from __future__ import annotations

import asyncio
import ipaddress
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Final

import msgspec

from .errors import Conflict, Internal, Unauthenticated, error_from
from .events import User

#: One request may take this long; checking a password alone takes a while.
TIMEOUT_S: Final = 30.0
#: No answer of these requests is larger.
_ANSWER_MAX: Final = 1 << 20


class Session(msgspec.Struct, frozen=True):
    """A log-in: keep ``token`` secret; it ends ``expires_ms`` after its last use."""

    token: str
    expires_ms: int
    user: User


class Address:
    """Where a server is, from one URL: ``http(s)://`` or ``ws(s)://``, host, port, perhaps a path.

    :raises ValueError: no such URL, or one with a user, a query or a fragment.
    """

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        schemes = {"http": ("http", "ws"), "ws": ("http", "ws"), "https": ("https", "wss"), "wss": ("https", "wss")}
        if parts.scheme not in schemes or not parts.hostname:
            raise ValueError(f"not the address of a server: {url!r} (like http://127.0.0.1:8080)")
        if parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError(f"the address of a server has no user, query or fragment: {url!r}")
        http, ws = schemes[parts.scheme]
        path = parts.path.rstrip("/").removesuffix("/ws")
        self.http = f"{http}://{parts.netloc}{path}"
        self.ws = f"{ws}://{parts.netloc}{path}/ws"
        self.local = _is_loopback(parts.hostname)

    def __str__(self) -> str:
        return self.http


async def register(address: Address, name: str, password: str) -> Session:
    """Make an account and log in. Raises Conflict (the name is taken), Forbidden (closed), OSError."""
    return await _session(address, "/v1/users", name, password)


async def login(address: Address, name: str, password: str) -> Session:
    """Log in. Raises Unauthenticated (wrong name or password, which look the same), OSError."""
    return await _session(address, "/v1/sessions", name, password)


async def login_or_register(address: Address, name: str, password: str) -> Session:
    """Log in; make the account if there is none of this name.

    :raises Unauthenticated: there is one, with another password.
    :raises Forbidden: registration is closed.
    :raises OSError: the server cannot be reached.
    """
    try:
        return await login(address, name, password)
    except Unauthenticated:
        try:
            return await register(address, name, password)
        except Conflict:
            raise Unauthenticated("the name or the password is wrong") from None


async def logout(address: Address, token: str) -> None:
    """End the session: the token is worth nothing from here on."""
    await request(address, "DELETE", "/v1/sessions/current", token=token)


async def find_user(address: Address, token: str, name: str) -> User | None:
    """The user of exactly this name, or None."""
    answer = await request(address, "GET", "/v1/users?" + urllib.parse.urlencode({"name": name}), token=token)
    users = msgspec.convert(answer.get("users", []), list[User])
    return next((user for user in users if user.name.casefold() == name.casefold()), None)


async def request(
    address: Address, method: str, path: str, body: dict[str, Any] | None = None, *, token: str | None = None
) -> dict[str, Any]:
    """One request of the HTTP API; the answer's JSON object.

    :raises chatcore.errors.ChatError: the server refused it.
    :raises OSError: the server cannot be reached.
    :raises Internal: it is no chatcore server.
    """
    return await asyncio.to_thread(_request, address, method, path, body, token)


async def _session(address: Address, path: str, name: str, password: str) -> Session:
    answer = await request(address, "POST", path, {"name": name, "password": password})
    return msgspec.convert(answer, Session)


def _request(
    address: Address, method: str, path: str, body: dict[str, Any] | None, token: str | None
) -> dict[str, Any]:
    headers = {"Accept": "application/json"}
    data = None
    if body is not None:
        headers["Content-Type"] = "application/json"
        data = msgspec.json.encode(body)
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    # A proxy has no way to this machine's loopback, whatever the environment says.
    proxies = urllib.request.ProxyHandler({} if address.local else None)
    opener = urllib.request.build_opener(proxies, _NoRedirect)
    asked = urllib.request.Request(address.http + path, data=data, headers=headers, method=method)
    try:
        with opener.open(asked, timeout=TIMEOUT_S) as response:
            return _object(response.read(_ANSWER_MAX), response.status)
    except urllib.error.HTTPError as exc:
        with exc:
            raise error_from(_object(exc.read(_ANSWER_MAX), exc.code)) from None
    except urllib.error.URLError as exc:
        reason = exc.reason
        raise reason if isinstance(reason, OSError) else ConnectionError(str(reason)) from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Passwords and tokens do not follow a redirect to wherever it points."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _object(data: bytes, status: int) -> dict[str, Any]:
    if not data and status < 400:
        return {}
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.MsgspecError:
        raise Internal(f"the answer (HTTP {status}) is not that of a chatcore server") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
