"""Logging in on a connection: `hello`, `auth` and its renewal, `ready`."""

from __future__ import annotations

from .world import World


async def test_hello_tells_version_timeouts_features_and_limits(world: World) -> None:
    client = await world.open()
    (hello,) = client.got(t="hello")
    assert hello["v"] == 1
    assert hello["server"].startswith("chatcore/")
    assert hello["auth_ms"] == 10_000
    assert hello["ping_ms"] == 25_000
    assert isinstance(hello["features"], list)
    limits = hello["limits"]
    assert limits == {
        "frame": 65536,
        "body": 8192,
        "have": 1000,
        "only": 100,
        "history": 100,
        "backlog": 500,
        "small": 100,
    }


async def test_auth_tells_who_it_is_and_how_long_the_token_lives(world: World) -> None:
    user = await world.user("alice")
    client = await world.open()
    reply = await client.request("auth", v=1, token=user.token)
    assert reply["user"] == {"id": user.id, "name": user.name}
    assert 0 < reply["expires_ms"] <= 30 * 24 * 3600 * 1000
    assert reply["full"] is True
    ready = await client.expect(t="ready")
    assert isinstance(ready["sync"], str)


async def test_connections_reach_both_workers(world: World) -> None:
    user = await world.user()
    for slot in (0, 1):
        client = await world.connect(user, on=slot)
        assert world.server.slot_of(client.port) == slot
