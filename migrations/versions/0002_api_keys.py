"""API keys of the gateway

Additive only: the code of the version before is still running while this is applied.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "keepstream_api_keys",
        sa.Column("id", sa.String(length=16), nullable=False, comment="the part of the key that everybody may see"),
        sa.Column("hash", sa.String(length=64), nullable=False, comment="SHA-256 of the key, hexadecimal"),
        sa.Column("tenant", sa.String(length=128), nullable=False, comment="whose jobs it is for"),
        sa.Column("name", sa.String(length=128), nullable=False, comment="what people call it"),
        sa.Column("rights", sa.JSON(none_as_null=True), nullable=False, comment="a list: api, console"),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True, comment="null: it is accepted"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_keepstream_api_keys")),
    )


def downgrade() -> None:
    """Take back."""
    op.drop_table("keepstream_api_keys")
