"""The Celery app: one task, and each setting of Celery with its reason; most switch something off.

In: settings and the service, from the composition root.  Out: a Celery app whose messages come through
``keepstream_worker.intake.transport`` and whose task is run by ``keepstream_worker.intake.pool``.
"""

from typing import Any, Final

from celery import Celery
from celery.signals import setup_logging

from keepstream import names
from keepstream_worker.intake.pool import LoopService
from keepstream_worker.settings import Settings
from keepstream_worker.telemetry.pulse import Pulse

#: Messages of one worker that are not stored yet, at most.
INTAKE: Final = 400
POOL: Final = "keepstream_worker.intake.pool:LoopPool"


def make_celery(settings: Settings, service: LoopService, pulse: Pulse | None = None) -> Celery:
    """Return the Celery app of one worker process; ``pulse``: where it gives signs of life, if it is to."""
    server = settings.broker_server
    # For messages only: where to connect says the transport's option ``server``, whatever Celery reads into a URL.
    app = Celery("keepstream", broker=str(server), set_as_current=True, fixups=[])
    app.loop_service = service
    app.pulse = pulse
    app.conf.update(
        # JSON only, in and out.
        accept_content=["json"],
        task_serializer="json",
        task_protocol=2,
        # A message filter in front of Celery, since one unreadable item would end the worker.
        broker_transport="keepstream_worker.intake.transport:FilteringTransport",
        broker_transport_options={
            "server": server,
            "rejected_prefix": settings.prefix,
            "capacity": INTAKE,
            # Only messages whose job is not stored yet are unacknowledged. They come back after this
            # time if their worker dies; a message that comes back too early finds its job stored.
            "visibility_timeout": 120,
            "socket_timeout": 5,  # more than the second a BRPOP waits; a dead connection is noticed
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "priority_steps": [0],  # one list per queue; the table knows classes
            "max_connections": 20,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # a worker never gives up on its broker
        broker_channel_error_retry=True,  # the transport waits by itself; should an error answer pass it by, reconnect
        # A message is acknowledged when the pool reports it accepted: as soon as its job is committed.
        task_acks_late=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # Of messages, not of jobs: they are stored as fast as they come.
        worker_concurrency=INTAKE,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        # The row is the result, our events are the events, cancel goes through the database.
        result_backend=None,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        worker_eta_task_limit=1,
        task_default_queue=settings.queue,
        task_create_missing_queues=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )

    @app.task(name=names.TASK)
    def run(job: Any) -> None:
        """Run by any pool but ours."""
        raise RuntimeError("jobs need Keepstream's pool: start the worker with `keepstream worker`")

    @setup_logging.connect(weak=False)
    def _logging_is_ours(**_: Any) -> None:
        """A receiver is enough to keep Celery from configuring logging."""

    return app
