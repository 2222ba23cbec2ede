// Socket.IO as a bare relay: rooms of its in-memory adapter, no acknowledgements.
//
// As socket.io/docs/v4/performance-tuning advises: WebSocket transport only, the native add-on bufferutil, no
// permessage-deflate (its default), and no reference kept to the request of the handshake.
//
//     node socketio.js --port N
//
// Emit "join" with a list of rooms (acknowledged), then "send" with room and text; all in the room get "message".
"use strict";

const { createServer } = require("node:http");
const { Server } = require("socket.io");
const { BACKLOG, HOST, MAX_MESSAGE_BYTES, port } = require("./common.js");

const http = createServer();
const io = new Server(http, {
  transports: ["websocket"],
  serveClient: false,
  maxHttpBufferSize: MAX_MESSAGE_BYTES,
});

io.engine.on("connection", (raw) => {
  raw.request = null;
});

io.on("connection", (socket) => {
  socket.on("join", (rooms, done) => {
    socket.join(rooms);
    done();
  });
  socket.on("send", (room, text) => {
    io.to(room).emit("message", room, text);
  });
});

http.listen({ host: HOST, port: port(), backlog: BACKLOG });
