"""The tables in which jobs and results are stored, and the database's clock.

In: nothing.  Out: SQLAlchemy tables to the worker's store, the client's queries and the migrations; SQL
expressions of the database's own clock (``now``, ``seconds_from_now``, ``seconds_until``, ``epoch_seconds``).

The tables and their columns are public: services may query them, and they change only additively.  Every name
begins with ``keepstream_`` or contains it, so that the tables can share a schema with a host application's.

A job is identified by tenant and id together, so no row can belong to two tenants.  All times are UTC and are
read from the database's clock, so that machines whose clocks differ agree.
"""

from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time in UTC: ``timestamptz`` on PostgreSQL, ISO text without zone on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Store in UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Read as UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class now(FunctionElement[datetime]):  # noqa: N801  # reads as the SQL function it is
    """The database's clock at the moment of the statement."""

    type = UtcDateTime()
    inherit_cache = True


class seconds_from_now(FunctionElement[datetime]):  # noqa: N801  # reads as the SQL function it is
    """The database's clock plus a number of seconds, which may be negative or a fraction."""

    type = UtcDateTime()
    inherit_cache = True


class seconds_until(FunctionElement[float]):  # noqa: N801  # reads as the SQL function it is
    """Seconds from the database's clock to a time; negative if it has passed."""

    type = Float()
    inherit_cache = True


class epoch_seconds(FunctionElement[float]):  # noqa: N801  # reads as the SQL function it is
    """A time as seconds since the epoch."""

    type = Float()
    inherit_cache = True


@compiles(now, "postgresql")
def _now_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    # now() would be the transaction's start, which a long grouped write leaves behind; clock_timestamp() changes within
    # a statement, so that no index could be searched by it.
    return "statement_timestamp()"


@compiles(now, "sqlite")
def _now_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f', 'now')"


@compiles(seconds_from_now, "postgresql")
def _seconds_from_now_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return f"(statement_timestamp() + make_interval(secs => {compiler.process(element.clauses, **kw)}))"


@compiles(seconds_from_now, "sqlite")
def _seconds_from_now_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    return f"strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', {seconds}))"


@compiles(seconds_until, "postgresql")
def _seconds_until_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return f"extract(epoch from ({compiler.process(element.clauses, **kw)} - statement_timestamp()))::double precision"


@compiles(seconds_until, "sqlite")
def _seconds_until_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return f"((julianday({compiler.process(element.clauses, **kw)}) - julianday('now')) * 86400.0)"


@compiles(epoch_seconds, "postgresql")
def _epoch_seconds_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return f"extract(epoch from {compiler.process(element.clauses, **kw)})::double precision"


@compiles(epoch_seconds, "sqlite")
def _epoch_seconds_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return f"((julianday({compiler.process(element.clauses, **kw)}) - 2440587.5) * 86400.0)"


#: Alembic's record of our revision. Its default, ``alembic_version``, belongs to a host application.
VERSION_TABLE: Final = "keepstream_version"

metadata: Final = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_JSON: Final = JSON(none_as_null=True)  # nothing is NULL, not the JSON text null

jobs: Final = Table(
    "keepstream_jobs",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("id", String(128), primary_key=True),
    Column("status", String(16), nullable=False, comment="queued, running, retrying, completed, failed, …"),
    Column("model", Text, nullable=False),
    Column("provider", String(128), nullable=False),
    Column("class", String(16), nullable=False, comment="interactive or bulk"),
    Column("request_hash", String(64), nullable=False, comment="whether a repeated id asks for the same"),
    Column("prompt_start", Text, nullable=False, comment="beginning of the last user message, for listings"),
    Column("metadata", _JSON, nullable=False),
    Column("retry_of", String(128), comment="id of the job that this one repeats"),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("deadline_at", UtcDateTime, comment="first start plus total time-out"),
    Column("started_at", UtcDateTime, comment="start of the first attempt"),
    Column("finished_at", UtcDateTime),
    Column("attempt", Integer, nullable=False, comment="the newest attempt; the fencing token of every write"),
    Column("tries", Integer, nullable=False, comment="attempts that count against max_attempts"),
    Column("max_attempts", Integer, comment="null: the worker's setting"),
    Column("total_timeout", Float, comment="seconds; null: the worker's setting"),
    Column("queue", String(128), nullable=False, comment="whose workers run it"),
    Column("next_reason", String(16), nullable=False, comment="why the next attempt will be made"),
    Column("cancel_requested_at", UtcDateTime),
    Column("partial", Boolean, nullable=False, comment="the output is of an attempt that did not finish"),
    Column("error_code", String(64)),
    Column("error_message", Text),
    Column("output_sha256", String(64)),
    Column("prompt_tokens", BigInteger, comment="summed over attempts; unknown is null"),
    Column("completion_tokens", BigInteger),
    Column("total_tokens", BigInteger),
    Column("usage_source", String(16), comment="the weakest source among the attempts"),
    Column("usage", _JSON, comment="what else providers reported, summed: cached and reasoning tokens, cost, …"),
    Column("provider_details", _JSON),
    Column("terminal_event_id", String(32)),
    # No index has a column that changes, in it or in its condition: so the two updates of a job, at its start and at
    # its end, need no new entry in any.  What is to be done with jobs stands in the narrow tables below.
    # For listings: a walk through a tenant's jobs by age; the id tells jobs of one moment apart.
    Index("ix_keepstream_jobs_tenant_created", "tenant", "created_at", "id"),
    Index("ix_keepstream_jobs_created", "created_at", "tenant", "id"),  # the same through all jobs, for operators
    postgresql_with={"fillfactor": 80},  # so that these updates find room on the row's own page
)


