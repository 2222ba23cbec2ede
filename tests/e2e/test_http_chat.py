"""Conversations and messages over HTTP: what bots use."""

from __future__ import annotations

from typing import Any

import pytest

from .world import World, new_cid


async def test_ones_conversations_are_listed_as_they_are_pushed(world: World) -> None:
    alice, a = await world.pair()
    bob = await world.user()
    convs = [await world.group(a, bob, title="one"), await world.dm(a, bob), await world.channel(a, "three")]
    for conv in convs:
        await world.send(a, conv, "hi")
    fresh = await world.connect(alice)
    pushed = [{k: v for k, v in view.items() if k not in ("t", "after")} for view in fresh.got(t="conv", after=...)]
    response = await world.http("GET", "/v1/conversations", token=alice.token)
    assert response.status == 200
    assert response.json == {"conversations": pushed}
    assert [view["c"] for view in pushed] == convs[::-1]
    theirs = (await world.http("GET", "/v1/conversations", token=bob.token)).json["conversations"]
    assert [view["c"] for view in theirs] == [convs[1], convs[0]]
    assert [view["unread"] for view in theirs] == [1, 1]


async def test_messages_are_paged_as_with_history(world: World) -> None:
    alice, a = await world.pair()
    conv = await world.group(a)
    head = await world.fill(a, conv, 12)
    path = f"/v1/conversations/{conv}/messages"
    for query, fields in (
        ("", {}),
        ("?limit=5", {"limit": 5}),
        (f"?before={head}&limit=5", {"before": head, "limit": 5}),
        ("?before=1", {"before": 1}),
    ):
        response = await world.http("GET", path + query, token=alice.token)
        page = await a.request("history", c=conv, **fields)
        assert response.status == 200
        assert response.json == {"entries": page["entries"], "more": page["more"], "at": page["at"]}


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("limit=0", 400, "bad_request"),
        ("limit=-1", 400, "bad_request"),
        ("limit=x", 400, "bad_request"),
        ("limit=101", 413, "too_large"),
        ("before=", 400, "bad_request"),
        ("before=1.5", 400, "bad_request"),
        ("before=99999999999999999999", 400, "bad_request"),
        ("before=%D9%A3", 400, "bad_request"),
    ],
)
async def test_a_page_that_is_none_is_refused(world: World, query: str, status: int, code: str) -> None:
    alice, a = await world.pair()
    conv = await world.group(a)
    response = await world.http("GET", f"/v1/conversations/{conv}/messages?{query}", token=alice.token)
    assert (response.status, response.json["code"]) == (status, code)


async def test_a_message_posted_reaches_everybody_on_every_worker(world: World) -> None:
    alice, a = await world.pair(on=0)
    bob = await world.user()
    b0, b1 = await world.both_workers(bob)
    conv = await world.group(a, bob)
    for client in (b0, b1):
        await client.expect(t="conv", c=conv)
    body = {"body": "beep", "re": 1, "data": "{}"}
    response = await world.http("POST", f"/v1/conversations/{conv}/messages", token=alice.token, body=body)
    assert response.status == 201
    posted = response.json
    for client in (a, b0, b1):
        entry = await client.expect(t="msg", c=conv, s=posted["s"])
        assert entry["from"] == alice.id
        assert (entry["body"], entry["re"], entry["data"]) == ("beep", 1, "{}")
        assert (entry["cid"], entry["ts"]) == (posted["cid"], posted["ts"])


async def test_the_idempotency_key_is_the_cid(world: World) -> None:
    alice, a = await world.pair()
    conv = await world.group(a)
    path = f"/v1/conversations/{conv}/messages"
    cid = new_cid()
    headers = {"Idempotency-Key": cid}
    first = await world.http("POST", path, token=alice.token, body={"body": "once"}, headers=headers)
    assert first.status == 201
    assert first.json["dup"] is False
    for _ in range(3):
        again = await world.http("POST", path, token=alice.token, body={"body": "once"}, headers=headers)
        assert again.status == 200
        assert again.json == {**first.json, "dup": True}
    # The same over the WebSocket, and a conflict for something else.
    assert (await a.request("send", c=conv, cid=cid, body="once"))["s"] == first.json["s"]
    other = await world.http("POST", path, token=alice.token, body={"body": "twice"}, headers=headers)
    assert (other.status, other.json["code"]) == (409, "conflict")
    assert [entry["cid"] for entry in await world.whole_log(a, conv)].count(cid) == 1


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"", {}, 400, "bad_request"),
        (b"beep", {}, 400, "bad_request"),
        ([], {}, 400, "bad_request"),
        ({}, {}, 400, "bad_request"),
        ({"body": 5}, {}, 400, "bad_request"),
        ({"body": ""}, {}, 400, "bad_request"),
        ({"body": "x", "re": 0}, {}, 400, "bad_request"),
        ({"body": "x", "data": {}}, {}, 400, "bad_request"),
        # The message was stored without them, and the client did not learn of the loss.
        ({"body": "x", "files": ["f1"]}, {}, 400, "bad_request"),
        ({"body": "x", "files": "f1"}, {}, 400, "bad_request"),
        ({"body": "x"}, {"Idempotency-Key": "not an id"}, 400, "bad_request"),
        ({"body": "x"}, {"Idempotency-Key": "x" * 65}, 400, "bad_request"),
        ({"body": "x"}, {"Idempotency-Key": 'x","from":"victim'}, 400, "bad_request"),
        ({"body": "x" * 8193}, {}, 413, "too_large"),
    ],
)
async def test_a_message_that_is_none_is_refused_and_not_stored(
    world: World, body: Any, headers: dict[str, str], status: int, code: str
) -> None:
    alice, a = await world.pair()
    conv = await world.group(a)
    head = len(await world.whole_log(a, conv))
    path = f"/v1/conversations/{conv}/messages"
    response = await world.http("POST", path, token=alice.token, body=body, headers=headers)
    assert (response.status, response.json["code"]) == (status, code)
    assert len(await world.whole_log(a, conv)) == head


