"""Every error code, when it comes, and that what was refused changed nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from .client import Client
from .conftest import Serve
from .raw import TEXT, frame
from .world import User, World, new_cid

# --- bad_request -----------------------------------------------------------------------


async def _bad(client: Client, message: str) -> dict[str, Any]:
    """The error that a message is answered with."""
    before = len(client.received)
    await client.raw(message)
    error = lambda: next((m for m in client.received[before:] if m["t"] == "error"), None)  # noqa: E731
    reply: dict[str, Any] = await client.until(error, "an error")
    assert reply["code"] == "bad_request", reply
    assert "retry_after_ms" not in reply
    return reply


@pytest.mark.parametrize("t", ["", "dance", "SEND", "ok", "hello", "msg", "edit", "del", "react", "search"])
async def test_an_unknown_type_is_a_bad_request(world: World, t: str) -> None:
    _, a = await world.pair()
    reply = await _bad(a, json.dumps({"t": t, "id": 77, "c": "c1"}))
    assert reply["id"] == 77
    await a.request("ping")


@pytest.mark.parametrize("message", ["{}", '{"id":5}', '{"t":null,"id":5}', '{"t":7,"id":5}', '{"t":["ping"],"id":5}'])
async def test_a_missing_type_is_a_bad_request(world: World, message: str) -> None:
    _, a = await world.pair()
    if message == "{}":  # without an id there is no answer
        await a.raw(message)
    else:
        assert (await _bad(a, message))["id"] == 5
    await a.request("ping")


@pytest.mark.parametrize("id", ["0", "-1", "2147483648", '"7"', "1.5", "true", "[1]", "1e400"])
async def test_an_id_that_is_none_is_a_bad_request(world: World, id: str) -> None:
    _, a = await world.pair()
    assert "id" not in await _bad(a, f'{{"t":"ping","id":{id}}}')
    await a.request("ping")


VALID: dict[str, dict[str, Any]] = {
    "send": {"c": "CONV", "cid": "cid", "body": "b"},
    "history": {"c": "CONV"},
    "attach": {"only": ["CONV"]},
    "read": {"c": "CONV", "upto": 1},
    "typing": {"c": "CONV"},
    "open": {"kind": "group", "cid": "cid"},
    "member": {"c": "CONV", "user": "USER", "role": "member"},
    "meta": {"c": "CONV", "cid": "cid", "title": "t"},
    "notify": {"c": "CONV", "level": "all"},
    "members": {"c": "CONV"},
    "users": {"ids": ["USER"]},
    "watch": {"users": ["USER"]},
    "block": {"user": "USER", "on": True},
}
REQUIRED = {t: [name for name in fields if (t, name) != ("attach", "only")] for t, fields in VALID.items()}
NO_IDS = ["", "a b", "x" * 65, "é", "a\n", 5, None, ["c"], {"c": 1}]


@pytest.mark.parametrize(("t", "name"), [(t, name) for t, names in REQUIRED.items() for name in names])
async def test_a_field_that_is_missing_or_of_another_type_is_a_bad_request(world: World, t: str, name: str) -> None:
    user, a = await world.pair()
    conv = await world.group(a)
    head = len(await world.whole_log(a, conv))
    fields = json.loads(json.dumps(VALID[t]).replace("CONV", conv).replace("USER", user.id))
    await a.refused("bad_request", t, **{key: value for key, value in fields.items() if key != name})
    for wrong in (None, {"a": 1}, 1.5, [[]]):
        await a.refused("bad_request", t, **{**fields, name: wrong})
    assert len(await world.whole_log(a, conv)) == head


@pytest.mark.parametrize(
    ("t", "name"),
    [
        (t, name)
        for t, fields in VALID.items()
        for name in fields
        if name in ("c", "cid", "user", "ids", "users", "only")
    ],
)
async def test_an_id_with_other_characters_or_too_long_is_a_bad_request(world: World, t: str, name: str) -> None:
    user, a = await world.pair()
    conv = await world.group(a)
    fields = json.loads(json.dumps(VALID[t]).replace("CONV", conv).replace("USER", user.id))
    for wrong in NO_IDS:
        await a.refused("bad_request", t, **{**fields, name: [wrong] if isinstance(fields[name], list) else wrong})
    await a.request("ping")


@pytest.mark.parametrize("body", ['"\\ud800"', '"\\udfff x"', '"\\ud83d"'])
async def test_half_a_character_is_refused(world: World, body: str) -> None:
    """A lone surrogate cannot be written in UTF-8, so no client could be sent it."""
    _, a = await world.pair()
    conv = await world.group(a)
    head = len(await world.whole_log(a, conv))
    b = await world.connect(await world.user())
    await a.raw(f'{{"t":"send","id":9,"c":"{conv}","cid":"{new_cid()}","body":{body}}}')
    await a.until(lambda: a.closed or a.got(t="error", id=9), "an error or a close")
    assert (a.closed and a.closed.code == 4103) or a.got(t="error", id=9, code="bad_request")
    await b.request("ping")
    assert head > 0


@pytest.mark.parametrize("body", ["\0", "\x1b[31m", '"\\', "\u2028", "\U0001f468\u200d\U0001f467", "a\r\nb", "﷽" * 500])
async def test_any_text_arrives_as_it_was_sent(world: World, body: str) -> None:
    _, a = await world.pair(on=0)
    bob, b = await world.pair(on=1)
    conv = await world.group(a, bob)
    await b.expect(t="conv", c=conv)
    seq = (await world.send(a, conv, body, data=body))["s"]
    entry = (await b.reach(conv, seq))[-1]
    assert (entry["body"], entry["data"]) == (body, body)
    assert (await world.whole_log(b, conv))[-1] == entry


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"t": "edit"}, "t: no such request: edit"),
        ({"t": "history", "c": "a b"}, "c: an id, 1 to 64 of A-Z a-z 0-9 _ -"),
        ({"t": "history", "c": "c1", "limit": 0}, "limit: a whole number from 1 to 9007199254740991"),
        ({"t": "send", "c": "c1", "cid": "m 1", "body": ""}, "cid: an id, 1 to 64 of A-Z a-z 0-9 _ -"),
        ({"t": "open", "kind": "room", "cid": "o1"}, "kind: one of dm, group, channel"),
        ({"t": "typing"}, "c: missing; an id, 1 to 64 of A-Z a-z 0-9 _ -"),
    ],
)
async def test_an_error_says_which_field_and_what_is_allowed(world: World, request_: dict[str, Any], said: str) -> None:
    """It said it in Python: Expected `int | null`, a regular expression, Invalid value 'edit' - at `$.t`."""
    _, a = await world.pair()
    assert (await _bad(a, json.dumps({**request_, "id": 1})))["message"] == said


async def test_null_is_as_good_as_absent_for_limit_raw_and_v(world: World) -> None:
    user = await world.user()
    a = await world.connect(user)
    conv = await world.group(a)
    page = await a.request("history", c=conv, limit=None, raw=None, before=None, after=None)
    assert page == {**await a.request("history", c=conv), "id": page["id"]}
    await a.request("members", c=conv, limit=None, after=None)
    await a.request("channels", limit=None)
    b = await world.open()
    await b.request("auth", token=user.token, v=None, sync=None, have=None, only=None, ping_ms=None)


async def test_of_two_fields_of_one_name_the_last_counts(world: World) -> None:
    """Not if the first one was wrong, or the name of another request: then it was refused."""
    _, a = await world.pair()
    await a.raw('{"t":"edit","id":"x","id":77,"t":"ping"}')
    await a.expect(t="ok", id=77)
    await a.raw('{"id":77,"t":"ping","id":78}')
    await a.expect(t="ok", id=78)


# --- not_found ---------------------------------------------------------------------------


async def _outsiders_requests(world: World, user: User, conv: str) -> list[tuple[str, dict[str, Any]]]:
    return [
        ("send", {"c": conv, "cid": new_cid(), "body": "let me in"}),
        ("history", {"c": conv}),
        ("history", {"c": conv, "after": 0, "raw": True}),
        ("read", {"c": conv, "upto": 1}),
        ("typing", {"c": conv}),
        ("member", {"c": conv, "user": user.id, "role": "owner"}),
        ("member", {"c": conv, "user": (await world.user()).id, "role": "member"}),
        ("member", {"c": conv, "user": (await world.user()).id, "role": "banned"}),
        ("meta", {"c": conv, "cid": new_cid(), "title": "mine"}),
        ("notify", {"c": conv, "level": "none"}),
        ("members", {"c": conv}),
    ]


@pytest.mark.parametrize("kind", ["group", "channel", "dm"])
async def test_to_outsiders_everything_of_a_conversation_is_not_found(world: World, kind: str) -> None:
    _, a = await world.pair(on=0)
    bob = await world.user()
    outsider, x = await world.pair(on=1)
    if kind == "dm":
        conv = await world.dm(a, bob)
    else:
        conv = await (world.group(a, bob) if kind == "group" else world.channel(a))
    head = (await world.send(a, conv))["s"]
    requests = await _outsiders_requests(world, outsider, conv)
    missing = await _outsiders_requests(world, outsider, "no-such-conv")
    for (t, fields), (_, nowhere) in zip(requests, missing, strict=True):
        if kind == "channel" and t == "member" and fields["user"] == outsider.id:
            continue  # a channel can be joined
        reply = await x.refused("not_found", t, **fields)
        other = await x.refused("not_found", t, **nowhere)
        assert reply["message"] == other["message"], "it must not tell whether there is one"
    await x.request("attach", only=[conv], have={conv: 0})
    for response in (
        await world.http("GET", f"/v1/conversations/{conv}/messages", token=outsider.token),
        await world.http("POST", f"/v1/conversations/{conv}/messages", token=outsider.token, body={"body": "hi"}),
    ):
        assert (response.status, response.json["code"]) == (404, "not_found")
    await x.request("ping")
    assert len(await world.whole_log(a, conv)) == head
    assert not [m for m in x.received if m.get("c") == conv]
    page = await a.request("members", c=conv)
    assert outsider.id not in [m["user"] for m in page["members"]]


# --- too_large, rate_limited ----------------------------------------------------------------


async def test_too_many_unanswered_requests_are_rate_limited_and_can_be_repeated(tight: World) -> None:
    user = await tight.user()
    a = await tight.connect(user)
    conv = await tight.group(a)
    raw = await tight.raw()
    await raw.log_in(user.token)
    cids = [new_cid() for _ in range(40)]
    sends = [{"t": "send", "id": i + 2, "c": conv, "cid": cid, "body": str(i)} for i, cid in enumerate(cids)]
    # In one piece, so that the store cannot answer in between.
    await raw.send(b"".join(frame(TEXT, json.dumps(send).encode()) for send in sends))
    replies: dict[int, dict[str, Any]] = {}
    while len(replies) < len(sends):
        message = (await raw.frame()).json
        if message["t"] in ("ok", "error"):
            replies[message["id"]] = message
    refused = [reply for reply in replies.values() if reply["t"] == "error"]
    assert {reply["code"] for reply in refused} == {"rate_limited"}
    assert all(reply["retry_after_ms"] > 0 for reply in refused)
    stored = {reply["id"] - 2 for reply in replies.values() if reply["t"] == "ok"}
    assert len(stored) >= 8
    # The other worker's pages go as far as it has heard.
    await a.reach(conv, max(reply["s"] for reply in replies.values() if reply["t"] == "ok"))
    log = await tight.whole_log(a, conv)
    assert [entry["cid"] for entry in log if entry["t"] == "msg"] == [cids[i] for i in sorted(stored)]
    for i, cid in enumerate(cids):
        reply = await a.request("send", c=conv, cid=cid, body=str(i))
        assert reply.get("dup", False) == (i in stored)


async def test_too_many_messages_are_rate_limited_for_as_long_as_is_said(serve: Serve) -> None:
    world = World(serve(settings={"rates.messages_per_s": 10, "rates.messages_burst": 10}))
    try:
        _, a = await world.pair()
        conv = await world.group(a)
        futures = [await a.begin("send", c=conv, cid=new_cid(), body=str(i)) for i in range(14)]
        replies = [await a.answer(future) for future in futures]
        refused = [reply for reply in replies if reply["t"] == "error"]
        assert refused
        assert {reply["code"] for reply in refused} == {"rate_limited"}
        wait = max(reply["retry_after_ms"] for reply in refused)
        assert 0 < wait <= 1500
        await asyncio.sleep(wait / 1000)  # the wait that the server asked for
        page = await a.request("history", c=conv)
        assert [e["s"] for e in page["entries"] if e["t"] == "msg"] == [r["s"] for r in replies if r["t"] == "ok"]
    finally:
        await world.aclose()


# --- unavailable --------------------------------------------------------------------------


async def test_while_the_store_does_not_answer_sends_are_unavailable_and_reads_go_on(serve: Serve) -> None:
    server = serve(settings={"timeouts.store_ms": 2000, "store.operation_ms": 2000})
    world = World(server)
    try:
        alice, a = await world.pair(on=0)
        bob, b = await world.pair(on=1)
        conv = await world.group(a, bob)
        head = (await world.send(a, conv))["s"]
        await b.reach(conv, head)
        message = {"c": conv, "cid": new_cid(), "body": "into the void"}
        with server.backend.stall(server.data):
            asked = [
                (client, await client.begin(t, **fields))
                for client in (a, b)
                for t, fields in (("send", message), ("open", {"kind": "group", "cid": new_cid()}))
            ]
            response = await world.http(
                "POST", f"/v1/conversations/{conv}/messages", token=alice.token, body={"body": "by HTTP"}
            )
            for client, future in asked:
                reply = await client.answer(future)
                assert (reply["t"], reply["code"]) == ("error", "unavailable")
                assert reply["retry_after_ms"] > 0
            assert (response.status, response.json["code"]) == (503, "unavailable")
            assert int(response.headers["retry-after"]) > 0
            page = await b.request("history", c=conv)
            assert page["at"] == head
        # Whatever became of the first try: the same cid finds it, once.
        while True:
            reply = await a.answer(await a.begin("send", **message))
            if reply["t"] == "ok":
                break
            assert reply["code"] == "unavailable"
            await asyncio.sleep(reply["retry_after_ms"] / 1000)
        await b.reach(conv, reply["s"])
        log = await world.whole_log(b, conv)
        assert [(e["from"], e["cid"]) for e in log].count((alice.id, message["cid"])) == 1
        # Other sends that were answered `unavailable` may still land, behind.
        assert (await b.reach(conv, len(log)))[: len(log) - b.after(conv)] == log[b.after(conv) :]
    finally:
        await world.aclose()
