"""Errors of Redis: which of them pass, and what is to be done about the others.

In: what redis-py raised, from ``keepstream.client.redis`` and ``keepstream.client.redis_aio``.  Out: what the follower
is thrown, which waits an outage out and hands the rest to its reader.
"""

import ssl
from collections.abc import Callable, Iterator
from typing import Final

from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    InvalidResponse,
    NoPermissionError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from keepstream.client.follower import DisconnectedError
from keepstream.errors import InvalidSettingError, KeepstreamError, UnexpectedError

#: How the replies begin that stay the same however long one waits.
_LASTING_REPLIES: Final = ("WRONGTYPE", "unknown command", "ERR unknown command", "unknown subcommand")


def explain(error: Exception, check_open: Callable[[], None]) -> Exception:
    """Return what a follower is thrown for the error of an operation; ``check_open`` raises if its client is closed."""
    try:
        check_open()  # the error may be a result of that
    except KeepstreamError as closed:
        return closed
    known = translate(error)
    if isinstance(known, KeepstreamError | DisconnectedError):
        return known
    unexpected = UnexpectedError(f"the job cannot be followed ({type(error).__name__})")
    unexpected.__cause__ = error
    return unexpected


def translate(error: Exception) -> Exception:
    """Return what the follower is thrown: ``DisconnectedError`` with the reason for an outage, which it survives.

    What waiting does not mend becomes an ``InvalidSettingError`` that says what to change.
    """
    # StoreUnavailableError is an OSError too, but not an outage of Redis.
    if isinstance(error, KeepstreamError | DisconnectedError):
        return error
    if isinstance(error, AuthenticationError | AuthorizationError | NoPermissionError):
        return InvalidSettingError(
            f"Redis does not let this user follow the job ({type(error).__name__}); check the user and password of the"
            " Redis URL, and that its ACL allows the tenant's log and channel"
        )
    if (tls := _lasting_tls_error(error)) is not None:
        return tls
    if isinstance(error, AskError):  # and MovedError
        return InvalidSettingError("this Redis is part of a cluster, which is not supported; check the Redis URL")
    if isinstance(error, ResponseError) and str(error).startswith(_LASTING_REPLIES):
        return InvalidSettingError(
            f"Redis cannot be used to follow the job ({type(error).__name__}: {str(error)[:200]});"
            " check the Redis URL and the prefix"
        )
    # What a server answers in an outage has many names, and new ones come; all others pass, as far as one can know.
    if isinstance(error, ResponseError | BusyLoadingError):
        return DisconnectedError(f"it answers with an error ({type(error).__name__}: {str(error)[:200]})")
    if isinstance(error, RedisConnectionError | RedisTimeoutError | OSError):
        return DisconnectedError(f"it does not answer ({_cause(error)})")
    if isinstance(error, InvalidResponse | RedisError):
        # Not its message, which may quote what was read.
        return InvalidSettingError(
            f"Redis cannot be used to follow the job ({type(error).__name__}); check the Redis URL and the prefix"
        )
    return error


def _lasting_tls_error(error: Exception) -> InvalidSettingError | None:
    for cause in _chain(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return InvalidSettingError(
                f"Redis' certificate is not trusted ({cause.verify_message or 'verification failed'}); name the file of"
                " its CA in the Redis URL: rediss://…?ssl_ca_certs=/path/ca.pem, and the host as the certificate does"
            )
        if isinstance(cause, ssl.SSLError) and cause.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            return InvalidSettingError(
                "the server of the Redis URL does not speak TLS there; write redis:// or name its TLS port"
            )
    return None


def _cause(error: Exception) -> str:
    """Return the operating system's reason if there is one; the addresses in redis-py's messages are no help."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
