"""Waiting for an event, but not for ever."""

from __future__ import annotations

import asyncio


async def wait_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event for so long at most; whether it came."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
