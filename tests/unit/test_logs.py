"""The log: what it shows of a defect, and that it disturbs nobody."""

import io
import json
import logging
import subprocess
import sys

import pytest
import structlog

from keepstream_worker.telemetry.logs import configure_logging, get_logger
from keepstream_worker.telemetry.outages import Outage, Server

SECRET = "sk-secret"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The log, written to memory."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging("info", "json")
    return stream


def meet_defect(prompt: str) -> None:
    try:
        {"a": 1}[prompt]
    except KeyError as error:
        raise ValueError(f"cannot use {prompt}") from error


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "of a library"])
def test_stack_shows_where_and_what_but_no_value(lines: io.StringIO, *, ours: bool) -> None:
    try:
        meet_defect(SECRET)
    except ValueError:
        if ours:
            get_logger().exception("attempt_defect", job_id="job-1")
        else:
            logging.getLogger("celery").exception("something happened")
    (line,) = lines.getvalue().splitlines()
    stack = json.loads(line)["exception"]
    assert SECRET not in line
    assert "in meet_defect" in stack
    assert "builtins.ValueError" in stack
    assert "builtins.KeyError" in stack


def test_system_and_database_errors_name_their_kind(lines: io.StringIO) -> None:
    class DriverError(Exception):
        sqlstate = "53100"

    for error in (OSError(28, "No space left on device", SECRET), DriverError(SECRET)):
        get_logger().error("upkeep_defect", exc_info=error)
    full, driver = lines.getvalue().splitlines()
    assert "OSError: No space left on device" in full
    assert "DriverError: 53100" in driver
    assert SECRET not in full + driver


def test_a_log_that_cannot_be_written_disturbs_nobody() -> None:
    program = (
        "from keepstream_worker.telemetry.logs import configure_logging, get_logger; import logging, sys\n"
        "configure_logging('info', 'json')\n"
        "get_logger().info('worker_started'); logging.getLogger('celery').warning('text')\n"
        "sys.stdout.write('went on')"
    )
    with open("/dev/full", "w") as full:  # noqa: PTH123  # a device
        result = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, check=False)
    assert result.stdout == b"went on"


@pytest.mark.parametrize("when", ["first", "afterwards"])
def test_a_test_hears_the_log_whatever_one_before_it_configured(when: str) -> None:
    outage = Outage(Server.BROKER, "take messages")
    with structlog.testing.capture_logs() as said:
        outage.failed(when)
    assert [line["reason"] for line in said] == [when]
    configure_logging("error", "json")
    outage.worked()  # its logger would remember that log
