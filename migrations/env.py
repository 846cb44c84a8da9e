"""Alembic's environment: how a command of Alembic meets the database.

In: the connection that ``keepstream_worker.store.schema`` hands over, inside a transaction.  Out: our migrations,
applied to the first schema of the connection's search path; a host application's tables and its
``alembic_version`` are neither read nor touched.
"""

from typing import Final

from alembic import context

from keepstream.tables import VERSION_TABLE, metadata

#: Two deploys that migrate at once take turns. PostgreSQL keeps advisory locks apart by database; the key is a hash
#: of our own table's name and the schema, so deployments in other schemas do not wait, and a host application's
#: lock has the same number only by a chance of one in 2^64.
_TAKE_TURN: Final = f"SELECT pg_advisory_xact_lock(hashtextextended(current_schema() || '.{VERSION_TABLE}', 0))"


def _is_ours(name: str | None, kind: str, _parents: object) -> bool:
    """Leave a host application's tables out of comparisons."""
    return kind != "table" or name in metadata.tables


connection = context.config.attributes["connection"]
schema = None
if connection.dialect.name == "postgresql":
    # Another deploy's migration may take its time; nobody but a third deploy waits behind us.
    connection.exec_driver_sql("SET LOCAL lock_timeout = '10min'")
    connection.exec_driver_sql("SET LOCAL statement_timeout = '10min'")
    connection.exec_driver_sql(_TAKE_TURN)
    # From here on, a migration that waits for a lock makes everybody behind it wait too; it is better repeated.
    connection.exec_driver_sql("SET LOCAL lock_timeout = '5s'")
    # Named, because without it Alembic would take a version table anywhere in the search path for this schema's.
    schema = connection.exec_driver_sql("SELECT current_schema()").scalar()
else:
    # The same on SQLite: a transaction that reads before it writes fails if somebody else writes in between.
    connection.exec_driver_sql("COMMIT")
    connection.exec_driver_sql("BEGIN IMMEDIATE")
context.configure(
    connection=connection,
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    version_table_schema=schema,
    include_name=_is_ours,
    compare_server_default=True,
    render_as_batch=connection.dialect.name == "sqlite",
)
context.run_migrations()
