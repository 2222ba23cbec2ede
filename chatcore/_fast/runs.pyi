"""Sorted runs of an index: keyed hashes, records in the order of their keys, Bloom filters. Knows no files.

A *record* is 16 bytes: a key and an id, both signed, 64 bit, little-endian. Records are kept one after the other in
``bytes``, sorted by key, then id. A wrong length is a ``ValueError``.
"""

from collections.abc import Iterable, Iterator

def siphash(secret16: bytes, data: bytes) -> int:
    """SipHash-2-4, unsigned, for tests: :func:`key_of` is it over two numbers and a text."""

def key_of(secret16: bytes, conv: int, sender: int, cid: str) -> int:
    """The key of a cid: SipHash-2-4 of both numbers (8 bytes each, little-endian) and the text, as a signed number."""

def sort_records(records: bytes, low: int = ..., high: int = ...) -> bytes:
    """The records with ``low <= key <= high`` (default: all), sorted."""

def find_ids(records: bytes, key: int) -> list[int]:
    """The ids of the records with this key, ascending. ``records`` are sorted."""

class Filter:
    """Which keys a run may have: a Bloom filter of about 14 bits a key, in blocks of one cache line.

    It never misses a key that was added. Of other keys it takes some 0.3 % for its own.
    """

    def __init__(self, keys: int) -> None:
        """An empty one, sized for so many keys."""
    def add_records(self, records: bytes) -> None: ...
    def __contains__(self, key: int) -> bool: ...
    @property
    def size(self) -> int:
        """Bytes of :meth:`dump`."""
    def dump(self) -> bytes:
        """All of it, for a file."""
    def put(self, at: int, bits: bytes) -> None:
        """Load a part of what :meth:`dump` gave, from its byte ``at`` on, into an empty one for as many keys."""

class Portion:
    """Entries of the log in any order, which leave it in the two orders of a run."""

    def __init__(self, secret16: bytes) -> None: ...
    def __len__(self) -> int: ...
    def add(self, rows: Iterable[tuple[int, int, int, int, str]]) -> None:
        """Take entries: (id, conv, seq, sender, cid) of each."""
    def places(self, most: int) -> Iterator[tuple[int, int, bytes]]:
        """The ids by conversation and seq: (conv, first, ids), at most so many ids in each, int64 little-endian.

        Entry ``first + i`` of the conversation has the i-th of the ids. Nothing may be added meanwhile.

        :raises ValueError: a conversation has a seq twice, lacks one, or has not them in the order of the ids.
        """
    def records(self) -> bytes:
        """A record for each entry, by its cid; sorted."""

def any_has(filters: list[Filter], key: int) -> bool:
    """Whether any of the filters may have the key."""
