// The work of the app for its clients: who they are, which conversations they are in, and messages.
"use strict";

const LAST_MESSAGES = 50; // of all conversations together, sent to a client that connects

exports.attach = function attach(io, store) {
  io.use(async (socket, next) => {
    try {
      const session = await store.session(socket.handshake.auth.token);
      if (session === null) return next(new Error("unauthorized"));
      const user = await store.user(session.user);
      if (user === null) return next(new Error("unauthorized"));
      socket.data.user = user;
      next();
    } catch (error) {
      next(error);
    }
  });

  io.on("connection", async (socket) => {
    const user = socket.data.user;

    socket.on("message", async (message, ack) => {
      try {
        if (!socket.rooms.has(message.conversation)) throw new Error("not a member");
        const stored = {
          conversation: message.conversation,
          sender: user._id,
          text: message.text,
          createdAt: new Date(),
        };
        const id = await store.insert(stored);
        io.to(stored.conversation).emit("message", {
          id,
          conversation: stored.conversation,
          sender: user._id,
          text: stored.text,
          createdAt: stored.createdAt,
        });
        ack({ ok: true, id });
      } catch (error) {
        ack({ ok: false, error: error.message });
      }
    });

    socket.on("history", async (conversation, ack) => {
      try {
        if (!socket.rooms.has(conversation)) throw new Error("not a member");
        ack({ ok: true, messages: await store.lastMessages([conversation], LAST_MESSAGES) });
      } catch (error) {
        ack({ ok: false, error: error.message });
      }
    });

    try {
      const conversations = await store.conversations(user._id);
      const ids = conversations.map((conversation) => conversation._id);
      socket.join([...ids, `user:${user._id}`]);
      const messages = await store.lastMessages(ids, LAST_MESSAGES);
      socket.emit("init", { user, conversations, messages });
    } catch (error) {
      console.error(error);
      socket.disconnect(true);
    }
  });
};
