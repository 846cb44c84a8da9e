"""The transport: Celery's Redis transport with a message filter, lighter bookkeeping, and patience.

In: items of the queue, from Redis.  Out: readable messages to Celery; records of all others to a Redis
list, from where upkeep moves them into the database.  One item that kombu or Celery cannot read ends the
worker (and, put back, the next one); so does any error that Redis answers; and kombu's bookkeeping of
unacknowledged messages, two transactions on two new clients for each, costs more than a short job.

Whatever Redis answers to any call made here, no message comes for a second, and then it is tried again on
a new connection, which leads to the new master after a fail-over.
"""

import base64
import time
import uuid
from contextlib import suppress
from queue import Empty
from typing import Any, Final

import orjson
import redis
from celery.worker import state
from kombu.asynchronous import get_event_loop
from kombu.transport import virtual
from kombu.transport.redis import Channel, MultiChannelPoller, QoS, Transport
from kombu.utils.encoding import bytes_to_str
from redis.connection import AbstractConnection
from redis.exceptions import InvalidResponse, RedisError, ResponseError
from typing_extensions import override

from keepstream.client.redis_connections import connection_class_for, make_pool
from keepstream.client.redis_url import RedisServer
from keepstream.names import rejected_list
from keepstream_worker.intake.message_filter import Unreadable, read_message
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.telemetry.outages import Outage, Server

log = get_logger()

#: Bytes of an unreadable item that are kept; enough to see what it was.
_KEPT_BYTES: Final = 64 * 1024
#: Items taken from the queue by one command: enough to share its cost, few enough to leave others some.
_TAKEN_AT_ONCE: Final = 16
#: Bytes of messages that may be held here before they are stored; more are left in the queue.
_MOST_HELD: Final = 64 * 1024 * 1024
#: Seconds after which an acknowledgement goes out, with all others until then.
_ACKNOWLEDGE_WITHIN: Final = 0.05
#: Seconds after which a call that failed is tried again.
_PAUSE: Final = 1.0
#: Seconds after which no more messages are put back if one cannot be: a Redis that is silent keeps each of them waiting
#: for its time-out, and the process is about to end.
_PUT_BACK_WITHIN: Final = 5.0


def _note_failure(outage: Outage, error: Exception, **known: str) -> None:
    """Say what an error is that Redis, the network or a defect has brought; whatever it is, the call is repeated."""
    if isinstance(error, RedisError | OSError):
        outage.redis_failed(error, **known)
    else:
        log.error("broker_defect", exc_info=error)


