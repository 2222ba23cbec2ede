"""Where the servers of a Redis are now: one, the one that the sentinels name, or a cluster's primaries."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from redis.crc import key_slot

from ..common.redis_client import RedisAddress
from .redis_link import Link, LinkError, Refused

SLOTS: Final = 16384
Server = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """The servers, and in a cluster the index of each slot's server."""

    servers: tuple[Server, ...]
    slots: tuple[int, ...] = ()

    def index(self, channel: bytes) -> int:
        """Of the server that a channel belongs to."""
        return self.slots[key_slot(channel)] if self.slots else 0


class Place:
    """Finds the layout, again and again. What was found is where it asks next time, too."""

    def __init__(self, address: RedisAddress, name: str, timeout_s: float) -> None:
        self.address = address
        #: Whether the layout can change without a connection being lost.
        self.moves = address.kind != "single"
        self._name = name
        self._timeout_s = timeout_s
        self._known = list(address.hosts)

    async def find(self) -> Layout:
        """Ask one after the other until one knows.

        :raises LinkError: nobody does; says what the last one said.
        """
        if not self.moves:
            return Layout(self.address.hosts or (("", 0),))
        why = "no address"
        for i, server in enumerate(self._known):
            try:
                async with asyncio.timeout(self._timeout_s):
                    layout = await self._ask(server)
            except TimeoutError:
                why = f"{server[0]}:{server[1]} does not answer"
            except (LinkError, Refused) as exc:
                why = str(exc)
            else:
                if self.address.cluster:
                    self._known = [*layout.servers, *(s for s in self.address.hosts if s not in layout.servers)]
                else:
                    self._known.insert(0, self._known.pop(i))
                return layout
        raise LinkError(why)

    async def _ask(self, server: Server) -> Layout:
        a = self.address
        link = Link(asyncio.get_running_loop(), lambda why: None)
        auth = (a.username, a.password) if a.cluster else (a.sentinel_username, a.sentinel_password)
        try:
            await link.open(a, server, self._name, auth)
            if a.cluster:
                return _cluster(await link.request(b"CLUSTER", b"SLOTS"), server)
            found = await link.request(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", a.service.encode())
            if not found:
                raise LinkError(f"the sentinel knows no service {a.service}")
            return Layout(((found[0].decode(), int(found[1])),))
        except (TypeError, ValueError, IndexError, AttributeError) as exc:
            raise LinkError(f"{server[0]}:{server[1]} answers strangely: {exc}") from None
        finally:
            link.drop()
            await asyncio.shield(link.gone())


def _cluster(ranges: list[list[object]], asked: Server) -> Layout:
    """The layout that CLUSTER SLOTS tells: [first slot, last slot, [host, port, ...], replicas ...] each.

    :raises LinkError: a slot has no server.
    """
    servers: dict[Server, int] = {}
    slots = [-1] * SLOTS
    for first, last, primary, *_ in sorted(ranges, key=lambda r: int(str(r[0]))):
        assert isinstance(primary, list)
        # Without a host it is "the one that you asked".
        server = (primary[0].decode() if primary[0] else asked[0], int(primary[1]))
        index = servers.setdefault(server, len(servers))
        for slot in range(int(str(first)), int(str(last)) + 1):
            slots[slot] = index
    if -1 in slots:
        raise LinkError("not all slots of the cluster have a server")
    return Layout(tuple(servers), tuple(slots))