async def test_null_and_unknown_fields_are_as_with_send(world: World) -> None:
    alice, a = await world.pair()
    conv = await world.group(a)
    path = f"/v1/conversations/{conv}/messages"
    for extra in (
        {"re": None, "data": None, "files": None},
        {"files": []},
        {"mentions": ["bob"], "new": {"deep": [1]}},
    ):
        response = await world.http("POST", path, token=alice.token, body={"body": "x", **extra})
        assert response.status == 201, response
    assert [entry["body"] for entry in await world.whole_log(a, conv) if entry["t"] == "msg"] == ["x"] * 3


@pytest.mark.parametrize(
    ("body", "key", "said"),
    [
        ({}, "k", "body: missing; text"),
        ({"body": 5}, "k", "body: text"),
        ({"body": "x", "re": 0}, "k", "re: a whole number from 1 to 9007199254740991"),
        ({"body": "x", "files": ["f1"]}, "k", "files: this server takes none"),
        ([], "k", "the body: not a JSON object"),
        ({"body": "x"}, "not an id", "Idempotency-Key: an id, 1 to 64 of A-Z a-z 0-9 _ -"),
    ],
)
async def test_an_error_says_which_field_and_what_is_allowed(world: World, body: Any, key: str, said: str) -> None:
    alice, a = await world.pair()
    path = f"/v1/conversations/{await world.group(a)}/messages"
    response = await world.http("POST", path, token=alice.token, body=body, headers={"Idempotency-Key": key})
    assert (response.status, response.json["message"]) == (400, said)


@pytest.mark.parametrize(("query", "least"), [("limit=0", 1), ("limit=x", 1), ("before=", 0), ("after=1e3", 0)])
async def test_an_error_says_what_a_parameter_may_be(world: World, query: str, least: int) -> None:
    alice, a = await world.pair()
    path = f"/v1/conversations/{await world.group(a)}/messages?{query}"
    response = await world.http("GET", path, token=alice.token)
    name = query.partition("=")[0]
    assert response.json["message"] == f"{name}: a whole number from {least} to 9007199254740991"


async def test_gets_carry_etags_and_answer_304_while_nothing_changed(world: World) -> None:
    alice, a = await world.pair()
    conv = await world.group(a)
    await world.send(a, conv)
    for path in ("/v1/me", f"/v1/users/{alice.id}", "/v1/conversations", f"/v1/conversations/{conv}/messages"):
        first = await world.http("GET", path, token=alice.token)
        tag = first.headers["etag"]
        assert tag.startswith('"')
        for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            again = await world.http("GET", path, token=alice.token, headers={"If-None-Match": known})
            assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
        assert (await world.http("GET", path, token=alice.token, headers={"If-None-Match": '"other"'})).status == 200
        head = await world.http("HEAD", path, token=alice.token)
        assert (head.status, head.headers["etag"], head.body) == (200, tag, b"")
        assert head.headers["content-length"] == str(len(first.body))


async def test_an_etag_changes_with_what_it_stands_for(world: World) -> None:
    alice, a = await world.pair()
    conv = await world.group(a)
    for path in ("/v1/conversations", f"/v1/conversations/{conv}/messages"):
        tag = (await world.http("GET", path, token=alice.token)).headers["etag"]
        await world.send(a, conv)
        changed = await world.http("GET", path, token=alice.token, headers={"If-None-Match": tag})
        assert changed.status == 200
        assert changed.headers["etag"] != tag


async def test_a_304_is_only_for_whom_it_is(world: World) -> None:
    alice, a = await world.pair()
    stranger = await world.user()
    conv = await world.group(a)
    path = f"/v1/conversations/{conv}/messages"
    tag = (await world.http("GET", path, token=alice.token)).headers["etag"]
    for token, status in ((stranger.token, 404), ("nonsense", 401)):
        response = await world.http("GET", path, token=token, headers={"If-None-Match": tag})
        assert response.status == status
