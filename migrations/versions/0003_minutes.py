"""Sums by the minute; an index for listing the jobs of all tenants

Additive only: the code of the version before is still running while this is applied.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

FIRST_OUTPUT_CLASSES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, "any")


def upgrade() -> None:
    """Apply."""
    op.create_index("ix_keepstream_jobs_created", "keepstream_jobs", ["created_at", "tenant", "id"], unique=False)
    op.create_table(
        "keepstream_minutes",
        sa.Column("minute", sa.Integer(), autoincrement=False, nullable=False, comment="since 1970-01-01 00:00 UTC"),
        sa.Column("provider", sa.String(length=128), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column(
            "outcome",
            sa.String(length=16),
            nullable=False,
            comment="of attempts that ended; empty: of those under way",
        ),
        sa.Column("error_code", sa.String(length=64), nullable=False, comment="empty: none"),
        sa.Column("attempts", sa.BigInteger(), nullable=False, comment="that ended so"),
        sa.Column("deltas", sa.BigInteger(), nullable=False, comment="that came"),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        *(
            sa.Column(
                f"first_output_{number}",
                sa.BigInteger(),
                nullable=False,
                comment=f"attempts: first output within {most} s",
            )
            for number, most in enumerate(FIRST_OUTPUT_CLASSES)
        ),
        sa.PrimaryKeyConstraint(
            "minute", "provider", "model", "outcome", "error_code", name=op.f("pk_keepstream_minutes")
        ),
        postgresql_with={"fillfactor": 50},
    )


def downgrade() -> None:
    """Take back."""
    op.drop_table("keepstream_minutes")
    op.drop_index("ix_keepstream_jobs_created", table_name="keepstream_jobs")
