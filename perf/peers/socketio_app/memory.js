// A store that answers at once and keeps no messages: an upper bound for the app, whatever its database.
"use strict";

const { conversationsOf, sessionsOf, usersOf } = require("./seed.js");

exports.open = function open(world) {
  const sessions = new Map();
  for (const session of sessionsOf(world)) sessions.set(session._id, session);
  const users = new Map();
  for (const user of usersOf(world)) users.set(user._id, user);
  const conversations = new Map();
  for (const { members, ...conversation } of conversationsOf(world)) {
    for (const user of members) {
      if (!conversations.has(user)) conversations.set(user, []);
      conversations.get(user).push(conversation);
    }
  }
  let inserted = 0;
  return {
    session: async (token) => sessions.get(token) ?? null,
    user: async (id) => users.get(id) ?? null,
    conversations: async (user) => conversations.get(user) ?? [],
    lastMessages: async () => [],
    insert: async () => (++inserted).toString(16).padStart(24, "0"),
  };
};
