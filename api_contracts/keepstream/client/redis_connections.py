"""How connections to Redis are made: by one place for all, so that each link reaches what the others reach.

In: a ``RedisServer``, and what a link wants of its connections: time-outs, how many.
Out: connection pools of redis-py, sync and async; for a link of one's own, where the master is, and the TLS context.

Certificates and host names are checked unless the URL says otherwise.  A master that has become a replica is left at
its first refusal: a new connection leads to the new master, if the address does; with Sentinels each one asks for it.
"""

import ssl
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.asyncio.connection import AbstractConnection as AsyncAbstractConnection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection
from redis.exceptions import MasterDownError, ReadOnlyError
from redis.retry import Retry

from keepstream.client.redis_url import Address, RedisServer, Sentinels, Tls, UnixSocket
from keepstream.errors import InvalidSettingError

#: What a server says that is not the master any more.
_MOVED: Final = (ReadOnlyError, MasterDownError)
_ASK_TIMEOUT: Final = 1.0  #: Seconds that a Sentinel has for a connection and for an answer; then the next is asked.


class PoolOptions(TypedDict, total=False):
    """What a link asks of its pool; what is left out has redis-py's default."""

    connect_timeout: float  #: Seconds.
    answer_timeout: float  #: Seconds for the answer to a command, or to send it.
    retries: int  #: How often a command is repeated after a lost connection, but not after a time-out; 0 by default.
    health_check_interval: float  #: Seconds of silence after which a connection is tried before it is used.
    max_connections: int
    protocol: int  #: Version of the protocol, 2 or 3.
    wait_for_connection: float  #: Seconds; how long to wait when all connections are busy, which else is an error.


def make_pool(
    server: RedisServer, *, connection_class: type[AbstractConnection] | None = None, **options: Unpack[PoolOptions]
) -> redis.ConnectionPool:
    """Return a pool of connections to ``server``. It connects when it is used.

    Args:
        server: Where to connect.
        connection_class: Made from what ``connection_class(server)`` returns, if it is not to be that itself.
        options: See ``PoolOptions``.

    Raises:
        InvalidSettingError: a file of certificates or a key cannot be used.
    """
    _check(server.tls)
    arguments = _arguments(server, options) | {
        "connection_class": connection_class or connection_class_for(server),
        "retry": Retry(NoBackoff(), options.get("retries", 0), supported_errors=(redis.ConnectionError,)),
    }
    waits = "wait_for_connection" in options
    if isinstance(server.place, Sentinels):
        pool_class: Any = _BlockingSentinelPool if waits else redis.sentinel.SentinelConnectionPool
        pool: redis.ConnectionPool = pool_class(server.place.service, MasterFinder(server), **arguments)
        return pool
    return (redis.BlockingConnectionPool if waits else redis.ConnectionPool)(**arguments)


def make_async_pool(server: RedisServer, **options: Unpack[PoolOptions]) -> redis.asyncio.ConnectionPool:
    """Return the same for asyncio. It belongs to the event loop on which it is first used.

    Raises:
        InvalidSettingError: a file of certificates or a key cannot be used.
    """
    _check(server.tls)
    arguments = _arguments(server, options) | {
        "retry": AsyncRetry(NoBackoff(), options.get("retries", 0), supported_errors=(redis.ConnectionError,))
    }
    waits = "wait_for_connection" in options
    match server.place:
        case Sentinels(service=service):
            arguments["connection_class"] = _AsyncMasterTlsConnection if server.tls else _AsyncMasterConnection
            pool_class: Any = _AsyncBlockingSentinelPool if waits else redis.asyncio.sentinel.SentinelConnectionPool
            pool: redis.asyncio.ConnectionPool = pool_class(service, AsyncMasterFinder(server), **arguments)
            return pool
        case UnixSocket():
            arguments["connection_class"] = _AsyncSocketConnection
        case Address():
            arguments["connection_class"] = _AsyncTlsConnection if server.tls else _AsyncConnection
    return (redis.asyncio.BlockingConnectionPool if waits else redis.asyncio.ConnectionPool)(**arguments)


