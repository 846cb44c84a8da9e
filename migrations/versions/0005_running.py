"""Jobs that run, counted from the oldest on

Additive, but for an index that another takes the place of: the code of the version before is still running while this
is applied.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_index("ix_keepstream_running_provider", "keepstream_running", ["provider", "started_at"], unique=False)
    op.create_index("ix_keepstream_running_started_at", "keepstream_running", ["started_at"], unique=False)
    op.drop_index("ix_keepstream_running_target", table_name="keepstream_running")


def downgrade() -> None:
    """Take back."""
    op.create_index("ix_keepstream_running_target", "keepstream_running", ["provider", "model"], unique=False)
    op.drop_index("ix_keepstream_running_started_at", table_name="keepstream_running")
    op.drop_index("ix_keepstream_running_provider", table_name="keepstream_running")
