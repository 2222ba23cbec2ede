"""`chatcore verify` finds nothing in what is whole, and each defect that is planted."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import apsw
import pytest

from chatcore.store.sqlite.index import index_path
from chatcore.store.sqlite.indexer import Indexer
from chatcore.store.sqlite.schema import BrokenStore, database_path, prepare
from chatcore.store.sqlite.verify import KINDS, SHOWN, contradiction, verify

from .version1 import OldProgram, fill

PORTION: Final = 16
#: The conversations and users of `fill`, in SQL.
TEAM, LOBBY, DM = (f"(SELECT n FROM ids WHERE id = '{conv}-conv-id')" for conv in ("team", "lobby", "dm"))
BOB: Final = "(SELECT n FROM ids WHERE id = 'u-Bob')"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder: a log of which the index has most, and changes since."""
    data = tmp_path_factory.mktemp("whole")
    fill(data, 200)
    prepare(data)
    make_index(data)
    # As the writer goes on, and has not folded yet: a message of Ann's, and marks of Bob's.
    newest = f"(SELECT max(seq) FROM entries WHERE conv = {TEAM})"
    change(
        data,
        f"INSERT INTO entries SELECT max(id) + 10, conv, {newest} + 1, 'msg', (SELECT n FROM ids WHERE id = 'u-Ann'),"
        f" max(msgs) + 1, {newest} + 1, 'newest', x'00', 1, '{{}}' FROM entries WHERE conv = {TEAM}",
        f"INSERT INTO row_changes SELECT max(id) + 1, conv, {BOB}, seq, msgs FROM entries",
    )
    return data


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return tmp_path


def make_index(data: Path) -> None:
    indexer = Indexer(data, portion=PORTION, fan_in=3, slice_rows=5)
    indexer.open()
    while indexer.step():
        pass
    indexer.close()


def change(data: Path, *statements: str, file: Callable[[Path], Path] = database_path) -> None:
    db = apsw.Connection(str(file(data)))
    with db:
        for sql in statements:
            db.execute(sql)
            assert db.changes() or not sql.startswith(("INSERT", "UPDATE", "DELETE")), f"it changes nothing: {sql}"
    db.close()


def check(data: Path) -> list[str]:
    """The problems, each of which was told, too."""
    told: list[str] = []
    problems = verify(data, told.append)
    assert [line.partition(":")[0] for line in told if not line.startswith("  ")] == list(KINDS)
    for problem in problems:
        assert any(line.strip() == problem.partition(": ")[2] for line in told)
    return problems


def test_what_is_whole_has_no_problems(data: Path) -> None:
    told: list[str] = []
    assert verify(data, told.append) == []
    assert told[0] == "files: ok"
    assert told[1] == "log: ok (213 entries of 3 conversations)"
    indexed = re.fullmatch(r"index: ok \((\d+) of 213 entries\)", told[-1])
    assert indexed and 213 - 2 * PORTION < int(indexed[1]) < 213


def test_without_an_index_all_else_is_checked(data: Path) -> None:
    for file in data.glob("index.db*"):
        file.unlink()
    told: list[str] = []
    assert verify(data, told.append) == []
    assert told[-1] == "index: there is none that can be used; the server makes it anew"


def test_an_empty_store_is_whole(tmp_path: Path) -> None:
    prepare(tmp_path)
    assert check(tmp_path) == []


def test_it_works_beside_a_writer(data: Path) -> None:
    """In one state: what is committed while it reads makes no difference, and it stops nobody."""
    writer = apsw.Connection(str(database_path(data)))
    before = writer.pragma("data_version")
    lines: list[str] = []

    def commit_and_note(line: str) -> None:
        writer.execute("UPDATE users SET seen = coalesce(seen, 0) + 1")
        lines.append(line)

    assert verify(data, commit_and_note) == []
    assert len(lines) == len(KINDS)
    assert writer.pragma("data_version") == before, "verify has written nothing"
    writer.close()


