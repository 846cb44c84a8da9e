"""Pools: what waits for the same.

In: their ids, from the narrow tables.  Out: their rows as values; each is read once a process.  A row that says nothing
that makes sense counts as missing: it concerns the jobs that wait there, and no others.

An id is a hash of the rest, so what was read once holds for ever, on any database.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Text, bindparam, cast, select
from sqlalchemy.dialects import postgresql, sqlite

from keepstream.tables import pools
from keepstream_worker.turn import Pool
from keepstream_worker.values import Target

#: What was read. Whoever invents a model for each job must not fill the memory.
_KNOWN: Final[dict[int, Pool]] = {}
_MOST_KNOWN: Final = 10_000

_FIND: Final = select(pools.c.id, pools.c.queue, pools.c["class"], cast(pools.c.chain, Text)).where(
    pools.c.id.in_(bindparam("ids", expanding=True))
)
_ADD: Final = {
    "postgresql": postgresql.insert(pools).on_conflict_do_nothing(),
    "sqlite": sqlite.insert(pools).on_conflict_do_nothing(),
}


def find_pools(connection: Connection, ids: Collection[int]) -> Mapping[int, Pool]:
    """Return the pools of these ids; those that have no row, or none that can be read, are missing."""
    found = {id_: _KNOWN[id_] for id_ in set(ids) if id_ in _KNOWN}
    missing = sorted(set(ids) - found.keys())
    if missing:
        if len(_KNOWN) > _MOST_KNOWN:
            _KNOWN.clear()
        for id_, queue, job_class, text in connection.execute(_FIND, {"ids": missing}):
            pool = _parsed(id_, queue, job_class, text)
            if pool is not None:
                found[id_] = _KNOWN[id_] = pool
    return found


def _parsed(id_: int, queue: str, job_class: str, text: str) -> Pool | None:
    try:
        chain = json.loads(text)
    except ValueError:
        return None
    return read_pool(id_, queue, job_class, chain)


def read_pool(id_: int, queue: str, job_class: str, chain: Any) -> Pool | None:
    """Return a pool; None: its chain is no list of targets."""
    if not isinstance(chain, list | tuple) or not chain or not all(map(_is_target, chain)):
        return None
    return Pool(id_, queue, job_class, tuple(Target(provider, model) for provider, model in chain))


def _is_target(item: Any) -> bool:
    return isinstance(item, list | tuple) and len(item) == len(Target._fields) and all(isinstance(x, str) for x in item)


def add_pools(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Make the rows of pools, where they are missing; ``rows`` are as ``queries.pool_values`` has them."""
    unique = {row["id"]: row for row in rows}
    if unique:
        connection.execute(_ADD[connection.dialect.name], [unique[id_] for id_ in sorted(unique)])
