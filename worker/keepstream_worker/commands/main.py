"""The command line `keepstream`, for newcomers, operators and shell scripts.

In: arguments and the environment.
Out: text for people or JSON for programs, and an exit code that says what happened.

Every expected failure is one line on standard error that says what to do.  Each command imports what it needs when it
runs, so that help and errors come at once.
"""

import re
from typing import Annotated, Final, NoReturn

from keepstream import names

try:
    import typer
except ModuleNotFoundError:  # installed for the contract or the client alone
    raise SystemExit(f"keepstream: the command line needs more; {names.install_hint('worker')}") from None

from keepstream_worker.commands import gateway, jobs, operate, try_it
from keepstream_worker.commands.entry import version_line
from keepstream_worker.commands.exits import (
    EXIT_CODES,
    INTERRUPTED,
    INVALID,
    OK,
    UNAVAILABLE,
    exit_code_of,
    print_error,
)
from keepstream_worker.commands.output import make_streams_tolerant

app = typer.Typer(
    help="Keepstream runs LLM completions in the background: a job from the queue, live deltas on Redis, "
    "the result in a database.",
    epilog=f"Begin with [bold cyan]keepstream demo[/].\n\n[dim]{EXIT_CODES}[/]",
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (try_it.group, jobs.group, operate.group, gateway.group):  # in the order of the help
    app.add_typer(group.app)


@app.callback(invoke_without_command=True)
def _keepstream(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(version_line())
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(INVALID)


#: What pydantic says of a value, and the same for people who have never heard of it.
_PLAIN_WORDS: Final = (
    (r"Value error, ", ""),
    (r"Input should be a valid integer\b.*?(?=$| \(|;)", "must be a whole number"),
    (r"Input should be a valid number\b.*?(?=$| \(|;)", "must be a number"),
    (r"(?:Input|String) should (?:be|have) greater than or equal to ", "must be at least "),
    (r"Input should be less than or equal to ", "must be at most "),
    (r"Input should be greater than ", "must be more than "),
    (r"Input should be less than ", "must be less than "),
    (r"(?:Input|String) should ", "must "),
)


def _in_plain_words(message: str) -> str:
    for pattern, words in _PLAIN_WORDS:
        message = re.sub(pattern, words, message)
    return message


def _usage_error(error: typer.TyperException) -> str:
    """Return what is wrong with the arguments, on one line, in the form of all other messages."""
    option, nearest = getattr(error, "option_name", None), getattr(error, "possibilities", None)
    if nearest:
        message = f"there is no option {option}; did you mean {' or '.join(sorted(nearest))}?"
    else:
        message = _in_plain_words(" ".join(error.format_message().rstrip(".").split()))
        message = message[:1].lower() + message[1:]
        message = message.replace("no such option: ", "there is no option ").replace(
            "no such command", "there is no command"
        )
        message = message.replace("extra argument(s)", "argument").replace(". Did you mean", "; did you mean")
    context = getattr(error, "ctx", None)
    return message if context is None else f"{message} (see: {context.command_path} --help)"


def main() -> NoReturn:
    """Run the command that the arguments name."""
    make_streams_tolerant()
    try:
        code = app(prog_name="keepstream", standalone_mode=False)
    except typer.TyperException as error:  # a wrong option or value
        print_error(f"keepstream: {_usage_error(error)}")
        raise SystemExit(error.exit_code) from None
    except typer.Abort:  # Ctrl-C at a question
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        says_what_to_do = code != UNAVAILABLE or "keepstream migrate" in str(error)
        hint = "" if says_what_to_do else "; to see what is wrong: keepstream doctor"
        print_error(f"keepstream: {_in_plain_words(str(error))}{hint}")
        raise SystemExit(code) from None
    raise SystemExit(code or OK)
