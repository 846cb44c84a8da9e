"""`keepstream alive` with real workers: it fails for one that hangs, and for nothing else."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typing_extensions import override

from keepstream.names import QUEUE
from keepstream.results import JobStatus
from keepstream_worker.commands.entry import version_line
from keepstream_worker.supervisor import python_module
from keepstream_worker.telemetry import pulse
from tests.cluster import Cluster, WorkerProcess, wait_until

#: A worker that beats faster than in production, and each of whose threads hangs for good after a signal.
HANGING = """
import signal, time
from keepstream_worker.intake import pool

pool.INTERVAL, pool._LONGEST_TURN = 0.2, 15.0
loops = []
make_loop = pool.uvloop.new_event_loop
pool.uvloop.new_event_loop = lambda: loops.append(make_loop()) or loops[-1]
signal.signal(signal.SIGRTMIN, lambda *_: time.sleep(3600))
signal.signal(signal.SIGRTMIN + 1, lambda *_: loops[0].call_soon_threadsafe(time.sleep, 3600))

from keepstream_worker.app import main
main()
"""
CELERY_HANGS, LOOP_HANGS = signal.SIGRTMIN, signal.SIGRTMIN + 1
#: Seconds after which a process counts as hung here: more beats than a busy machine can leave out.
LIMIT = 20.0
#: What would cost the check more than Python takes to start.
HEAVY = {"asyncio", "email", "inspect", "json", "logging", "pathlib", "socket", "subprocess", "threading"}


class HangingWorker(WorkerProcess):
    """A worker that can be told to hang."""

    @override
    def _command(self) -> list[str]:
        return [sys.executable, "-c", HANGING]


class NumberedWorker(WorkerProcess):
    """A worker as a supervisor starts it."""

    @override
    def _command(self) -> list[str]:
        return [*python_module("keepstream_worker.app"), "1"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "alive"


def check(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Ask `keepstream alive`, in an environment that leads to no service."""
    env = {"PATH": os.environ["PATH"], "KEEPSTREAM_ALIVE_DIR": str(directory)}
    command = [*python_module("keepstream_worker.commands"), "alive", *options]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def alive(directory: Path) -> bool:
    done = check(directory)
    assert done.returncode == (1 if done.stderr else 0)
    return done.returncode == 0


def start(cluster: Cluster, directory: Path, **settings: Any) -> HangingWorker:
    """Start a worker that can be told to hang, and wait until it is alive."""
    environment = cluster.environment(alive_dir=directory, **settings)
    worker = HangingWorker(environment, cluster.directory / f"worker-{len(cluster.workers) + 1}.log")
    cluster.workers.append(worker)
    worker.start()
    wait_for_life(directory)
    return worker


def wait_for_life(directory: Path) -> None:
    """Wait until all processes are alive, and `keepstream alive` says so."""
    wait_until(lambda: pulse.complaint(str(directory)) is None, "the first sign of life", timeout=180)
    assert alive(directory)


def wait_for_beats(directory: Path, count: int = 5) -> None:
    """Wait for so many further beats of every process."""
    for file in directory.iterdir():
        seen = {file.read_bytes()}

        def beaten(file: Path = file, seen: set[bytes] = seen) -> bool:
            seen.add(file.read_bytes())
            return len(seen) > count

        wait_until(beaten, f"{count} beats in {file.name}")


@pytest.mark.parametrize(
    "how", [signal.SIGSTOP, CELERY_HANGS, LOOP_HANGS], ids=["frozen", "Celery hangs", "loop hangs"]
)
def test_a_worker_that_hangs_is_found(cluster: Cluster, directory: Path, how: int) -> None:
    worker = start(cluster, directory)
    with cluster.redis() as client:
        cluster.enqueue(deltas=1)
        wait_until(lambda: client.llen(QUEUE) == 0, "Celery's thread to be at work")  # one that starts may take long
    os.kill(worker.pid, how)
    wait_until(lambda: pulse.complaint(str(directory), LIMIT), "its silence to be noticed", timeout=180)
    done = check(directory, "--within", str(LIMIT))
    assert done.returncode == 1
    assert done.stderr.startswith("keepstream: worker process 1 of 1 has given no sign of life for ")
    if how == signal.SIGSTOP:
        os.kill(worker.pid, signal.SIGCONT)
        wait_for_beats(directory)
        assert alive(directory)


