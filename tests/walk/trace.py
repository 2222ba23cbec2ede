"""Records which modules of chatcore a run enters, and counts them.

What is counted:

* An entry is a call of a Python function of ``chatcore/``, in the loop's thread or in one of the store's. A coroutine
  that goes on after an ``await`` was entered before and is not entered again.
* Modules are printed in the order of their first entry: the order in which a reader who follows the run opens the
  files. A constructor that ``dataclasses`` generated has no line in any file and opens none.
* A package is a folder directly below ``chatcore/``. ``protocol``, ``errors``, ``settings``, ``config`` and
  ``common/`` are words that every package uses: their modules are counted, but entering one leaves no package.
* A *return* is a package that is entered again after it was left: the reader goes back to a folder to open
  another file of it.
* The C parts (``_fast``) are one module. A profiler sees them only where they call Python, so they are listed
  where the bytes of a request arrive, and not again where a frame is queued.

The *strict* count knows every call, not only the first one of each module: a package is also entered again by a
call of a function that was seen before. A package on the stack below was not left (a part that calls back
its caller returns to nothing).

The issue that asked for this counted "22 files with 6 returns" by hand for a send at commit b45e24f, C files
included. There this tool counts 18 modules (17 and the five C files of that path as one), 3 returns, and 4 in
the strict count, which becomes that 6 with the two calls into C (the fan-out and the queueing of the reply).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import chatcore

ROOT: Final = str(Path(chatcore.__file__).parent) + "/"
#: Words that every package uses: no package of their own.
SHARED: Final = frozenset({"protocol", "errors", "entries", "settings", "config", "common"})
FAST: Final = "_fast"
#: What the reactor calls: the worker's side of ``_fast``, entered from C.
HANDLERS: Final = frozenset({"on_http", "on_http_closed", "on_message", "on_writable", "on_closed"})
#: Modules that lay flat in ``chatcore/`` at b45e24f, and the package that they are in now.
MOVED: Final = {"worker": "server", "session": "server", "locks": "common"}


@dataclass(frozen=True, slots=True)
class Step:
    """One call: of which module, in which thread; which packages were on the stack below it."""

    thread: str
    module: str
    function: str
    resumed: bool
    below: frozenset[str]


def package_of(module: str) -> str | None:
    """The package of a module; None: shared words."""
    first = module.partition("/")[0]
    first = MOVED.get(first, first)
    return None if first in SHARED else first


@dataclass(frozen=True, slots=True)
class Walk:
    """What one run entered."""

    steps: tuple[Step, ...]

    @property
    def modules(self) -> list[str]:
        """In the order of their first entry."""
        return list(dict.fromkeys(step.module for step in self.steps))

    @property
    def returns(self) -> list[str]:
        """The modules at whose first entry a package is entered again."""
        return [module for module, again in _visits([(module, frozenset()) for module in self.modules]) if again]

    @property
    def strict(self) -> list[str]:
        """The packages that are entered again, counting every call."""
        calls = [(step.module, step.below) for step in self.steps if not step.resumed]
        return [package_of(module) or "" for module, again in _visits(calls) if again]

    def report(self) -> str:
        """For people."""
        visits = list(_visits([(module, frozenset()) for module in self.modules]))
        lines = [
            f"{i:3}  {module}{f'  <- back in {package_of(module)}' if again else ''}"
            for i, (module, again) in enumerate(visits, 1)
        ]
        strict = self.strict
        return "\n".join(
            [
                *lines,
                "",
                f"{len(self.modules)} modules, {len(self.returns)} returns",
                f"counting every call: {len(strict)} returns ({' '.join(strict)})",
            ]
        )


def _visits(calls: Sequence[tuple[str, frozenset[str]]]) -> Iterator[tuple[str, bool]]:
    """Each call's module, and whether its package is entered again there after it was left."""
    here: str | None = None
    left: set[str] = set()
    for module, below in calls:
        package = package_of(module)
        if package is None or package == here:
            yield module, False
            continue
        # A package on the stack was not left: its caller waits, and goes on now.
        yield module, package in left and package not in below
        if here is not None:
            left.add(here)
        here = package


class Tracer:
    """Records calls while ``recording``. To be made before the threads that it is to see."""

    def __init__(self) -> None:
        self._recording = False
        self._steps: list[Step] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """See this thread, and those that are started inside."""
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def begin(self) -> None:
        """Record from here on."""
        self._steps = []
        self._recording = True

    def end(self) -> Walk:
        """What was recorded since."""
        self._recording = False
        return Walk(tuple(self._steps))

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if not self._recording or event != "call":
            return
        module = _module(frame)
        if module is None:
            return
        below: set[str] = set()
        caller = frame.f_back
        from_loop = True
        while caller is not None:
            if (name := _module(caller)) is not None:
                from_loop = False
                if (package := package_of(name)) is not None:
                    below.add(package)
            caller = caller.f_back
        thread = threading.current_thread().name
        if from_loop and frame.f_code.co_name in HANDLERS:
            self._steps.append(Step(thread, FAST, "Reactor.poll", False, frozenset()))
        self._steps.append(Step(thread, module, frame.f_code.co_qualname, _resumed(frame), frozenset(below)))


def _resumed(frame: FrameType) -> bool:
    """Whether a generator or coroutine goes on: the argument of the interpreter's RESUME is 0 at a beginning only."""
    return frame.f_code.co_code[frame.f_lasti + 1] & 3 != 0


def _module(frame: FrameType) -> str | None:
    name = frame.f_code.co_filename
    if not name.startswith(ROOT):
        return None
    return name.removeprefix(ROOT).removesuffix(".py").removesuffix("/__init__")
