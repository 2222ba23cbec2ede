"""The parent process: it holds the listeners and the lock, replaces workers, and obeys signals and ``chatcore ctl``.

It has no event loop and no threads, and it is a client of no other service. What the supervisor and a worker agree
on lives here, too: the contract (``worker_process``) and the shared stats page (``stats``).
"""
