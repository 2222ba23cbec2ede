"""No outdated value is kept: constructed races, lost announcements, lost connections. With and without Redis."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chatcore.cache.store import SharedCachedStore
from chatcore.entries import MemberFields, new_entry
from chatcore.errors import NotFound
from chatcore.store.base import Entry, Token, User

from .parts import SETTINGS, Clock, Worker, seqs, until, within, workers

HASH = b"t" * 32
FOR_EVER = 2**50


@pytest.fixture(params=["level 1", "both levels"])
def redis(request: pytest.FixtureRequest) -> str | None:
    """The URL of Redis; None: level 1 alone."""
    if request.param == "level 1":
        return None
    url: str = request.getfixturevalue("redis_url")
    return url


async def name_of(cache: SharedCachedStore, user: User) -> str:
    return (await cache.users([user.id]))[0].name


async def forget(*some: Worker) -> None:
    """Empty level 1, and let level 2 write what is queued."""
    for w in some:
        w.cache.on_resync_needed()
        if w.cache.l2 is not None:
            await w.cache.l2.flush()


async def test_a_fill_does_not_keep_what_changed_while_it_was_read(tmp_path: Path, redis: str | None) -> None:
    """The fill race: a reader reads the old value, a writer changes and announces it, then the reader fills."""
    async with workers(tmp_path, 2, redis=redis) as (reader, writer):
        ann, bob = await writer.user("ann"), await writer.user("bob")
        conv = await writer.conversation(ann, bob)
        await writer.cache.add_token(HASH, ann.id, FOR_EVER, "hash")
        await forget(reader, writer)
        if reader.cache.l2 is not None:
            await reader.cache.l2.delete([("t", HASH.hex())])  # else level 2 has it since log-in

        gate = reader.slow.gate("users")
        asked = asyncio.create_task(reader.cache.users([ann.id]))
        await within(gate.reached.wait(), "the read")
        await writer.cache.update_user(ann.id, "anna", None)
        gate.open.set()
        await asked
        assert await name_of(reader.cache, ann) == "anna"

        gate = reader.slow.gate("role")
        role = asyncio.create_task(reader.cache.role(bob.id, conv))
        await within(gate.reached.wait(), "the read")
        await writer.change(conv, ann, bob, "none")
        gate.open.set()
        assert await role is None, "it was read again"
        with pytest.raises(NotFound):
            await reader.last(conv, bob)

        gate = reader.slow.gate("token")
        token = asyncio.create_task(reader.cache.token(HASH))
        await within(gate.reached.wait(), "the read")
        await writer.cache.revoke_token(HASH)
        gate.open.set()
        assert await token is None, "it was read again"
        assert await reader.cache.token(HASH) is None
        if reader.cache.l2 is not None:
            await reader.cache.l2.flush()
            await forget(reader)
            assert await name_of(reader.cache, ann) == "anna", "level 2 has the new value"
            assert await reader.cache.role(bob.id, conv) is None
            assert await reader.cache.token(HASH) is None


async def test_a_fill_does_not_keep_a_change_whose_announcement_was_lost(tmp_path: Path, redis_url: str) -> None:
    """The same race without the announcement: level 2 itself refuses a value that was read before the change."""
    async with workers(tmp_path, 2, redis=redis_url) as (reader, writer):
        ann = await writer.user("ann")
        await writer.cache.add_token(HASH, ann.id, FOR_EVER, "hash")
        await forget(reader, writer)
        assert reader.cache.l2 is not None
        await reader.cache.l2.delete([("t", HASH.hex())])
        gates = [reader.slow.gate(name) for name in ("users", "token")]
        asked = [asyncio.create_task(reader.cache.users([ann.id])), asyncio.create_task(reader.cache.token(HASH))]
        for gate in gates:
            await within(gate.reached.wait(), "the read")
        reader.hub.lossy = True
        await writer.cache.update_user(ann.id, "anna", "other hash")  # ends the token
        for gate in gates:
            gate.open.set()
        await asyncio.gather(*asked)
        await reader.cache.l2.flush()
        await forget(reader, writer)
        assert await name_of(writer.cache, ann) == "anna"
        assert await writer.cache.token(HASH) is None


async def test_a_caller_after_the_answer_to_a_change_gets_the_new_value(tmp_path: Path, redis: str | None) -> None:
    """Not the result of a read that began before the change."""
    async with workers(tmp_path, redis=redis) as (w,):
        ann, bob = await w.user("ann"), await w.user("bob")
        conv = await w.conversation(ann)
        await forget(w)
        gate = w.slow.gate("users")
        early = asyncio.create_task(w.cache.users([ann.id]))
        await within(gate.reached.wait(), "the read")
        await w.cache.update_user(ann.id, "anna", None)
        assert await within(name_of(w.cache, ann), "a read of its own") == "anna"
        gate.open.set()
        await early
        assert await name_of(w.cache, ann) == "anna"
        with pytest.raises(NotFound):
            await w.last(conv, bob)
        await w.change(conv, ann, bob, "member")
        assert seqs(await w.last(conv, bob))
        await w.change(conv, ann, bob, "banned")
        with pytest.raises(NotFound):
            await w.last(conv, bob)


async def test_every_change_reaches_the_other_worker_before_it_is_answered(tmp_path: Path, redis: str | None) -> None:
    async with workers(tmp_path, 2, redis=redis) as (a, b):
        ann, bob = await a.user("ann"), await a.user("bob")
        conv = await a.conversation(ann, bob)
        hashes = [bytes([i]) * 32 for i in range(5)]
        for h in hashes:
            await a.cache.add_token(h, ann.id, FOR_EVER, "hash")

        async def known() -> list[Token | None]:
            return [await b.cache.token(h) for h in hashes]

        assert all(await known())
        assert seqs(await b.last(conv, bob))
        await a.cache.revoke_token(hashes[0])
        assert [t is not None for t in await known()] == [False, True, True, True, True]
        await a.cache.extend_token(hashes[1], FOR_EVER + 1)
        assert (await b.cache.token(hashes[1])).expires == FOR_EVER + 1  # type: ignore[union-attr]
        await a.cache.update_user(ann.id, "anna", None)
        assert {t.user.name for t in await known() if t is not None} == {"anna"}
        await a.cache.update_user(ann.id, None, "new hash", keep=hashes[1])
        assert [t is not None for t in await known()] == [False, True, False, False, False]
        await a.cache.set_disabled("anna", True)
        assert not any(await known())
        await a.cache.set_disabled("anna", False)
        await a.change(conv, ann, bob, "none")
        with pytest.raises(NotFound):
            await b.last(conv, bob)
        channel = await a.conversation(ann, kind="channel")
        with pytest.raises(NotFound):
            await b.last(channel, bob)
        assert (await a.change(channel, bob, bob, "member")).seq == 0, "the row alone"
        assert seqs(await b.last(channel, bob))


async def test_a_lost_announcement_is_made_up_for_by_the_changes_in_the_store(
    tmp_path: Path, redis: str | None
) -> None:
    async with workers(tmp_path, 2, redis=redis) as (a, b):
        ann, bob = await a.user("ann"), await a.user("bob")
        conv = await a.conversation(ann, bob)
        await a.cache.add_token(HASH, ann.id, FOR_EVER, "hash")
        assert await b.cache.role(bob.id, conv) == "member"
        assert await b.cache.token(HASH) is not None
        at = await b.cache.position()
        a.hub.lossy = True
        # Past the cache: as another program would, or a worker that died between commit and announcement.
        await a.sqlite.revoke_token(HASH)
        await a.sqlite.append(new_entry(conv, ann.id, "cid-lost", MemberFields(bob.id, "none")))
        assert await b.cache.role(bob.id, conv) == "member", "no worker has announced it"
        await b.cache.changes(at)
        assert await b.cache.role(bob.id, conv) is None
        assert await b.cache.token(HASH) is None
        await forget(b)
        assert await b.cache.role(bob.id, conv) is None, "level 2 was ignored, then corrected"


async def test_a_value_whose_invalidation_was_lost_expires(tmp_path: Path) -> None:
    clock = Clock()
    async with workers(tmp_path, 2, clock=clock) as (a, b):
        ann = await a.user("ann")
        await a.cache.add_token(HASH, ann.id, FOR_EVER, "hash")
        assert await name_of(b.cache, ann) == "ann"
        assert await b.cache.token(HASH) is not None
        a.hub.lossy = True
        await a.cache.update_user(ann.id, "anna", "new hash")
        assert await name_of(b.cache, ann) == "ann", "the announcement was lost"
        clock.move(SETTINGS.session_ttl_ms / 1000 + 0.1)
        assert await b.cache.token(HASH) is None
        clock.move(SETTINGS.profile_ttl_ms / 1000)
        assert await name_of(b.cache, ann) == "anna"


async def test_a_resync_drops_everything(tmp_path: Path, redis: str | None) -> None:
    async with workers(tmp_path, 2, redis=redis) as (a, b):
        ann, bob = await a.user("ann"), await a.user("bob")
        conv = await a.conversation(ann, bob)
        await a.cache.add_token(HASH, ann.id, FOR_EVER, "hash")
        await asyncio.gather(b.cache.users([ann.id]), b.cache.token(HASH), b.last(conv, bob))
        a.hub.lossy = True
        await a.cache.update_user(ann.id, "anna", "new hash")
        await a.change(conv, ann, bob, "none")
        a.hub.resync()
        assert await name_of(b.cache, ann) == "anna"
        assert await b.cache.token(HASH) is None
        with pytest.raises(NotFound):
            await b.last(conv, bob)


async def test_a_resync_during_a_read_refuses_its_result(tmp_path: Path, redis: str | None) -> None:
    """The connection to the bus breaks between the read and the fill."""
    async with workers(tmp_path, 2, redis=redis) as (reader, writer):
        ann = await writer.user("ann")
        await forget(reader, writer)
        gate = reader.slow.gate("users")
        asked = asyncio.create_task(reader.cache.users([ann.id]))
        await within(gate.reached.wait(), "the read")
        reader.hub.lossy = True
        await writer.cache.update_user(ann.id, "anna", None)
        reader.cache.on_resync_needed()
        gate.open.set()
        await asked
        assert await name_of(reader.cache, ann) == "anna"


async def test_values_expire_early_while_the_bus_is_down(tmp_path: Path) -> None:
    clock = Clock()
    async with workers(tmp_path, 2, clock=clock) as (a, b):
        ann = await a.user("ann")
        a.hub.lossy, a.hub.healthy = True, False
        a.hub.resync()
        assert await name_of(b.cache, ann) == "ann"
        await a.cache.update_user(ann.id, "anna", None)
        clock.move(SETTINGS.unheard_ttl_ms / 1000 + 0.01)
        assert await name_of(b.cache, ann) == "anna"


async def test_a_malformed_announcement_drops_everything(tmp_path: Path) -> None:
    async with workers(tmp_path) as (w,):
        ann = await w.user("ann")
        for payload in (b"{", b"[]", b'{"k": 1}', b'{"k": [["t"]]}', b'{"k": [["?", "x"]]}', b"\xff"):
            await w.cache.users([ann.id])
            w.calls.clear()
            with pytest.raises(ValueError):  # noqa: PT011
                w.cache.on_bus(payload)
            await w.cache.users([ann.id])
            assert w.calls["users"] == 1, payload


async def test_a_body_that_was_overwritten_is_not_returned(tmp_path: Path, redis: str | None) -> None:
    async with workers(tmp_path, 2, redis=redis) as (a, b):
        ann = await a.user("ann")
        conv = await a.conversation(ann)
        head = await a.fill(conv, ann, 10)
        await b.last(conv, ann)
        (old,) = await a.sqlite.entries(conv, head - 1, 1, 10**6)
        new = Entry(conv, head, "msg", ann.id, old.msgs, old.last_msg, old.wire.replace(b'"m', b'"gone '))
        gate = b.slow.gate("entries")
        b.cache.on_resync_needed()
        if b.cache.l2 is not None:
            await b.cache.l2.delete([("e", conv)])  # so that the store is asked
        asked = asyncio.create_task(b.last(conv, ann, hint=head))
        await within(gate.reached.wait(), "the read of the old body")
        await a.cache.overwrite(new)
        gate.open.set()
        await asked
        for w in (a, b):
            if w.cache.l2 is not None:
                await w.cache.l2.flush()
        kept = b.cache.recent.l1.dense(conv, head, head)
        # The store of this test still has the old body, so a read of the store after the change may return it.
        assert kept is None or b.calls["entries"] >= 2
        if a.cache.l2 is not None:
            record = (await a.cache.l2.read_entries([conv]))[conv]
            bodies = {e.seq: e.wire for e in record.entries}
            assert bodies[head] == new.wire, "a body that was read before the change was not written"
            a.cache.l2.add_committed([old])  # late: it was committed long ago
            await a.cache.l2.flush()
            record = (await a.cache.l2.read_entries([conv]))[conv]
            assert {e.seq: e.wire for e in record.entries}[head] == new.wire


async def test_a_value_that_one_worker_reads_is_cached_for_all(tmp_path: Path, redis_url: str) -> None:
    async with workers(tmp_path, 2, redis=redis_url) as (a, b):
        ann = await a.user("ann")
        conv = await a.conversation(ann)
        head = await a.fill(conv, ann, 70)
        await a.cache.add_token(HASH, ann.id, FOR_EVER, "hash")
        await forget(a, b)
        for w in (a, b):
            await w.last(conv, ann, hint=head)
            await w.cache.token(HASH)
            await forget(w)
        await b.last(conv, ann, hint=head)
        await b.cache.token(HASH)
        assert b.calls["entries"] == b.calls["role"] == b.calls["token"] == b.calls["users"] == 0
        kinds = b.cache.stats()["kinds"]
        assert {name: counts["l2"] for name, counts in kinds.items()} == {
            "sessions": 2, "profiles": 2, "roles": 2, "member_counts": 0, "last_entries": 2,
        }  # fmt: skip
        await until(lambda: a.cache.stats()["l2"] == {"ready": True, "outages": 0, "shed": 0}, "level 2 is in use")
