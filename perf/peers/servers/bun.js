// Bun: uWebSockets' publish and subscribe, as Bun's own server offers it.
//
// As bun.sh/docs/api/websockets advises: native topics (ws.subscribe, server.publish), no per-message compression.
// The limit of backpressure, over which messages are dropped, is raised for floods.
//
//     bun bun.js --port N      says the protocol of relay.py
//
// Bun listens with a backlog of 512, which it has no setting for.
"use strict";

const { HOST, JOINED, MAX_MESSAGE_BYTES, port } = require("./common.js");

const MAX_BACKPRESSURE_BYTES = 64 << 20; // reported by settings() of node.py; its default is 16 MiB

const server = Bun.serve({
  hostname: HOST,
  port: port(),
  fetch(request, server) {
    return server.upgrade(request) ? undefined : new Response("WebSocket only", { status: 426 });
  },
  websocket: {
    perMessageDeflate: false,
    maxPayloadLength: MAX_MESSAGE_BYTES,
    backpressureLimit: MAX_BACKPRESSURE_BYTES,
    message(socket, text) {
      if (text[0] === "J") {
        for (const room of text.slice(1).split(" ")) socket.subscribe(room);
        socket.send(JOINED);
      } else {
        server.publish(text.slice(1, text.indexOf(" ")), text);
      }
    },
  },
});
