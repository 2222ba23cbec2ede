"""chatcore: a self-hosted chat server with a native core."""

__version__ = "0.1.0"
