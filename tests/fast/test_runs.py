"""Keyed hashes, sorted records, filters and portions: what the index of a log is made of."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatcore._fast.runs import Filter, Portion, find_ids, key_of, siphash, sort_records

SECRET = bytes(range(16))
#: SipHash-2-4 of the bytes 0, 1, 2 … (n of them) under SECRET: appendix A of the paper, and the authors' vectors.h.
VECTORS = {
    0: 0x726FDB47DD0E0E31,
    1: 0x74F839C593DC67FD,
    2: 0x0D6C8009D9A94F5A,
    3: 0x85676696D7FB7E2D,
    7: 0xAB0200F58B01D137,
    8: 0x93F5F5799A932462,
    15: 0xA129CA6149BE45E5,
}

int64 = st.integers(-(2**63), 2**63 - 1)
# Few keys, so that some are equal, and both ends.
records = st.lists(st.tuples(st.integers(-3, 3) | st.sampled_from([-(2**63), 2**63 - 1]), st.integers(1, 50)))


def pack(rows: list[tuple[int, int]]) -> bytes:
    return b"".join(struct.pack("<qq", *row) for row in rows)


@pytest.mark.parametrize(("n", "expected"), VECTORS.items())
def test_siphash_has_the_published_values(n: int, expected: int) -> None:
    assert siphash(SECRET, bytes(range(n))) == expected


@given(conv=int64, sender=int64, cid=st.text(max_size=40))
def test_a_key_is_the_hash_of_both_numbers_and_the_text(conv: int, sender: int, cid: str) -> None:
    (expected,) = struct.unpack(
        "<q", struct.pack("<Q", siphash(SECRET, struct.pack("<qq", conv, sender) + cid.encode()))
    )
    assert key_of(SECRET, conv, sender, cid) == expected
    assert key_of(bytes(16), conv, sender, cid) != expected


def test_a_secret_has_16_bytes() -> None:
    for wrong in (b"", bytes(15), bytes(17)):
        with pytest.raises(ValueError, match="needs 16"):
            key_of(wrong, 1, 1, "")
        with pytest.raises(ValueError, match="needs 16"):
            Portion(wrong)


@given(rows=records, low=st.integers(-4, 4), high=st.integers(-4, 4))
def test_records_are_sorted_and_cut(rows: list[tuple[int, int]], low: int, high: int) -> None:
    assert sort_records(pack(rows)) == pack(sorted(rows))
    assert sort_records(pack(rows), low, high) == pack(sorted(row for row in rows if low <= row[0] <= high))


@given(rows=records)
def test_ids_are_found_by_their_key(rows: list[tuple[int, int]]) -> None:
    data = sort_records(pack(rows))
    for key in [-(2**63), *range(-4, 5), 2**63 - 1]:
        assert find_ids(data, key) == sorted(id for k, id in rows if k == key)


def test_a_part_of_a_record_is_refused() -> None:
    for call in (sort_records, lambda data: find_ids(data, 1), Filter(1).add_records):
        with pytest.raises(ValueError, match="not records"):
            call(bytes(17))


def test_a_filter_knows_its_keys_and_takes_few_others_for_them() -> None:
    count = 50_000
    own = [key_of(SECRET, n % 100, n % 7, f"own-{n}") for n in range(count)]
    others = [key_of(SECRET, n % 100, n % 7, f"other-{n}") for n in range(count)]
    keys = Filter(count)
    assert not any(key in keys for key in own)
    keys.add_records(pack([(key, 1) for key in own]))
    assert all(key in keys for key in own)
    assert sum(key in keys for key in others) / count < 0.005
    assert keys.size == len(keys.dump())
    assert keys.size * 8 / count == pytest.approx(14, rel=0.01)


def test_a_filter_comes_back_in_parts() -> None:
    own = [key_of(SECRET, 1, 1, str(n)) for n in range(1000)]
    keys, again = Filter(1000), Filter(1000)
    keys.add_records(pack([(key, 1) for key in own]))
    bits = keys.dump()
    for at in range(0, len(bits), 100):
        again.put(at, bits[at : at + 100])
    assert again.dump() == bits
    for at in (1, len(bits), len(bits) + 1):
        with pytest.raises(ValueError, match="not within"):
            again.put(at, bits)


def test_an_empty_filter_has_nothing() -> None:
    assert 5 not in Filter(0)


@given(convs=st.lists(st.integers(1, 4), max_size=60), most=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_portion_leaves_in_both_orders(convs: list[int], most: int, seed: int) -> None:
    rows: list[tuple[int, int, int, int, str]] = []
    heads: dict[int, int] = {}
    for id, conv in enumerate(convs, 1):
        heads[conv] = heads.get(conv, 6) + 1
        rows.append((id, conv, heads[conv], 9, f"c{id}"))
    mixed = random.Random(seed).sample(rows, len(rows))
    portion = Portion(SECRET)
    portion.add(mixed[:20])
    portion.add(iter(mixed[20:]))
    assert len(portion) == len(rows)
    found = []
    for conv, first, ids in portion.places(most):
        assert 0 < len(ids) // 8 <= most
        found += [(conv, first + i, id) for i, (id,) in enumerate(struct.iter_unpack("<q", ids))]
    assert found == sorted((conv, seq, id) for id, conv, seq, _, _ in rows)
    assert portion.records() == pack(sorted((key_of(SECRET, conv, 9, cid), id) for id, conv, _, _, cid in rows))


@pytest.mark.parametrize("most", [1, 2, 96])
@pytest.mark.parametrize(
    "places",
    [
        pytest.param([(1, 1), (2, 2), (3, 2)], id="a seq twice"),
        pytest.param([(1, 1), (2, 2), (2, 2)], id="an entry twice"),
        pytest.param([(1, 1), (2, 2), (3, 4)], id="a seq is missing"),
        pytest.param([(1, 1), (2, 3), (3, 2)], id="ids in another order"),
    ],
)
def test_a_portion_that_is_not_dense_is_refused(places: list[tuple[int, int]], most: int) -> None:
    portion = Portion(SECRET)
    portion.add((id, 5, seq, 1, f"{id}") for id, seq in places)
    with pytest.raises(ValueError, match="conversation 5 has seq"):
        list(portion.places(most))
