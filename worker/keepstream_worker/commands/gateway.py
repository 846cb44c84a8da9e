"""The commands around the gateway: gateway, keys.

In: arguments and the settings of a deployment.
Out: a running gateway; API keys, made, listed and revoked.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keepstream.names import Right, install_hint
from keepstream_worker.commands.arguments import AsJson, AsJsonLines
from keepstream_worker.commands.environment import check_variable_names, database_from_environment
from keepstream_worker.commands.exits import INVALID, NOT_FOUND, UNAVAILABLE, fail
from keepstream_worker.commands.group import CommandGroup
from keepstream_worker.commands.output import make_console, print_lines

if TYPE_CHECKING:
    from keepstream.client.api_keys import StoredKey

group = CommandGroup("Operate")
keys = CommandGroup("Keys")
group.app.add_typer(
    keys.app,
    name="keys",
    help="Make, list and revoke the API keys by which programs call the gateway.",
    rich_help_panel="Operate",
    no_args_is_help=True,
)


@group.command("keepstream gateway", "keepstream gateway --host 0.0.0.0 --port 8080")
def gateway(
    *,
    host: Annotated[str | None, typer.Option(help="Address to listen on; else KEEPSTREAM_GATEWAY_HOST.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Port to listen on; else KEEPSTREAM_GATEWAY_PORT.")
    ] = None,
) -> None:
    """Run a gateway until SIGTERM or Ctrl-C: Keepstream over HTTP.

    It speaks OpenAI's API and its own, for callers with a key (`keepstream keys create`). When it stops, its streams
    end in a way that their readers resume at another gateway; run two of them or more behind a proxy.
    """
    check_variable_names()
    try:
        from keepstream_gateway.server import StartError, serve
        from keepstream_gateway.settings import SettingsError, load_settings
    except ModuleNotFoundError as error:
        fail(f"the gateway needs '{error.name}', which is not installed; {install_hint('gateway')}", INVALID)
    given: dict[str, Any] = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    try:
        code = serve(load_settings(**given))
    except SettingsError as error:
        fail(str(error), INVALID)
    except StartError as error:
        fail(str(error), UNAVAILABLE)
    raise typer.Exit(code)


@keys.command("keepstream keys create --tenant shop --name 'web backend'", "keepstream keys create --right console")
def create(
    *,
    tenant: Annotated[str, typer.Option(help="Whose jobs it is for.")] = "default",
    name: Annotated[str, typer.Option(help="What it is for; you see it in the list.")] = "unnamed",
    rights: Annotated[list[Right] | None, typer.Option("--right", help="What it may; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, once and for all: only its hash is stored.

    The right `api` is to enqueue, follow, cancel and read the tenant's jobs; `console` is to see the console.
    """
    from keepstream.client import api_keys

    with _database() as connection:
        stored, key = api_keys.create(connection, tenant, name, frozenset(rights or [Right.API]))
    typer.echo(json.dumps({"key": key, **_shown(stored)}) if as_json else key)


@keys.command("keepstream keys list", "keepstream keys list --tenant shop --json", name="list")
def list_(
    *,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    as_json: AsJsonLines = False,
) -> None:
    """List keys, the newest first, by how they begin; also those that have been revoked."""
    from keepstream.client import api_keys

    with _database() as connection:
        found = api_keys.list_keys(connection, tenant)
    if as_json:
        print_lines(json.dumps(_shown(stored)) for stored in found)
        return
    from keepstream_worker.commands.tables import show_keys

    show_keys(make_console(), found)


@keys.command("keepstream keys revoke ks_0123456789ab")
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The key, or how it begins.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Have a key refused from now on, once and for all, with the tokens that it has made.

    Gateways remember keys for some seconds: KEEPSTREAM_GATEWAY_KEY_CACHE.
    """
    from keepstream.client import api_keys

    key_id = key.removeprefix("ks_").partition("_")[0]
    with _database() as connection:
        stored = api_keys.revoke(connection, key_id)
    if stored is None:
        fail("there is no such key; see: keepstream keys list", NOT_FOUND)
    typer.echo(json.dumps(_shown(stored)) if as_json else f"revoked {stored.prefix} ({stored.name})")


@contextmanager
def _database() -> Iterator[Any]:
    """Give a connection inside a transaction."""
    database = database_from_environment()
    try:
        with database.transaction() as connection:
            yield connection
    finally:
        database.close()


def _shown(stored: "StoredKey") -> dict[str, Any]:
    """Return a key as JSON has it."""
    from keepstream_worker.commands.formats import iso_time

    return {
        "prefix": stored.prefix,
        "tenant": stored.tenant,
        "name": stored.name,
        "rights": sorted(stored.rights),
        "created_at": iso_time(stored.created_at),
        "revoked_at": stored.revoked_at and iso_time(stored.revoked_at),
    }
