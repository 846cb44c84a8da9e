"""Costs by the minute; what is used of limits, told by one worker; rejected messages in one order

Additive, but for an index that another takes the place of: the code of the version before is still running while this
is applied.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column(
        "keepstream_minutes",
        sa.Column("cost", sa.Float(), nullable=True, comment="as providers reported it; null: none did"),
    )
    op.create_table(
        "keepstream_reports",
        sa.Column("name", sa.String(length=64), nullable=False, comment="limits: what is used of each"),
        sa.Column("told_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("report", sa.JSON(none_as_null=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_keepstream_reports")),
    )
    op.create_index(
        "ix_keepstream_rejected_messages_age", "keepstream_rejected_messages", ["rejected_at", "id"], unique=False
    )
    op.drop_index("ix_keepstream_rejected_messages_rejected_at", table_name="keepstream_rejected_messages")


def downgrade() -> None:
    """Take back."""
    op.create_index(
        "ix_keepstream_rejected_messages_rejected_at", "keepstream_rejected_messages", ["rejected_at"], unique=False
    )
    op.drop_index("ix_keepstream_rejected_messages_age", table_name="keepstream_rejected_messages")
    op.drop_table("keepstream_reports")
    op.drop_column("keepstream_minutes", "cost")
