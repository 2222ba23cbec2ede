"""The native core: client sockets, frames and fan-out in C. It knows nothing of chat.

``reactor`` is the door; the other modules are its parts (see their docstrings):

=========  ================================================================
sys        what we use of Linux (declarations only)
bucket     token bucket, one number per connection
frames     WebSocket framing: incremental parser, builder, shared frames
outbox     what waits to be sent on one connection
conns      the connection struct, its slab, lists, timers and memberships
topics     fan-out
reactor    the epoll loop's body, and everything that calls Python
=========  ================================================================
"""
