"""The load generator: WebSocket clients in C, and how Python directs them."""
