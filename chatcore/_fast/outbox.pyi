"""What waits to be sent on one connection (C only, nothing for Python)."""
