"""The commands for jobs: submit, follow, get, list, cancel.

In: arguments, from people and shell scripts.
Out: jobs, to the client; events and results, to standard output as text or JSON.
"""

import json
from collections.abc import Iterable
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
    parse_param,
    read_job,
    read_message,
    read_tools,
)
from keepstream_worker.commands.environment import client_for
from keepstream_worker.commands.exits import INTERRUPTED, INVALID, NOT_FOUND, OK, UNSUCCESSFUL, fail, print_error
from keepstream_worker.commands.group import CommandGroup
from keepstream_worker.commands.output import make_console, print_lines

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
        job_id = client.enqueue(checked)
        if not follow_:
            typer.echo(json.dumps({"job_id": job_id}) if as_json else job_id)
            return
        if not as_json:
            make_console().print(f"job {job_id}", style="dim", highlight=False)
        raise typer.Exit(_follow(client, job_id, None, as_json=as_json))


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

    Text, tool calls, usage, times, and each attempt with its outcome and cost.
    """
    with client_for(tenant) as client:
        result = client.get(job_id)
    if result is None:
        fail(f"there is no job {job_id} of tenant {tenant}; see: keepstream list", NOT_FOUND)
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    elif text:
        typer.echo(result.text)
    else:
        from keepstream_worker.commands.tables import show_result

        show_result(make_console(), result)


@group.command(
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
        fail(f"--status: choose one of {', '.join(JobStatus)}", INVALID)
    with client_for(tenant) as client:
        summaries = client.list(status=wanted, model=model, provider=provider, before=before, limit=limit)
    if as_json:
        print_lines(summary.model_dump_json() for summary in summaries)
        return
    from keepstream_worker.commands.tables import show_list

    console = make_console()
    if not summaries:
        console.print("No such jobs.", style="dim")
        return
    show_list(console, summaries)
    if len(summaries) == limit:
        console.print(f"\nThere may be more: --before {summaries[-1].id}", style="dim", highlight=False)


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


def _follow(client: "Client", job_id: str, after: str | None, *, timeout: float = 600.0, as_json: bool) -> int:
    """Show a job's events; return the exit code."""
    if as_json:
        return _follow_json(client.follow(job_id, after, timeout=timeout))
    from keepstream.client.follower import parse_cursor
    from keepstream_worker.commands.live_view import LiveView

    view = LiveView(make_console(), parse_cursor(after))
    try:
        for event in client.follow(job_id, after, timeout=timeout):
            view.show(event)
    except KeyboardInterrupt:
        at = f" --after {view.transcript.last}" if view.transcript.last else ""
        print_error(f"\nthe job goes on; to follow it again: keepstream follow {job_id}{at}")
        return INTERRUPTED
    end = view.transcript.terminal
    return OK if end and end.type == "job.completed" and view.matches is not False else UNSUCCESSFUL


def _follow_json(events: "Iterable[Event]") -> int:
    last = ""
    for event in events:
        last = event.type
        print_lines([event.model_dump_json(exclude_none=True)])
    return OK if last == "job.completed" else UNSUCCESSFUL
