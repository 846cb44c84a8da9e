"""The transport: Celery's Redis transport with a message filter, and lighter bookkeeping.

In: items of the queue, from Redis.  Out: readable messages to Celery; records of all others to a Redis
list, from where upkeep moves them into the database.  One item that kombu or Celery cannot read ends the
worker (and, put back, the next one); and kombu's bookkeeping of unacknowledged messages, two transactions
on two new clients for each, costs more than a short job.
"""

import base64
import time
import uuid
from queue import Empty
from typing import Any, Final

import orjson
from celery.worker import state
from kombu.asynchronous import get_event_loop
from kombu.transport import virtual
from kombu.transport.redis import Channel, QoS, Transport
from kombu.utils.encoding import bytes_to_str
from redis.exceptions import RedisError, ResponseError

from keepstream.names import rejected_list
from keepstream_worker.intake.message_filter import Unreadable, read_message
from keepstream_worker.telemetry.logs import get_logger

log = get_logger()

#: Bytes of an unreadable item that are kept; enough to see what it was.
_KEPT_BYTES: Final = 64 * 1024
#: Items taken from the queue by one command: enough to share its cost, few enough to leave others some.
_TAKEN_AT_ONCE: Final = 16
#: Seconds after which an acknowledgement goes out, with all others until then.
_ACKNOWLEDGE_WITHIN: Final = 0.05


class BatchingQoS(QoS):
    """Keeps unacknowledged messages in Redis like its parent, in fewer round trips.

    Messages that are taken together are noted together, and acknowledgements that come within a moment go
    out together. No transaction is needed: an entry that is half there is either overlooked or delivered
    once more, and a second delivery finds the job claimed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._client = self.channel._create_client()
        self._acknowledged: list[str] = []

    def note(self, messages: list[dict[str, Any]]) -> None:
        """Note messages that were taken from the queue, before they are delivered.

        If Redis refuses, out of memory for instance, they are delivered all the same: they are in no
        queue any more, and an exception here would end the worker.
        """
        now = time.time()
        entries: dict[str, bytes] = {}
        for message in messages:
            properties = message["properties"]
            delivery = properties["delivery_info"]
            entries[properties["delivery_tag"]] = orjson.dumps(
                [message, delivery.get("exchange", ""), delivery.get("routing_key", "")]
            )
        try:
            with self._client.pipeline(transaction=False) as pipe:
                pipe.hset(self.unacked_key, mapping=entries)
                pipe.zadd(self.unacked_index_key, dict.fromkeys(entries, now))
                pipe.execute()
        except (RedisError, OSError) as error:
            log.warning("messages_not_noted", count=len(entries), reason=type(error).__name__)

    def append(self, message: Any, delivery_tag: str) -> None:
        """Remember a message that is delivered; ``note`` has noted it in Redis."""
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge a message; called on Celery's thread."""
        virtual.QoS.ack(self, delivery_tag)
        self._acknowledged.append(delivery_tag)
        hub = get_event_loop()
        if len(self._acknowledged) == 1 and hub is not None:
            hub.call_later(_ACKNOWLEDGE_WITHIN, self.flush_acknowledgements)

    def flush_acknowledgements(self) -> None:
        """Send all acknowledgements to Redis at once."""
        tags, self._acknowledged = self._acknowledged, []
        if not tags:
            return
        try:
            with self._client.pipeline(transaction=False) as pipe:
                pipe.zrem(self.unacked_index_key, *tags)
                pipe.hdel(self.unacked_key, *tags)
                pipe.execute()
        except (RedisError, OSError) as error:
            # They will be delivered again some time, and find their jobs claimed.
            log.warning("acknowledgements_not_sent", count=len(tags), reason=type(error).__name__)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Put back what is not acknowledged; called when the channel closes."""
        self.flush_acknowledgements()
        super().restore_unacked_once(stderr)  # type: ignore[no-untyped-call]


class FilteringChannel(Channel):
    """Reads the queue like its parent, but several items at once, and each through the message filter."""

    QoS = BatchingQoS

    #: Set by ``keepstream_worker.intake.celery_app`` through ``broker_transport_options``.
    rejected_prefix = "keepstream"
    capacity = 1  #: Jobs that this worker runs at once.
    from_transport_options: tuple[str, ...] = (  # type: ignore[assignment]
        *Channel.from_transport_options,
        "rejected_prefix",
        "capacity",
    )

    #: Whether the server knows BLMPOP (Redis 7, Valkey); if not, items come one by one.
    _takes_many = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._unreadable: list[bytes] = []  # records of unreadable items that Redis has not taken yet

    def _brpop_start(self, timeout: float | None = None) -> None:
        self._flush_unreadable()
        if not self._takes_many:
            super()._brpop_start(timeout)  # type: ignore[no-untyped-call]
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        count = max(1, min(_TAKEN_AT_ONCE, self.capacity - len(state.reserved_requests)))
        self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()  # type: ignore[assignment]  # inferred from its first value
        self.client.connection.send_command(
            "BLMPOP", timeout or self.brpop_timeout, len(queues), *queues, "RIGHT", "COUNT", count
        )

    def _brpop_read(self, **options: Any) -> bool:
        try:
            queue, items = self._read_items(**options)
            messages = []
            for raw in items:
                message = read_message(raw)
                if isinstance(message, Unreadable):
                    self._set_aside(raw, message)
                else:
                    messages.append(message)
            if not messages:
                raise Empty
            self.qos.note(messages)
            for message in messages:
                self.connection._deliver(message, queue)
        finally:
            self._in_poll = None  # type: ignore[assignment]  # inferred from its other uses
            self._flush_brpop_reauth()  # type: ignore[no-untyped-call]
        return True

    def _read_items(self, **options: Any) -> tuple[str, list[bytes]]:
        """Return the queue's name and the items taken from it; raise ``Empty`` if there was none in time."""
        try:
            reply = self.client.parse_response(self.client.connection, "BLMPOP", **options)
        except ResponseError as error:
            if not self._takes_many or "unknown command" not in str(error).lower():
                raise
            self._takes_many = False
            raise Empty from None
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        if not reply:
            raise Empty
        queue = bytes_to_str(reply[0])
        self._queue_cycle.rotate(queue)
        items = reply[1] if isinstance(reply[1], list) else [reply[1]]
        return queue, [item.encode() if isinstance(item, str) else item for item in items]

    def _set_aside(self, raw: bytes, fault: Unreadable) -> None:
        log.warning("message_unreadable", reason=fault.reason, size=len(raw), task_id=fault.task_id)
        self._unreadable.append(
            orjson.dumps(
                {
                    "id": uuid.uuid4().hex,
                    "reason": fault.reason,
                    "size": len(raw),
                    "task_id": fault.task_id,
                    "received_at": time.time(),
                    "payload": base64.b64encode(raw[:_KEPT_BYTES]).decode(),
                }
            )
        )

    def _flush_unreadable(self) -> None:
        if not self._unreadable:
            return
        try:
            with self.conn_or_acquire() as client:
                client.lpush(rejected_list(self.rejected_prefix), *self._unreadable)
        except (RedisError, OSError) as error:
            log.warning("unreadable_messages_not_recorded", count=len(self._unreadable), reason=type(error).__name__)
        else:
            self._unreadable.clear()


class FilteringTransport(Transport):
    """Celery's Redis transport with our channel."""

    Channel = FilteringChannel
