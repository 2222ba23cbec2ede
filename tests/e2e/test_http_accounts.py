"""Accounts over HTTP: registering, logging in and out, oneself, and others."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import pytest

from .conftest import Serve
from .world import PASSWORD, World


def _name() -> str:
    return f"n-{secrets.token_hex(6)}"


async def test_registering_gives_a_token_that_works_everywhere(world: World) -> None:
    name = _name()
    response = await world.http("POST", "/v1/users", body={"name": name, "password": PASSWORD})
    assert response.status == 201
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    account = response.json
    assert set(account) == {"token", "expires_ms", "user"}
    assert account["user"]["name"] == name
    assert account["expires_ms"] > 0
    assert len(account["token"]) >= 32
    for slot in (0, 1):
        client = await world.open(on=slot)
        assert (await client.request("auth", v=1, token=account["token"]))["user"] == account["user"]


async def test_logging_in_gives_another_token_and_the_first_stays_valid(world: World) -> None:
    user = await world.user()
    again = await world.login(user)
    assert again.token != user.token
    for token in (user.token, again.token):
        assert (await world.http("GET", "/v1/me", token=token)).json == {"id": user.id, "name": user.name}


@pytest.mark.parametrize("change", [str.upper, str.title, lambda name: name])
async def test_a_name_is_taken_whatever_its_case(world: World, change: Any) -> None:
    user = await world.user("Straße")
    response = await world.http("POST", "/v1/users", body={"name": change(user.name), "password": PASSWORD})
    assert (response.status, response.json["code"]) == (409, "conflict")
    body = {"name": change(user.name), "password": PASSWORD}
    assert (await world.http("POST", "/v1/sessions", body=body)).json["user"]["id"] == user.id


async def test_the_same_name_at_the_same_time_is_given_once(world: World) -> None:
    body = {"name": _name(), "password": PASSWORD}
    responses = await asyncio.gather(*(world.http("POST", "/v1/users", body=body) for _ in range(6)))
    assert sorted(response.status for response in responses) == [201] + [409] * 5


@pytest.mark.parametrize("path", ["/v1/users", "/v1/sessions"])
@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b'"x"', b"\xff", {}, {"name": "x"}, {"password": PASSWORD}),
        *({"name": 5, "password": PASSWORD}, {"name": "someone", "password": None}),
    ],
)
async def test_a_body_that_is_no_name_and_password_is_a_bad_request(world: World, path: str, body: Any) -> None:
    response = await world.http("POST", path, body=body)
    assert (response.status, response.json["code"]) == (400, "bad_request")
    assert isinstance(response.json["message"], str)


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a\tb", "\0", "a\u200bb", "\u202eabc", "@you", "#chat", "x" * 33, "a\ud800"]
)
async def test_a_name_that_is_none_is_a_bad_request(world: World, name: str) -> None:
    response = await world.http("POST", "/v1/users", body={"name": name, "password": PASSWORD})
    assert (response.status, response.json["code"]) == (400, "bad_request")


@pytest.mark.parametrize("name", ["ä", "李雷", "x" * 20, "o'neil", "a.b-c_d"])
async def test_names_of_all_languages_are_taken(world: World, name: str) -> None:
    name += secrets.token_hex(6)
    response = await world.http("POST", "/v1/users", body={"name": name, "password": PASSWORD})
    assert (response.status, response.json["user"]["name"]) == (201, name)


@pytest.mark.parametrize("password", ["", "short", "x" * 7, "x" * 257])
async def test_a_password_too_short_or_too_long_is_a_bad_request(world: World, password: str) -> None:
    response = await world.http("POST", "/v1/users", body={"name": _name(), "password": password})
    assert (response.status, response.json["code"]) == (400, "bad_request")


async def test_a_wrong_password_and_an_unknown_user_look_the_same(world: World) -> None:
    user = await world.user()
    tries = [
        {"name": user.name, "password": "wrong horse"},
        {"name": _name(), "password": PASSWORD},
        {"name": user.name, "password": ""},
        {"name": user.name, "password": "x" * 5000},
        {"name": "", "password": PASSWORD},
        {"name": "x" * 5000, "password": PASSWORD},
        {"name": "no such name, and never one", "password": PASSWORD},
    ]
    responses = [await world.http("POST", "/v1/sessions", body=body) for body in tries]
    assert {response.status for response in responses} == {401}
    assert responses[0].json["code"] == "unauthenticated"
    assert len({response.body for response in responses}) == 1
    assert len({tuple(sorted(response.headers)) for response in responses}) == 1


async def test_a_wrong_password_and_an_unknown_user_take_the_same_time(serve: Serve) -> None:
    world = World(serve(quick=False))  # with hashes that cost what they cost
    user = await world.user()
    loop = asyncio.get_running_loop()

    async def duration(name: str) -> float:
        begin = loop.time()
        response = await world.http("POST", "/v1/sessions", body={"name": name, "password": "wrong horse"})
        assert response.status == 401
        return loop.time() - begin

    await duration(_name())  # on each worker the first unknown user costs a hash more
    await asyncio.gather(*(duration(_name()) for _ in range(8)))
    known, unknown = [], []
    ratio = 0.0
    # Disturbances only add time: more tries bring both minima nearer to what a log-in costs, and never a real
    # difference to nothing.
    while len(known) < 11 or (not 0.6 < ratio < 1.7 and len(known) < 60):
        known.append(await duration(user.name))
        unknown.append(await duration(_name()))
        ratio = min(known) / min(unknown)
    assert 0.6 < ratio < 1.7, (known, unknown)
    assert min(unknown) > 0.005, "no hash was computed"


async def test_logging_out_ends_the_token(world: World) -> None:
    user = await world.user()
    response = await world.http("DELETE", "/v1/sessions/current", token=user.token)
    assert (response.status, response.body) == (204, b"")
    await world.worthless(user.token)
    for method, path in (("GET", "/v1/me"), ("DELETE", "/v1/sessions/current"), ("GET", "/v1/conversations")):
        response = await world.http(method, path, token=user.token)
        assert (response.status, response.json["code"]) == (401, "unauthenticated")
        assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer nonsense"}, {"Authorization": "Basic YTpi"}],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/me"),
        ("PATCH", "/v1/me"),
        ("DELETE", "/v1/sessions/current"),
        ("GET", "/v1/users/someone"),
        ("GET", "/v1/users?name=someone"),
        ("GET", "/v1/conversations"),
        ("GET", "/v1/conversations/c1/messages"),
        ("POST", "/v1/conversations/c1/messages"),
    ],
)
async def test_without_a_valid_token_it_is_unauthenticated(
    world: World, headers: dict[str, str], method: str, path: str
) -> None:
    response = await world.http(method, path, headers=headers, body={} if method in ("POST", "PATCH") else None)
    assert (response.status, response.json["code"]) == (401, "unauthenticated")


async def test_a_new_name_is_told_to_all_ones_sessions_and_shown_to_others(world: World) -> None:
    alice, bob = await world.user(), await world.user()
    clients = await world.both_workers(alice)
    name = _name()
    response = await world.http("PATCH", "/v1/me", token=alice.token, body={"name": name})
    assert (response.status, response.json) == (200, {"id": alice.id, "name": name})
    for client in clients:
        assert (await client.expect(t="user"))["user"] == {"id": alice.id, "name": name}
    found = await world.http("GET", f"/v1/users/{alice.id}", token=bob.token)
    assert found.json == {"id": alice.id, "name": name}
    # The old name is free, the new one is taken.
    taken = await world.http("PATCH", "/v1/me", token=bob.token, body={"name": name.upper()})
    assert (taken.status, taken.json["code"]) == (409, "conflict")
    assert (await world.http("PATCH", "/v1/me", token=bob.token, body={"name": alice.name})).status == 200


async def test_a_new_password_needs_the_old_one(world: World) -> None:
    user = await world.user()
    new = "battery staple"
    for old in (None, "wrong horse", ""):
        body = {"password": new} | ({} if old is None else {"old_password": old})
        response = await world.http("PATCH", "/v1/me", token=user.token, body=body)
        assert (response.status, response.json["code"]) == (403, "forbidden")
    await world.login(user)
    response = await world.http("PATCH", "/v1/me", token=user.token, body={"password": new, "old_password": PASSWORD})
    assert response.status == 200
    await world.login(user, new)
    body = {"name": user.name, "password": PASSWORD}
    assert (await world.http("POST", "/v1/sessions", body=body)).status == 401


async def test_a_new_password_ends_the_users_other_sessions(world: World) -> None:
    user = await world.user()
    others = await world.both_workers(await world.login(user))
    mine = await world.connect(user)
    body = {"password": "battery staple", "old_password": PASSWORD}
    assert (await world.http("PATCH", "/v1/me", token=user.token, body=body)).status == 200
    for client in others:
        assert (await client.end()).code == 4101
    await mine.request("ping")
    assert (await world.http("GET", "/v1/me", token=user.token)).status == 200


@pytest.mark.parametrize("body", [{}, {"name": ""}, {"name": 7}, {"password": "short", "old_password": PASSWORD}, b"x"])
async def test_a_change_that_is_none_is_a_bad_request_and_changes_nothing(world: World, body: Any) -> None:
    user = await world.user()
    response = await world.http("PATCH", "/v1/me", token=user.token, body=body)
    assert (response.status, response.json["code"]) == (400, "bad_request")
    assert (await world.http("GET", "/v1/me", token=user.token)).json["name"] == user.name
    await world.login(user)


async def test_users_are_found_by_id_and_by_name(world: World) -> None:
    alice, bob = await world.user("Alice"), await world.user()
    for path in (f"/v1/users/{alice.id}",):
        assert (await world.http("GET", path, token=bob.token)).json == {"id": alice.id, "name": alice.name}
    for name in (alice.name, alice.name.lower()):
        response = await world.http("GET", f"/v1/users?name={name}", token=bob.token)
        assert response.json == {"users": [{"id": alice.id, "name": alice.name}]}
    response = await world.http("GET", "/v1/users/no-such-user", token=bob.token)
    assert (response.status, response.json["code"]) == (404, "not_found")
    assert (await world.http("GET", f"/v1/users?name={_name()}", token=bob.token)).json == {"users": []}
    for query in ("", "?name=", "?name=" + "x" * 100):
        response = await world.http("GET", f"/v1/users{query}", token=bob.token)
        assert (response.status, response.json["code"]) == (400, "bad_request")


async def test_closed_registration_lets_nobody_in_but_whom_the_operator_adds(serve: Serve) -> None:
    world = World(serve(settings={"server.registration": "closed"}))
    try:
        response = await world.http("POST", "/v1/users", body={"name": _name(), "password": PASSWORD})
        assert (response.status, response.json["code"]) == (403, "forbidden")
        added = await world.command("user", "add", "alice", "--password-stdin", stdin=f"{PASSWORD}\n")
        assert added.returncode == 0, added.stderr
        response = await world.http("POST", "/v1/sessions", body={"name": "alice", "password": PASSWORD})
        assert response.status == 201
        assert response.json["user"]["id"] == added.stdout.strip()
    finally:
        await world.aclose()
