"""The way of one request through a worker: which modules a reader has to open, and in which order."""
