"""Groups of rows arrive as they were given, on both databases."""

from collections.abc import Iterator

import pytest
from sqlalchemy import JSON, Column, Engine, Integer, MetaData, String, Table, Text, create_engine, select
from sqlalchemy.exc import DataError

from keepstream.client.groups import GroupUpdate, insert_group

AWKWARD = ('say "hi" \\ {a,b} %s', "NULL", "", "ä\n\u2003")
TABLE = Table(
    "awkward",
    MetaData(),
    Column("key", String(8), primary_key=True),
    Column("number", Integer),
    Column("text", Text),
    Column("data", JSON(none_as_null=True)),
)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = create_engine(database_url)
    TABLE.create(engine)
    yield engine
    engine.dispose()


def test_awkward_texts_are_written_as_they_are(engine: Engine) -> None:
    change = GroupUpdate(TABLE, key=("key",), columns=("text", "data"), also={"number": TABLE.c.number + 10})
    with engine.begin() as connection:
        insert_group(
            connection, TABLE, [{"key": f"k{n}", "number": n, "data": {"a": text}} for n, text in enumerate(AWKWARD)]
        )
        assert connection.scalars(select(TABLE.c.data).order_by(TABLE.c.key)).all() == [{"a": text} for text in AWKWARD]
        change.execute(connection, [((f"k{n}",), {"text": text, "data": None}) for n, text in enumerate(AWKWARD)])
        found = connection.execute(select(TABLE).order_by(TABLE.c.key)).all()
    assert [tuple(row) for row in found] == [(f"k{n}", n + 10, text, None) for n, text in enumerate(AWKWARD)]


def test_postgresql_refuses_what_is_too_long_instead_of_cutting_it_off(engine: Engine) -> None:
    rows = [{"key": "k" * 9, "number": 1}]
    if engine.dialect.name == "sqlite":  # which knows no lengths
        with engine.begin() as connection:
            insert_group(connection, TABLE, rows)
        return
    with pytest.raises(DataError), engine.begin() as connection:
        insert_group(connection, TABLE, rows)