class BatchingQoS(QoS):
    """Keeps unacknowledged messages in Redis like its parent, in fewer round trips.

    Messages that are taken together are noted together, and acknowledgements that come within a moment go
    out together. No transaction is needed: an entry that is half there is either overlooked or delivered
    once more, and a second delivery finds the job claimed.

    What Redis refuses is kept and tried again.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._client = self.channel._create_client()
        self._unnoted: dict[str, tuple[dict[str, Any], str]] = {}  # message and queue, by delivery tag
        self._acknowledged: list[str] = []
        self._sizes: dict[str, int] = {}  # bytes of what is not acknowledged, by delivery tag
        self.held = 0  #: Bytes of what is not acknowledged.
        self._noting = Outage(Server.BROKER, "note messages")
        self._acknowledging = Outage(Server.BROKER, "acknowledge messages")
        self._restoring = Outage(Server.BROKER, "put messages back")

    def note(self, messages: list[dict[str, Any]], queue: str) -> None:
        """Note messages that were taken from the queue, before they are delivered.

        If Redis refuses, out of memory for instance, they are delivered all the same: they are in no
        queue any more.
        """
        for message in messages:
            tag = message["properties"]["delivery_tag"]
            self._unnoted[tag] = (message, queue)
            self.held += len(message["body"]) - self._sizes.get(tag, 0)
            self._sizes[tag] = len(message["body"])
        self.flush_notes()

    def flush_notes(self) -> None:
        """Note what is delivered and not noted yet."""
        if not self._unnoted:
            return
        # To the queue it came from, whatever exchange its sender named.
        entries = {tag: orjson.dumps([message, "", queue]) for tag, (message, queue) in self._unnoted.items()}
        try:
            with self._client.pipeline(transaction=False) as pipe:
                pipe.hset(self.unacked_key, mapping=entries)
                pipe.zadd(self.unacked_index_key, dict.fromkeys(entries, time.time()))
                pipe.execute()
        except Exception as error:  # noqa: BLE001  # what is taken is delivered; the rest is tried again
            _note_failure(self._noting, error)
        else:
            self._unnoted.clear()
            self._noting.worked()

    def append(self, message: Any, delivery_tag: str) -> None:
        """Remember a message that is delivered; ``note`` has noted it in Redis."""
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge a message; called on Celery's thread."""
        virtual.QoS.ack(self, delivery_tag)
        self._unnoted.pop(delivery_tag, None)
        self.held -= self._sizes.pop(delivery_tag, 0)
        self._acknowledged.append(delivery_tag)
        if len(self._acknowledged) == 1:
            self._flush_acknowledgements_in(_ACKNOWLEDGE_WITHIN)

    def _flush_acknowledgements_in(self, seconds: float) -> None:
        hub = get_event_loop()
        if hub is not None:
            hub.call_later(seconds, self.flush_acknowledgements)

    def flush_acknowledgements(self) -> None:
        """Send all acknowledgements to Redis at once."""
        tags = self._acknowledged
        if not tags:
            return
        try:
            with self._client.pipeline(transaction=False) as pipe:
                pipe.zrem(self.unacked_index_key, *tags)
                pipe.hdel(self.unacked_key, *tags)
                pipe.execute()
        except Exception as error:  # noqa: BLE001  # nothing else would send them any more
            # If this worker dies first, they will be delivered again some time, and find their jobs claimed.
            _note_failure(self._acknowledging, error)
            if not self.channel.closed:
                self._flush_acknowledgements_in(_PAUSE)
        else:
            self._acknowledged = []
            self._acknowledging.worked()

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Put back what is not acknowledged; called when the channel closes.

        The parent's way writes what it could not put back, prompts included, to a file for everybody.
        """
        self._on_collect.cancel()
        self._flush()  # type: ignore[no-untyped-call]  # forgets what is acknowledged
        self.flush_acknowledgements()
        delivered = list(self._delivered.items())
        self._delivered.clear()
        give_up_at = time.monotonic() + _PUT_BACK_WITHIN
        for tag, message in delivered:
            try:
                if tag in self._unnoted:  # the only copy is ours
                    raw, queue = self._unnoted[tag]
                    self._client.rpush(queue, orjson.dumps(raw))
                else:
                    self.channel._restore(message)
            except Exception as error:  # noqa: BLE001  # what is noted comes back after the visibility time-out
                _note_failure(self._restoring, error)
                if time.monotonic() > give_up_at:
                    break

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Put back what other workers have taken and not acknowledged for long; called by a timer."""
        try:
            super().restore_visible(*args, **kwargs)  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001  # it is called again some seconds later
            _note_failure(self._restoring, error)
        else:
            self._restoring.worked()

    @override
    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Put one message back; an entry that is none of ours is set aside, so that it does not hold up the others.

        It is removed only when it is in the queue again. The parent does both in one transaction, which Redis does
        not take back when a part of it fails, so that the message would be lost.
        """
        client = client or self._client
        entry = client.hget(self.unacked_key, tag)
        if entry:
            message, queues = None, []
            try:
                message, exchange, routing_key = orjson.loads(entry)
                queues = self.channel._lookup(exchange, routing_key)
            except (RedisError, OSError):
                raise
            except Exception as error:
                log.exception("message_defect", task_id=None)
                self.channel.set_aside(entry, _unreadable(error))
            for queue in queues:
                (client.lpush if leftmost else client.rpush)(queue, orjson.dumps(message))
        client.zrem(self.unacked_index_key, tag)
        client.hdel(self.unacked_key, tag)


class FilteringChannel(Channel):
    """Reads the queue like its parent, but several items at once, and each through the message filter."""

    QoS = BatchingQoS

    #: Set by ``keepstream_worker.intake.celery_app`` through ``broker_transport_options``.
    server: RedisServer
    rejected_prefix = "keepstream"
    capacity = 1  #: Messages that may be held here before they are stored.
    from_transport_options: tuple[str, ...] = (  # type: ignore[assignment]
        *Channel.from_transport_options,
        "server",
        "rejected_prefix",
        "capacity",
    )

    #: Whether the server knows BLMPOP (Redis 7, Valkey); if not, items come one by one.
    _takes_many = True

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        self._unreadable: list[bytes] = []  # records of unreadable items that Redis has not taken yet
        self._unbound: list[tuple[Any, ...]] = []  # bindings that Redis has not taken yet
        self._rests_until = 0.0  #: By the monotonic clock.
        self._catches_up_at = 0.0
        self._taking = Outage(Server.BROKER, "take messages")
        self._recording = Outage(Server.BROKER, "record unreadable messages")
        self._declaring = Outage(Server.BROKER, "declare the queue")
        numbers = connection._used_channel_ids[:]
        try:
            super().__init__(connection, **kwargs)  # type: ignore[no-untyped-call]
        except BaseException:
            connection._used_channel_ids[:] = numbers  # there are 65,535, and an outage may be long
            raise

    # -- patience --

    @property
    def rests(self) -> bool:
        """Whether nothing is to be asked of Redis yet, because the last call failed."""
        return time.monotonic() < self._rests_until

    def rest(self, error: Exception) -> None:
        """Take no messages for a moment, and then by a new connection."""
        _note_failure(self._taking, error, queue=" ".join(self.active_queues))
        self._rests_until = time.monotonic() + _PAUSE
        self._in_poll = None  # type: ignore[assignment]  # inferred from its other uses
        connection = self.client.connection
        if connection is not None:
            with suppress(RedisError, OSError):
                connection.disconnect()

    def _catch_up(self) -> None:
        """Do what Redis has refused until now."""
        if time.monotonic() < self._catches_up_at:
            return
        self._catches_up_at = time.monotonic() + _PAUSE
        self.qos.flush_notes()
        self._flush_unreadable()
        unbound, self._unbound = self._unbound, []
        for binding in unbound:
            self._queue_bind(*binding)

    # -- declaring --

    def _queue_bind(self, *binding: Any) -> None:
        # Only senders that name an exchange need it, so a Redis that refuses it keeps nobody from taking messages.
        try:
            super()._queue_bind(*binding)  # type: ignore[no-untyped-call]
        except (RedisError, OSError) as error:
            self._declaring.redis_failed(error)
            self._unbound.append(binding)
        else:
            self._declaring.worked()

    def _size(self, queue: str) -> int:
        return 0  # asked for when the queue is declared, and read by nobody

    # -- connecting --

    @override
    def _get_pool(self, asynchronous: bool = False) -> redis.ConnectionPool:
        """Return a pool of connections, made as all connections to Redis are; kombu would not verify certificates.

        ``asynchronous``: for the connections on which Celery's hub waits.
        """
        self.keyprefix_fanout = self.keyprefix_fanout.format(db=self.server.db)
        made: type[AbstractConnection] = connection_class_for(self.server)
        return make_pool(
            self.server,
            connection_class=_watched(made, self) if asynchronous else made,
            connect_timeout=self.socket_connect_timeout,  # type: ignore[arg-type]  # inferred from its default
            answer_timeout=self.socket_timeout,  # type: ignore[arg-type]  # inferred from its default
            health_check_interval=self.health_check_interval,
            max_connections=self.max_connections,
        )

    # -- taking --

    def _brpop_start(self, timeout: float | None = None) -> None:
        self._catch_up()
        if self.qos.held > _MOST_HELD:
            return  # asked again as soon as something is stored
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
        except Exception as error:  # noqa: BLE001  # whatever it is, it must not end Celery's loop; it is logged
            self.rest(error)
            raise Empty from None
        finally:
            self._in_poll = None  # type: ignore[assignment]  # inferred from its other uses
            self._flush_brpop_reauth()  # type: ignore[no-untyped-call]
        self._taking.worked()
        messages = self._filter(items)
        if not messages:
            raise Empty
        self.qos.note([message for _, message in messages], queue)
        for raw, message in messages:
            self._deliver(raw, message, queue)
        return True

    def _read_items(self, **options: Any) -> tuple[str, list[bytes]]:
        """Return the queue's name and the items taken from it; none if there was none in time."""
        try:
            reply = self.client.parse_response(self.client.connection, "BLMPOP", **options)
        except ResponseError as error:
            if not self._takes_many or "unknown command" not in str(error).lower():
                raise
            self._takes_many = False
            return "", []
        if not reply:
            return "", []
        if not (isinstance(reply, list | tuple) and len(reply) == 2):
            raise InvalidResponse("neither a queue with items nor nothing")
        items = reply[1] if isinstance(reply[1], list) else [reply[1]]
        if not all(isinstance(item, bytes | str) for item in (reply[0], *items)):
            raise InvalidResponse("a queue or an item that is no text")
        queue = bytes_to_str(reply[0])
        self._queue_cycle.rotate(queue)
        return queue, [item.encode() if isinstance(item, str) else item for item in items]

    def _filter(self, items: list[bytes]) -> list[tuple[bytes, dict[str, Any]]]:
        """Return the items that are messages, with what they hold."""
        messages = []
        for raw in items:
            try:
                message = read_message(raw)
            except Exception as error:
                log.exception("message_defect", task_id=None)
                message = _unreadable(error)
            if isinstance(message, Unreadable):
                log.warning("message_unreadable", reason=message.reason, size=len(raw), task_id=message.task_id)
                self.set_aside(raw, message)
            else:
                messages.append((raw, message))
        return messages

    def _deliver(self, raw: bytes, message: dict[str, Any], queue: str) -> None:
        """Hand one message to Celery."""
        try:
            self.connection._deliver(message, queue)
        except (RedisError, OSError) as error:
            # A worker that stops puts back what it has just taken, and Redis refused that: the message stays noted, and
            # is put back when the channel closes, or after the visibility time-out.
            _note_failure(self._taking, error)
        except Exception as error:
            task_id = message["headers"]["id"]
            log.exception("message_defect", task_id=task_id)
            self.qos.ack(message["properties"]["delivery_tag"])
            self.set_aside(raw, _unreadable(error, task_id))

    # -- what cannot be read --

    def set_aside(self, raw: bytes, fault: Unreadable) -> None:
        """Keep the record of an item that cannot be delivered until Redis has taken it."""
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
        except Exception as error:  # noqa: BLE001  # messages are taken all the same
            _note_failure(self._recording, error)
        else:
            self._unreadable.clear()
            self._recording.worked()

    # -- putting back --

    @override
    def _restore(self, message: Any, leftmost: bool = False) -> None:
        self.qos.restore_by_tag(message.delivery_tag, leftmost=leftmost)

    def close(self) -> None:
        """Put back what is not acknowledged, and close the connections."""
        self._flush_unreadable()
        super().close()  # type: ignore[no-untyped-call]


