"""The HTTP API: the same services as over WebSocket."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
import orjson

from .. import protocol as p
from ..accounts.service import Accounts, Identity, Login
from ..chat.service import Chat
from ..chat.user_events import UserEvents
from ..errors import BadRequest, ChatError, NotFound, Unauthenticated
from ..settings import Limits
from ..store.base import Store, User
from .health import Health
from .http import WEBSOCKET_PATH, HttpRequest, HttpResponse, bearer, error_response, json_response, not_modified
from .session import conv_push

Handler = Callable[[HttpRequest, str], Awaitable[HttpResponse]]

_IDEMPOTENCY_KEY: Final = "idempotency-key"


class Credentials(msgspec.Struct):
    """Body of POST /v1/users and /v1/sessions."""

    name: str
    password: str


class Profile(msgspec.Struct):
    """Body of PATCH /v1/me."""

    name: str | None = None
    password: str | None = None
    old_password: str | None = None


class NewMessage(msgspec.Struct):
    """Body of POST /v1/conversations/{id}/messages: a :class:`~..protocol.Send` without its ids."""

    body: str
    re: p.Count | None = None
    data: str | None = None
    files: list[p.Id] | None = None


class Api:
    """Routes requests to the services. One per worker."""

    def __init__(
        self,
        limits: Limits,
        store: Store,
        accounts: Accounts,
        chat: Chat,
        user_events: UserEvents,
        health: Health,
        draining: Callable[[], bool],
    ) -> None:
        self._limits = limits
        self._store = store
        self._accounts = accounts
        self._chat = chat
        self._user_events = user_events
        self._health = health
        self._draining = draining
        # (method, path with {} for one id) -> handler
        self._routes: dict[tuple[str, str], Handler] = {
            ("GET", "/healthz"): self._healthz,
            ("GET", "/readyz"): self._readyz,
            ("POST", "/v1/users"): self._register,
            ("GET", "/v1/users"): self._find_user,
            ("GET", "/v1/users/{}"): self._get_user,
            ("POST", "/v1/sessions"): self._login,
            ("DELETE", "/v1/sessions/current"): self._logout,
            ("GET", "/v1/me"): self._me,
            ("PATCH", "/v1/me"): self._update_me,
            ("GET", "/v1/conversations"): self._conversations,
            ("GET", "/v1/conversations/{}/messages"): self._history,
            ("POST", "/v1/conversations/{}/messages"): self._send,
        }
        self._paths = {path for _, path in self._routes}

    async def handle(self, request: HttpRequest) -> HttpResponse:
        """Answer one request."""
        method = "GET" if request.method == "HEAD" else request.method
        if request.path == WEBSOCKET_PATH:
            upgrade = {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
            body = orjson.dumps({"code": "bad_request", "message": "this is for WebSocket connections"})
            return HttpResponse(426, body, upgrade)
        path, arg = self._match(request.path)
        if path is None:
            return error_response(NotFound("no such resource"))
        handler = self._routes.get((method, path))
        if handler is None:
            allowed = ", ".join(sorted(m for m, known in self._routes if known == path))
            return json_response(405, {"code": "bad_request", "message": f"allowed: {allowed}"}, Allow=allowed)
        try:
            response = await handler(request, arg)
        except ChatError as exc:
            return error_response(exc)
        if method == "GET" and response.status == 200 and path.startswith("/v1/"):
            return not_modified(request, response)
        return response

    def _match(self, path: str) -> tuple[str | None, str]:
        if path in self._paths:
            return path, ""
        parts = path.split("/")
        # /v1/<collection>/<id>[/…]
        if len(parts) >= 4 and parts[3]:
            pattern = "/".join([*parts[:3], "{}", *parts[4:]])
            if pattern in self._paths:
                return pattern, parts[3]
        return None, ""

    async def _identify(self, request: HttpRequest) -> Identity:
        token = bearer(request)
        if token is None:
            raise Unauthenticated("Authorization: Bearer TOKEN is needed")
        return await self._accounts.identify(token)

    @staticmethod
    def _number(request: HttpRequest, name: str, least: int = 0) -> int | None:
        """A parameter of the query, None if it is absent.

        :raises BadRequest: it is no number from ``least``.
        """
        text = request.query.get(name)
        if text is None:
            return None
        # 16 digits: as many as the largest number has, so that int() has little to do.
        if not (text.isascii() and text.isdigit()) or len(text) > 16 or not least <= int(text) <= p.MAX_INT:
            raise BadRequest(f"{name}: a whole number from {least} to {p.MAX_INT}")
        return int(text)

    # --- health -----------------------------------------------------------------
    async def _healthz(self, request: HttpRequest, arg: str) -> HttpResponse:
        return json_response(200, {"status": "ok"})

    async def _readyz(self, request: HttpRequest, arg: str) -> HttpResponse:
        parts = {"worker": "down" if self._draining() else "ok"}
        parts |= {name: state.name.lower() for name, state in self._health.parts().items()}
        body = {"ready": "down" not in parts.values(), "parts": parts}
        # Without a bus, workers find each other's entries in the store; without a cache, the store is asked more
        # often: slower, but served.
        return json_response(503 if "down" in (parts["worker"], parts["store"]) else 200, body)

    # --- accounts -----------------------------------------------------------------
    async def _register(self, request: HttpRequest, arg: str) -> HttpResponse:
        asked = p.decode_body(request.body, Credentials)
        return _logged_in(201, await self._accounts.register(asked.name, asked.password))

    async def _login(self, request: HttpRequest, arg: str) -> HttpResponse:
        asked = p.decode_body(request.body, Credentials)
        return _logged_in(201, await self._accounts.login(asked.name, asked.password))

    async def _logout(self, request: HttpRequest, arg: str) -> HttpResponse:
        who = await self._identify(request)
        await self._accounts.logout(who)
        self._user_events.token_revoked(who.user.id, who.token_hash)
        return HttpResponse(204)

    async def _me(self, request: HttpRequest, arg: str) -> HttpResponse:
        return json_response(200, _user((await self._identify(request)).user))

    async def _update_me(self, request: HttpRequest, arg: str) -> HttpResponse:
        who = await self._identify(request)
        asked = p.decode_body(request.body, Profile)
        if asked.name is None and asked.password is None:
            raise BadRequest("nothing to change: name, or password with old_password")
        user = await self._accounts.update(who, asked.name, asked.password, asked.old_password)
        self._user_events.push(user.id, orjson.dumps({"t": "user", "user": _user(user)}))
        return json_response(200, _user(user))

    async def _get_user(self, request: HttpRequest, arg: str) -> HttpResponse:
        await self._identify(request)
        found = await self._store.users([arg])
        if not found:
            raise NotFound("no such user")
        return json_response(200, _user(found[0]))

    async def _find_user(self, request: HttpRequest, arg: str) -> HttpResponse:
        await self._identify(request)
        name = request.query.get("name")
        if not name or len(name) > self._limits.name_chars:
            raise BadRequest("name: whose id is wanted")
        account = await self._store.account(name)
        found = [] if account is None or account.disabled else [_user(User(account.id, account.name))]
        return json_response(200, {"users": found})

    # --- conversations ---------------------------------------------------------------
    async def _conversations(self, request: HttpRequest, arg: str) -> HttpResponse:
        who = await self._identify(request)
        most = self._limits.conversations
        asked = self._number(request, "limit")
        limit = most if asked is None else asked
        if not 1 <= limit <= most:
            raise BadRequest(f"limit: 1 to {most}")
        _, views = await self._store.views(who.user.id)
        after = request.query.get("after")
        if after is not None:
            ids = [view.conv for view in views]
            if after not in ids:
                raise NotFound("after: no such conversation")
            views = views[ids.index(after) + 1 :]
        entries = []
        for view in views[:limit]:
            fields: dict[str, Any] = orjson.loads(conv_push(view, None))
            del fields["t"]
            entries.append(fields)
        more = {"next": views[limit - 1].conv} if len(views) > limit else {}
        return json_response(200, {"conversations": entries, **more})

    async def _history(self, request: HttpRequest, arg: str) -> HttpResponse:
        who = await self._identify(request)
        limit = self._number(request, "limit", 1)
        asked = p.History(
            c=arg,
            before=self._number(request, "before"),
            after=self._number(request, "after"),
            limit=50 if limit is None else limit,
        )
        page = await self._chat.history(who.user.id, asked)
        entries = [orjson.Fragment(e.wire) for e in page.entries]
        return json_response(200, {"entries": entries, "more": page.more, "at": page.head})

    async def _send(self, request: HttpRequest, arg: str) -> HttpResponse:
        who = await self._identify(request)
        asked = p.decode_body(request.body, NewMessage)
        cid = request.headers.get(_IDEMPOTENCY_KEY) or secrets.token_urlsafe(16)
        if not p.is_id(cid):
            raise BadRequest(f"Idempotency-Key: {p.ID_WORDS}")
        if not p.is_id(arg):
            raise NotFound("no such conversation")
        send = p.Send(c=arg, cid=cid, body=asked.body, re=asked.re, data=asked.data, files=asked.files)
        done = await self._chat.send(who.user.id, send)
        return json_response(200 if done.dup else 201, {"s": done.seq, "ts": done.ts, "cid": cid, "dup": done.dup})


def _user(user: User) -> dict[str, str]:
    return {"id": user.id, "name": user.name}


def _logged_in(status: int, login: Login) -> HttpResponse:
    return json_response(
        status,
        {"token": login.token, "expires_ms": login.expires_ms, "user": _user(login.user)},
        Cache_Control="no-store",
    )
