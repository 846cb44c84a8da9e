"""The minutes: sums of what all workers did, for people who look on.

In: sums of a worker, now and then.  Out: rows, one for each minute, target and way to end, that all workers add to;
those that are too old, deleted.

The minute is the database's, in which the sums arrive.  A write is never repeated, so that nothing counts twice: what
did not arrive is missing.  That all add to the same rows keeps their number independent of the number of workers.
"""

from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, bindparam, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from keepstream.tables import epoch_seconds, minutes, now
from keepstream_worker.telemetry.figures import Sums

KEPT: Final = 7 * 24 * 60  #: Minutes for which they are kept.

_KEY: Final = tuple(column.name for column in minutes.primary_key)
_SUMMED: Final = tuple(column.name for column in minutes.c if column.name not in _KEY)


def _sum(stored: Any, added: Any) -> Any:
    """Return the sum; of what may be unknown, the sum of what is known."""
    return func.coalesce(stored + added, stored, added) if stored.nullable else stored + added


def _add(dialect: Any) -> Any:
    insert = dialect.insert(minutes).values({name: bindparam(name) for name in (*_KEY, *_SUMMED)})
    return insert.on_conflict_do_update(
        index_elements=[minutes.c[name] for name in _KEY],
        set_={name: _sum(minutes.c[name], insert.excluded[name]) for name in _SUMMED},
    )


_ADD: Final = {"postgresql": _add(postgresql), "sqlite": _add(sqlite)}


def add_up(connection: Connection, reports: list[list[Sums]]) -> list[None]:
    """Add the sums of workers to the current minute."""
    minute = _current(connection)
    rows = [_row(minute, sums) for report in reports for sums in report]
    # In one order, so that two workers that add to the same rows wait for each other, and not in a ring.
    rows.sort(key=lambda row: tuple(row[name] for name in _KEY))
    for row in rows:
        connection.execute(_ADD[connection.dialect.name], row)
    return [None] * len(reports)


class Expiry(NamedTuple):
    """Old minutes are to be deleted."""

    limit: int  #: Rows at most, but for those of one minute.


_BOUND: Final = (
    select(minutes.c.minute)
    .where(minutes.c.minute < bindparam("kept"))
    .order_by(minutes.c.minute)
    .limit(1)
    .offset(bindparam("limit"))
)
_DELETE: Final = delete(minutes).where(minutes.c.minute <= bindparam("bound"))


def delete_old_minutes(connection: Connection, expiries: list[Expiry]) -> list[object]:
    """Delete what is not kept any more, the oldest first; return how many rows each was."""
    kept = _current(connection) - KEPT
    deleted: list[object] = []
    for expiry in expiries:
        bound = connection.scalar(_BOUND, {"kept": kept, "limit": expiry.limit - 1})
        gone = connection.execute(_DELETE, {"bound": kept - 1 if bound is None else bound})
        deleted.append(gone.rowcount)
    return deleted


def _current(connection: Connection) -> int:
    return int(connection.execute(select(epoch_seconds(now()))).scalar_one() // 60)


def _row(minute: int, sums: Sums) -> dict[str, Any]:
    return {
        "minute": minute,
        "provider": sums.provider,
        "model": sums.model,
        "outcome": sums.outcome,
        "error_code": sums.error_code,
        "attempts": sums.attempts,
        "deltas": sums.deltas,
        "prompt_tokens": sums.prompt_tokens,
        "completion_tokens": sums.completion_tokens,
        "cost": sums.cost,
        **{f"first_output_{number}": attempts for number, attempts in enumerate(sums.first_outputs)},
    }
