"""The sender: puts jobs on the Celery queue, within seconds or not at all.

In: jobs, or the names of stored ones, from the client.  Out: messages in Celery's protocol 2 on the queue, a Redis
list.

It writes the messages itself, as Celery with Kombu would: a service that only sends jobs needs neither, and their
pools do not survive a fork.
"""

import base64
import json
import os
import socket
import uuid
from typing import Any, Final

import redis
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError

from keepstream import names
from keepstream.client.forks import PerProcess
from keepstream.client.redis_connections import PoolOptions, make_pool
from keepstream.client.redis_url import parse_redis_url
from keepstream.errors import BrokerUnavailableError

_POOL: Final[PoolOptions] = {
    "connect_timeout": 1.0,  # seconds; a broker that does not even accept a connection is down
    "answer_timeout": 2.0,  # seconds; a push normally takes microseconds, so this is generous
    "max_connections": 10,  # sends at the same time
    "wait_for_connection": 2.0,
}


class Sender:
    """Sends jobs to one queue. Thread-safe; connects when it is first used, and anew after a fork.

    Raises:
        InvalidSettingError: the broker URL cannot be used.
    """

    def __init__(self, broker_url: str, queue: str = names.QUEUE) -> None:
        self._server = parse_redis_url(broker_url)
        self._queue = queue
        self._connections = PerProcess(self._connect)
        self._connections.get()

    def send(self, job: dict[str, Any]) -> None:
        """Send one job, or the name of a stored one, given as ``to_wire()`` returns it.

        Raises:
            BrokerUnavailableError: the broker refused it or did not confirm it in time.  A message that timed
                out may still be on the queue; a worker drops the duplicate.
        """
        origin = f"keepstream{os.getpid()}@{socket.gethostname()}"
        try:
            self._connections.get().lpush(self._queue, celery_message(job, self._queue, origin))
        except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
            raise BrokerUnavailableError(
                f"the broker does not let this user send jobs ({type(error).__name__}); check the user and password of"
                " the broker URL, and that its ACL allows LPUSH on the queue"
            ) from None
        except (RedisError, OSError) as error:
            raise BrokerUnavailableError(f"the broker did not take the job ({type(error).__name__})") from None

    def close(self) -> None:
        """Close the connections."""
        connections = self._connections.take()
        if connections is not None:
            connections.close()

    def _connect(self) -> redis.Redis:
        return redis.Redis.from_pool(make_pool(self._server, **_POOL))


def celery_message(job: dict[str, Any], queue: str, origin: str) -> str:
    """Return the message that has a Celery worker run the job: the item that Kombu would put on the Redis list."""
    job_id = job["id"]
    shown = {"argsrepr": f"({job_id},)", "kwargsrepr": "{}"}  # Celery's own repr would show the prompt in logs
    body = [[job], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    return json.dumps(
        {
            "body": base64.b64encode(json.dumps(body).encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": names.TASK,
                "id": job_id,
                "shadow": None,
                "eta": None,
                "expires": None,
                "group": None,
                "group_index": None,
                "retries": 0,
                "timelimit": [None, None],
                "root_id": job_id,
                "parent_id": None,
                **shown,
                "origin": origin,
                "ignore_result": None,
                "replaced_task_nesting": 0,
                "stamped_headers": None,
                "stamps": {},
            },
            "properties": {
                "correlation_id": job_id,
                "reply_to": "",  # no result is sent anywhere
                **shown,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    )