#: What is planted in chatcore.db, and what is said of it.
IN_THE_LOG: Final = {
    "a hole": (
        f"DELETE FROM entries WHERE conv = {TEAM} AND seq = 20",
        r"log: entry 21 of team-conv-id \(id \d+\) comes after entry 19",
    ),
    "no first entry": (
        f"DELETE FROM entries WHERE conv = {DM} AND seq = 1",
        r"log: entry 2 of dm-conv-id \(id \d+\) comes after entry 0",
    ),
    "a seq twice": (
        f"INSERT INTO entries SELECT (SELECT max(id) + 5 FROM entries), conv, seq, t, sender, msgs, last_msg, 'other',"
        f" digest, ts, fields FROM entries WHERE conv = {TEAM} AND seq = 20",
        r"log: entry 20 of team-conv-id \(id \d+\) comes after entry 20",
    ),
    "a cid twice": (
        f"UPDATE entries SET cid = 'dm-conv-id-9', sender = {BOB} WHERE conv = {DM} AND seq IN (9, 10)",
        "cids: conversation dm-conv-id has 2 entries with the sender u-Bob and the cid dm-conv-id-9",
    ),
    "a wrong number of messages": (
        f"UPDATE entries SET msgs = msgs + 1 WHERE conv = {DM} AND seq = 30",
        "log: entry 30 of dm-conv-id has msgs 29 and last_msg 30, not 28 and 30",
    ),
    "a wrong last message": (
        f"UPDATE entries SET last_msg = 1 WHERE conv = {DM} AND seq = 2",
        "log: entry 2 of dm-conv-id has msgs 0 and last_msg 1, not 0 and 0",
    ),
    "an entry of no conversation": (
        "DELETE FROM convs WHERE id = 'dm-conv-id'",
        "log: there are entries of dm-conv-id, which is no conversation",
    ),
    "a sender whom nobody knows": (
        f"UPDATE entries SET sender = 999 WHERE conv = {DM} AND seq = 8",
        r"log: the entry with id \d+ has the sender number 999, which nobody has",
    ),
    "a conversation without entries": (
        "INSERT INTO convs(id, kind, created) VALUES ('empty', 'group', 1)",
        "log: conversation empty has no entry",
    ),
    "a position given out twice": (
        "INSERT INTO revocations SELECT max(id), NULL, 'u-Bob' FROM entries",
        r"log: position \d+ of the change counter was given out twice",
    ),
    "an entry that cannot be read": (
        f"UPDATE entries SET fields = '{{}}' WHERE conv = {TEAM} AND t = 'meta'",
        r"log: entry 4 of team-conv-id is no meta: .*title",
    ),
    "a role that the entry does not give": (
        "UPDATE members SET role = 'owner' WHERE conv = 'team-conv-id' AND user = 'u-Bob'",
        r"members: the row of u-Bob in team-conv-id is owner as of \d+: entry \d+ says admin",
    ),
    "a row that did not follow": (
        "UPDATE members SET role = 'member', as_of = 3 WHERE conv = 'team-conv-id' AND user = 'u-Bob'",
        r"members: the row of u-Bob in team-conv-id is member as of 3: entry \d+ says admin",
    ),
    "a row of the future": (
        "UPDATE members SET as_of = 9999 WHERE conv = 'lobby-conv-id' AND user = 'u-Bob'",
        r"members: the row of u-Bob in lobby-conv-id is none as of 9999: the newest entry is \d+",
    ),
    "a ban that was undone": (
        "UPDATE members SET role = 'none' WHERE conv = 'lobby-conv-id' AND user = 'u-Zoy'",
        r"members: the row of u-Zoy in lobby-conv-id is none as of \d+: entry \d+ says banned",
    ),
    "a row that is gone": (
        "DELETE FROM members WHERE conv = 'dm-conv-id' AND user = 'u-Bob'",
        "members: there is no row of u-Bob in dm-conv-id, who is member by entry 2",
    ),
    "a row without an entry": (
        "INSERT INTO members VALUES ('dm-conv-id', 'u-Eve', 'none', 1, 1, 0, 'all', 1)",
        "members: the row of u-Eve in dm-conv-id is none as of 1: no entry says so",
    ),
    "a wrong number of members": (
        "UPDATE convs SET members = 7 WHERE id = 'team-conv-id'",
        "members: conversation team-conv-id has 2 members, by its row 7",
    ),
    "a row of no conversation": (
        "INSERT INTO members VALUES ('nowhere', 'u-Eve', 'none', 1, 0, 0, 'all', 1)",
        "members: there is a row of u-Eve in nowhere, which is no conversation",
    ),
    "a counter that went back": (
        "UPDATE members SET rev = 99999 WHERE conv = 'dm-conv-id' AND user = 'u-Bob'",
        "members: the row of u-Bob in dm-conv-id has a position that was not given out yet: 99999",
    ),
    "a mark beyond the head": (
        "UPDATE members SET read = 5000 WHERE conv = 'dm-conv-id' AND user = 'u-Bob'",
        r"read marks: the mark of u-Bob in dm-conv-id is at 5000, the newest entry is \d+",
    ),
    "a mark that counts wrong": (
        "UPDATE members SET read_msgs = 1 WHERE conv = 'dm-conv-id' AND user = 'u-Bob'",
        r"read marks: the mark of u-Bob in entry \d+ of dm-conv-id counts 1 messages, not \d+",
    ),
    "a mark at nothing that counts": (
        "UPDATE members SET read = 0, read_msgs = 3 WHERE conv = 'lobby-conv-id' AND user = 'u-Zoy'",
        "read marks: the mark of u-Zoy in lobby-conv-id is at 0 and counts 3 messages",
    ),
    "a message that did not move the mark": (
        "UPDATE members SET read = 2, read_msgs = 0 WHERE conv = 'dm-conv-id' AND user = 'u-Bob'",
        r"read marks: the row of u-Bob in dm-conv-id has read 2, but read \d+",
    ),
    "a mark of the log beyond the head": (
        "UPDATE row_changes SET read = 4000 WHERE read NOT NULL",
        r"read marks: the mark of user number \d+ at position \d+ in team-conv-id is at 4000",
    ),
    "a mark of the log that counts wrong": (
        "UPDATE row_changes SET msgs = 0 WHERE read NOT NULL",
        r"read marks: the mark of user number \d+ at position \d+ in entry \d+ of team-conv-id counts 0",
    ),
    "a mark that was not folded": (
        "UPDATE meta SET value = (SELECT max(id) FROM row_changes) WHERE key = 'folded'",
        r"read marks: the row of u-Bob in team-conv-id has read \d+, but read \d+",
    ),
    "a change in no conversation": (
        "INSERT INTO row_changes SELECT max(id) + 1, 999, 1, NULL, NULL FROM row_changes",
        r"read marks: there is a change of a row in conversation number 999, which has no entry, at position \d+",
    ),
    "folded too far": (
        "UPDATE meta SET value = 99999 WHERE key = 'folded'",
        r"read marks: folded up to 99999, but the newest position is \d+",
    ),
    "another title": (
        "UPDATE convs SET title = 'Lobby', title_key = 'lobby' WHERE id = 'lobby-conv-id'",
        "titles: lobby-conv-id is called 'Lobby', by its entries 'Straße'",
    ),
    "another order of the title": (
        "UPDATE convs SET title_key = 'Straße' WHERE id = 'lobby-conv-id'",
        "titles: lobby-conv-id is called 'Straße', by its entries 'Straße'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", IN_THE_LOG)
def test_a_defect_of_the_log_or_of_a_row_is_found(data: Path, defect: str) -> None:
    sql, said = IN_THE_LOG[defect]
    change(data, sql)
    assert_found(data, said)


def assert_found(data: Path, said: str) -> None:
    problems = check(data)
    assert any(re.match(said, problem) for problem in problems), problems


#: What is planted in index.db. Blobs of ids and records are little-endian.
IN_THE_INDEX: Final = {
    "a run deleted": (
        "DELETE FROM seqs WHERE run = (SELECT min(run) FROM runs WHERE state = 1)",
        r"index: it has id None for entry \d+ of [\w-]+, which has id \d+",
    ),
    "a run dead": (
        "UPDATE runs SET state = 2 WHERE run = (SELECT max(run) FROM runs WHERE state = 1);"
        "UPDATE meta SET value = value + 1 WHERE key = 'generation'",
        r"index: it does not have the cid of entry \d+ of [\w-]+",
    ),
    "a run that is shorter than it says": (
        "UPDATE runs SET entries = entries + 1 WHERE run = (SELECT max(run) FROM runs WHERE state = 1)",
        r"index: its runs have \d+ entries, the log has \d+ up to its mark",
    ),
    "a wrong id": (
        "UPDATE seqs SET ids = CAST(x'0700000000000000' || substr(ids, 9) AS BLOB) WHERE first = 1 AND conv = 2",
        r"index: it has id 7 for entry 1 of [\w-]+, which has id \d+",
    ),
    "ids missing": (
        "UPDATE seqs SET ids = substr(ids, 1, length(ids) - 8) WHERE first = 1 AND conv = 2",
        r"index: it has id (None|\d+) for entry \d+ of [\w-]+, which has id \d+",
    ),
    "an id too many": (
        "UPDATE seqs SET ids = CAST(ids || x'ff00000000000000' AS BLOB) WHERE (conv, first) ="
        " (SELECT conv, max(first) FROM seqs WHERE conv = 2 AND run IN (SELECT run FROM runs WHERE state = 1))",
        r"index: it has id 255 for entry \d+ of [\w-]+, which is not there",
    ),
    "a wrong head": (
        "UPDATE heads SET id = id - 1 WHERE conv = 2",
        r"index: it has id \d+ as the head of [\w-]+, not \d+",
    ),
    "no head": (
        "DELETE FROM heads WHERE conv = 2",
        r"index: it has id 0 as the head of [\w-]+, not \d+",
    ),
    "a head of nothing": (
        "INSERT INTO heads VALUES (999, 5, 1)",
        "index: it has conversation number 999, which has no entry",
    ),
    "cids gone": (
        "DELETE FROM cids WHERE run = (SELECT min(run) FROM runs WHERE state = 1)",
        r"index: it does not have the cid of entry \d+ of [\w-]+",
    ),
    "a filter without its keys": (
        "UPDATE filters SET bits = zeroblob(length(bits))",
        r"index: the filter of its run does not have the cid of entry 1 of [\w-]+",
    ),
    "no filter": (
        "DELETE FROM filters WHERE run = (SELECT max(run) FROM runs WHERE state = 1)",
        r"index: run \d+ has no filter",
    ),
    "another store": (
        "UPDATE meta SET value = 'another' WHERE key = 'store_id'",
        "index: it is of another store",
    ),
    "another log": (
        "UPDATE meta SET value = x'00' WHERE key = 'digest'",
        r"index: it is of another state of the log: at its mark, \d+,",
    ),
    "the mark ahead": (
        "UPDATE meta SET value = 99999 WHERE key = 'mark'",
        "index: it is of another state of the log: at its mark, 99999,",
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", IN_THE_INDEX)
def test_a_defect_of_the_index_is_found(data: Path, defect: str) -> None:
    sql, said = IN_THE_INDEX[defect]
    change(data, *sql.split(";"), file=index_path)
    assert_found(data, said)


@pytest.mark.parametrize("file", [database_path, index_path])
@pytest.mark.parametrize("first", [1, 5, 10])
def test_damaged_pages_are_found(data: Path, file: Callable[[Path], Path], first: int) -> None:
    with file(data).open("r+b") as f:
        # Beyond the schema, so that it can be opened.
        size = f.seek(0, 2)
        for at in range(4096 * first, size, 4096):
            f.seek(at)
            f.write(b"\xff" * 100)
    told: list[str] = []
    assert all(problem.startswith("files: ") for problem in verify(data, told.append))
    log = next(line for line in told if line.startswith("log: "))
    assert log.startswith("log: not checked" if file is database_path else "log: ok")


def test_an_index_that_is_no_database_is_a_problem(data: Path) -> None:
    for path in data.glob("index.db*"):
        path.unlink()
    index_path(data).write_bytes(b"nothing of the kind" * 1000)
    assert check(data) == ["files: index.db: file is not a database"]


def test_of_many_problems_the_first_are_told(data: Path) -> None:
    change(data, "UPDATE entries SET msgs = msgs + seq * seq")
    told: list[str] = []
    problems = [problem for problem in verify(data, told.append) if problem.startswith("log: ")]
    assert len(problems) == SHOWN
    heading = next(line for line in told if line.startswith("log: "))
    assert f"  and {int(heading.split()[1]) - SHOWN} more" in told


@pytest.mark.parametrize(
    ("kind", "said", "row", "fine"),
    [
        ("group", (5, "member"), ("member", 5), True),
        ("group", (5, "member"), ("member", 6), False),
        ("group", None, ("none", 0), False),
        ("channel", None, ("member", 3), True),
        ("channel", None, ("owner", 3), True),
        ("channel", None, ("admin", 3), False),
        ("channel", None, ("banned", 3), False),
        ("channel", (5, "none"), ("member", 5), True),
        ("channel", (5, "admin"), ("none", 9), True),
        ("channel", (5, "admin"), ("admin", 5), True),
        ("channel", (5, "member"), ("admin", 9), False),
        ("channel", (5, "banned"), ("member", 9), False),
        ("channel", (5, "banned"), ("banned", 5), True),
        ("channel", (5, "none"), ("member", 4), False),
        ("channel", (5, "none"), ("none", 11), False),
    ],
)
def test_a_row_may_say_what_needs_no_entry(
    kind: str, said: tuple[int, str] | None, row: tuple[str, int], fine: bool
) -> None:
    assert (contradiction(kind, said, *row, head=10) == "") is fine


def test_a_folder_of_another_version_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BrokenStore, match="there is no chatcore data in"):
        verify(tmp_path, print)
    OldProgram(tmp_path).db.close()
    with pytest.raises(BrokenStore, match="has schema version 1; a start of the server makes it 2"):
        verify(tmp_path, print)


def command(data: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "chatcore", "verify", "--data", str(data)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def test_the_command_prints_what_it_finds_and_says_it_by_its_exit_code(data: Path, tmp_path: Path) -> None:
    done = command(data)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == list(KINDS)
    change(data, "UPDATE convs SET members = 7 WHERE id = 'team-conv-id'")
    done = command(data)
    assert done.returncode == 1
    assert "members: 1 problem\n  conversation team-conv-id has 2 members, by its row 7\n" in done.stdout
    done = command(tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"chatcore: there is no chatcore data in {tmp_path / 'nowhere'}\n"
