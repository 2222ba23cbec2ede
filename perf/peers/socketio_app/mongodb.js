// The app's store: MongoDB, through its driver with the driver's own settings (an insert is acknowledged before it
// is on disk), with the indexes that the queries want.
"use strict";

const { MongoClient } = require("mongodb");
const { conversationsOf, messagesOf, sessionsOf, usersOf } = require("./seed.js");

const BATCH = 100; // documents per insert of the seed

function connect() {
  return new MongoClient(process.env.MONGODB_URL).connect();
}

exports.open = async function open() {
  const client = await connect();
  const db = client.db(process.env.MONGODB_DATABASE || "chat");
  const sessions = db.collection("sessions");
  const users = db.collection("users");
  const conversations = db.collection("conversations");
  const messages = db.collection("messages");
  return {
    session: (token) => sessions.findOne({ _id: token }),
    user: (id) => users.findOne({ _id: id }),
    conversations: (user) => conversations.find({ members: user }, { projection: { members: 0 } }).toArray(),
    lastMessages: (ids, limit) =>
      messages
        .find({ conversation: { $in: ids } })
        .sort({ createdAt: -1 })
        .limit(limit)
        .toArray(),
    insert: async (message) => (await messages.insertOne(message)).insertedId,
  };
};

exports.seed = async function seed(world) {
  const client = await connect();
  try {
    const db = client.db(process.env.MONGODB_DATABASE || "chat");
    await db.collection("conversations").createIndex({ members: 1 });
    await db.collection("messages").createIndex({ conversation: 1, createdAt: -1 });
    for (const [name, documents] of [
      ["sessions", sessionsOf(world)],
      ["users", usersOf(world)],
      ["conversations", conversationsOf(world)],
      ["messages", messagesOf(world)],
    ]) {
      let batch = [];
      for (const document of documents) {
        batch.push(document);
        if (batch.length === BATCH) {
          await db.collection(name).insertMany(batch, { ordered: false });
          batch = [];
        }
      }
      if (batch.length > 0) await db.collection(name).insertMany(batch, { ordered: false });
    }
  } finally {
    await client.close();
  }
};
