"""Pools: what waits for the same.

In: their ids, from the narrow tables.  Out: their rows as values; each is read once a process.

An id is a hash of the rest, so what was read once holds for ever, on any database.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, bindparam, select
from sqlalchemy.dialects import postgresql, sqlite

from keepstream.tables import pools
from keepstream_worker.turn import Pool
from keepstream_worker.values import Target

#: What was read. Whoever invents a model for each job must not fill the memory.
_KNOWN: Final[dict[int, Pool]] = {}
_MOST_KNOWN: Final = 10_000

_FIND: Final = select(pools.c.id, pools.c.queue, pools.c["class"].label("job_class"), pools.c.chain).where(
    pools.c.id.in_(bindparam("ids", expanding=True))
)
_ADD: Final = {
    "postgresql": postgresql.insert(pools).on_conflict_do_nothing(),
    "sqlite": sqlite.insert(pools).on_conflict_do_nothing(),
}


def find_pools(connection: Connection, ids: Collection[int]) -> Mapping[int, Pool]:
    """Return the pools of these ids; those that have no row are missing."""
    found = {id_: _KNOWN[id_] for id_ in set(ids) if id_ in _KNOWN}
    missing = sorted(set(ids) - found.keys())
    if missing:
        if len(_KNOWN) > _MOST_KNOWN:
            _KNOWN.clear()
        for row in connection.execute(_FIND, {"ids": missing}):
            chain = tuple(Target(provider, model) for provider, model in row.chain)
            found[row.id] = _KNOWN[row.id] = Pool(row.id, row.queue, row.job_class, chain)
    return found


def add_pools(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Make the rows of pools, where they are missing; ``rows`` are as ``queries.pool_values`` has them."""
    unique = {row["id"]: row for row in rows}
    if unique:
        connection.execute(_ADD[connection.dialect.name], [unique[id_] for id_ in sorted(unique)])
