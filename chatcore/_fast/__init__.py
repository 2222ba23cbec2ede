"""The native core: client sockets, frames and fan-out in C. It knows nothing of chat.

``reactor`` is the interface; the other modules are its parts (see their docstrings):

=========  ================================================================
sys        declarations of the Linux calls in use
bucket     token bucket, and times for refused messages to come back
frames     WebSocket framing: incremental parser, builder, shared frames
outbox     queue of frames to be sent on one connection
uring      many sends in one system call
conns      the connection struct, its slab, lists, timers and memberships
topics     fan-out
reactor    the epoll loop's body, and everything that calls Python
=========  ================================================================
"""
