"""Moved to :mod:`chatcore.store.append`."""

from ..store.append import *  # noqa: F403
from ..store.append import _Item, _Log  # noqa: F401
