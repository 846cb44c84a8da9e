"""``python -m tests.interop ENVIRONMENT``: stream from other people's servers through a real worker, and compare.

In: the environment in which the servers are installed.
Out: a table of what was compared, and each difference in words; exit code 0 if there is none.
"""

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table

from keepstream_worker.dev_stack.embedded import sqlite_url
from tests.cluster import Cluster
from tests.interop.comparison import Comparison, compare, read
from tests.interop.servers import AIMock, Case, CodexRelay, FakeLLM, IndependentServer, LiteLLM, StubLLM
from tests.interop.tap import Tap

KEY_VARIABLE: Final = "INTEROP_{}_KEY"
FOLLOWERS: Final = 2


def play(cluster: Cluster, server: IndependentServer, tap: Tap, case: Case) -> Comparison:
    """Send one job to one server, with two followers that were there before it."""
    job_id = f"{server.name}-{case.api}-{case.name}".replace(" ", "-")
    followers = [cluster.follow(job_id) for _ in range(FOLLOWERS)]
    cluster.client.enqueue(
        {"model": case.model, "messages": case.messages, **case.parameters},
        id=job_id,
        provider=f"{server.name}-{case.api}",
        max_attempts=1,
    )
    held = [follower.to_the_end() for follower in followers]
    return compare(case, read(case, tap.take_answer()), cluster.result(job_id), held)


def providers_file(directory: Path, taps: dict[IndependentServer, Tap]) -> Path:
    """Write the file that names each server by each of its dialects, and put their keys where it says."""
    lines = []
    for server, tap in taps.items():
        for api in sorted({case.api for case in server.cases}):
            lines += [f"[providers.{server.name}-{api}]", f'base_url = "http://127.0.0.1:{tap.port}/v1"']
            lines.append(f'api = "{api}"')
            if server.key:
                variable = KEY_VARIABLE.format(server.name.upper())
                os.environ[variable] = server.key
                lines.append(f'api_key_env = "{variable}"')
    file = directory / "providers.toml"
    file.write_text("\n".join(lines) + "\n")
    return file


def make_table() -> Table:
    """Return the table without its rows."""
    table = Table(
        box=box.SIMPLE_HEAD, title="stored = sent by the server = held by both followers", title_justify="left"
    )
    for column in ("server", "api", "case", "text", "reasoning", "tool calls", "finish", "tokens", ""):
        table.add_column(column, overflow="fold")
    return table


def add_row(table: Table, server: IndependentServer, case: Case, compared: Comparison) -> None:
    """Show one case."""
    result = compared.result
    text = "".join(choice.content for choice in result.choices).encode()
    usage = result.attempts[0].usage
    assert usage is not None
    table.add_row(
        server.name,
        case.api,
        case.name,
        f"{len(text)} B" if text else "-",
        f"{len(result.choices[0].reasoning.encode())} B" if result.choices[0].reasoning else "-",
        ", ".join(call.name for call in result.tool_calls) or "-",
        ", ".join(choice.finish_reason or "none" for choice in result.choices),
        f"{usage.prompt_tokens}+{usage.completion_tokens} {usage.source}",
        "differs" if compared.problems else "same",
    )


def main() -> int:
    """Start everything, play every case and show the results."""
    parser = argparse.ArgumentParser(prog="python -m tests.interop", description=__doc__.split("\n", 1)[0])
    parser.add_argument("environment", type=Path, help="directory in which the servers are installed")
    environment = parser.parse_args().environment
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = make_table()
    compared: list[tuple[IndependentServer, Case, Comparison]] = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keepstream-")))
        fake, stub = FakeLLM(environment), StubLLM(environment)
        servers = [LiteLLM(environment, behind=fake), CodexRelay(environment, behind=fake), fake, stub]
        if (environment / AIMock.place / AIMock.program).exists():
            servers.append(AIMock(environment))
        else:
            console.print("aimock is left out: npm was not there to install it.", style="yellow")
        console.print(f"Starting {', '.join(server.name for server in servers)} and a worker ...", style="dim")
        started = time.monotonic()
        taps = {server: stack.enter_context(Tap(stack.enter_context(server).port)) for server in servers}
        cluster = stack.enter_context(Cluster(directory, sqlite_url(directory / "keepstream.db")))
        cluster.start_worker(providers_file=providers_file(directory, taps))
        console.print(f"... which took {time.monotonic() - started:.0f} s.", style="dim")
        for server, tap in taps.items():
            for case in server.cases:
                compared.append((server, case, play(cluster, server, tap, case)))
                add_row(table, *compared[-1])
    console.print(table)
    failed = [(server, case, comparison) for server, case, comparison in compared if comparison.problems]
    for server, case, comparison in failed:
        console.print("\n  ".join([f"{server.name}, {case.name}:", *comparison.problems]), markup=False)
    console.print(f"{len(compared) - len(failed)} the same, {len(failed)} different")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
