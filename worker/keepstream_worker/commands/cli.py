"""The command line: `keepstream`, for newcomers, for operators and for shell scripts.

In: arguments and the environment.  Out: text for people or JSON for programs, and an exit code that
tells what happened.  Exists so that everything Keepstream does can be tried, watched and mended from a
terminal.  Expected failures are one line on standard error that says what to do.

Each command imports what it needs when it runs, so that help and errors are there at once.
"""

import inspect
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn, TypeVar

try:
    import typer
except ModuleNotFoundError:  # installed for the contract or the client alone
    raise SystemExit("keepstream: the command line needs more: pip install 'keepstream[worker]'") from None

if TYPE_CHECKING:
    from rich.console import Console

    from keepstream.client.client import Client
    from keepstream.events import Event
    from keepstream_worker.settings import Settings

OK, UNSUCCESSFUL, INVALID, UNAVAILABLE, NOT_FOUND, INTERRUPTED = 0, 1, 2, 3, 4, 130

_EXIT_CODES: Final = (
    "Exit codes: 0 done · 1 the job did not complete, or a check failed · 2 wrong input or setting · "
    "3 a service is not available · 4 no such job · 130 Ctrl-C"
)
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "": 1}
_TRY, _JOBS, _OPERATE = "Try it", "Jobs", "Operate"

app = typer.Typer(
    help="Keepstream runs LLM completions in the background: a job from the queue, live deltas on Redis, "
    "the result in a database.",
    epilog=f"Begin with [bold cyan]keepstream demo[/].\n\n[dim]{_EXIT_CODES}[/]",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JobId = Annotated[str, typer.Argument(metavar="JOB_ID", help="The id that `keepstream submit` printed.")]
Tenant = Annotated[str, typer.Option(help="Whose jobs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
AsJsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON document per line.")]


Command = TypeVar("Command", bound=Callable[..., None])


def _command(panel: str, *examples: str, name: str | None = None) -> Callable[[Command], Command]:
    """Make a function a command; its docstring is the help, and ``examples`` stand below it."""
    shown = "\n".join(f"  [cyan]{line}[/]" for line in examples)
    epilog = f"[bold]Examples[/]\n{shown}\n\n[dim]{_EXIT_CODES}[/]"

    def register(function: Command) -> Command:
        # The docstring's lines are as long as the source allows; the terminal's width is another.
        text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(function.__doc__ or ""))
        return app.command(name, help=text, rich_help_panel=panel, epilog=epilog)(function)

    return register


@app.callback(invoke_without_command=True)
def _version(
    *, version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False
) -> None:
    if version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        try:
            typer.echo(f"keepstream {installed('keepstream')}")
        except PackageNotFoundError:
            typer.echo("keepstream, not installed")
        raise typer.Exit


# -- to try it ------------------------------------------------------------------------------------


@_command(_TRY, "keepstream demo", "keepstream demo --cut")
def demo(
    *,
    cut: Annotated[
        bool, typer.Option("--cut", help="Cut the provider's first stream in the middle, to see a retry.")
    ] = False,
) -> None:
    """Show one job on its whole way; needs nothing installed.

    Starts an embedded Valkey, a SQLite database, a scripted provider and a worker, sends a job through them, shows
    its events as they come and the stored row, and ends everything. If OPENAI_API_KEY or OPENAI_BASE_URL is set,
    your provider is used instead, with the model that KEEPSTREAM_DEMO_MODEL names.
    """
    from keepstream_worker.commands.demo import WIDTH, run_demo

    console = _console()
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    with _start_errors():
        if not run_demo(console, cut=cut):
            raise typer.Exit(UNSUCCESSFUL)


@_command(_TRY, "keepstream dev", "keepstream dev --directory /tmp/mill")
def dev(
    *,
    directory: Annotated[Path, typer.Option(help="Where the database is kept.", file_okay=False)] = Path(".keepstream"),
) -> None:
    """Run everything here, for development, until Ctrl-C.

    Starts an embedded Valkey, a SQLite database, a scripted provider and a worker. Prints what other terminals and
    your own service need. Jobs and results are kept in the directory. If OPENAI_API_KEY or OPENAI_BASE_URL is set,
    your provider is used instead of the scripted one.
    """
    from keepstream_worker.dev_stack.stack import dev_stack

    directory.mkdir(parents=True, exist_ok=True)
    (directory / ".gitignore").write_text("*\n")
    with _start_errors(), dev_stack(directory) as stack:
        exports = directory / "env"
        exports.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in stack.settings.items()))
        model = "MODEL" if stack.provider_url is None else "scripted-1"
        console = _console()
        console.print("Keepstream runs. In another terminal:\n", style="bold")
        for line in (f". {exports}", f"keepstream submit --model {model} -m 'Hello!' --follow"):
            console.print(f"  {line}", style="cyan", soft_wrap=True, markup=False)
        console.print()
        for name, value in stack.settings.items():
            console.print(f"  {name}={value}", style="dim", soft_wrap=True, markup=False)
        console.print("\nThe worker's log follows. Ctrl-C ends everything.\n", style="dim")
        environment = {"KEEPSTREAM_LOG_FORMAT": "console", **stack.environment(os.environ)}
        os.environ.clear()
        os.environ.update(environment)
        _run_worker()


