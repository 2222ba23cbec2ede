// The usual server of small teams: Node.js, Socket.IO with its Redis adapter, MongoDB,
// processes as PM2's cluster mode starts them. A small app, but each step is one that such an app takes.
//
//     node server.js --port N [--workers 2] [--world FILE] [--store mongodb|memory]
//
// REDIS_URL, MONGODB_URL and MONGODB_DATABASE say where its services are. FILE lists the users and rooms (seed.js).
//
// - PM2's cluster mode is node:cluster: the first process accepts and hands connections round. Clients use WebSocket
//   only (socket.io/docs/v4/using-multiple-nodes: then no stickiness is needed).
// - --store memory answers at once and keeps nothing: what the app could do with an infinitely fast database. With
//   --store mongodb it depends on the server of MongoDB's protocol that stands behind it (perf/peers/README.md).
"use strict";

const cluster = require("node:cluster");
const fs = require("node:fs");
const { createServer } = require("node:http");
const { createAdapter } = require("@socket.io/redis-adapter");
const { createClient } = require("redis");
const { Server } = require("socket.io");

const { BACKLOG, HOST, option, port } = require("../servers/common.js");
const chat = require("./chat.js");
const memory = require("./memory.js");
const mongodb = require("./mongodb.js");

const workers = Number(option("workers", "2"));
const worldFile = option("world", "");
const kind = option("store", "mongodb");

function world() {
  return worldFile === "" ? { users: 0, rooms: [], entries: 0 } : JSON.parse(fs.readFileSync(worldFile));
}

async function serve() {
  const store = kind === "memory" ? memory.open(world()) : await mongodb.open();
  const publisher = createClient({ url: process.env.REDIS_URL });
  const subscriber = publisher.duplicate();
  await Promise.all([publisher.connect(), subscriber.connect()]);

  const http = createServer();
  const io = new Server(http, { transports: ["websocket"], serveClient: false });
  io.adapter(createAdapter(publisher, subscriber));
  // socket.io/docs/v4/performance-tuning: the request of the handshake is not needed any more.
  io.engine.on("connection", (raw) => {
    raw.request = null;
  });
  chat.attach(io, store);
  http.listen({ host: HOST, port: port(), backlog: BACKLOG });
}

async function main() {
  if (cluster.isPrimary) {
    if (kind === "mongodb") await mongodb.seed(world());
    if (workers > 1) {
      for (let i = 0; i < workers; i++) cluster.fork();
      cluster.on("exit", () => cluster.fork()); // as PM2 does
      process.on("SIGTERM", () => {
        for (const worker of Object.values(cluster.workers)) worker.process.kill("SIGKILL");
        process.exit(0);
      });
      return;
    }
  }
  await serve();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
