"""The terminal chat, ``chatcore chat``."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from ..errors import ChatError, ClientError
from .credentials import Refusal
from .options import parse
from .run import run

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Run ``chatcore chat`` with these arguments; the exit code.

    0: done. 1: it failed, or not everything was sent. 2: the arguments are
    wrong. 130: interrupted.
    """
    options = parse(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that cannot show a character shows a question mark instead of ending the chat.
            stream.reconfigure(errors="replace")
    try:
        return asyncio.run(run(options))
    except Refusal as refusal:
        problem = str(refusal)
    except (ChatError, ClientError) as error:
        problem = str(error)
    except TimeoutError:
        problem = f"no answer from {options.address}"
    except BrokenPipeError:
        # Whoever read our output has seen enough; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        problem = f"{options.address}: {error.strerror or error}"
    except KeyboardInterrupt:
        return 130
    print(f"chatcore chat: {' '.join(problem.split())}", file=sys.stderr, flush=True)
    return 1