def _of_job(*columns: Column[Any]) -> tuple[Any, ...]:
    """Return ``columns`` after those that name the job, and the foreign key to it."""
    return (
        Column("tenant", String(128), primary_key=True),
        Column("job_id", String(128), primary_key=True),
        *columns,
        ForeignKeyConstraint(
            ["tenant", "job_id"], ["keepstream_jobs.tenant", "keepstream_jobs.id"], ondelete="CASCADE"
        ),
    )


requests: Final = Table(
    "keepstream_requests",
    metadata,
    # Apart, because it is written once and may have megabytes, which SQLite would copy at each update of the row.
    *_of_job(Column("job", Text, nullable=False, comment="the whole job as JSON, as it was enqueued")),
)

choices: Final = Table(
    "keepstream_choices",
    metadata,
    *_of_job(
        Column("index", Integer, primary_key=True, autoincrement=False),
        Column("content", Text, nullable=False),
        Column("reasoning", Text, nullable=False),
        Column("refusal", Text, nullable=False),
        Column("finish_reason", Text, comment="as the provider sent it"),
        Column("extra", _JSON, comment="logprobs, annotations and other extras"),
    ),
)

tool_calls: Final = Table(
    "keepstream_tool_calls",
    metadata,
    *_of_job(
        Column("choice_index", Integer, primary_key=True, autoincrement=False),
        Column("position", Integer, primary_key=True, autoincrement=False),
        Column("call_id", Text, nullable=False),
        Column("type", String(32), nullable=False),
        Column("name", Text, nullable=False),
        Column("arguments", Text, nullable=False),
        Column("arguments_valid", Boolean, nullable=False, comment="whether the arguments are a JSON text"),
        Column("extra", _JSON),
    ),
)

attempts: Final = Table(
    "keepstream_attempts",
    metadata,
    *_of_job(
        Column("number", Integer, primary_key=True, autoincrement=False),
        Column("reason", String(16), nullable=False, comment="first, retry, worker_lost, interrupted"),
        Column(
            "outcome",
            String(16),
            comment="finished, recovered, failed, cancelled, interrupted, lost; null while it runs",
        ),
        Column("worker_id", String(128), nullable=False),
        Column("provider", String(128), nullable=False),
        Column("model", Text, nullable=False),
        Column("started_at", UtcDateTime, nullable=False),
        Column("finished_at", UtcDateTime),
        Column("first_token_ms", Float, comment="milliseconds from the request to the first output"),
        Column("error_code", String(64)),
        Column("error_message", Text),
        Column("http_status", Integer),
        Column("retryable", Boolean),
        Column("provider_request_id", Text),
        Column("provider_error", _JSON, comment="what the provider said of its refusal: message, type, code, param"),
        Column("prompt_tokens", BigInteger, comment="as reported; unknown is null"),
        Column("completion_tokens", BigInteger),
        Column("total_tokens", BigInteger),
        Column("usage_source", String(16), comment="provider, estimated or unknown"),
        Column("usage", _JSON, comment="what the provider reported, whole"),
    ),
)

workers: Final = Table(
    "keepstream_workers",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("started_at", UtcDateTime, nullable=False),
    Column("heartbeat_at", UtcDateTime, nullable=False),
    Column("lease", Float, nullable=False, comment="seconds without a heartbeat after which it counts as dead"),
    Column("queue", String(128), nullable=False, comment="where it takes its jobs from"),
    Column("places", Integer, nullable=False, comment="jobs that it runs at once"),
    Column("running", Integer, nullable=False, comment="jobs that it ran at its last heartbeat"),
    Column("providers", _JSON, comment="names of those that it can ask; null: it does not say"),
    Index("ix_keepstream_workers_heartbeat", "heartbeat_at"),
)

