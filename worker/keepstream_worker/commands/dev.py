"""The command `dev`: everything a service needs, on this machine, until Ctrl-C.

In: a directory, and whether the user's own provider answers.
Out: what other shells need, on a console; the logs of worker and gateway on standard error; an exit code.
"""

import os
import signal
import socket
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keepstream_worker.commands.dev_directory import (
    API_KEY,
    API_URL,
    PROVIDERS_VARIABLE,
    DevDirectory,
    DevDirectoryError,
    dev_directory,
)
from keepstream_worker.commands.exits import INTERRUPTED, INVALID, UNSUCCESSFUL, fail, print_error, start_errors
from keepstream_worker.commands.output import own_command
from keepstream_worker.dev_stack.embedded import free_port
from keepstream_worker.dev_stack.stack import SCRIPTED, DevStack, GatewayProcess, WorkerProcess, dev_stack

_GATEWAY_PORT = 8080  #: As that of a gateway by default.
_ALSO_EXPORTED = ("KEEPSTREAM_PREFIX", "KEEPSTREAM_QUEUE")  #: If set here; clients need the same ones as the worker.


def run_dev(console: Console, path: Path, *, own_provider: bool, providers_file: Path | None) -> NoReturn:
    """Run the servers, a worker and a gateway until Ctrl-C or SIGTERM.

    Args:
        console: Where to.
        path: The directory in which the database is kept.
        own_provider: Whether jobs go to the user's provider rather than to the scripted one.
        providers_file: The user's own, if there is one; not used unless ``own_provider``.
    """
    command = own_command()
    try:
        with start_errors(), dev_directory(path, command) as directory:
            console.print("Starting Valkey, SQLite and a scripted provider ...", style="dim")
            used = providers_file if own_provider else None
            with dev_stack(path, own_provider=own_provider, providers_file=used) as stack:
                exported = {name: os.environ[name] for name in _ALSO_EXPORTED if os.environ.get(name)}
                port = _gateway_port()
                api = {API_URL: f"http://127.0.0.1:{port}", API_KEY: directory.api_key(stack.database)}
                directory.publish(exported | stack.settings | api)
                _show(console, directory, stack, command, api, providers_file)
                environment = {"KEEPSTREAM_LOG_FORMAT": "console", **stack.environment(os.environ)}
                listening = {"KEEPSTREAM_GATEWAY_HOST": "127.0.0.1", "KEEPSTREAM_GATEWAY_PORT": str(port)}
                with (
                    closing(GatewayProcess(environment | listening, visible=True)) as gateway,
                    closing(WorkerProcess(environment, visible=True)) as worker,
                ):
                    gateway.launch()
                    code = _run(console, worker)
            console.print(f"Stopped. What was stored stays in {path}; Redis starts empty the next time.", style="dim")
    except DevDirectoryError as error:
        fail(str(error), INVALID)
    raise typer.Exit(code)


def _run(console: Console, worker: WorkerProcess) -> int:
    try:
        worker.launch()
        code = worker.wait()
    except KeyboardInterrupt:
        console.print("\nStopping. Ctrl-C again interrupts what still streams; it goes on the next time.", style="dim")
        worker.terminate()
        try:
            worker.wait()
        except KeyboardInterrupt:
            worker.terminate()
            worker.wait()
        return INTERRUPTED
    print_error(f"keepstream: the worker has ended by itself ({_how(code)}), so everything stops")
    return UNSUCCESSFUL


def _gateway_port() -> int:
    """Return the port for the gateway: the usual one, unless something listens there already."""
    wanted = os.environ.get("KEEPSTREAM_GATEWAY_PORT", "")
    port = int(wanted) if wanted.isdecimal() and 0 < int(wanted) < 65_536 else _GATEWAY_PORT
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the gateway itself does
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return free_port()
    return port


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _show(
    console: Console,
    directory: DevDirectory,
    stack: DevStack,
    command: str,
    api: dict[str, str],
    providers_file: Path | None,
) -> None:
    provider = (stack.provider_url, "scripted: no model, no cost")
    if stack.own_provider:
        of = f"those of {providers_file}" if providers_file else f"of OPENAI_…; the scripted one is called {SCRIPTED}"
        provider = ("yours", of)
    rows = [
        ("Redis", stack.redis_url, "Valkey; starts empty each time"),
        ("database", str(directory.path / stack.database.name), "SQLite; kept, and unfinished jobs go on"),
        ("provider", *provider),
        ("gateway", api[API_URL], "Keepstream over HTTP"),
    ]
    if providers_file is not None and not stack.own_provider:
        rows.append(("not used", str(providers_file), f"{PROVIDERS_VARIABLE}; with it: --provider own"))
    table = Table.grid(padding=(0, 2))
    for name, value, remark in rows:
        table.add_row(Text(f"  {name}", "dim"), Text(value, overflow="fold"), Text(remark, "dim"))
    console.print(Text("Keepstream runs here until Ctrl-C.", "bold"))
    console.print(table)
    console.print(Text.assemble(("  API key   ", "dim"), api[API_KEY]), soft_wrap=True)
    console.print(Text("\nIn other shells, in this directory and after each start:", "bold"))
    model = "MODEL" if stack.own_provider else "scripted-1"
    ask = f'curl -H "Authorization: Bearer ${API_KEY}" ${API_URL}/api/jobs'
    for line in (f". {directory.env}", f"{command} submit --model {model} -m 'Hello!' --follow", ask):
        console.print(Text(f"  {line}", "cyan"), soft_wrap=True)
    console.print(Text("\nWhat worker and gateway log:", "bold"))
