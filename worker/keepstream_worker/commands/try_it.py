"""The commands to try Keepstream with: demo and dev.

In: arguments and, if asked to, the provider that the environment names.
Out: a whole deployment on this machine for as long as the command runs.
"""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from keepstream_worker.commands.dev_directory import DIRECTORY, own_providers_file
from keepstream_worker.commands.environment import check_variable_names, settings_from_environment
from keepstream_worker.commands.exits import INVALID, UNSUCCESSFUL, fail, start_errors
from keepstream_worker.commands.group import CommandGroup
from keepstream_worker.commands.output import make_console

if TYPE_CHECKING:
    from keepstream_worker.providers.config import ProviderConfig

group = CommandGroup("Try it")

_DEFAULT_MODEL: Final = "gpt-5-mini"


class Whose(StrEnum):
    """Whose provider answers."""

    SCRIPTED = "scripted"
    OWN = "own"


Provider = Annotated[
    Whose, typer.Option(help="scripted: no model, no key, no cost; own: that of OPENAI_API_KEY and OPENAI_BASE_URL.")
]


@group.command("keepstream demo", "keepstream demo --cut", "keepstream demo --provider own --model gpt-5-mini")
def demo(
    *,
    cut: Annotated[
        bool, typer.Option("--cut", help="Cut the scripted provider's first stream in the middle, to see a retry.")
    ] = False,
    provider: Provider = Whose.SCRIPTED,
    model: Annotated[
        str | None, typer.Option(help=f"A model of your own provider; else {_DEFAULT_MODEL}.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before your own provider is called.")] = False,
) -> None:
    """Show jobs from the queue to the database; needs no service, and spends nothing unless told to.

    Starts an embedded Valkey, a SQLite database, a scripted provider and two workers. Sends one job and shows its
    answer live, then many at once, kills a worker in the middle of them, and shows the row of a job that went on. Then
    it stops everything and leaves nothing behind. Your own provider is used only with --provider own, for one job, and
    after a question.
    """
    from keepstream_worker.commands.demo import WIDTH, run_demo

    check_variable_names()
    own_model = None
    if provider is Whose.OWN:
        if cut:
            fail("--cut needs the scripted provider; leave out --provider own", INVALID)
        own_model = model or _DEFAULT_MODEL
        _ask_before_spending(own_model, yes=yes)
    elif model is not None:
        fail("--model is for your own provider; add --provider own", INVALID)
    console = make_console()
    console.width = min(WIDTH, console.width)
    with start_errors():
        if not run_demo(console, own_model=own_model, cut=cut):
            raise typer.Exit(UNSUCCESSFUL)


def _ask_before_spending(model: str, *, yes: bool) -> None:
    config = _check_own_provider()
    if yes:
        return
    if not sys.stdin.isatty():
        fail("--provider own may cost money; add --yes if that is right", INVALID)
    if not typer.confirm(f"Send one short job to {config.url}, model {model}? It may cost a little.", err=True):
        fail("nothing was sent", UNSUCCESSFUL)


@group.command("keepstream dev", "keepstream dev --directory /tmp/keepstream", "keepstream dev --provider own")
def dev(
    *,
    directory: Annotated[Path, typer.Option(help="Where the database is kept.", file_okay=False)] = DIRECTORY,
    provider: Provider = Whose.SCRIPTED,
) -> None:
    """Run everything here, for development, until Ctrl-C.

    Starts an embedded Valkey, a SQLite database, a scripted provider, a worker and a gateway. Prints what other shells
    and your own service need. The database is kept in the directory from run to run; Redis starts empty each time, and
    jobs that had not ended go on. With --provider own, the worker calls your provider, and those of
    KEEPSTREAM_PROVIDERS_FILE, whenever a job is sent; without it, that file is not used. Exits 130 after Ctrl-C.
    """
    from keepstream_worker.commands.dev import run_dev

    settings_from_environment()
    own_provider = provider is Whose.OWN
    file = own_providers_file(os.environ)
    if own_provider:
        _check_own_provider(file)
    run_dev(make_console(), directory, own_provider=own_provider, providers_file=file)


def _check_own_provider(file: Path | None = None) -> "ProviderConfig":
    """Return the user's default provider; end the command if it is not configured."""
    from keepstream_worker.providers.config import DEFAULT, ProviderConfigError, load_providers

    try:
        config = load_providers(file, os.environ)[DEFAULT]
    except ProviderConfigError as error:
        fail(str(error), INVALID)
    if config.key_missing and file is None:
        fail("--provider own: set OPENAI_API_KEY, to any text if your server wants none", INVALID)
    return config
