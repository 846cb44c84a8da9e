"""Jobs, choices, tool calls, attempts, workers, rejected messages

Additive only: the code of the version before is still running while this is applied.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "keepstream_jobs",
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column(
            "status", sa.String(length=16), nullable=False, comment="queued, running, retrying, completed, failed, …"
        ),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("provider", sa.String(length=128), nullable=False),
        sa.Column("job", sa.Text(), nullable=False, comment="the whole job as JSON, as it was enqueued"),
        sa.Column(
            "request_hash",
            sa.String(length=64),
            nullable=False,
            comment="whether a repeated id asks for the same",
        ),
        sa.Column(
            "prompt_start",
            sa.Text(),
            nullable=False,
            comment="beginning of the last user message, for listings",
        ),
        sa.Column("metadata", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("retry_of", sa.String(length=128), nullable=True, comment="id of the job that this one repeats"),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False, comment="not to be started before"),
        sa.Column(
            "resend_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="when a worker's sweeper sends its message (again)",
        ),
        sa.Column(
            "sends",
            sa.Integer(),
            nullable=False,
            comment="messages sent for the next attempt, as far as is known",
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=True, comment="first start plus total time-out"),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True, comment="start of the first attempt"),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "attempt", sa.Integer(), nullable=False, comment="the newest attempt; the fencing token of every write"
        ),
        sa.Column("tries", sa.Integer(), nullable=False, comment="attempts that count against max_attempts"),
        sa.Column("max_attempts", sa.Integer(), nullable=True, comment="null: the worker's setting"),
        sa.Column("queue", sa.String(length=128), nullable=False, comment="where its messages go"),
        sa.Column("next_reason", sa.String(length=16), nullable=False, comment="why the next attempt will be made"),
        sa.Column("worker_id", sa.String(length=128), nullable=True, comment="who runs it now"),
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
        sa.Column(
            "announced", sa.Boolean(), nullable=False, comment="whether the terminal event is known to be in the log"
        ),
        sa.PrimaryKeyConstraint("tenant", "id", name=op.f("pk_keepstream_jobs")),
    )
    op.create_index(
        "ix_keepstream_jobs_expiring",
        "keepstream_jobs",
        ["expires_at"],
        unique=False,
        postgresql_where=sa.text("status IN ('queued', 'retrying') AND expires_at IS NOT NULL"),
        sqlite_where=sa.text("status IN ('queued', 'retrying') AND expires_at IS NOT NULL"),
    )
    op.create_index(
        "ix_keepstream_jobs_tenant_created", "keepstream_jobs", ["tenant", "created_at", "id"], unique=False
    )
    op.create_index(
        "ix_keepstream_jobs_unannounced",
        "keepstream_jobs",
        ["finished_at"],
        unique=False,
        postgresql_where=sa.text("NOT announced AND finished_at IS NOT NULL"),
        sqlite_where=sa.text("NOT announced AND finished_at IS NOT NULL"),
    )
    op.create_index(
        "ix_keepstream_jobs_waiting",
        "keepstream_jobs",
        ["resend_at"],
        unique=False,
        postgresql_where=sa.text("status IN ('queued', 'retrying')"),
        sqlite_where=sa.text("status IN ('queued', 'retrying')"),
    )
    op.create_index(
        "ix_keepstream_jobs_worker",
        "keepstream_jobs",
        ["worker_id"],
        unique=False,
        postgresql_where=sa.text("worker_id IS NOT NULL"),
        sqlite_where=sa.text("worker_id IS NOT NULL"),
    )

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
        "keepstream_workers",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "lease",
            sa.Float(),
            nullable=False,
            comment="seconds without a heartbeat after which it counts as dead",
        ),
        sa.Column("queue", sa.String(length=128), nullable=False, comment="where it takes its jobs from"),
        sa.Column("places", sa.Integer(), nullable=False, comment="jobs that it runs at once"),
        sa.Column("running", sa.Integer(), nullable=False, comment="jobs that it ran at its last heartbeat"),
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
    op.drop_table("keepstream_choices")
    op.drop_table("keepstream_attempts")
    op.drop_table("keepstream_workers")
    op.drop_table("keepstream_rejected_messages")
    op.drop_table("keepstream_jobs")
