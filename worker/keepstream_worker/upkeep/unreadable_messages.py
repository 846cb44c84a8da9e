"""Unreadable messages: from the list where the transport keeps them to the table of rejected messages.

In: records of queue items that are no Celery message, from a Redis list.  Out: one row for each, for
``keepstream rejected``.
"""

import base64
import hashlib
import re
from typing import Any, Final

import orjson
import redis.asyncio
from redis.exceptions import RedisError

from keepstream.errors import StoreUnavailableError
from keepstream.names import ID_PATTERN, rejected_list
from keepstream_worker import store
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.telemetry.outages import Outage, Server

log = get_logger()

#: Bytes of an entry that is no record of ours which are kept.
_KEPT_BYTES: Final = 64 * 1024


class UnreadableMessages:
    """Moves records of unreadable messages into the database. Used on the event loop."""

    def __init__(self, client: redis.asyncio.Redis, prefix: str, database: WorkerDatabase) -> None:
        self._client = client
        self._list = rejected_list(prefix)
        self._database = database
        self._outage = Outage(Server.REDIS, "look for records of unreadable messages")

    async def record(self, limit: int) -> None:
        """Move at most ``limit`` records.

        Raises:
            StoreUnavailableError: the database is away; what it has not recorded stays in the list.
        """
        try:
            records: list[Any] = await self._client.lrange(self._list, -limit, -1)
            for raw in records:
                await self._record_one(raw)
                # Removed only when recorded; two sweepers that record the same one write one row.
                await self._client.lrem(self._list, -1, raw)
        except (RedisError, OSError) as error:
            self._outage.redis_failed(error)
        else:
            self._outage.worked()

    async def _record_one(self, raw: bytes) -> None:
        try:
            await self._database.run(store.reject, _rejection(raw))
        except StoreUnavailableError:
            raise
        except Exception as error:  # one record must not hold up those behind it
            log.exception("message_defect", task_id=None)
            fault = f"the record of an unreadable message met an internal error ({type(error).__name__})"
            await self._database.run(store.reject, _unrecorded(raw, fault))


def _rejection(raw: bytes) -> store.Rejection:
    try:
        record = orjson.loads(raw)
        task_id = record["task_id"]
        return store.Rejection(
            id=str(record["id"]),
            reason=str(record["reason"]),
            size=int(record["size"]),
            payload=str(record["payload"]),
            job_id=task_id if task_id and re.fullmatch(ID_PATTERN, task_id) else None,  # the task id is the job id
        )
    except (ValueError, KeyError, TypeError):
        # Not one of our records. It is recorded itself, so that what lies behind it is recorded too.
        return _unrecorded(raw, "an entry of the list of unreadable messages is not a record of one")


def _unrecorded(raw: bytes, reason: str) -> store.Rejection:
    return store.Rejection(
        id=hashlib.sha256(raw).hexdigest(),
        reason=reason,
        size=len(raw),
        payload=base64.b64encode(raw[:_KEPT_BYTES]).decode(),
    )
