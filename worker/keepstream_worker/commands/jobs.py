"""The commands for jobs: submit, follow, get, list, cancel, retry.

In: arguments, from people and shell scripts.
Out: jobs, to the client; events and results, to standard output as text or JSON; what keeps a job waiting, to standard
error.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keepstream_worker.commands.arguments import (
    AsJson,
    AsJsonLines,
    JobId,
    Tenant,
    parse_duration,
    parse_json,
    parse_metadata,
    parse_moment,
    parse_param,
    parse_statuses,
    parse_target,
    read_job,
    read_message,
    read_tools,
)
from keepstream_worker.commands.environment import client_for
from keepstream_worker.commands.exits import INTERRUPTED, INVALID, NOT_FOUND, OK, UNSUCCESSFUL, fail, print_error
from keepstream_worker.commands.group import CommandGroup
from keepstream_worker.commands.output import json_text, make_console, print_lines

if TYPE_CHECKING:
    from keepstream import Client
    from keepstream.events import Event

group = CommandGroup("Jobs")


@group.command(
    "keepstream submit --model gpt-5-mini -m 'Why is the sky blue?' --follow",
    "keepstream submit --file job.json --idempotency-key order-4711",
    'echo \'{"model": "gpt-5-mini", "messages": …}\' | keepstream submit --file - --json',
    "keepstream submit --model gpt-5-mini -m Hi --param temperature=0.2 --tool weather.json",
)
def submit(
    *,
    model: Annotated[str | None, typer.Option(help="Model, as the provider calls it.")] = None,
    message: Annotated[
        list[str] | None,
        typer.Option("--message", "-m", metavar="TEXT", help="What the user says; - reads standard input."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message, before the user's.")] = None,
    provider: Annotated[str | None, typer.Option(help="Name of a configured provider.")] = None,
    fallback: Annotated[
        list[str] | None,
        typer.Option(metavar="PROVIDER/MODEL", help="Who is asked if those before cannot answer; repeatable."),
    ] = None,
    bulk: Annotated[bool, typer.Option("--bulk", help="Nobody waits for it: others come first.")] = False,
    tenant: Annotated[str | None, typer.Option(help="Whose job; otherwise as the file says, or default.")] = None,
    file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Request or whole job as JSON; - reads standard input.")
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

    It comes from options, or from a file: a chat-completions body, or a whole job as `keepstream schema job`
    describes it, which has a "v" and a "request". Options win over the file.
    """
    from keepstream.jobs import parse_job

    text = read_message(message, file)
    job = read_job(file) if file is not None else {"v": 2, "request": {}}
    messages = [("system", system), ("user", text)]
    parameters: dict[str, Any] = {
        "model": model,
        "messages": [{"role": role, "content": content} for role, content in messages if content is not None] or None,
        "tools": [definition for path in tool for definition in read_tools(path)] if tool else None,
    }
    fields: dict[str, Any] = {
        "provider": provider,
        "fallbacks": [parse_target(text) for text in fallback] if fallback else None,
        "class": "bulk" if bulk else None,
        "tenant": tenant,
        "metadata": None if metadata is None else parse_json(metadata, "--metadata"),
        "id": id_,
        "idempotency_key": idempotency_key,
        "max_attempts": max_attempts,
        "first_token_timeout": first_token_timeout,
        "idle_timeout": idle_timeout,
        "total_timeout": total_timeout,
        "expires_at": None if expires_in is None else datetime.now(UTC) + timedelta(seconds=parse_duration(expires_in)),
    }
    job |= {name: value for name, value in fields.items() if value is not None}
    if isinstance(request := job.setdefault("request", {}), dict):
        request |= {name: value for name, value in parameters.items() if value is not None}
        request |= dict(parse_param(pair) for pair in param or ())
        if file is None and not request.get("model"):
            fail("the job needs a model: --model NAME", INVALID)
        if file is None and not request.get("messages"):
            fail("the job needs a message: --message TEXT, or --file FILE", INVALID)
    checked = parse_job(job)
    with client_for(checked.tenant) as client:
        _print_or_follow(client, client.enqueue(checked), follow=follow_, as_json=as_json)


@group.command("keepstream follow 3f2a9c7e…", "keepstream follow 3f2a9c7e… --after 1-17", "keepstream follow ID --json")
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
    with the stored text.
    """
    with client_for(tenant) as client:
        raise typer.Exit(_follow(client, job_id, after, timeout=timeout, as_json=as_json))


@group.command(
    "keepstream get 3f2a9c7e…", "keepstream get ID --json | jq .usage", "keepstream get ID --text > answer.md"
)
def get(
    job_id: JobId,
    *,
    tenant: Tenant = "default",
    text: Annotated[bool, typer.Option("--text", help="Print the text alone, unchanged.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show everything that is stored about a job.

    Its request and metadata, text, tool calls, usage, times, and each attempt with its outcome and cost; and what it
    waits for. Long messages are cut; --json shows them whole.
    """
    with client_for(tenant) as client:
        result = client.get(job_id)
    if result is None:
        fail(f"there is no job {job_id} of tenant {tenant}; see: keepstream list", NOT_FOUND)
    if as_json:
        typer.echo(json_text(result, indent=2))
    elif text:
        typer.echo(result.text)
    else:
        from keepstream_worker.commands.tables import show_result

        show_result(make_console(), result)


