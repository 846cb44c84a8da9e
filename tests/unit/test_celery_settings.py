"""What is switched off in Celery stays off; ``docs/operations/hazards.md`` says why."""

import re
from pathlib import Path
from typing import Any, cast

import pytest
from celery import Celery

from keepstream import names
from keepstream_worker.intake.celery_app import INTAKE, make_celery
from keepstream_worker.settings import load_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def app() -> Celery:
    app = make_celery(load_settings(), cast("Any", None))
    app.finalize()  # before another app is made: a task is registered with every app that is finalized after it
    return app


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("task_acks_late", False),
        ("task_reject_on_worker_lost", None),
        ("worker_disable_prefetch", True),
        ("worker_prefetch_multiplier", 1),
        ("worker_enable_remote_control", False),
        ("worker_send_task_events", False),
        ("task_send_sent_event", False),
        ("result_backend", None),
        ("task_ignore_result", True),
        ("task_time_limit", None),
        ("task_soft_time_limit", None),
        ("accept_content", ["json"]),
        ("task_serializer", "json"),
        ("broker_connection_max_retries", None),
        ("worker_state_db", None),
        ("beat_schedule", {}),
    ],
)
def test_celery_is_set_as_the_hazards_demand(app: Celery, setting: str, value: object) -> None:
    assert getattr(app.conf, setting) == value


def test_messages_are_stored_however_few_jobs_the_worker_runs_at_once() -> None:
    """The table is the backlog: a queue that waits for places would keep jobs from being chosen, and from workers."""
    one_place = load_settings().model_copy(update={"concurrency": 1})
    assert make_celery(one_place, cast("Any", None)).conf.worker_concurrency == INTAKE


def test_broker_connections_are_bounded_in_time(app: Celery) -> None:
    options = app.conf.broker_transport_options
    assert options["socket_timeout"] > 1, "more than a BRPOP waits"
    assert options["socket_connect_timeout"]
    assert options["health_check_interval"]
    assert options["priority_steps"] == [0]


def test_there_is_one_task_of_ours(app: Celery) -> None:
    assert [name for name in app.tasks if not name.startswith("celery.")] == [names.TASK]


def test_nothing_is_left_to_one_workers_memory() -> None:
    """No ETA, no countdown, no retry of Celery's."""
    sources = [path for package in ("worker", "api_contracts") for path in (ROOT / package).rglob("*.py")]
    offences = [
        f"{path.name}: {found.group()}"
        for path in sources
        for found in re.finditer(r"\bcountdown=|\beta=|apply_async\(|self\.retry\(|autoretry_for", path.read_text())
    ]
    assert offences == []