# -- jobs -----------------------------------------------------------------------------------------


@_command(
    _JOBS,
    "keepstream submit --model gpt-5-mini -m 'Why is the sky blue?' --follow",
    "keepstream submit --file job.json --idempotency-key order-4711",
    'echo \'{"model": "gpt-5-mini", "messages": …}\' | keepstream submit --file - --json',
    "keepstream submit --model gpt-5-mini -m Hi --param temperature=0.2 --tool weather.json",
)
def submit(
    *,
    model: Annotated[str | None, typer.Option(help="Model, as the provider calls it.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="What the user says.")] = None,
    system: Annotated[str | None, typer.Option(help="System message, before the user's.")] = None,
    provider: Annotated[str | None, typer.Option(help="Name of a configured provider.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose job; otherwise as the file says, or default.")] = None,
    file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Job as a JSON object; - reads standard input.")
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Further chat-completions parameter, JSON or text; repeatable."),
    ] = None,
    tool: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="JSON file with a function or tool (or several); repeatable."),
    ] = None,
    metadata: Annotated[
        str | None, typer.Option(metavar="JSON", help="Object stored with the result, never sent to the provider.")
    ] = None,
    id_: Annotated[str | None, typer.Option("--id", help="Id of the job; by default a new one.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key gives the same job, however often it is submitted.")
    ] = None,
    max_attempts: Annotated[int | None, typer.Option(help="Provider streams at most.")] = None,
    first_token_timeout: Annotated[
        float | None, typer.Option(help="Seconds to wait for the first data of a stream.")
    ] = None,
    idle_timeout: Annotated[float | None, typer.Option(help="Seconds without data that end a stream.")] = None,
    total_timeout: Annotated[float | None, typer.Option(help="Seconds for all attempts together.")] = None,
    expires_in: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Do not start it any more after, say, 90s, 15m, 2h or 1d.")
    ] = None,
    follow_: Annotated[bool, typer.Option("--follow", "-f", help="Show the job's events until it ends.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the id as JSON; with --follow the events, one per line.")
    ] = False,
) -> None:
    """Put a job on the queue and print its id.

    The job comes from options, or from a file as the schema of `keepstream schema job` describes it; options win
    over the file.
    """
    job = _read_job(file) if file is not None else {}
    messages = [("system", system), ("user", message)]
    given: dict[str, Any] = {
        "model": model,
        "messages": [{"role": role, "content": text} for role, text in messages if text is not None] or None,
        "provider": provider,
        "tenant": tenant,
        "metadata": None if metadata is None else _parse_json(metadata, "--metadata"),
        "id": id_,
        "idempotency_key": idempotency_key,
        "max_attempts": max_attempts,
        "first_token_timeout": first_token_timeout,
        "idle_timeout": idle_timeout,
        "total_timeout": total_timeout,
        "expires_at": None if expires_in is None else datetime.now(UTC) + timedelta(seconds=_duration(expires_in)),
        "tools": [definition for path in tool for definition in _read_tools(path)] if tool else None,
    }
    job |= {name: value for name, value in given.items() if value is not None}
    job |= dict(_parse_param(text) for text in param or ())
    if not job.get("model"):
        _fail("the job needs a model: --model NAME", INVALID)
    if not job.get("messages"):
        _fail("the job needs a message: --message TEXT, or --file FILE", INVALID)
    with _client(str(job.get("tenant", "default"))) as client:
        job_id = client.enqueue(job)
        if not follow_:
            typer.echo(json.dumps({"job_id": job_id}) if as_json else job_id)
            return
        if not as_json:
            _console().print(f"job {job_id}", style="dim", highlight=False)
        raise typer.Exit(_follow(client, job_id, None, as_json=as_json))


