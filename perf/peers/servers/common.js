// What the servers in JavaScript share. Node.js and Bun allow as many open files as the system's hard limit by
// themselves.
"use strict";

exports.HOST = "127.0.0.1";
exports.BACKLOG = 4096; // connections that may wait to be accepted: a load generator opens thousands at once
exports.MAX_MESSAGE_BYTES = 64 * 1024;
exports.JOINED = "joined";
exports.JOIN_BYTE = "J".charCodeAt(0);
exports.SPACE = " ".charCodeAt(0);

exports.option = function option(name, fallback) {
  const at = process.argv.indexOf(`--${name}`);
  const value = at < 0 ? fallback : process.argv[at + 1];
  if (value === undefined) {
    console.error(`--${name} is missing`);
    process.exit(2);
  }
  return value;
};

exports.port = () => Number(exports.option("port"));
