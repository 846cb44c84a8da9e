"""The transport: Celery's Redis transport with a doorkeeper.

In: items of the queue, from Redis.  Out: readable messages to Celery; all others to a Redis list,
from where the sweeper records them in the database.  Exists because one item that kombu or Celery
cannot read ends the worker (and, put back, the next one).
"""

import base64
import time
import uuid
from queue import Empty
from typing import Any, Final

import orjson
from kombu.transport.redis import Channel, Transport
from kombu.utils.encoding import bytes_to_str

from api_contracts.names import rejected_list
from worker.envelope import Unreadable, open_envelope
from worker.telemetry import get_logger

log = get_logger()

#: Bytes of an unreadable item that are kept; enough to see what it was.
_KEPT_BYTES: Final = 64 * 1024


class DoorkeeperChannel(Channel):
    """Reads the queue like its parent, but looks at each item first."""

    #: Set by the composition root through ``broker_transport_options``.
    rejected_prefix = "millrace"
    from_transport_options: tuple[str, ...] = (*Channel.from_transport_options, "rejected_prefix")  # type: ignore[assignment]

    def _brpop_read(self, **options: Any) -> bool:
        try:
            try:
                reply = self.client.parse_response(self.client.connection, "BRPOP", **options)
            except self.connection_errors:
                self.client.connection.disconnect()
                raise
            if not reply:
                raise Empty
            queue = bytes_to_str(reply[0]).rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            raw = reply[1].encode() if isinstance(reply[1], str) else reply[1]
            message = open_envelope(raw)
            if isinstance(message, Unreadable):
                self._keep_aside(raw, message)
                raise Empty
            self.connection._deliver(message, queue)
        finally:
            self._in_poll = None  # type: ignore[assignment]  # inferred from its other uses
            self._flush_brpop_reauth()  # type: ignore[no-untyped-call]
        return True

    def _keep_aside(self, raw: bytes, fault: Unreadable) -> None:
        log.warning("message_unreadable", reason=fault.reason, size=len(raw), task_id=fault.task_id)
        record = orjson.dumps(
            {
                "id": uuid.uuid4().hex,
                "reason": fault.reason,
                "size": len(raw),
                "task_id": fault.task_id,
                "received_at": time.time(),
                "payload": base64.b64encode(raw[:_KEPT_BYTES]).decode(),
            }
        )
        with self.conn_or_acquire() as client:
            client.lpush(rejected_list(self.rejected_prefix), record)


class DoorkeeperTransport(Transport):
    """Celery's Redis transport with our channel."""

    Channel = DoorkeeperChannel