@group.command(
    "keepstream list",
    "keepstream list --status failed --since 2h --limit 20",
    "keepstream list --metadata conversation=4711 --status ended",
    "keepstream list --json | jq -r .id",
    name="list",
)
def list_(
    *,
    status: Annotated[
        list[str] | None,
        typer.Option(
            help="queued, running, retrying, completed, failed, cancelled or expired; active: any of the first three,"
            " ended: any of the others; repeatable."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs for this model.")] = None,
    provider: Annotated[str | None, typer.Option(help="Only jobs for this provider.")] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Only jobs whose metadata have this value; repeatable."),
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only jobs created since then: 2h ago, or 2030-01-31T09:00Z.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Only jobs created before.")] = None,
    before: Annotated[str | None, typer.Option(metavar="JOB_ID", help="Go on after the last job of a page.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Jobs at most.")] = 50,
    tenant: Tenant = "default",
    as_json: AsJsonLines = False,
) -> None:
    """List jobs, the newest first, each with the beginning of its prompt.

    With filters other than the time, it looks at the newest 10,000 jobs and says how to go on from there.
    """
    statuses = parse_statuses(status or ())
    wanted = dict(parse_metadata(pair) for pair in metadata or ())
    begin = None if since is None else parse_moment(since, "--since")
    end = None if until is None else parse_moment(until, "--until")
    with client_for(tenant) as client:
        page = client.list(
            status=statuses,
            model=model,
            provider=provider,
            metadata=wanted,
            since=begin,
            until=end,
            before=before,
            limit=limit,
        )
    more = "" if page.next_before is None else f"There may be more: --before {page.next_before}"
    if page.looked_back_to is not None:
        more = (
            f"Looked back as far as {page.looked_back_to:%Y-%m-%d %H:%M:%S} UTC; to go on: --before {page.next_before}"
        )
    if as_json:
        print_lines(json_text(summary) for summary in page)
        if page.looked_back_to is not None:
            print_error(more)
        return
    from keepstream_worker.commands.tables import show_list

    console = make_console()
    if page:
        show_list(console, page)
    else:
        console.print("No such jobs.", style="dim")
    if more:
        console.print(f"\n{more}", style="dim", highlight=False, soft_wrap=True)


@group.command("keepstream cancel 3f2a9c7e…")
def cancel(job_id: JobId, *, tenant: Tenant = "default", as_json: AsJson = False) -> None:
    """Cancel a job, in whatever state it is.

    What it wrote so far is kept. Cancelling twice, or a job that has ended, does no harm.
    """
    with client_for(tenant) as client:
        status = client.cancel(job_id)
    if status is None:
        fail(f"there is no job {job_id} of tenant {tenant}; if it still arrives, it will be cancelled", NOT_FOUND)
    if as_json:
        typer.echo(json.dumps({"job_id": job_id, "status": status}))
    elif status.terminal:
        typer.echo(status.value)
    else:
        typer.echo(f"{status.value}: its worker has been asked to stop")


@group.command("keepstream retry 3f2a9c7e…", "keepstream retry 3f2a9c7e… --follow", "keepstream retry ID --json")
def retry(
    job_id: JobId,
    *,
    force: Annotated[bool, typer.Option("--force", help="Also if the job is completed.")] = False,
    follow_: Annotated[bool, typer.Option("--follow", "-f", help="Show the new job's events until it ends.")] = False,
    tenant: Tenant = "default",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the id as JSON; with --follow the events, one per line.")
    ] = False,
) -> None:
    """Run a job that has ended again, as a new job, and print its id.

    It has the same request, metadata and limits. The old job stays as it is; `get` shows of which job the new one is a
    retry.
    """
    with client_for(tenant) as client:
        _print_or_follow(client, client.retry(job_id, force=force), follow=follow_, as_json=as_json)


def _print_or_follow(client: "Client", job_id: str, *, follow: bool, as_json: bool) -> None:
    if not follow:
        typer.echo(json.dumps({"job_id": job_id}) if as_json else job_id)
        return
    if not as_json:
        make_console().print(f"job {job_id}", style="dim", highlight=False, soft_wrap=True)
    raise typer.Exit(_follow(client, job_id, None, as_json=as_json))


def _follow(client: "Client", job_id: str, after: str | None, *, timeout: float = 600.0, as_json: bool) -> int:
    """Show a job's events; return the exit code."""
    if as_json:
        with _reasons_shown():
            return _follow_json(client.follow(job_id, after, timeout=timeout))
    from keepstream.client.follower import parse_cursor
    from keepstream_worker.commands.live_view import LiveView

    view = LiveView(make_console(), parse_cursor(after))
    try:
        with _reasons_shown(view.end_line):
            for event in client.follow(job_id, after, timeout=timeout):
                view.show(event)
    except KeyboardInterrupt:
        at = f" --after {view.transcript.last}" if view.transcript.last else ""
        print_error(f"\nthe job goes on; to follow it again: keepstream follow {job_id}{at}")
        return INTERRUPTED
    end = view.transcript.terminal
    return OK if end and end.type == "job.completed" and view.matches is not False else UNSUCCESSFUL


@contextmanager
def _reasons_shown(before_each: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Show what the client reports about the job it follows, a line each on standard error."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            before_each()
            print_error(record.getMessage())

    logger, lines = logging.getLogger("keepstream"), Lines()
    level, propagates = logger.level, logger.propagate
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
        logger.propagate = propagates


def _follow_json(events: "Iterable[Event]") -> int:
    last = ""
    for event in events:
        last = event.type
        print_lines([event.model_dump_json(exclude_none=True)])
    return OK if last == "job.completed" else UNSUCCESSFUL