rejected_messages: Final = Table(
    "keepstream_rejected_messages",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("rejected_at", UtcDateTime, nullable=False),
    Column("reason", Text, nullable=False),
    Column("tenant", String(128), comment="if the message named one"),
    Column("job_id", String(128), comment="if the message named one"),
    Column("size", Integer, nullable=False, comment="bytes of the message"),
    Column("payload", Text, comment="the message, base64, cut to a limit"),
    Index("ix_keepstream_rejected_messages_age", "rejected_at", "id"),  # the id tells those of one moment apart
)

#: Upper ends in seconds of the classes into which the times until the first output are sorted; the last has none.
FIRST_OUTPUT_CLASSES: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

minutes: Final = Table(
    "keepstream_minutes",
    metadata,
    # Sums of what all workers did, for people; what counts stands in the tables above.
    Column("minute", Integer, primary_key=True, autoincrement=False, comment="since 1970-01-01 00:00 UTC"),
    Column("provider", String(128), primary_key=True),
    Column("model", Text, primary_key=True),
    Column("outcome", String(16), primary_key=True, comment="of attempts that ended; empty: of those under way"),
    Column("error_code", String(64), primary_key=True, comment="empty: none"),
    Column("attempts", BigInteger, nullable=False, comment="that ended so"),
    Column("deltas", BigInteger, nullable=False, comment="that came"),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    *(
        Column(f"first_output_{number}", BigInteger, nullable=False, comment=f"attempts: first output within {most} s")
        for number, most in enumerate((*FIRST_OUTPUT_CLASSES, "any"))
    ),
    Column("cost", Float, comment="as providers reported it; null: none did"),
    postgresql_with={"fillfactor": 50},  # so that what all workers add finds room on the row's own page
)

reports: Final = Table(
    "keepstream_reports",
    metadata,
    # What one worker tells for all, for people: only workers have the configuration.
    Column("name", String(64), primary_key=True, comment="limits: what is used of each"),
    Column("told_at", UtcDateTime, nullable=False),
    Column("report", _JSON, nullable=False),
)

api_keys: Final = Table(
    "keepstream_api_keys",
    metadata,
    Column("id", String(16), primary_key=True, comment="the part of the key that everybody may see"),
    Column("hash", String(64), nullable=False, comment="SHA-256 of the key, hexadecimal"),
    Column("tenant", String(128), nullable=False, comment="whose jobs it is for"),
    Column("name", String(128), nullable=False, comment="what people call it"),
    Column("rights", _JSON, nullable=False, comment="a list: api, console"),
    Column("created_at", UtcDateTime, nullable=False),
    Column("revoked_at", UtcDateTime, comment="null: it is accepted"),
)

# What is to be done: narrow tables, whose rows are deleted when it is done.  They are not for other services.

#: Rows come and go: cleaned often, without pauses, whatever the size of the table.
_BRIEF: Final = {
    "autovacuum_vacuum_threshold": 1000,
    "autovacuum_vacuum_scale_factor": 0,
    "autovacuum_vacuum_cost_delay": 0,
}

#: A number that the database gives, never twice.
_SEQ: Final = BigInteger().with_variant(Integer(), "sqlite")

waiting: Final = Table(
    "keepstream_waiting",
    metadata,
    Column("seq", _SEQ, primary_key=True, comment="age: smaller is older"),
    Column("tenant", String(128), nullable=False),
    Column("job_id", String(128), nullable=False),
    Column("lane", BigInteger, nullable=False, comment="tenant, class and queue, as a number"),
    Column("pool", BigInteger, nullable=False),
    Column("attempt", Integer, nullable=False, comment="the newest attempt so far"),
    Column("prompt_tokens", BigInteger, nullable=False, comment="an estimate"),
    Column("max_tokens", BigInteger, comment="of the answer, if the request says so"),
    Column("restarted_due", UtcDateTime, comment="of a job that was started before: not to go on earlier"),
    Column("expires_at", UtcDateTime, comment="when it ends, if it waits until then"),
    Index("ix_keepstream_waiting_job", "tenant", "job_id", unique=True),
    Index(
        "ix_keepstream_waiting_lane",
        "lane",
        "pool",
        "seq",
        postgresql_where=text("restarted_due IS NULL"),
        sqlite_where=text("restarted_due IS NULL"),
    ),
    Index(
        "ix_keepstream_waiting_restarted",
        "pool",
        "restarted_due",
        postgresql_where=text("restarted_due IS NOT NULL"),
        sqlite_where=text("restarted_due IS NOT NULL"),
    ),
    Index(
        "ix_keepstream_waiting_expiring",
        "expires_at",
        postgresql_where=text("expires_at IS NOT NULL"),
        sqlite_where=text("expires_at IS NOT NULL"),
    ),
    sqlite_autoincrement=True,
    postgresql_with=_BRIEF,
)

