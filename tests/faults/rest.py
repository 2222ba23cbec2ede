"""One HTTP request, for what a run needs before its WebSockets."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

ANSWER_S = 30.0


async def post(address: tuple[str, int], path: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST JSON, get JSON.

    :raises AssertionError: the answer is not 2xx.
    """
    data = orjson.dumps(body)
    host, port = address
    async with asyncio.timeout(ANSWER_S):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
            answer = await reader.read()
        finally:
            writer.close()
    headers, _, content = answer.partition(b"\r\n\r\n")
    assert headers.split()[1].startswith(b"2"), answer
    answered: dict[str, Any] = orjson.loads(content)
    return answered
