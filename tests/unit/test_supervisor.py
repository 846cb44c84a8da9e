"""The supervisor passes on whatever tells it to stop, so that no process is left behind."""

import signal
import subprocess
import sys
from functools import partial

import pytest

#: A worker: it says when it is up, and which signal ends it.
CHILD = """
import os, signal, sys, time
def stop(signum, _):
    os.write(1, f"stopped by {signal.Signals(signum).name}\\n".encode())  # at once, since two write here
    sys.exit()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    signal.signal(number, stop)
signal.alarm(120)
os.write(1, b"up\\n")
while True:
    time.sleep(0.05)
"""
SUPERVISOR = f"""
import os, sys
from keepstream_worker.supervisor import Supervisor
sys.exit(Supervisor([sys.executable, "-c", {CHILD!r}], 2, os.environ).run())
"""


def stopped_by(signums: list[signal.Signals], *prefix: str) -> list[str]:
    """Return what two processes say when their supervisor is sent signals."""
    command = [*prefix, sys.executable, "-c", SUPERVISOR]
    heard = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # these tests themselves may run under nohup
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heard) as supervisor:  # noqa: PLW1509
        try:
            assert supervisor.stdout is not None
            assert [supervisor.stdout.readline() for _ in range(2)] == ["up\n"] * 2
            for signum in signums:
                supervisor.send_signal(signum)
            output, _ = supervisor.communicate(timeout=60)
        finally:
            supervisor.kill()
    assert supervisor.returncode == 0
    return output.splitlines()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP])
def test_signal_ends_all_processes(signum: signal.Signals) -> None:
    assert stopped_by([signum]) == [f"stopped by {signum.name}"] * 2


def test_closed_terminal_ends_nothing_that_nohup_has_started() -> None:
    nohup = ("sh", "-c", 'trap "" HUP; exec "$@"', "sh")
    assert stopped_by([signal.SIGHUP, signal.SIGTERM], *nohup) == ["stopped by SIGTERM"] * 2
