// The documents of a world: {"users": how many, "rooms": [[user, …], …], "entries": messages in each room}.
// User 5 is "u5" and has the token "s5"; room 7 is the conversation "c7".
"use strict";

const BEGAN = Date.UTC(2026, 0, 1);

exports.sessionsOf = function* sessionsOf(world) {
  for (let user = 0; user < world.users; user++) yield { _id: `s${user}`, user: `u${user}` };
};

exports.usersOf = function* usersOf(world) {
  for (let user = 0; user < world.users; user++) yield { _id: `u${user}`, name: `User ${user}` };
};

exports.conversationsOf = function* conversationsOf(world) {
  for (const [room, members] of world.rooms.entries()) {
    yield { _id: `c${room}`, name: `Room ${room}`, members: members.map((user) => `u${user}`) };
  }
};

exports.messagesOf = function* messagesOf(world) {
  for (const [room, members] of world.rooms.entries()) {
    for (let entry = 0; entry < world.entries; entry++) {
      yield {
        conversation: `c${room}`,
        sender: `u${members[entry % members.length]}`,
        text: `message ${entry} of this conversation`,
        createdAt: new Date(BEGAN + entry * 1000),
      };
    }
  }
};
