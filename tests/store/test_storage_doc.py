"""The queries of docs/storage.md work, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import apsw
import pytest

from chatcore.store.sqlite.schema import prepare

from .test_verify import make_index
from .version1 import fill

ROOT: Final = Path(__file__).parents[2]


def queries() -> list[str]:
    text = (ROOT / "docs/storage.md").read_text()
    blocks = re.findall(r"^```sql\n(.*?)^```", text, flags=re.M | re.S)
    return [query.strip() for block in blocks for query in block.split(";") if query.strip()]


def test_each_query_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the queries name data/
    (tmp_path / "data").mkdir()
    fill(tmp_path / "data")
    prepare(tmp_path / "data")
    make_index(tmp_path / "data")
    writer = apsw.Connection("data/chatcore.db")
    mark = "INSERT INTO row_changes SELECT max(id) + 99, conv, sender, seq, msgs FROM entries"
    writer.execute(mark)
    # As `sqlite3 -readonly` opens it, beside a writer.
    db = apsw.Connection("data/chatcore.db", flags=apsw.SQLITE_OPEN_READONLY)
    asked = queries()
    assert len(asked) > 6
    for query in asked:
        found = db.execute(query.replace("CONVERSATION", "team-conv-id").replace("NAME", "Ann")).fetchall()
        assert found or query.startswith("ATTACH"), query
    writer.close()
    db.close()


def test_the_backup_is_a_whole_store(tmp_path: Path) -> None:
    fill(tmp_path)
    prepare(tmp_path)
    writer = apsw.Connection(str(tmp_path / "chatcore.db"))
    writer.wal_autocheckpoint(0)
    writer.execute("UPDATE users SET name = 'in the write-ahead log' WHERE id = 'u-Ann'")
    (command,) = re.findall(
        r'^sqlite3 -readonly data/chatcore.db "(.*)"$', (ROOT / "docs/storage.md").read_text(), re.M
    )
    (tmp_path / "restored").mkdir()
    db = apsw.Connection(str(tmp_path / "chatcore.db"), flags=apsw.SQLITE_OPEN_READONLY)
    db.execute(command.replace("backup.db", str(tmp_path / "restored" / "chatcore.db")))
    db.close()
    prepare(tmp_path / "restored")
    restored = apsw.Connection(str(tmp_path / "restored" / "chatcore.db"))
    for query in ("SELECT * FROM entries ORDER BY id", "SELECT * FROM users ORDER BY id", "SELECT * FROM ids"):
        assert restored.execute(query).fetchall() == writer.execute(query).fetchall()
    restored.close()
    writer.close()
