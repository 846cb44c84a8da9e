"""Settings and a client as the environment describes them.

In: environment variables.
Out: `Settings`, a `Client` or the database, to the commands; a wrong setting ends the command with one line.
"""

import os
from typing import TYPE_CHECKING

from keepstream_worker.commands.exits import INVALID, UNAVAILABLE, fail, print_error, stale_settings_hint

if TYPE_CHECKING:
    from keepstream import Client
    from keepstream.client.database import ClientDatabase
    from keepstream_worker.settings import Settings


def settings_from_environment() -> "Settings":
    """Return the settings of this environment."""
    from keepstream_worker.settings import SettingsError, load_settings

    try:
        return load_settings()
    except SettingsError as error:
        fail(str(error), INVALID)


def check_variable_names() -> None:
    """End the command if a ``KEEPSTREAM_…`` variable is misspelt; for commands that make settings of their own."""
    from keepstream_worker.settings import unknown_variables

    if complaints := unknown_variables(os.environ):
        fail("; ".join(complaints), INVALID)


def client_for(tenant: str) -> "Client":
    """Return a client for the same services as a worker in this environment."""
    from keepstream import Client

    settings = settings_from_environment()
    if hint := stale_settings_hint():
        print_error(f"keepstream: {hint}")
    _check_that_there_is_a_file(settings)
    return Client(
        settings.redis_url,
        broker_url=settings.broker_url,
        database_url=settings.database_url,
        tenant=tenant,
        prefix=settings.prefix,
        queue=settings.queue,
    )


def database_from_environment() -> "ClientDatabase":
    """Return the database of this environment, for commands that need nothing else."""
    from keepstream.client.database import ClientDatabase

    settings = settings_from_environment()
    _check_that_there_is_a_file(settings)
    return ClientDatabase(settings.database_url)


def _check_that_there_is_a_file(settings: "Settings") -> None:
    """End the command if the database is a file that does not exist: most likely this is the wrong directory."""
    from keepstream.client.database import missing_file
    from keepstream.client.postgresql import MIGRATE_OR_SET
    from keepstream_worker.commands.dev_directory import DEV_VARIABLE, env_file_here

    file = missing_file(settings.database_url)
    if file is None:
        return
    advice = MIGRATE_OR_SET
    if (dev := env_file_here()) is not None and DEV_VARIABLE not in os.environ:
        advice = f"for that of the `keepstream dev` here, source its settings: . {dev}"
    fail(f"there is no database {file}: {advice}", UNAVAILABLE)
