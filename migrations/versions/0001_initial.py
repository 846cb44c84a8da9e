"""Jobs and their results; what waits, what runs and what was decided; workers; rejected messages

Additive only: the code of the version before is still running while this is applied.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

#: Rows come and go: cleaned often, without pauses, whatever the size of the table.
BRIEF = {
    "autovacuum_vacuum_threshold": 1000,
    "autovacuum_vacuum_scale_factor": 0,
    "autovacuum_vacuum_cost_delay": 0,
}


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "keepstream_announcements",
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("job_id", sa.String(length=128), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "job_id", name=op.f("pk_keepstream_announcements")),
        postgresql_with=BRIEF,
    )
    op.create_index("ix_keepstream_announcements_ended_at", "keepstream_announcements", ["ended_at"], unique=False)
    op.create_table(
        "keepstream_arrivals",
        sa.Column(
            "seq",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=False,
            nullable=False,
            comment="the waiting job's",
        ),
        sa.Column("lane", sa.BigInteger(), nullable=False),
        sa.Column("pool", sa.BigInteger(), nullable=False),
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("restarted_due", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_keepstream_arrivals")),
        postgresql_with=BRIEF,
    )
    op.create_table(
        "keepstream_jobs",
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column(
            "status", sa.String(length=16), nullable=False, comment="queued, running, retrying, completed, failed, …"
        ),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("provider", sa.String(length=128), nullable=False),
        sa.Column("class", sa.String(length=16), nullable=False, comment="interactive or bulk"),
        sa.Column(
            "request_hash", sa.String(length=64), nullable=False, comment="whether a repeated id asks for the same"
        ),
        sa.Column(
            "prompt_start", sa.Text(), nullable=False, comment="beginning of the last user message, for listings"
        ),
        sa.Column("metadata", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("retry_of", sa.String(length=128), nullable=True, comment="id of the job that this one repeats"),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=True, comment="first start plus total time-out"),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True, comment="start of the first attempt"),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "attempt", sa.Integer(), nullable=False, comment="the newest attempt; the fencing token of every write"
        ),
        sa.Column("tries", sa.Integer(), nullable=False, comment="attempts that count against max_attempts"),
        sa.Column("max_attempts", sa.Integer(), nullable=True, comment="null: the worker's setting"),
        sa.Column("total_timeout", sa.Float(), nullable=True, comment="seconds; null: the worker's setting"),
        sa.Column("queue", sa.String(length=128), nullable=False, comment="whose workers run it"),
        sa.Column("next_reason", sa.String(length=16), nullable=False, comment="why the next attempt will be made"),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("partial", sa.Boolean(), nullable=False, comment="the output is of an attempt that did not finish"),
        sa.Column("error_code", sa.String(length=64), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("output_sha256", sa.String(length=64), nullable=True),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=True, comment="summed over attempts; unknown is null"),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=True),
        sa.Column("total_tokens", sa.BigInteger(), nullable=True),
        sa.Column("usage_source", sa.String(length=16), nullable=True, comment="the weakest source among the attempts"),
        sa.Column(
            "usage",
            sa.JSON(none_as_null=True),
            nullable=True,
            comment="what else providers reported, summed: cached and reasoning tokens, cost, …",
        ),
        sa.Column("provider_details", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("terminal_event_id", sa.String(length=32), nullable=True),
        sa.PrimaryKeyConstraint("tenant", "id", name=op.f("pk_keepstream_jobs")),
        postgresql_with={"fillfactor": 80},
    )
    op.create_index(
        "ix_keepstream_jobs_tenant_created", "keepstream_jobs", ["tenant", "created_at", "id"], unique=False
    )
    op.create_table(
        "keepstream_leases",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("holder", sa.String(length=128), nullable=False),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_keepstream_leases")),
    )
    op.create_table(
        "keepstream_pools",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False, comment="a hash of the rest"),
        sa.Column("queue", sa.String(length=128), nullable=False),
        sa.Column("class", sa.String(length=16), nullable=False),
        sa.Column(
            "chain",
            sa.JSON(none_as_null=True),
            nullable=False,
            comment="[[provider, model], …]: the target, then the fallbacks",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_keepstream_pools")),
    )
    op.create_index("ix_keepstream_pools_queue", "keepstream_pools", ["queue", "class"], unique=False)
    op.create_table(
        "keepstream_rejected_messages",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("rejected_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("tenant", sa.String(length=128), nullable=True, comment="if the message named one"),
        sa.Column("job_id", sa.String(length=128), nullable=True, comment="if the message named one"),
        sa.Column("size", sa.Integer(), nullable=False, comment="bytes of the message"),
        sa.Column("payload", sa.Text(), nullable=True, comment="the message, base64, cut to a limit"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_keepstream_rejected_messages")),
    )
    op.create_index(
        "ix_keepstream_rejected_messages_rejected_at", "keepstream_rejected_messages", ["rejected_at"], unique=False
    )
    op.create_table(
        "keepstream_running",
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("job_id", sa.String(length=128), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False, comment="the one under way, or about to begin"),
        sa.Column("worker_id", sa.String(length=128), nullable=False),
        sa.Column("provider", sa.String(length=128), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("lane", sa.BigInteger(), nullable=False),
        sa.Column("pool", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False, comment="charged when it was chosen"),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False, comment="an estimate"),
        sa.Column("max_tokens", sa.BigInteger(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "job_id", name=op.f("pk_keepstream_running")),
        postgresql_with=BRIEF,
    )
    op.create_index("ix_keepstream_running_target", "keepstream_running", ["provider", "model"], unique=False)
    op.create_index("ix_keepstream_running_worker", "keepstream_running", ["worker_id"], unique=False)
    op.create_table(
        "keepstream_standings",
        sa.Column("lane", sa.BigInteger(), nullable=False),
        sa.Column("pool", sa.BigInteger(), nullable=False),
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column(
            "time", sa.Float(), nullable=False, comment="virtual: tokens given to the lane, divided by its weight"
        ),
        sa.Column(
            "head", sa.BigInteger(), nullable=False, comment="no new job of it waits in this pool with a smaller seq"
        ),
        sa.Column("active", sa.Integer(), nullable=True, comment="1: jobs wait, and may be chosen; else null"),
        sa.Column(
            "parked", sa.Integer(), nullable=True, comment="1: its tenant runs as many jobs as it may; else null"
        ),
        postgresql_with=BRIEF | {"fillfactor": 50},
    )
    op.create_index(
        "ix_keepstream_standings_active",
        "keepstream_standings",
        ["pool", "time", "lane"],
        unique=False,
        postgresql_where=sa.text("active IS NOT NULL"),
        sqlite_where=sa.text("active IS NOT NULL"),
    )
    op.create_index(
        "ix_keepstream_standings_idle",
        "keepstream_standings",
        ["pool", "time"],
        unique=False,
        postgresql_where=sa.text("active IS NULL"),
        sqlite_where=sa.text("active IS NULL"),
    )
    op.create_index("ix_keepstream_standings_lane", "keepstream_standings", ["lane", "time"], unique=False)
    op.create_index(
        "ix_keepstream_standings_parked",
        "keepstream_standings",
        ["tenant"],
        unique=False,
        postgresql_where=sa.text("parked IS NOT NULL"),
        sqlite_where=sa.text("parked IS NOT NULL"),
    )
    op.create_table(
        "keepstream_turns",
        sa.Column("n", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("arrivals_low", sa.BigInteger(), nullable=False),
        sa.Column("ready", sa.Text(), nullable=False, comment="JSON: by queue, when the next turn is worth taking"),
        sa.Column("closed", sa.Text(), nullable=False, comment="JSON: why what waits waits"),
        sa.Column("state", sa.Text(), nullable=False, comment="JSON: what the next turn goes on with"),
        sa.PrimaryKeyConstraint("n", name=op.f("pk_keepstream_turns")),
        postgresql_with=BRIEF,
    )
    op.create_table(
        "keepstream_waiting",
        sa.Column(
            "seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False, comment="age: smaller is older"
        ),
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("job_id", sa.String(length=128), nullable=False),
        sa.Column("lane", sa.BigInteger(), nullable=False, comment="tenant, class and queue, as a number"),
        sa.Column("pool", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False, comment="the newest attempt so far"),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False, comment="an estimate"),
        sa.Column("max_tokens", sa.BigInteger(), nullable=True, comment="of the answer, if the request says so"),
        sa.Column(
            "restarted_due",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="of a job that was started before: not to go on earlier",
        ),
        sa.Column(
            "expires_at", sa.DateTime(timezone=True), nullable=True, comment="when it ends, if it waits until then"
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_keepstream_waiting")),
        postgresql_with=BRIEF,
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_keepstream_waiting_expiring",
        "keepstream_waiting",
        ["expires_at"],
        unique=False,
        postgresql_where=sa.text("expires_at IS NOT NULL"),
        sqlite_where=sa.text("expires_at IS NOT NULL"),
    )
    op.create_index("ix_keepstream_waiting_job", "keepstream_waiting", ["tenant", "job_id"], unique=True)
    op.create_index(
        "ix_keepstream_waiting_lane",
        "keepstream_waiting",
        ["lane", "pool", "seq"],
        unique=False,
        postgresql_where=sa.text("restarted_due IS NULL"),
        sqlite_where=sa.text("restarted_due IS NULL"),
    )
    op.create_index(
        "ix_keepstream_waiting_restarted",
        "keepstream_waiting",
        ["pool", "restarted_due"],
        unique=False,
        postgresql_where=sa.text("restarted_due IS NOT NULL"),
        sqlite_where=sa.text("restarted_due IS NOT NULL"),
    )
    op.create_table(
        "keepstream_workers",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "lease", sa.Float(), nullable=False, comment="seconds without a heartbeat after which it counts as dead"
        ),
        sa.Column("queue", sa.String(length=128), nullable=False, comment="where it takes its jobs from"),
        sa.Column("places", sa.Integer(), nullable=False, comment="jobs that it runs at once"),
        sa.Column("running", sa.Integer(), nullable=False, comment="jobs that it ran at its last heartbeat"),
        sa.Column(
            "providers",
            sa.JSON(none_as_null=True),
            nullable=True,
            comment="names of those that it can ask; null: it does not say",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_keepstream_workers")),
    )
    op.create_index("ix_keepstream_workers_heartbeat", "keepstream_workers", ["heartbeat_at"], unique=False)
    op.create_table(
        "keepstream_attempts",
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("job_id", sa.String(length=128), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("reason", sa.String(length=16), nullable=False, comment="first, retry, worker_lost, interrupted"),
        sa.Column(
            "outcome",
            sa.String(length=16),
            nullable=True,
            comment="finished, recovered, failed, cancelled, interrupted, lost; null while it runs",
        ),
        sa.Column("worker_id", sa.String(length=128), nullable=False),
        sa.Column("provider", sa.String(length=128), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "first_token_ms", sa.Float(), nullable=True, comment="milliseconds from the request to the first output"
        ),
        sa.Column("error_code", sa.String(length=64), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("http_status", sa.Integer(), nullable=True),
        sa.Column("retryable", sa.Boolean(), nullable=True),
        sa.Column("provider_request_id", sa.Text(), nullable=True),
        sa.Column(
            "provider_error",
            sa.JSON(none_as_null=True),
            nullable=True,
            comment="what the provider said of its refusal: message, type, code, param",
        ),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=True, comment="as reported; unknown is null"),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=True),
        sa.Column("total_tokens", sa.BigInteger(), nullable=True),
        sa.Column("usage_source", sa.String(length=16), nullable=True, comment="provider, estimated or unknown"),
        sa.Column("usage", sa.JSON(none_as_null=True), nullable=True, comment="what the provider reported, whole"),
        sa.ForeignKeyConstraint(
            ["tenant", "job_id"],
            ["keepstream_jobs.tenant", "keepstream_jobs.id"],
            name=op.f("fk_keepstream_attempts_keepstream_jobs"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant", "job_id", "number", name=op.f("pk_keepstream_attempts")),
    )
    op.create_table(
        "keepstream_choices",
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("job_id", sa.String(length=128), nullable=False),
        sa.Column("index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("reasoning", sa.Text(), nullable=False),
        sa.Column("refusal", sa.Text(), nullable=False),
        sa.Column("finish_reason", sa.Text(), nullable=True, comment="as the provider sent it"),
        sa.Column("extra", sa.JSON(none_as_null=True), nullable=True, comment="logprobs, annotations and other extras"),
        sa.ForeignKeyConstraint(
            ["tenant", "job_id"],
            ["keepstream_jobs.tenant", "keepstream_jobs.id"],
            name=op.f("fk_keepstream_choices_keepstream_jobs"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant", "job_id", "index", name=op.f("pk_keepstream_choices")),
    )
    op.create_table(
        "keepstream_requests",
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("job_id", sa.String(length=128), nullable=False),
        sa.Column("job", sa.Text(), nullable=False, comment="the whole job as JSON, as it was enqueued"),
        sa.ForeignKeyConstraint(
            ["tenant", "job_id"],
            ["keepstream_jobs.tenant", "keepstream_jobs.id"],
            name=op.f("fk_keepstream_requests_keepstream_jobs"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant", "job_id", name=op.f("pk_keepstream_requests")),
    )
    op.create_table(
        "keepstream_tool_calls",
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("job_id", sa.String(length=128), nullable=False),
        sa.Column("choice_index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("call_id", sa.Text(), nullable=False),
        sa.Column("type", sa.String(length=32), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("arguments", sa.Text(), nullable=False),
        sa.Column("arguments_valid", sa.Boolean(), nullable=False, comment="whether the arguments are a JSON text"),
        sa.Column("extra", sa.JSON(none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant", "job_id"],
            ["keepstream_jobs.tenant", "keepstream_jobs.id"],
            name=op.f("fk_keepstream_tool_calls_keepstream_jobs"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant", "job_id", "choice_index", "position", name=op.f("pk_keepstream_tool_calls")),
    )


def downgrade() -> None:
    """Take back."""
    op.drop_table("keepstream_tool_calls")
    op.drop_table("keepstream_requests")
    op.drop_table("keepstream_choices")
    op.drop_table("keepstream_attempts")
    op.drop_table("keepstream_workers")
    op.drop_table("keepstream_waiting")
    op.drop_table("keepstream_turns")
    op.drop_table("keepstream_standings")
    op.drop_table("keepstream_running")
    op.drop_table("keepstream_rejected_messages")
    op.drop_table("keepstream_pools")
    op.drop_table("keepstream_leases")
    op.drop_table("keepstream_jobs")
    op.drop_table("keepstream_arrivals")
    op.drop_table("keepstream_announcements")
