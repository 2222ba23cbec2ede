// ws: its broadcast on Node.js.
//
// As its README advises: a loop over the receivers that sends to those that are open ("Server broadcast"),
// permessage-deflate off, the optional native add-on bufferutil installed ("Opt-in for performance"). Receivers are
// kept per room, so its own list of clients is turned off (doc/ws.md, clientTracking).
//
//     node ws.js --port N      says the protocol of relay.py
"use strict";

const { WebSocket, WebSocketServer } = require("ws");
const { BACKLOG, HOST, JOINED, MAX_MESSAGE_BYTES, JOIN_BYTE, SPACE, port } = require("./common.js");

const rooms = new Map();

function join(room, socket) {
  let members = rooms.get(room);
  if (members === undefined) rooms.set(room, (members = new Set()));
  members.add(socket);
}

const server = new WebSocketServer({
  host: HOST,
  port: port(),
  backlog: BACKLOG,
  perMessageDeflate: false,
  clientTracking: false,
  maxPayload: MAX_MESSAGE_BYTES,
});

server.on("connection", (socket) => {
  let joined = [];
  socket.on("message", (data) => {
    if (data[0] === JOIN_BYTE) {
      joined = joined.concat(data.latin1Slice(1).split(" "));
      for (const room of joined) join(room, socket);
      socket.send(JOINED);
      return;
    }
    const members = rooms.get(data.latin1Slice(1, data.indexOf(SPACE)));
    if (members === undefined) return;
    for (const member of members) {
      if (member.readyState === WebSocket.OPEN) member.send(data, { binary: false });
    }
  });
  socket.on("error", () => {}); // a close follows
  socket.on("close", () => {
    for (const room of joined) rooms.get(room).delete(socket);
  });
});
