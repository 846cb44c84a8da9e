"""The sender: puts jobs on the Celery queue, within seconds or not at all.

In: jobs, from the client and from a worker's sweeper.  Out: messages in Celery's protocol 2 on the queue.
The only importer of Celery in this package.

A plain ``send_task`` would wait without limit for a broker that accepts a connection and then never answers.
"""

from collections.abc import Iterable
from typing import Any, Final

from celery import Celery
from kombu.exceptions import KombuError, OperationalError
from kombu.pools import ProducerPool

from keepstream import names
from keepstream.errors import BrokerUnavailableError, InvalidSettingError

_CONNECT_TIMEOUT: Final = 1.0  #: Seconds; a broker that does not even accept a connection is down.
_ANSWER_TIMEOUT: Final = 2.0  #: Seconds; a push normally takes microseconds, so this is generous.
_CONNECTIONS: Final = 10  #: Sends at the same time; further ones wait, at most ``_ANSWER_TIMEOUT``.


class Sender:
    """Sends jobs to one queue. Thread-safe; connects when it is first used.

    Raises:
        InvalidSettingError: the broker URL cannot be used.
    """

    def __init__(self, broker_url: str, queue: str = names.QUEUE) -> None:
        if "cluster" in broker_url.partition("://")[0]:
            raise InvalidSettingError(
                "Celery cannot use a Redis Cluster as its broker: its commands span slots;"
                " name a single Redis (redis://) or a Sentinel (sentinel://)"
            )
        self._queue = queue
        self._app = Celery("keepstream-sender", broker=broker_url, set_as_current=False, fixups=[])
        self._app.conf.update(
            task_serializer="json",
            accept_content=["json"],
            task_protocol=2,
            task_ignore_result=True,
            task_publish_retry=False,  # with a database a sweeper resends it; without, the caller decides
            broker_connection_retry=False,
            broker_transport_options={
                "socket_connect_timeout": _CONNECT_TIMEOUT,
                "socket_timeout": _ANSWER_TIMEOUT,
                "socket_keepalive": True,
                "max_retries": 0,  # of a connection; Kombu's own three would take six seconds
            },
        )
        try:
            connection = self._app.connection_for_write()
        except (KeyError, ValueError):
            raise InvalidSettingError("the broker URL cannot be used; it looks like redis://host:6379/0") from None
        # Not Celery's own pools: those are shared by the whole process, so closing them would hurt others.
        self._connections = connection.Pool(limit=_CONNECTIONS)
        self._producers: Any = ProducerPool(self._connections, limit=_CONNECTIONS, Producer=self._app.amqp.Producer)

    def send(self, job: dict[str, Any]) -> None:
        """Send one job, given as ``Job.to_wire()`` returns it.

        Raises:
            BrokerUnavailableError: the broker refused it or did not confirm it in time.  A message that timed
                out may still be on the queue; a worker drops the duplicate.
        """
        self.send_many([job])

    def send_many(self, jobs: Iterable[dict[str, Any]]) -> None:
        """Send jobs together. After an error, some of them may still be on the queue.

        Raises:
            BrokerUnavailableError: as for ``send``.
        """
        try:
            with self._producers.acquire(block=True, timeout=_ANSWER_TIMEOUT) as producer, producer.batch():
                for job in jobs:
                    self._app.send_task(
                        names.TASK,
                        args=[job],
                        task_id=job["id"],
                        queue=self._queue,
                        producer=producer,
                        argsrepr=f"({job['id']},)",  # Celery's own repr would show the prompt in logs
                        kwargsrepr="{}",
                    )
        except (KombuError, OperationalError, OSError) as error:
            raise BrokerUnavailableError(f"the broker did not take the job ({type(error).__name__})") from None

    def close(self) -> None:
        """Close the connections."""
        self._producers.force_close_all()
        self._connections.force_close_all()
        self._app.close()