@_command(
    _JOBS, "keepstream follow 3f2a9c7e…", "keepstream follow 3f2a9c7e… --after 1-17", "keepstream follow ID --json"
)
def follow(
    job_id: JobId,
    *,
    after: Annotated[
        str | None, typer.Option(metavar="EVENT_ID", help="Only what comes after this event, 1-17 for instance.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds without any event after which to give up.")] = 600.0,
    tenant: Tenant = "default",
    as_json: AsJsonLines = False,
) -> None:
    """Show a job's text and events live, until it ends.

    Begins with what has happened already. Text appears as the model writes it, reasoning dimmed, tool calls as
    they are built. When an attempt fails and the text starts over, a line says so. At the end the text is compared
    with the stored one.
    """
    with _client(tenant) as client:
        raise typer.Exit(_follow(client, job_id, after, timeout=timeout, as_json=as_json))


@_command(
    _JOBS, "keepstream get 3f2a9c7e…", "keepstream get ID --json | jq .usage", "keepstream get ID --text > answer.md"
)
def get(
    job_id: JobId,
    *,
    tenant: Tenant = "default",
    text: Annotated[bool, typer.Option("--text", help="Print the text alone, unchanged.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show everything that is stored about a job.

    Text, tool calls, usage, times, and each attempt with its outcome and cost.
    """
    with _client(tenant) as client:
        result = client.get(job_id)
    if result is None:
        _fail(f"there is no job {job_id} of tenant {tenant}; see: keepstream list", NOT_FOUND)
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    elif text:
        typer.echo(result.text)
    else:
        from keepstream_worker.commands.console import show_result

        show_result(_console(), result)


@_command(
    _JOBS,
    "keepstream list",
    "keepstream list --status failed --limit 20",
    "keepstream list --json | jq -r .id",
    name="list",
)
def list_(
    *,
    status: Annotated[
        str | None,
        typer.Option(help="queued, running, retrying, completed, failed, cancelled or expired."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs for this model.")] = None,
    provider: Annotated[str | None, typer.Option(help="Only jobs for this provider.")] = None,
    before: Annotated[str | None, typer.Option(metavar="JOB_ID", help="Go on after the last job of a page.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Jobs at most.")] = 50,
    tenant: Tenant = "default",
    as_json: AsJsonLines = False,
) -> None:
    """List jobs, the newest first."""
    from keepstream.results import JobStatus

    try:
        wanted = None if status is None else JobStatus(status)
    except ValueError:
        _fail(f"--status: choose one of {', '.join(JobStatus)}", INVALID)
    with _client(tenant) as client:
        summaries = client.list(status=wanted, model=model, provider=provider, before=before, limit=limit)
    if as_json:
        _print_lines(summary.model_dump_json() for summary in summaries)
        return
    from keepstream_worker.commands.console import show_list

    console = _console()
    if not summaries:
        console.print("No such jobs.", style="dim")
        return
    show_list(console, summaries)
    if len(summaries) == limit:
        console.print(f"\nThere may be more: --before {summaries[-1].id}", style="dim", highlight=False)


@_command(_JOBS, "keepstream cancel 3f2a9c7e…")
def cancel(job_id: JobId, *, tenant: Tenant = "default", as_json: AsJson = False) -> None:
    """Cancel a job, in whatever state it is.

    What it wrote so far is kept. Cancelling twice, or a job that has ended, does no harm.
    """
    with _client(tenant) as client:
        status = client.cancel(job_id)
    if status is None:
        _fail(f"there is no job {job_id} of tenant {tenant}; should it still come, it is cancelled", NOT_FOUND)
    if as_json:
        typer.echo(json.dumps({"job_id": job_id, "status": status}))
    elif status.terminal:
        typer.echo(status.value)
    else:
        typer.echo(f"{status.value}: its worker has been told to stop")


# -- to operate it --------------------------------------------------------------------------------


@_command(_OPERATE, "keepstream worker", "keepstream worker --processes 4 --concurrency 500")
def worker(
    *,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Jobs that one process runs at once; else KEEPSTREAM_CONCURRENCY.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, max=256, help="Processes, one per core; else KEEPSTREAM_PROCESSES.")
    ] = None,
) -> None:
    """Run a worker until it is told to stop.

    On SIGTERM or Ctrl-C it takes no more jobs, lets streams finish for KEEPSTREAM_SHUTDOWN_GRACE seconds, and hands
    the rest to other workers; a second signal shortens that. With several processes, one that dies is replaced.
    """
    from keepstream_worker.providers.config import ProviderConfigError, load_providers

    settings = _settings()
    try:
        load_providers(settings.providers_file, os.environ)
    except ProviderConfigError as error:
        _fail(str(error), INVALID)
    count = processes or settings.processes
    if count == 1:
        try:
            _run_worker(concurrency)
        except typer.Exit as end:
            from keepstream_worker.app import leave

            leave(end.exit_code)
    _run_workers(settings, count, concurrency)


@_command(_OPERATE, "keepstream migrate", "keepstream migrate --check")
def migrate(
    *,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 if the tables are not current.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Create or update the database's tables.

    The database is the one of KEEPSTREAM_DATABASE_URL. Old workers go on working meanwhile: every change is
    additive.
    """
    from keepstream.client.database import make_engine
    from keepstream_worker.store import schema

    with _start_errors():
        engine = make_engine(_settings().database_url)
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


@_command(_OPERATE, "keepstream doctor", "keepstream doctor --quick", "keepstream doctor --json | jq .healthy")
def doctor(
    *,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="For a container's health check: no providers; is a worker on this host alive?"),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with a deployment and what to do.

    Looks at settings, Redis, database, workers, waiting jobs, rejected messages, providers (their list of models
    is asked for; that costs nothing). Exits 1 if something fails; a warning is none.
    """
    from keepstream_worker.commands.doctor import as_json as findings_json
    from keepstream_worker.commands.doctor import examine, healthy, show

    findings = examine(quick=quick)
    if as_json:
        typer.echo(json.dumps(findings_json(findings), indent=2))
    else:
        show(_console(), findings)
    if not healthy(findings):
        raise typer.Exit(UNSUCCESSFUL)


@_command(_OPERATE, "keepstream rejected", "keepstream rejected --json | jq .reason")
def rejected(
    *, limit: Annotated[int, typer.Option(min=1, max=1000, help="Messages at most.")] = 50, as_json: AsJsonLines = False
) -> None:
    """List messages that were no valid jobs, and why.

    The newest come first. They are kept in the table keepstream_rejected_messages, with their payload.
    """
    from keepstream.client.database import ClientDatabase
    from keepstream_worker.store import inspection

    database = ClientDatabase(_settings().database_url)
    try:
        with database.transaction() as connection:
            messages = inspection.rejected(connection, limit)
    finally:
        database.close()
    if as_json:
        _print_lines(json.dumps(message._asdict(), default=datetime.isoformat) for message in messages)
        return
    from keepstream_worker.commands.console import show_rejected

    show_rejected(_console(), messages)


@_command(_OPERATE, "keepstream purge --older-than 30d", "keepstream purge --older-than 1h --tenant a")
def purge(
    *,
    older_than: Annotated[str, typer.Option(metavar="DURATION", help="Age since their end: 90s, 15m, 2h or 30d.")],
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's jobs; else of all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Delete jobs that ended long ago, with their results.

    There is no way back.
    """
    from keepstream.client.database import ClientDatabase
    from keepstream_worker.store.retention import purge as purge_jobs

    seconds, deleted = _duration(older_than), 0
    database = ClientDatabase(_settings().database_url)
    try:
        while True:  # in small transactions, so that workers need not wait
            with database.transaction() as connection:
                batch = purge_jobs(connection, seconds, tenant)
            deleted += batch
            if not batch:
                break
    finally:
        database.close()
    typer.echo(json.dumps({"deleted": deleted}) if as_json else f"deleted {deleted} jobs")


@_command(
    _OPERATE, "keepstream schema job > job.schema.json", "keepstream schema asyncapi", "keepstream schema --check"
)
def schema(
    name: Annotated[str, typer.Argument(metavar="[job|event|result|asyncapi]", help="Which one.")] = "",
    *,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 if the committed files are not current.")] = False,
) -> None:
    """Print the contract for services in any language.

    It consists of JSON Schemas and an AsyncAPI document.
    """
    from keepstream.schemas import generate as generate_schemas

    if check:
        if outdated := generate_schemas.outdated():
            message = f"{', '.join(outdated)}: not current; run: python -m keepstream.schemas.generate"
            _fail(message, UNSUCCESSFUL)
        return
    documents = {file.partition(".")[0]: text for file, text in generate_schemas.documents().items()}
    text = documents.get({"events": "event", "jobs": "job", "results": "result"}.get(name, name))
    if text is None:
        _fail(f"which schema? choose one of {', '.join(documents)}", INVALID)
    typer.echo(text, nl=False)


# -- what the commands share ----------------------------------------------------------------------


def _follow(client: "Client", job_id: str, after: str | None, *, timeout: float = 600.0, as_json: bool) -> int:
    """Show a job's events; return the exit code."""
    if as_json:
        return _follow_json(client.follow(job_id, after, timeout=timeout))
    from keepstream.client.follower import parse_cursor
    from keepstream_worker.commands.console import LiveView

    view = LiveView(_console(), parse_cursor(after))
    try:
        for event in client.follow(job_id, after, timeout=timeout):
            view.show(event)
    except KeyboardInterrupt:
        at = f" --after {view.transcript.last}" if view.transcript.last else ""
        _say(f"\nthe job goes on; to follow it again: keepstream follow {job_id}{at}")
        return INTERRUPTED
    terminal = view.transcript.terminal
    return OK if terminal and terminal.type == "job.completed" and view.matches is not False else UNSUCCESSFUL


def _follow_json(events: "Iterable[Event]") -> int:
    last = ""
    for event in events:
        last = event.type
        _print_lines([event.model_dump_json(exclude_none=True)])
    return OK if last == "job.completed" else UNSUCCESSFUL


def _run_worker(concurrency: int | None = None) -> NoReturn:
    """Run a worker in this process, so that signals reach it."""
    from keepstream_worker.app import StartError, run_worker

    try:
        code = run_worker(concurrency=concurrency)
    except StartError as error:
        _fail(str(error), UNAVAILABLE)
    raise typer.Exit(code)


def _run_workers(settings: "Settings", count: int, concurrency: int | None) -> NoReturn:
    """Run several worker processes."""
    from keepstream_worker.app import StartError, check_database, check_redis
    from keepstream_worker.supervisor import Supervisor, python_module
    from keepstream_worker.telemetry.logs import configure_logging

    configure_logging(settings.log_level, settings.log_format)
    try:
        # Once and here, rather than by each process again and again.
        check_database(settings)
        check_redis(settings)
    except StartError as error:
        _fail(str(error), UNAVAILABLE)
    environment = dict(os.environ)
    if concurrency is not None:
        environment["KEEPSTREAM_CONCURRENCY"] = str(concurrency)
    raise typer.Exit(Supervisor(python_module("keepstream_worker.app"), count, environment).run())


def _settings() -> "Settings":
    from keepstream_worker.settings import SettingsError, load_settings

    try:
        return load_settings()
    except SettingsError as error:
        _fail(str(error), INVALID)


def _client(tenant: str) -> "Client":
    """Return a client for the same services as a worker in this environment."""
    from keepstream.client.client import Client

    settings = _settings()
    path = settings.database_url.removeprefix("sqlite:///").partition("?")[0]
    if settings.database_url.startswith("sqlite:///") and path and not Path(path).exists():
        _fail(f"there is no database {path}: run `keepstream migrate`, or set KEEPSTREAM_DATABASE_URL", UNAVAILABLE)
    return Client(
        settings.redis_url,
        broker_url=settings.broker_url,
        database_url=settings.database_url,
        tenant=tenant,
        prefix=settings.prefix,
        queue=settings.queue,
    )


@contextmanager
def _start_errors() -> Iterator[None]:
    """End with one line if a service does not start or the database cannot be migrated."""
    from keepstream_worker.dev_stack.embedded import EmbeddedServiceError
    from keepstream_worker.store.schema import SchemaError

    try:
        yield
    except (SchemaError, EmbeddedServiceError) as error:
        _fail(str(error), UNAVAILABLE)


def _read_job(file: str) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        _fail(f"{file} cannot be read: {_reason(error)}", INVALID)
    job = _parse_json(text, "standard input" if file == "-" else file)
    if not isinstance(job, dict):
        _fail(f"{file}: a job is a JSON object; see: keepstream schema job", INVALID)
    return job


def _read_tools(path: Path) -> list[Any]:
    try:
        content = _parse_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        _fail(f"{path} cannot be read: {_reason(error)}", INVALID)
    tools = content if isinstance(content, list) else [content]
    # A function alone, as its author wrote it, is made a tool.
    return [
        {"type": "function", "function": tool} if isinstance(tool, dict) and "name" in tool else tool for tool in tools
    ]


def _parse_param(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        _fail(f"--param {text}: write NAME=VALUE, temperature=0.2 for instance", INVALID)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        _fail(f"{where}: this is not valid JSON{place}", INVALID)


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if match is None:
        _fail(f"{text} is no duration; write 90s, 15m, 2h or 30d", INVALID)
    return float(match[1]) * _UNITS[match[2]]


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "it is not UTF-8"


def _console() -> "Console":
    from rich.console import Console

    # What is not a terminal has no width; a pipe should get whole lines.
    return Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")


def _fail(message: str, code: int) -> NoReturn:
    """End with one line on standard error."""
    _say(f"keepstream: {message}")
    raise typer.Exit(code)


def _code_of(error: Exception) -> int | None:
    """Return the exit code of a failure that the client raises on purpose; None: a defect."""
    from keepstream import errors

    match error:
        case errors.JobNotFoundError():
            return NOT_FOUND
        case (
            errors.BrokerUnavailableError()
            | errors.StoreUnavailableError()
            | errors.FollowTimeoutError()
            | errors.EventsLostError()
        ):
            return UNAVAILABLE
        case errors.KeepstreamError():
            return INVALID
    return None


def main() -> NoReturn:
    """Run the command that the arguments name."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that lacks a character shows "?"
    try:
        app(prog_name="keepstream")
    except Exception as error:
        code = _code_of(error)
        if code is None:
            raise
        hint = "; to see what is wrong: keepstream doctor" if code == UNAVAILABLE else ""
        _say(f"keepstream: {error}{hint}")
        raise SystemExit(code) from None
    raise SystemExit(OK)


if __name__ == "__main__":
    main()
