"""A bridge from webhooks: it posts what it receives over HTTP into a channel.

    CHATCORE_PASSWORD='correct horse' python examples/webhook_bridge.py http://127.0.0.1:8080 builds lobby 9090
    curl -d '{"text": "build 17 passed"}' http://127.0.0.1:9090

Arguments: the server, the bridge's user (created if there is none), a channel, a port. The caller gets the server's
answer, and may repeat the request: with an Idempotency-Key header it is stored once. It listens on loopback only.
"""

import asyncio
import contextlib
import json
import os
import sys
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from chatcore.client import Client


async def join(url: str, name: str, channel: str) -> tuple[str, str]:
    """Log in and join the channel; returns the URL of its messages in the HTTP API, and the token."""
    async with await Client.login(url, name, os.environ["CHATCORE_PASSWORD"], register=True) as chat:
        return f"{chat.address.http}/v1/conversations/{await chat.channel(channel)}/messages", chat.token


def post(url: str, token: str, received: bytes, key: str | None) -> tuple[int, bytes]:
    """Post the text of a webhook; returns the status and the body of the answer."""
    try:
        body = json.dumps({"body": json.loads(received)["text"]}).encode()
    except (KeyError, TypeError, ValueError):
        return 400, b'expected {"text": ...}\n'
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, body, headers | ({"Idempotency-Key": key} if key else {}))
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except OSError as error:
        return (error.code, error.read()) if isinstance(error, urllib.error.HTTPError) else (502, str(error).encode())


def serve(url: str, token: str, port: int) -> None:
    class Bridge(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = min(int(self.headers["Content-Length"] or 0), 65_536)
            status, body = post(url, token, self.rfile.read(length), self.headers["Idempotency-Key"])
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", port), Bridge) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    serve(*asyncio.run(join(*sys.argv[1:4])), int(sys.argv[4]))
