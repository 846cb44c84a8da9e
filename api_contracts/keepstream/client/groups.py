"""Groups of rows: written by one statement, where each statement costs a round trip and a plan.

In: a table, and rows of one form as values by column.  Out: rows.

On PostgreSQL the values come in arrays, and each row that is to be changed is looked up by its key: of a table whose
statistics say little the planner would rather read the whole. On SQLite a statement is executed for one row after the
other, which costs next to nothing there.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import JSON, ColumnElement, Connection, String, Table, and_, bindparam, update
from sqlalchemy.dialects import postgresql

Row = Mapping[str, Any]


def array_of(table: Table, column: str, parameter: str) -> str:
    """Return how PostgreSQL is given values of a column, as ``array_values`` returns them, in one parameter."""
    type_ = table.c[column].type
    # Texts in the binary format: in the other one the driver would look for each quotation mark in them. Without the
    # length of the column: a cast would cut off what is too long, which the column refuses.
    if isinstance(type_, String):
        return f"%({parameter})b::text[]"
    return f"%({parameter}){'b' if isinstance(type_, JSON) else 's'}::{type_.compile(_postgresql())}[]"


def array_values(table: Table, column: str, values: list[Any]) -> list[Any]:
    """Return what ``array_of`` is to be given for these values."""
    if isinstance(table.c[column].type, JSON):
        return [None if value is None else json.dumps(value) for value in values]
    return values


def insert_group(connection: Connection, table: Table, rows: Sequence[Row]) -> None:
    """Insert rows, all with the same columns."""
    if not rows:
        return
    if connection.dialect.name != "postgresql":
        connection.execute(table.insert(), [dict(row) for row in rows])
        return
    columns = tuple(rows[0])
    values = {column: array_values(table, column, [row[column] for row in rows]) for column in columns}
    connection.exec_driver_sql(_insert_statement(table, columns), values)


@cache
def _insert_statement(table: Table, columns: tuple[str, ...]) -> str:
    names = ", ".join(f'"{column}"' for column in columns)
    arrays = ", ".join(array_of(table, column, column) for column in columns)
    return f"INSERT INTO {table.name} ({names}) SELECT * FROM unnest({arrays})"  # noqa: S608  # of constants


class GroupUpdate:
    """A statement that changes rows of a table, each looked up by its key.

    Args:
        table: Whose rows.
        key: Columns by which a row is found.
        columns: What is written; where one of them is part of the key, its new value.
        also: What is written besides, the same for all rows.
        only: What a row has to fulfil besides.
    """

    def __init__(
        self,
        table: Table,
        key: Sequence[str],
        columns: Sequence[str],
        also: Mapping[str, ColumnElement[Any]],
        only: Sequence[ColumnElement[bool]] = (),
    ) -> None:
        self._table = table
        self._key = tuple(key)
        self._columns = tuple(columns)
        self._each = (
            update(table)
            .where(and_(*(table.c[column] == bindparam(f"old_{column}") for column in key), *only))
            .values({column: bindparam(column) for column in columns} | dict(also))
        )
        self._all = self._for_postgresql(also, only)

    def _for_postgresql(self, also: Mapping[str, ColumnElement[Any]], only: Sequence[ColumnElement[bool]]) -> str:
        table = self._table
        names = {f"old_{column}": column for column in self._key} | {column: column for column in self._columns}
        arrays = ", ".join(array_of(table, column, name) for name, column in names.items())
        found = [f"{table.name}.{column} = g.old_{column}" for column in self._key] + [_sql(item) for item in only]
        written = {column: f'm."{column}"' for column in self._columns} | {
            column: _sql(item) for column, item in also.items()
        }
        quoted = ", ".join(f'"{name}"' for name in names)
        return f"""
UPDATE {table.name} SET {", ".join(f'"{column}" = {value}' for column, value in written.items())}
FROM (
  SELECT f.place, g.* FROM unnest({arrays}) g({quoted}) CROSS JOIN LATERAL (
    SELECT ctid AS place FROM {table.name} WHERE {" AND ".join(found)} OFFSET 0
  ) f
) m
WHERE {table.name}.ctid = m.place
"""  # noqa: S608  # of constants

    def execute(self, connection: Connection, rows: Sequence[tuple[Sequence[Any], Row]]) -> None:
        """Change rows that the caller's transaction has locked.

        Args:
            connection: In a transaction.
            rows: Of each its key, as it is now, and what is written.
        """
        if not rows:
            return
        if connection.dialect.name != "postgresql":
            old = [f"old_{column}" for column in self._key]
            connection.execute(self._each, [{**dict(zip(old, key, strict=True)), **row} for key, row in rows])
            return
        values = {f"old_{column}": [key[place] for key, _ in rows] for place, column in enumerate(self._key)} | {
            column: array_values(self._table, column, [row[column] for _, row in rows]) for column in self._columns
        }
        connection.exec_driver_sql(self._all, values)


def _sql(element: ColumnElement[Any]) -> str:
    return str(element.compile(dialect=_postgresql(), compile_kwargs={"literal_binds": True}))


@cache
def _postgresql() -> Any:
    return postgresql.dialect()  # type: ignore[no-untyped-call]
