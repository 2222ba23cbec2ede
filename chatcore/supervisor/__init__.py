"""The parent process: it holds the listeners and the lock, replaces workers, obeys signals and ``ctl``.

No event loop, no threads, no client of anything. What it and a worker agree on is here, too:
the contract (``worker_process``) and the shared stats page (``stats``).
"""