def connection_class_for(server: RedisServer) -> type[AbstractConnection]:
    """Return the class of redis-py's connections to such a server."""
    match server.place:
        case Sentinels():
            return (
                redis.sentinel.SentinelManagedSSLConnection if server.tls else redis.sentinel.SentinelManagedConnection
            )
        case UnixSocket():
            return _SocketConnection
        case Address():
            return _TlsConnection if server.tls else _Connection


def tls_context(tls: Tls) -> ssl.SSLContext:
    """Return the context that redis-py makes from the same options; reads files, so it may block for milliseconds.

    Raises:
        InvalidSettingError: a file of certificates or a key cannot be used.
    """
    for option, file in (("ssl_ca_certs", tls.ca_certs), ("ssl_certfile", tls.certfile), ("ssl_keyfile", tls.keyfile)):
        try:
            if file is not None:
                Path(file).open("rb").close()
        except OSError as error:
            raise InvalidSettingError(f"the file of {option} cannot be read ({error.strerror})") from None
    try:
        return redis.asyncio.SSLConnection(**_tls_arguments(tls)).ssl_context.get()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise InvalidSettingError(
            f"the certificates, the key, its password or the ciphers of the URL's ssl_ options are no use ({reason})"
        ) from None


def sentinel_clients(server: RedisServer) -> list[redis.Redis]:
    """Return a client of each Sentinel, to be closed by the caller."""
    assert isinstance(server.place, Sentinels)
    arguments = _sentinel_arguments(server) | {"retry": Retry(NoBackoff(), 0)}
    return [redis.Redis(host, port, **arguments) for host, port in server.place.addresses]


class MasterFinder:
    """Asks the Sentinels for the master; the ``sentinel_manager`` of redis-py's pools.

    It keeps no connection to a Sentinel: there is one question for each new connection to the master, and until the
    next one a Sentinel may have gone.
    """

    def __init__(self, server: RedisServer) -> None:
        assert isinstance(server.place, Sentinels)
        self._addresses = list(server.place.addresses)
        self._arguments = _sentinel_arguments(server)

    def discover_master(self, service: str) -> Address:
        """Return the master's address.

        Raises:
            redis.ConnectionError: no Sentinel that answers knows a living master.
        """
        arguments = self._arguments | {"retry": Retry(NoBackoff(), 0)}
        with redis.sentinel.Sentinel(self._addresses, sentinel_kwargs=arguments) as sentinels:
            host, port = sentinels.discover_master(service)
            self._addresses = [_address_of(sentinel) for sentinel in sentinels.sentinels]  # who answered comes first
        return Address(host, port)


class AsyncMasterFinder:
    """The same for asyncio."""

    def __init__(self, server: RedisServer) -> None:
        assert isinstance(server.place, Sentinels)
        self._addresses = list(server.place.addresses)
        self._arguments = _sentinel_arguments(server)

    async def discover_master(self, service: str) -> Address:
        """Return the master's address; see ``MasterFinder``."""
        arguments = self._arguments | {"retry": AsyncRetry(NoBackoff(), 0)}
        async with redis.asyncio.sentinel.Sentinel(self._addresses, sentinel_kwargs=arguments) as sentinels:
            host, port = await sentinels.discover_master(service)
            self._addresses = [_address_of(sentinel) for sentinel in sentinels.sentinels]
        return Address(host, port)


class _LeavingReplicas(AbstractConnection):
    """A connection that is not used again once its server has become a replica, as it else would be for ever."""

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """Called by redis-py."""
        try:
            return super().read_response(*args, **kwargs)
        except _MOVED:
            self.mark_for_reconnect()  # type: ignore[no-untyped-call]  # redis-py's
            raise


class _Connection(_LeavingReplicas, redis.Connection):
    """To an address."""


class _TlsConnection(_LeavingReplicas, redis.SSLConnection):
    """To an address, by TLS."""


class _SocketConnection(_LeavingReplicas, redis.UnixDomainSocketConnection):
    """To a Unix socket."""


class _AsyncNoticingTheEnd(AsyncAbstractConnection):
    """A connection that says as redis-py does that it is lost, whatever the event loop."""

    async def send_packed_command(self, *args: Any, **kwargs: Any) -> None:
        """Called by redis-py."""
        try:
            await super().send_packed_command(*args, **kwargs)
        except RuntimeError as error:  # what uvloop says where asyncio itself only drops what is written
            raise redis.ConnectionError("The server has closed the connection") from error


