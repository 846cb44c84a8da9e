"""The doctor: checks everything a deployment needs, and says what is wrong and what to do.

In: the environment.
Out: findings, as a table or as JSON, to `keepstream doctor`.

The quick form asks whether this host's worker can work now: it fails in an outage, and so is no sign of life.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from keepstream import names
from keepstream.client.database import ClientDatabase, make_engine
from keepstream.client.redis_url import RedisServer
from keepstream.errors import InvalidSettingError, StoreUnavailableError
from keepstream_worker.commands.formats import count, printable
from keepstream_worker.providers.config import DEFAULT, ProviderConfig, ProviderConfigError, load
from keepstream_worker.redis_check import RedisFault, check_redis_server
from keepstream_worker.settings import Settings, SettingsError, load_settings
from keepstream_worker.store import inspection, schema
from keepstream_worker.store.inspection import Overview
from keepstream_worker.values import is_on_host

if TYPE_CHECKING:
    from keepstream_worker.providers.provider import ProviderCheck

_LONG_WAIT: Final = 30.0  #: Seconds in the queue after which more workers would help.


class Severity(StrEnum):
    """How serious a finding is."""

    OK = "ok"
    WARN = "warn"  #: Jobs are done, but somebody should know.
    FAIL = "fail"  #: Jobs are not done, or may be lost.


_STYLES: Final = {Severity.OK: "green", Severity.WARN: "yellow", Severity.FAIL: "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    check: str
    severity: Severity
    found: str  #: One line; no secret in it.
    advice: str = ""  #: What to do; empty if all is well.


def examine(*, quick: bool = False) -> list[Finding]:
    """Return the findings of all checks; ``quick``: only of those that show whether this host's worker can work."""
    return list(_quick() if quick else _thorough())


def healthy(findings: list[Finding]) -> bool:
    """Whether no check failed."""
    return all(finding.severity is not Severity.FAIL for finding in findings)


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """Return the findings as JSON-ready values."""
    return {"healthy": healthy(findings), "checks": [asdict(finding) for finding in findings]}


