"""The commands for operators: worker, alive, migrate, top, limits, doctor, rejected, purge, schema.

In: arguments and the settings of a deployment.
Out: a running worker, changes to the database, or a report on standard output as text or JSON.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Final

import typer

from keepstream_worker.commands.arguments import AsJson, AsJsonLines, parse_duration
from keepstream_worker.commands.entry import check_pulses
from keepstream_worker.commands.environment import database_from_environment, settings_from_environment
from keepstream_worker.commands.exits import INVALID, UNSUCCESSFUL, fail, print_error, start_errors
from keepstream_worker.commands.group import CommandGroup
from keepstream_worker.commands.output import make_console, print_lines
from keepstream_worker.commands.worker_processes import run_worker_here, run_workers
from keepstream_worker.telemetry.pulse import LIMIT

if TYPE_CHECKING:
    from keepstream.client.database import ClientDatabase
    from keepstream_worker.limits import Policy
    from keepstream_worker.store.retention import PurgeCounts

group = CommandGroup("Operate")

_PAUSE_AFTER_OUTAGE: Final = 60.0  #: Seconds until a repeated purge that did not reach the database tries again.


@group.command("keepstream worker", "keepstream worker --processes 4 --concurrency 500")
def worker(
    *,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Jobs that one process runs at once; else KEEPSTREAM_CONCURRENCY.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, max=256, help="Processes, one per core; else KEEPSTREAM_PROCESSES.")
    ] = None,
) -> None:
    """Run a worker until SIGTERM or Ctrl-C.

    It then takes no more jobs, lets streams finish for KEEPSTREAM_SHUTDOWN_GRACE seconds, and leaves the rest to
    other workers; a second signal shortens that. With several processes, one that dies is replaced.
    """
    from keepstream_worker.providers.config import ProviderConfigError, load_providers

    settings = settings_from_environment()
    try:
        load_providers(settings.providers_file, os.environ)
    except ProviderConfigError as error:
        fail(str(error), INVALID)
    count = processes or settings.processes
    if count == 1:
        try:
            run_worker_here(concurrency)
        except typer.Exit as end:
            from keepstream_worker.app import leave

            leave(end.exit_code)
    run_workers(settings, count, concurrency)


@group.command("keepstream alive", "keepstream alive --within 20")
def alive(
    *,
    within: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Silence after which a process counts as hung.")
    ] = LIMIT,
) -> None:
    """Exit 0 if each process of this container's worker is alive, 1 if one hangs or is gone.

    The liveness check of a container: it costs next to nothing and asks no server, so an outage of Redis or the
    database is no failure. It reads the signs of life that a worker leaves in KEEPSTREAM_ALIVE_DIR.
    """
    directory = settings_from_environment().alive_dir
    if directory is None:
        fail("set KEEPSTREAM_ALIVE_DIR to a directory in memory, for the worker and for this command", INVALID)
    raise typer.Exit(check_pulses(str(directory), within))


@group.command("keepstream migrate", "keepstream migrate --check")
def migrate(
    *,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 if the tables are not current.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Create or update the database's tables.

    The database is that of KEEPSTREAM_DATABASE_URL. Workers of the previous version can go on working meanwhile:
    changes are additive.
    """
    from keepstream.client.database import make_engine
    from keepstream_worker.store import schema

    with start_errors():
        engine = make_engine(settings_from_environment().database_url)
        try:
            before = schema.current(engine)
            after = before if check else schema.migrate(engine)
        finally:
            engine.dispose()
    needed = schema.head()
    if as_json:
        typer.echo(json.dumps({"before": before, "after": after, "needed": needed}))
    elif before == after:
        typer.echo(f"the database is at {before or 'no revision yet'}; this version needs {needed}")
    else:
        typer.echo(f"migrated the database from {before or 'nothing'} to {after}")
    if after != needed:
        raise typer.Exit(UNSUCCESSFUL)


