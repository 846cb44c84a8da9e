"""The commands to try Keepstream with: demo and dev.

In: arguments and, if the user has one, the provider that the environment names.
Out: a whole deployment on this machine for as long as the command runs.
"""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from keepstream_worker.commands.environment import check_variable_names
from keepstream_worker.commands.exits import UNSUCCESSFUL, start_errors
from keepstream_worker.commands.group import CommandGroup
from keepstream_worker.commands.output import make_console
from keepstream_worker.commands.worker_processes import run_worker_here

group = CommandGroup("Try it")


@group.command("keepstream demo", "keepstream demo --cut")
def demo(
    *,
    cut: Annotated[
        bool, typer.Option("--cut", help="Cut the provider's first stream in the middle, to see a retry.")
    ] = False,
) -> None:
    """Show one job from the queue to the database; needs no service.

    Starts an embedded Valkey, a SQLite database, a scripted provider and a worker, sends a job through them, shows
    its events as they come and the stored row, and stops everything. If OPENAI_API_KEY or OPENAI_BASE_URL is set,
    your provider is used instead, with the model that KEEPSTREAM_DEMO_MODEL names.
    """
    from keepstream_worker.commands.demo import WIDTH, run_demo

    check_variable_names()
    console = make_console()
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    with start_errors():
        if not run_demo(console, cut=cut):
            raise typer.Exit(UNSUCCESSFUL)


@group.command("keepstream dev", "keepstream dev --directory /tmp/keepstream")
def dev(
    *,
    directory: Annotated[Path, typer.Option(help="Where the database is kept.", file_okay=False)] = Path(".keepstream"),
) -> None:
    """Run everything here, for development, until Ctrl-C.

    Starts an embedded Valkey, a SQLite database, a scripted provider and a worker. Prints what other shells and
    your own service need. Jobs and results are kept in the directory. If OPENAI_API_KEY or OPENAI_BASE_URL is set,
    your provider is used instead of the scripted one.
    """
    from keepstream_worker.dev_stack.stack import dev_stack

    check_variable_names()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ".gitignore").write_text("*\n")
    with start_errors(), dev_stack(directory) as stack:
        exports = directory / "env"
        exports.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in stack.settings.items()))
        model = "MODEL" if stack.provider_url is None else "scripted-1"
        console = make_console()
        console.print("Keepstream is running. In another shell:\n", style="bold")
        for line in (f". {exports}", f"keepstream submit --model {model} -m 'Hello!' --follow"):
            console.print(f"  {line}", style="cyan", soft_wrap=True, markup=False)
        console.print()
        for name, value in stack.settings.items():
            console.print(f"  {name}={value}", style="dim", soft_wrap=True, markup=False)
        console.print("\nThe worker's log follows. Ctrl-C stops everything.\n", style="dim")
        environment = {"KEEPSTREAM_LOG_FORMAT": "console", **stack.environment(os.environ)}
        os.environ.clear()
        os.environ.update(environment)
        run_worker_here()