def show(console: Console, findings: list[Finding]) -> None:
    """Show the findings as a table, with advice below what is not well."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        style = _STYLES[finding.severity]
        found = Text(finding.found)
        if finding.advice:
            found.append(f"\n→ {finding.advice}", style)
        table.add_row(Text(finding.severity.value, style), finding.check, found)
    console.print(table)


def _quick() -> Iterator[Finding]:
    settings = yield from _settings()
    if settings is None:
        return
    yield from _redis(settings)
    database = _database(settings)
    yield database
    if database.severity is not Severity.FAIL:
        yield from _work(settings, _own_worker)


def _thorough() -> Iterator[Finding]:
    settings = yield from _settings()
    if settings is None:
        return
    yield from _redis(settings)
    database = _database(settings)
    yield database
    if database.severity is not Severity.FAIL:
        yield from _work(settings, _workers, _jobs, _rejected, _transactions)
    yield from _providers(settings)


def _settings() -> Generator[Finding, None, Settings | None]:
    try:
        settings = load_settings()
    except SettingsError as error:
        yield Finding("settings", Severity.FAIL, str(error), "correct the environment")
        return None
    set_here = sorted(name for name in os.environ if name.startswith("KEEPSTREAM_"))
    yield Finding("settings", Severity.OK, f"from {', '.join(set_here)}" if set_here else "all at their defaults")
    return settings


def _redis(settings: Settings) -> Iterator[Finding]:
    for variable, server in settings.redis_servers().items():
        yield _redis_server("redis" if variable == names.ENV_REDIS_URL else "broker", server, variable)


def _redis_server(check: str, server: RedisServer, variable: str) -> Finding:
    try:
        facts = check_redis_server(server, variable)
    except RedisFault as fault:
        return Finding(check, Severity.FAIL, fault.found, fault.advice)
    found = f"{facts.version} answers"
    if server.tls is not None and not server.tls.verified:
        advice = f"take ssl_cert_reqs and ssl_check_hostname out of {variable}; ssl_ca_certs names an authority"
        return Finding(check, Severity.WARN, f"{found}; whether it is the right one, nobody checks", advice)
    if facts.silent_sentinels:
        silent = count(facts.silent_sentinels, "Sentinel does", "Sentinels do")
        return Finding(check, Severity.WARN, f"{found}; {silent} not", "start it, or correct its address in the URL")
    if facts.eviction is None:
        advice = "allow +info to its user, so that what it is can be checked"
        return Finding(check, Severity.WARN, f"{found}; this user may not ask what it is", advice)
    if facts.eviction != "noeviction":
        advice = "CONFIG SET maxmemory-policy noeviction: an evicted key is a lost message or a hole in a log"
        return Finding(check, Severity.WARN, f"{found}; its maxmemory-policy is {facts.eviction}", advice)
    return Finding(check, Severity.OK, f"{found}; it evicts nothing")


def _database(settings: Settings) -> Finding:
    try:
        engine = make_engine(settings.database_url)
    except InvalidSettingError as error:
        return Finding("database", Severity.FAIL, str(error), "correct KEEPSTREAM_DATABASE_URL")
    try:
        schema.check(engine)
        revision = schema.current(engine)
    except schema.SchemaError as error:
        found, _, advice = str(error).partition("; " if "; " in str(error) else ": ")
        return Finding("database", Severity.FAIL, found, advice)
    finally:
        engine.dispose()
    return Finding("database", Severity.OK, f"{engine.dialect.name} answers; its tables are at revision {revision}")


def _work(settings: Settings, *checks: Callable[[Overview], Finding | None]) -> Iterator[Finding]:
    try:
        database = ClientDatabase(settings.database_url)
        try:
            with database.transaction() as connection:
                overview = inspection.overview(connection, settings.lease)
        finally:
            database.close()
    except StoreUnavailableError as error:
        yield Finding("work", Severity.FAIL, str(error), "see the database's own log")
    else:
        yield from filter(None, (check(overview) for check in checks))


def _own_worker(overview: Overview) -> Finding:
    host = socket.gethostname()
    alive = sum(is_on_host(worker, host) for worker in overview.workers)
    if not alive:
        return Finding("worker", Severity.FAIL, f"none on {host} is alive", "start one: keepstream worker")
    return Finding("worker", Severity.OK, f"{count(alive, 'process', 'processes')} on {host} alive")


def _workers(overview: Overview) -> Finding:
    if overview.workers:
        return Finding("workers", Severity.OK, f"{count(len(overview.workers), 'process', 'processes')} alive")
    waiting = overview.backlog.oldest_wait is not None
    severity = Severity.FAIL if waiting else Severity.WARN
    found = "none is alive, and jobs wait" if waiting else "none is alive"
    return Finding("workers", severity, found, "start one: keepstream worker")


def _jobs(overview: Overview) -> Finding:
    jobs = overview.backlog
    queued, running, retrying = map(_counted, (jobs.queued, jobs.running, jobs.retrying))
    found = f"{queued} queued, {running} running, {retrying} waiting to retry"
    if jobs.oldest_wait is not None and jobs.oldest_wait > _LONG_WAIT:
        found += f"; the oldest has been due for {jobs.oldest_wait:.0f} s"
        more = (
            "see what they wait for: keepstream top; if it is a free place, start more workers or raise"
            " KEEPSTREAM_CONCURRENCY"
            if overview.workers
            else "start a worker: see above"
        )
        return Finding("jobs", Severity.WARN, found, more)
    return Finding("jobs", Severity.OK, found)


def _counted(number: int) -> str:
    return f"more than {inspection.COUNTED}" if number > inspection.COUNTED else str(number)


def _rejected(overview: Overview) -> Finding:
    found = f"{_counted(overview.rejected)} {'message' if overview.rejected == 1 else 'messages'} in the last 24 hours"
    if overview.rejected:
        return Finding(
            "rejected",
            Severity.WARN,
            found,
            "a producer sends messages that are not valid jobs; to see them: keepstream rejected",
        )
    return Finding("rejected", Severity.OK, found)


def _transactions(overview: Overview) -> Finding | None:
    found = overview.long_transactions
    if found is None:
        return None
    if not found:
        return Finding("transactions", Severity.OK, "none has been open for long")
    oldest = found[0]
    whose = f"pid {oldest.pid}, application '{printable(oldest.application)}', {oldest.state or 'state not shown'}"
    return Finding(
        "transactions",
        Severity.WARN,
        f"{len(found)} open for long; the oldest for {oldest.age:.0f} s: {whose}",
        "PostgreSQL cannot clean up behind it, and choosing jobs gets slower: let its application end it, or"
        f" SELECT pg_terminate_backend({oldest.pid})",
    )


def _providers(settings: Settings) -> Iterator[Finding]:
    try:
        configuration = load(settings.providers_file, os.environ)
    except ProviderConfigError as error:
        yield Finding("providers", Severity.FAIL, str(error), "correct KEEPSTREAM_PROVIDERS_FILE or what it names")
        return
    for doubt in configuration.policy.doubts():
        yield Finding("limits", Severity.WARN, doubt, "raise it in KEEPSTREAM_PROVIDERS_FILE, if it is not meant")
    yield from asyncio.run(_try_providers(configuration.providers))


async def _try_providers(configs: dict[str, ProviderConfig]) -> list[Finding]:
    from keepstream_worker.providers.provider import (
        Providers,  # the SDK takes longer to import than all other checks take
    )

    providers = Providers(configs)
    try:
        checks = await asyncio.gather(*(providers.get(name).check() for name in configs))
    finally:
        await providers.aclose()
    return [_provider(config, check, len(configs)) for config, check in zip(configs.values(), checks, strict=True)]


def _provider(config: ProviderConfig, check: "ProviderCheck", providers: int) -> Finding:
    name = f"provider {config.name}"
    if check.ok:
        return Finding(name, Severity.OK, check.line)
    if config.name == DEFAULT and config.key_missing and providers > 1:
        return Finding(name, Severity.WARN, check.line, "only needed for jobs that name no other provider")
    advice = f"{check.advice}; " if check.advice else ""
    return Finding(name, Severity.FAIL, check.line, f"{advice}until then, jobs for this provider fail")
