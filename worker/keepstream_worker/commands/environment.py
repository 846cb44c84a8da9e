"""Settings and a client as the environment describes them.

In: environment variables.
Out: `Settings` or a `Client`, to the commands; a wrong setting ends the command with one line.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from keepstream_worker.commands.exits import INVALID, UNAVAILABLE, fail, print_error, stale_settings_hint

if TYPE_CHECKING:
    from keepstream import Client
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
    from keepstream_worker.commands.dev_directory import DEV_VARIABLE, env_file_here

    settings = settings_from_environment()
    if hint := stale_settings_hint():
        print_error(f"keepstream: {hint}")
    path = settings.database_url.removeprefix("sqlite:///").partition("?")[0]
    if settings.database_url.startswith("sqlite:///") and path and not Path(path).exists():
        advice = "run `keepstream migrate`, or set KEEPSTREAM_DATABASE_URL"
        if (dev := env_file_here()) is not None and DEV_VARIABLE not in os.environ:
            advice = f"for that of the `keepstream dev` here, source its settings: . {dev}"
        fail(f"there is no database {path}: {advice}", UNAVAILABLE)
    return Client(
        settings.redis_url,
        broker_url=settings.broker_url,
        database_url=settings.database_url,
        tenant=tenant,
        prefix=settings.prefix,
        queue=settings.queue,
    )