def _unreadable(defect: Exception, task_id: str | None = None) -> Unreadable:
    return Unreadable(f"internal error ({type(defect).__name__}); see the worker's log", task_id)


class PatientPoller(MultiChannelPoller):
    """Asks Redis for messages like its parent; where that raises an error, the channel rests and Celery goes on."""

    def on_poll_start(self) -> None:
        """Ask for messages where nothing is asked yet; called by Celery's hub before it waits."""
        try:
            super().on_poll_start()  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001  # it is logged, and would end the worker
            for channel in self._channels:
                channel.rest(error)

    def on_readable(self, fileno: Any) -> Any:
        """Read what Redis has sent; called by Celery's hub."""
        try:
            return super().on_readable(fileno)  # type: ignore[no-untyped-call]
        except Empty:
            raise  # nothing came; the hub knows
        except Exception as error:  # noqa: BLE001  # it is logged, and would end the worker
            for channel in self._channels:
                channel.rest(error)
            return None

    def _register_BRPOP(self, channel: FilteringChannel) -> None:  # noqa: N802  # the parent's name
        if not channel.rests:
            super()._register_BRPOP(channel)  # type: ignore[no-untyped-call]


def _watched(base: type[AbstractConnection], channel: FilteringChannel) -> type[AbstractConnection]:
    """Return a class of connections that tell the channel when they are closed, as kombu's own do."""

    class Watched(base):  # type: ignore[valid-type, misc]  # a class made at run time
        def disconnect(self, *args: Any, **kwargs: Any) -> None:
            super().disconnect(*args, **kwargs)
            if channel._registered:
                channel._on_connection_disconnect(self)  # type: ignore[no-untyped-call]

    return Watched


class FilteringTransport(Transport):
    """Celery's Redis transport with our channel."""

    Channel = FilteringChannel
    can_parse_url = True  # so that kombu makes nothing of it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.cycle = PatientPoller()  # type: ignore[assignment, no-untyped-call]
        self._connecting = Outage(Server.BROKER, "connect")

    def establish_connection(self) -> Any:
        """Connect; wait for a Redis that is away or answers with an error, until the worker is told to stop."""
        while True:
            try:
                connection = super().establish_connection()  # type: ignore[no-untyped-call]
            except (RedisError, OSError) as error:
                self._connecting.redis_failed(error)
            else:
                self._connecting.worked()
                return connection
            state.maybe_shutdown()
            time.sleep(_PAUSE)