class _AsyncMasterConnection(_AsyncNoticingTheEnd, redis.asyncio.sentinel.SentinelManagedConnection):
    """To the master that Sentinels name."""


class _AsyncMasterTlsConnection(_AsyncNoticingTheEnd, redis.asyncio.sentinel.SentinelManagedSSLConnection):
    """To the master that Sentinels name, by TLS."""


class _AsyncLeavingReplicas(_AsyncNoticingTheEnd):
    """The same as ``_LeavingReplicas`` for asyncio."""

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """Called by redis-py."""
        try:
            return await super().read_response(*args, **kwargs)
        except _MOVED:
            self.mark_for_reconnect()  # type: ignore[no-untyped-call]  # redis-py's
            raise


class _AsyncConnection(_AsyncLeavingReplicas, redis.asyncio.Connection):
    """To an address."""


class _AsyncTlsConnection(_AsyncLeavingReplicas, redis.asyncio.SSLConnection):
    """To an address, by TLS."""


class _AsyncSocketConnection(_AsyncLeavingReplicas, redis.asyncio.UnixDomainSocketConnection):
    """To a Unix socket."""


class _BlockingSentinelPool(redis.sentinel.SentinelConnectionPool, redis.BlockingConnectionPool):
    """Connections to the master, for which callers wait."""


class _AsyncBlockingSentinelPool(redis.asyncio.sentinel.SentinelConnectionPool, redis.asyncio.BlockingConnectionPool):
    """Connections to the master, for which callers wait."""


def _check(tls: Tls | None) -> None:
    """Find out now whether the files are there, since later it would look like an outage."""
    if tls is not None:
        tls_context(tls)


def _arguments(server: RedisServer, options: PoolOptions) -> dict[str, Any]:
    """Return redis-py's arguments for a pool and its connections, without those that differ for asyncio."""
    arguments: dict[str, Any] = {"db": server.db, "username": server.username, "password": server.password}
    match server.place:
        case UnixSocket(path):
            arguments["path"] = path
        case Address(host, port):
            arguments |= {"host": host, "port": port}
    if not isinstance(server.place, UnixSocket):
        arguments["socket_keepalive"] = True  # a peer that vanished is noticed, also by who only listens
    if server.tls is not None:
        arguments |= _tls_arguments(server.tls)
    names = {
        "connect_timeout": "socket_connect_timeout",
        "answer_timeout": "socket_timeout",
        "health_check_interval": "health_check_interval",
        "max_connections": "max_connections",
        "protocol": "protocol",
        "wait_for_connection": "timeout",
    }
    return arguments | {names[name]: value for name, value in options.items() if name in names}


def _sentinel_arguments(server: RedisServer) -> dict[str, Any]:
    assert isinstance(server.place, Sentinels)
    arguments: dict[str, Any] = {
        "socket_timeout": _ASK_TIMEOUT,
        "socket_connect_timeout": _ASK_TIMEOUT,
        "username": server.place.username,
        "password": server.place.password,
    }
    if server.tls is not None:
        arguments |= {"ssl": True} | _tls_arguments(server.tls)
    return arguments


def _tls_arguments(tls: Tls) -> dict[str, Any]:
    """Return redis-py's arguments for TLS: the one place where a URL's options become a connection's."""
    return {
        "ssl_cert_reqs": tls.cert_reqs,
        "ssl_check_hostname": tls.check_hostname,
        "ssl_ca_certs": tls.ca_certs,
        "ssl_ca_path": tls.ca_path,
        "ssl_ca_data": tls.ca_data,
        "ssl_certfile": tls.certfile,
        "ssl_keyfile": tls.keyfile,
        "ssl_password": tls.password or "",  # for None, OpenSSL asks on the terminal
        "ssl_min_version": tls.min_version,
        "ssl_ciphers": tls.ciphers,
        "ssl_include_verify_flags": tls.include_verify_flags,
        "ssl_exclude_verify_flags": tls.exclude_verify_flags,
    }


def _address_of(sentinel: redis.Redis | redis.asyncio.Redis) -> Address:
    arguments = sentinel.connection_pool.connection_kwargs
    return Address(arguments["host"], arguments["port"])