def test_an_outage_of_redis_and_the_database_is_no_death(postgres_cluster: Cluster, directory: Path) -> None:
    cluster = postgres_cluster
    worker = start(cluster, directory)
    cluster.valkey.kill()
    cluster.postgres.kill()
    worker.wait_to_say("database_unavailable")
    worker.wait_to_say("broker_unavailable")
    wait_for_beats(directory, 2 * int(15.0 / 0.2))  # for longer than a turn of Celery's thread may take
    assert alive(directory)
    cluster.postgres.start()
    cluster.valkey.start()
    assert cluster.wait_for(cluster.enqueue(deltas=3)).status is JobStatus.COMPLETED
    wait_for_beats(directory)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_worker_that_waits_for_the_database_at_its_start_is_alive(
    postgres_cluster: Cluster, directory: Path, processes: int
) -> None:
    cluster = postgres_cluster
    cluster.postgres.kill()
    command = [*python_module("keepstream_worker.commands"), "worker", "--processes", str(processes)]
    with (
        (cluster.directory / "worker.log").open("wb") as log,
        subprocess.Popen(command, env=cluster.environment(alive_dir=directory), stderr=log) as process,
    ):
        try:
            wait_for_life(directory)
            wait_for_beats(directory, 2)
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()
    cluster.postgres.start()


def test_a_process_that_replaces_another_waits_for_a_redis_that_is_away(cluster: Cluster, directory: Path) -> None:
    pulse.expect(str(directory), 1)  # as its supervisor does
    cluster.valkey.kill()
    worker = NumberedWorker(cluster.environment(alive_dir=directory), cluster.directory / "worker-1.log")
    cluster.workers.append(worker)
    worker.start()
    wait_for_life(directory)
    cluster.valkey.start()
    assert cluster.wait_for(cluster.enqueue(deltas=3)).status is JobStatus.COMPLETED


def test_a_worker_that_lets_its_streams_finish_is_alive_to_the_end(cluster: Cluster, directory: Path) -> None:
    worker = start(cluster, directory, shutdown_grace=600)
    job_id = cluster.enqueue(deltas=400, rate=20)
    cluster.wait_for_deltas(job_id)
    worker.terminate()
    worker.wait_to_say("worker_draining")
    wait_for_beats(directory, int(17.0 / 0.2))
    assert alive(directory)
    worker.terminate()
    assert worker.wait() == 0
    assert "no worker runs here" in check(directory).stderr


@pytest.fixture
def two_processes(cluster: Cluster, directory: Path) -> Iterator[psutil.Process]:
    """`keepstream worker --processes 2`, of which both are alive."""
    command = [*python_module("keepstream_worker.commands"), "worker", "--processes", "2"]
    log = (cluster.directory / "worker.log").open("wb")
    with log, subprocess.Popen(command, env=cluster.environment(alive_dir=directory), stderr=log) as process:
        supervisor = psutil.Process(process.pid)
        try:
            wait_for_life(directory)
            yield supervisor
        finally:
            children = supervisor.children()
            process.kill()
            for child in children:
                child.kill()


def test_each_of_several_processes_counts(two_processes: psutil.Process, directory: Path) -> None:
    assert sorted(file.name for file in directory.iterdir()) == ["1.pulse", "2.pulse"]
    first, second = sorted(two_processes.children(), key=lambda child: child.cmdline()[-1])
    first.kill()
    wait_until(lambda: len(two_processes.children()) == 2 and not first.is_running(), "it to be replaced")
    assert alive(directory), "one that is being replaced is no failure"
    wait_for_beats(directory, 1)
    second.suspend()
    limit = 3 * pulse.INTERVAL
    wait_until(
        lambda: "worker process 2 of 2" in str(pulse.complaint(str(directory), limit)),
        "the silence of the second to be noticed",
    )


def test_a_directory_that_cannot_be_written_stops_the_start(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for options in ((), ("--processes", "2")):
        command = [*python_module("keepstream_worker.commands"), "worker", *options]
        environment = cluster.environment(alive_dir=file)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 3
        assert done.stderr.startswith(f"keepstream: KEEPSTREAM_ALIVE_DIR: {file} cannot be written (")


def test_without_a_directory_the_check_says_what_to_set(cluster: Cluster) -> None:
    command = [*python_module("keepstream_worker.commands"), "alive"]
    done = subprocess.run(command, env=cluster.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "set KEEPSTREAM_ALIVE_DIR" in done.stderr


@pytest.mark.parametrize("arguments", [["alive"], ["--version"]])
def test_what_a_machine_asks_again_and_again_loads_next_to_nothing(directory: Path, arguments: list[str]) -> None:
    pulse.expect(str(directory), 1)
    script = (
        "import sys; before = set(sys.modules)\n"
        "from keepstream_worker.commands.entry import main\n"
        f"sys.argv[1:] = {arguments}\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    env = {"KEEPSTREAM_ALIVE_DIR": str(directory)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert loaded & HEAVY == set()
    assert loaded - sys.stdlib_module_names == {"keepstream_worker"}


def test_the_version_is_that_of_the_installed_distribution() -> None:
    from importlib.metadata import version

    assert version_line() == f"keepstream {version('keepstream')}"
