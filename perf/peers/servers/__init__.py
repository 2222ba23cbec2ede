"""The programs that are measured. Those in Python run as ``python -m perf.peers.servers.NAME --port N``."""
