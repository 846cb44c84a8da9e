"""The way in: answers at once what a machine asks again and again, and leaves all else to the command line.

In: arguments and the environment, from the console script.  Out: an exit code.

A health check runs every few seconds in each container, and `keepstream_worker.commands.main` takes half a second of
CPU to import. Here nothing is imported but a little of the standard library.
"""

import os
import sys
from typing import Final, NoReturn

from keepstream_worker.telemetry import pulse

_INTERRUPTED: Final = 130


def main() -> NoReturn:
    """Run the command that the arguments name."""
    arguments = sys.argv[1:]
    if arguments == ["alive"] and (directory := os.environ.get("KEEPSTREAM_ALIVE_DIR")):
        raise SystemExit(check_pulses(directory))
    if arguments == ["--version"]:
        sys.stdout.write(f"{version_line()}\n")
        raise SystemExit(0)
    try:
        from keepstream_worker.commands.main import main as command_line

        command_line()
    except KeyboardInterrupt:  # also while it is imported, when people do press Ctrl-C
        raise SystemExit(_INTERRUPTED) from None


def check_pulses(directory: str, within: float = pulse.LIMIT) -> int:
    """Say on standard error what is wrong with the worker whose signs of life are in ``directory``.

    Args:
        directory: That of KEEPSTREAM_ALIVE_DIR.
        within: Seconds since the last sign of life after which a process counts as hung.

    Returns:
        The exit code: 0, or 1 if a process is not alive.
    """
    complaint = pulse.complaint(directory, within)
    if complaint is None:
        return 0
    sys.stderr.write(f"keepstream: {complaint}\n")
    return 1


def version_line() -> str:
    """Return what `keepstream --version` prints."""
    # The name of the folder that pip leaves behind has the version; importlib.metadata takes four times as long to
    # import as Python to start.
    for entry in sys.path:
        try:
            names = os.listdir(entry or ".")  # noqa: PTH208  # so does pathlib
        except OSError:
            continue
        for name in names:
            if name.startswith("keepstream-") and name.endswith(".dist-info"):
                return f"keepstream {name.removeprefix('keepstream-').removesuffix('.dist-info')}"
    return "keepstream, not installed"