arrivals: Final = Table(
    "keepstream_arrivals",
    metadata,
    # Written in the transaction of the waiting job's row, so that no turn can miss a job.
    Column("seq", _SEQ, primary_key=True, autoincrement=False, comment="the waiting job's"),
    Column("lane", BigInteger, nullable=False),
    Column("pool", BigInteger, nullable=False),
    Column("tenant", String(128), nullable=False),
    Column("restarted_due", UtcDateTime),
    postgresql_with=_BRIEF,
)

running: Final = Table(
    "keepstream_running",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("job_id", String(128), primary_key=True),
    Column("attempt", Integer, nullable=False, comment="the one under way, or about to begin"),
    Column("worker_id", String(128), nullable=False),
    Column("provider", String(128), nullable=False),
    Column("model", Text, nullable=False),
    Column("lane", BigInteger, nullable=False),
    Column("pool", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False, comment="charged when it was chosen"),
    # As the waiting job's, to which it may return.
    Column("prompt_tokens", BigInteger, nullable=False, comment="an estimate"),
    Column("max_tokens", BigInteger),
    Column("started_at", UtcDateTime, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    # While a transaction is held open, entries of ended jobs stay: counts begin with the oldest job that runs.
    Index("ix_keepstream_running_provider", "provider", "started_at"),
    Index("ix_keepstream_running_started_at", "started_at"),
    Index("ix_keepstream_running_worker", "worker_id"),
    postgresql_with=_BRIEF,
)

announcements: Final = Table(
    "keepstream_announcements",
    metadata,
    # Jobs that have ended, and whose terminal event is not known to be in the log.
    Column("tenant", String(128), primary_key=True),
    Column("job_id", String(128), primary_key=True),
    Column("ended_at", UtcDateTime, nullable=False),
    Index("ix_keepstream_announcements_ended_at", "ended_at"),
    postgresql_with=_BRIEF,
)

pools: Final = Table(
    "keepstream_pools",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False, comment="a hash of the rest"),
    Column("queue", String(128), nullable=False),
    Column("class", String(16), nullable=False),
    Column("chain", _JSON, nullable=False, comment="[[provider, model], …]: the target, then the fallbacks"),
    Index("ix_keepstream_pools_queue", "queue", "class"),
)

standings: Final = Table(
    "keepstream_standings",
    metadata,
    # No unique index: in a row that changes this often, each change would be checked against all dead versions.
    Column("lane", BigInteger, nullable=False),
    Column("pool", BigInteger, nullable=False),
    Column("tenant", String(128), nullable=False),
    Column("time", Float, nullable=False, comment="virtual: tokens given to the lane, divided by its weight"),
    Column("head", BigInteger, nullable=False, comment="no new job of it waits in this pool with a smaller seq"),
    Column("active", Integer, comment="1: jobs wait, and may be chosen; else null"),
    Column("parked", Integer, comment="1: its tenant runs as many jobs as it may; else null"),
    Index(
        "ix_keepstream_standings_active",
        "pool",
        "time",
        "lane",  # of many lanes with one time a bounded number can be read in a fixed order
        postgresql_where=text("active IS NOT NULL"),
        sqlite_where=text("active IS NOT NULL"),
    ),
    # Those that mean nothing any more.
    Index(
        "ix_keepstream_standings_idle",
        "pool",
        "time",
        postgresql_where=text("active IS NULL"),
        sqlite_where=text("active IS NULL"),
    ),
    Index("ix_keepstream_standings_lane", "lane", "time"),
    Index(
        "ix_keepstream_standings_parked",
        "tenant",
        postgresql_where=text("parked IS NOT NULL"),
        sqlite_where=text("parked IS NOT NULL"),
    ),
    postgresql_with=_BRIEF | {"fillfactor": 50},
)

turns: Final = Table(
    "keepstream_turns",
    metadata,
    # Appended, the newest counts: a row that is updated at each choice would grow slower with each.
    Column("n", _SEQ, primary_key=True, autoincrement=False),
    Column("arrivals_low", BigInteger, nullable=False),
    Column("ready", Text, nullable=False, comment="JSON: by queue, when the next turn is worth taking"),
    Column("closed", Text, nullable=False, comment="JSON: why what waits waits"),
    Column("state", Text, nullable=False, comment="JSON: what the next turn goes on with"),
    postgresql_with=_BRIEF,
)

leases: Final = Table(
    "keepstream_leases",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("holder", String(128), nullable=False),
    Column("until", UtcDateTime, nullable=False),
)
