"""How Alembic reaches the database: through the connection that ``keepstream_worker.store.schema`` hands over."""

from alembic import context

from keepstream.tables import metadata

connection = context.config.attributes["connection"]
if connection.dialect.name == "postgresql":
    # A migration that waits for a lock makes everybody behind it wait too; it is better repeated.
    connection.exec_driver_sql("SET lock_timeout = '5s'")
    # Two deploys that migrate at once take turns.
    connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7274496632)")
context.configure(connection=connection, target_metadata=metadata, render_as_batch=connection.dialect.name == "sqlite")
context.run_migrations()
