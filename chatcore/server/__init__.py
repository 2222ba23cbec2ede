"""What one worker process is made of: its parts, HTTP and WebSocket, sessions, and how it reports its health."""