@group.command("keepstream top", "keepstream top --once", "keepstream top --json | jq .tenants")
def top(
    *,
    every: Annotated[float, typer.Option(min=0.2, max=3600, metavar="SECONDS", help="Pause between two looks.")] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Look once; so it does where the output is no terminal.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what runs, what waits and why, by provider and tenant, until Ctrl-C.

    What waits for a limit, a cool-down, a worker or a free place says so. With --json it prints one look for programs.
    """
    from keepstream_worker.commands.top import show_top

    show_top(database_from_environment(), _policy(), every=every, once=once, as_json=as_json)


@group.command("keepstream limits", "keepstream limits --json | jq .limits")
def limits(*, as_json: AsJson = False) -> None:
    """Show each limit of providers, models and tenants, configured or learned, and what is used of it now."""
    from keepstream_worker.commands.top import show_limits_now

    show_limits_now(database_from_environment(), _policy(), as_json=as_json)


def _policy() -> "Policy":
    """Return the limits that the providers file says; a wrong one ends the command with one line."""
    from keepstream_worker.providers.config import ProviderConfigError, load_policy

    try:
        return load_policy(settings_from_environment().providers_file, os.environ)
    except ProviderConfigError as error:
        fail(str(error), INVALID)


@group.command("keepstream doctor", "keepstream doctor --quick", "keepstream doctor --json | jq .healthy")
def doctor(
    *,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Can this host's worker work now? No provider is asked."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with a deployment and what to do.

    Checks settings, Redis, database, workers, waiting jobs, rejected messages, and providers (by asking for their list
    of models, which costs nothing). Exits 1 if a check fails; a warning is not a failure.
    """
    from keepstream_worker.commands.doctor import as_json as findings_json
    from keepstream_worker.commands.doctor import examine, healthy, show
    from keepstream_worker.telemetry.logs import configure_logging

    configure_logging("error", "console")  # the findings say what a worker would log
    findings = examine(quick=quick)
    if as_json:
        typer.echo(json.dumps(findings_json(findings), indent=2))
    else:
        show(make_console(), findings)
    if not healthy(findings):
        raise typer.Exit(UNSUCCESSFUL)


@group.command("keepstream rejected", "keepstream rejected --json | jq .reason")
def rejected(
    *, limit: Annotated[int, typer.Option(min=1, max=1000, help="Messages at most.")] = 50, as_json: AsJsonLines = False
) -> None:
    """List messages that were not valid jobs, and why.

    The newest come first. The table keepstream_rejected_messages keeps them with their payload.
    """
    from keepstream.client import overview

    database = database_from_environment()
    try:
        with database.transaction() as connection:
            messages = overview.rejected(connection, limit)
    finally:
        database.close()
    if as_json:
        from keepstream_worker.commands.formats import iso_time

        print_lines(json.dumps(message._asdict(), default=iso_time) for message in messages)
        return
    from keepstream_worker.commands.tables import show_rejected

    show_rejected(make_console(), messages)


@group.command(
    "keepstream purge --older-than 30d --all-tenants --dry-run",
    "keepstream purge --older-than 30d --all-tenants --yes",
    "keepstream purge --older-than 1h --tenant shop",
    "keepstream purge --older-than 30d --all-tenants --yes --every 1d",
)
def purge(
    *,
    older_than: Annotated[str, typer.Option(metavar="DURATION", help="Age since their end: 90s, 15m, 2h or 30d.")],
    tenant: Annotated[str | None, typer.Option(help="Only what is this tenant's.")] = None,
    all_tenants: Annotated[bool, typer.Option("--all-tenants", help="What is any tenant's.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing; say how much would be deleted.")] = False,
    every: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Do so again and again, until SIGTERM; needs --yes.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete jobs that ended long ago, with their results, and rejected messages of that age.

    What is deleted cannot be restored. If standard input is interactive, the command asks first. With --every it goes
    on until SIGTERM, and an outage of the database only delays it.
    """
    from keepstream_worker.store import retention

    seconds = parse_duration(older_than)
    if (tenant is None) is not all_tenants:
        fail("whose jobs? write either --tenant NAME or --all-tenants", INVALID)
    pause = None if every is None else parse_duration(every)
    if pause is not None and (pause < 1 or dry_run or not yes):
        fail("--every goes with --yes, not with --dry-run, and is at least 1s: it runs where nobody is asked", INVALID)
    ask = sys.stdin.isatty() and not yes and not dry_run
    database = database_from_environment()
    try:
        if dry_run or ask:
            found = retention.purge(database.transaction, seconds, tenant, count_only=True)
            if dry_run:
                typer.echo(json.dumps(found._asdict()) if as_json else f"would delete {_purge_counts(found)}")
                return
            if not typer.confirm(f"Delete {_purge_counts(found)}?", err=True):
                fail("nothing was deleted", UNSUCCESSFUL)
        for deleted in _purges(database, seconds, tenant, pause):
            typer.echo(json.dumps(deleted._asdict()) if as_json else f"deleted {_purge_counts(deleted)}")
    finally:
        database.close()


def _purges(
    database: "ClientDatabase", seconds: float, tenant: str | None, pause: float | None
) -> Iterator["PurgeCounts"]:
    """Purge once, or, with a pause, again and again until SIGTERM; yield how much each time has deleted."""
    from keepstream.errors import StoreUnavailableError
    from keepstream_worker.store import retention

    if pause is None:
        yield retention.purge(database.transaction, seconds, tenant)
        return
    # In a container it is process 1, which a signal without a handler does not end. What is under way is rolled back.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    while True:
        wait = pause
        try:
            yield retention.purge(database.transaction, seconds, tenant)
        except StoreUnavailableError as error:
            wait = min(pause, _PAUSE_AFTER_OUTAGE)
            print_error(f"keepstream: {error}; the next try is in {wait:.0f} s")
        time.sleep(wait)


def _purge_counts(counts: "PurgeCounts") -> str:
    from keepstream_worker.commands.formats import count

    messages = count(counts.rejected_messages, "rejected message", "rejected messages")
    return f"{count(counts.jobs, 'job', 'jobs')} and {messages}"


@group.command("keepstream schema job > job.schema.json", "keepstream schema asyncapi", "keepstream schema --check")
def schema(
    name: Annotated[str, typer.Argument(metavar="[job|event|result|asyncapi]", help="Which one.")] = "",
    *,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 if the committed files are not current.")] = False,
) -> None:
    """Print the contract for services in any language: JSON Schemas or an AsyncAPI document."""
    from keepstream.schemas import generate as generate_schemas

    if check:
        if outdated := generate_schemas.outdated():
            message = f"{', '.join(outdated)}: not current; run: python -m keepstream.schemas.generate"
            fail(message, UNSUCCESSFUL)
        return
    documents = {file.partition(".")[0]: text for file, text in generate_schemas.documents().items()}
    text = documents.get({"events": "event", "jobs": "job", "results": "result"}.get(name, name))
    if text is None:
        fail(f"which schema? choose one of {', '.join(documents)}", INVALID)
    typer.echo(text, nl=False)
