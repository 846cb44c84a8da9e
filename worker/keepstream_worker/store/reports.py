"""The reports: what one worker tells for all, for people who look on.

In: questions and reports of the worker that sweeps.  Out: what is used of the limits; one row for each report.
"""

from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, bindparam, func, select
from sqlalchemy.dialects import postgresql, sqlite

from keepstream.client.overview import LIMITS
from keepstream.tables import epoch_seconds, now, reports, running, turns
from keepstream_worker.values import Target

_COUNTED: Final = 10_000  #: Running jobs that are counted.


class InUse(NamedTuple):
    """What runs, and what the newest turn knows of the limits."""

    now: float  #: Seconds since the epoch by the database's clock.
    state: str  #: JSON; ``scheduling.state`` reads it.
    running: dict[Target, int]  #: Jobs by target.


def read_use(connection: Connection, asked: list[None]) -> list[InUse]:
    """Return what is in use now."""
    state = connection.scalar(select(turns.c.state).order_by(turns.c.n.desc()).limit(1))
    some = select(running.c.provider, running.c.model).limit(_COUNTED).subquery()
    counted = connection.execute(select(some, func.count()).group_by(*some.c))
    runs = {Target(provider, model): jobs for provider, model, jobs in counted}
    at = float(connection.execute(select(epoch_seconds(now()))).scalar_one())
    return [InUse(at, state or "{}", runs)] * len(asked)


def _tell(dialect: Any) -> Any:
    insert = dialect.insert(reports).values(name=LIMITS, told_at=now(), report=bindparam("report"))
    new = {name: insert.excluded[name] for name in ("told_at", "report")}
    return insert.on_conflict_do_update(index_elements=[reports.c.name], set_=new)


_TELL: Final = {"postgresql": _tell(postgresql), "sqlite": _tell(sqlite)}


def tell_limits(connection: Connection, told: list[dict[str, Any]]) -> list[None]:
    """Write the newest report in the place of the one before."""
    connection.execute(_TELL[connection.dialect.name], {"report": told[-1]})
    return [None] * len(told)
