"""Which Redis a URL names: read in one way for every connection, so that what is accepted works everywhere.

In: a URL, from settings, the client and the command line.
Out: a ``RedisServer``, to whoever connects; or the reason why the URL cannot be used, and what to write instead.

A message never repeats a value of the URL: it could be a piece of the password.
"""

import re
import ssl
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, quote, unquote

from keepstream.errors import InvalidSettingError
from keepstream.names import nearest

_REDIS_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_EXAMPLE: Final = "redis://host:6379/0"
_SENTINEL_EXAMPLE: Final = "redis+sentinel://host1:26379,host2:26379,host3:26379/mymaster/0"
_UNQUOTED: Final = "a '/', '?' or '#' in the URL's user or password has to be percent-encoded: %2F, %3F, %23"
_SPELLINGS: Final = "redis://, rediss:// (TLS), unix://, redis+sentinel:// or rediss+sentinel:// (TLS)"

#: Brokers that Celery knows and this system does not use.
_OTHER_BROKERS: Final = frozenset(
    {
        "amqp",
        "amqps",
        "azureservicebus",
        "azurestoragequeues",
        "confluentkafka",
        "consul",
        "etcd",
        "filesystem",
        "gcpubsub",
        "kafka",
        "memory",
        "mongodb",
        "mqtt",
        "pulsar",
        "pyamqp",
        "qpid",
        "slmq",
        "sqla",
        "sqlalchemy",
        "sqs",
        "zookeeper",
    }
)
#: In these the path is that of a file, in which an "@" means nothing.
_WITH_PATH: Final = frozenset({"unix", "redis+socket"})
#: Options of redis-py that a URL may not decide, because each link has its own reasons for its value.
_DECIDED_ELSEWHERE: Final = frozenset(
    {
        "client_name",
        "decode_responses",
        "encoding",
        "encoding_errors",
        "health_check_interval",
        "legacy_responses",
        "max_connections",
        "protocol",
        "retry_on_error",
        "retry_on_timeout",
        "socket_connect_timeout",
        "socket_keepalive",
        "socket_read_size",
        "socket_timeout",
        "timeout",
    }
)


class _Parts(NamedTuple):
    """A URL, cut and not yet decoded."""

    scheme: str
    userinfo: str
    hosts: str
    path: str
    query: str


class Address(NamedTuple):
    """A host, by name or IP address without brackets, and a TCP port."""

    host: str
    port: int


class UnixSocket(NamedTuple):
    """The path of a Unix domain socket."""

    path: str


@dataclass(frozen=True, slots=True)
class Sentinels:
    """The Sentinels that know where a service's master is."""

    service: str  #: What the Sentinels call the group of servers, ``mymaster`` for instance.
    addresses: tuple[Address, ...]
    username: str | None = None  #: Of the Sentinels themselves, not of the Redis they watch.
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Tls:
    """How the server's certificate is checked, and which one is shown to it; as redis-py's options ``ssl_…``."""

    cert_reqs: str = "required"  #: ``required``, ``optional`` (for a client the same) or ``none``.
    check_hostname: bool = True
    ca_certs: str | None = None  #: File of certificates that are trusted besides the system's.
    ca_path: str | None = None  #: Directory of such certificates.
    ca_data: str | None = None  #: Such certificates themselves, as PEM.
    certfile: str | None = None
    keyfile: str | None = None
    password: str | None = field(default=None, repr=False)  #: Of the key file.
    min_version: ssl.TLSVersion | None = None
    ciphers: str | None = None
    include_verify_flags: tuple[ssl.VerifyFlags, ...] | None = None
    exclude_verify_flags: tuple[ssl.VerifyFlags, ...] | None = None

    @property
    def verified(self) -> bool:
        """Whether nobody but the server can answer: its certificate and its name are checked."""
        return self.cert_reqs != "none" and self.check_hostname


@dataclass(frozen=True, slots=True)
class RedisServer:
    """A Redis database and how to reach it: all that a URL says."""

    place: Address | UnixSocket | Sentinels
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Tls | None = None  #: None: no TLS. With Sentinels it holds for them and for the servers they name.

    def __str__(self) -> str:
        """The place, for people: without user and password."""
        if isinstance(self.place, UnixSocket):
            place = self.place.path
        elif isinstance(self.place, Address):
            place = _join([self.place])
        else:
            place = f"{self.place.service} of the Sentinels {_join(self.place.addresses)}"
        return f"{place}, database {self.db}{', TLS' if self.tls else ''}"


def parse_redis_url(url: str) -> RedisServer:
    """Return the server that ``url`` names.

    Accepted are redis-py's ``redis://``, ``rediss://`` and ``unix://``, Celery's ``redis+socket://`` and
    ``sentinel://…;sentinel://…``, and ``redis+sentinel://`` and ``rediss+sentinel://``.

    Raises:
        InvalidSettingError: it names none, or something that cannot work.
    """
    url = url.strip()  # as a file gives it, with a line feed
    scheme, separator, _ = url.partition("://")
    scheme = scheme.lower()
    if not separator:
        raise InvalidSettingError(f"a Redis URL looks like {_EXAMPLE}")
    match scheme:
        case "redis" | "rediss":
            return _at_address(_split(url), tls=scheme == "rediss")
        case "unix" | "redis+socket":
            return _at_socket(_split(url), database_option="db" if scheme == "unix" else "virtual_host")
        case "redis+sentinel" | "rediss+sentinel":
            return _behind_sentinels(_split(url), tls=scheme == "rediss+sentinel")
        case "sentinel":
            return _behind_celery_sentinels(url)
    if "cluster" in scheme:
        raise InvalidSettingError(
            "a Redis Cluster cannot be used, because Celery cannot take a queue from one; name a single Redis"
            f" ({_EXAMPLE}), or Sentinels ({_SENTINEL_EXAMPLE})"
        )
    if scheme in _OTHER_BROKERS:
        raise InvalidSettingError(f"{scheme}:// is no Redis, and jobs are queued on Redis only; write {_SPELLINGS}")
    raise InvalidSettingError(f"a Redis URL begins with {_SPELLINGS}")


def with_password(url: str, password: str | None) -> str:
    """Return ``url`` with ``password``, unless it names one itself.

    Args:
        url: Of any Redis, Sentinels or sockets; it may name a user.
        password: As it is, whatever its characters; None or empty: the URL stays as it is.

    Raises:
        InvalidSettingError: the URL cannot be used.
    """
    if not password or parse_redis_url(url).password:
        return url
    # As an option, which each spelling has; of Celery's several URLs any may hold it.
    first, separator, others = url.partition(";") if url.lstrip().startswith("sentinel:") else (url, "", "")
    return f"{first.rstrip()}{'&' if '?' in first else '?'}password={quote(password, safe='')}{separator}{others}"


def _at_address(parts: _Parts, *, tls: bool) -> RedisServer:
    options = _Options(parts.query)
    addresses = _addresses(parts, _REDIS_PORT)
    if len(addresses) > 1:
        raise InvalidSettingError(f"several hosts are Sentinels; these are written {_SENTINEL_EXAMPLE}")
    server = _server(
        addresses[0],
        _userinfo(parts),
        options,
        databases=[parts.path.strip("/"), options.take("db")],
        tls=options.tls() if tls else None,
    )
    options.refuse_rest()
    return server


def _at_socket(parts: _Parts, *, database_option: str) -> RedisServer:
    options = _Options(parts.query)
    if not parts.path.strip("/"):
        raise InvalidSettingError("the path of the socket is missing: unix:///run/redis/redis.sock?db=0")
    if parts.hosts:
        raise InvalidSettingError(
            "a socket has no host, so its path follows three slashes: unix:///run/redis.sock?db=0"
        )
    path = unquote(parts.path)
    server = _server(UnixSocket(path), _userinfo(parts), options, databases=[options.take(database_option)], tls=None)
    options.refuse_rest()
    return server


def _behind_sentinels(parts: _Parts, *, tls: bool) -> RedisServer:
    service, _, database = unquote(parts.path).strip("/").partition("/")
    if not service or service.isdecimal():
        raise InvalidSettingError(f"the Sentinels' name of the service is missing after the hosts: {_SENTINEL_EXAMPLE}")
    options = _Options(parts.query)
    sentinels = Sentinels(
        service,
        _addresses(parts, _SENTINEL_PORT),
        username=options.take("sentinel_username"),
        password=options.take("sentinel_password"),
    )
    databases = [database, options.take("db")]
    server = _server(sentinels, _userinfo(parts), options, databases=databases, tls=options.tls() if tls else None)
    options.refuse_rest()
    return server


def _behind_celery_sentinels(urls: str) -> RedisServer:
    """Read Celery's spelling: one URL for each Sentinel, and the rest of it in any of them."""
    parts = [_split(url.strip()) for url in urls.split(";") if url.strip()]
    if any(part.scheme != "sentinel" for part in parts):
        raise InvalidSettingError(
            "each Sentinel is written sentinel://host:26379, with ';' between them; all of them at once, and with TLS,"
            f" are written {_SENTINEL_EXAMPLE}"
        )
    options = _Options("&".join(part.query for part in parts if part.query))
    service = options.take("master_name")
    if not service:
        raise InvalidSettingError(
            "the Sentinels' name of the service is missing: add ?master_name=mymaster at the end of the URL"
        )
    sentinels = Sentinels(
        service,
        tuple(address for part in parts for address in _addresses(part, _SENTINEL_PORT)),
        username=options.take("sentinel_username"),
        password=options.take("sentinel_password"),
    )
    users = list(dict.fromkeys(user for user in map(_userinfo, parts) if user != (None, None)))
    if len(users) > 1:
        raise InvalidSettingError("the Sentinels' URLs name different users or passwords; these are those of the Redis")
    databases = [*(part.path.strip("/") for part in parts), options.take("db")]
    server = _server(sentinels, users[0] if users else (None, None), options, databases=databases, tls=None)
    options.refuse_rest()
    return server


def _server(
    place: Address | UnixSocket | Sentinels,
    user: tuple[str | None, str | None],
    options: "_Options",
    *,
    databases: Iterable[str | None],
    tls: Tls | None,
) -> RedisServer:
    username, password = user
    named = {database for database in databases if database}
    if len(named) > 1:
        raise InvalidSettingError("the URL names two databases; leave one of them out")
    database = unquote(named.pop()) if named else "0"
    if not re.fullmatch(r"[0-9]{1,9}", database):
        raise InvalidSettingError(f"a Redis database is a number: {_EXAMPLE}")
    return RedisServer(
        place,
        int(database),
        username=options.take("username") or username,
        password=options.take("password") or password,
        tls=tls,
    )


def _split(url: str) -> _Parts:
    # Not urlsplit: it knows one host, and silently drops what it takes for a fragment or a stray character.
    found = re.fullmatch(
        r"(?P<scheme>[^:]+)://(?P<netloc>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?", url, re.DOTALL
    )
    if found is None:
        raise InvalidSettingError(_UNQUOTED)
    userinfo, _, hosts = found["netloc"].rpartition("@")
    parts = _Parts(found["scheme"].lower(), userinfo, hosts, found["path"], found["query"] or "")
    if parts.scheme not in _WITH_PATH and "@" in parts.path:
        raise InvalidSettingError(_UNQUOTED)
    return parts


def _userinfo(parts: _Parts) -> tuple[str | None, str | None]:
    username, _, password = parts.userinfo.partition(":")
    return unquote(username) or None, unquote(password) or None


def _addresses(parts: _Parts, default_port: int) -> tuple[Address, ...]:
    return tuple(_address(host, default_port) for host in parts.hosts.split(","))


def _address(text: str, default_port: int) -> Address:
    found = re.fullmatch(r"(?:\[(?P<ip>[^\[\]]+)\]|(?P<name>[^\[\]:]*))(?::(?P<port>[0-9]{0,5}))?", text)
    if found is None:
        raise InvalidSettingError(
            f"the URL's host or port cannot be read; it looks like {_EXAMPLE}, or redis://[::1]:6379/0, and ':', '@',"
            " '/', '?' and '#' in a password are percent-encoded"
        )
    port = int(found["port"] or default_port)
    if not 0 < port < 65536:
        raise InvalidSettingError("the URL's port is no port: it is a number from 1 to 65535")
    host = unquote(found["ip"] or found["name"]) or "localhost"
    try:
        host.encode("idna")  # as every look-up of it does
    except UnicodeError:
        raise InvalidSettingError("the URL's host is no host name: its parts have 1 to 63 characters") from None
    return Address(host, port)


def _join(addresses: Iterable[Address]) -> str:
    return ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in addresses)


# -- options --


def _text(value: str) -> str:
    return value


def _truth(value: str) -> bool:
    match value.lower():
        case "true" | "yes" | "on" | "1":
            return True
        case "false" | "no" | "off" | "0":
            return False
    raise ValueError("true or false")


def _cert_reqs(value: str) -> str:
    plain = value.lower().removeprefix("cert_")  # Celery writes CERT_NONE
    if plain not in {"required", "optional", "none"}:
        raise ValueError("required, or none for a server whose certificate nobody checks")
    return plain


def _tls_version(value: str) -> ssl.TLSVersion:
    try:
        if value.isdecimal():  # redis-py reads a number
            return ssl.TLSVersion(int(value))
        return ssl.TLSVersion[value.replace("v", "V").replace(".", "_").replace("TLSV", "TLSv")]
    except (KeyError, ValueError):
        raise ValueError("TLSv1.2 or TLSv1.3") from None


def _verify_flags(value: str) -> tuple[ssl.VerifyFlags, ...]:
    try:
        return tuple(ssl.VerifyFlags[flag.strip()] for flag in value.strip("[]").split(","))
    except KeyError:
        raise ValueError("names of ssl.VerifyFlags, VERIFY_X509_STRICT for instance") from None


#: For each option of TLS how it is read; the reader raises ``ValueError`` with the values that there are.
_TLS_OPTIONS: Final = MappingProxyType[str, Callable[[str], Any]](
    {
        "ssl_cert_reqs": _cert_reqs,
        "ssl_check_hostname": _truth,
        "ssl_ca_certs": _text,
        "ssl_ca_path": _text,
        "ssl_ca_data": _text,
        "ssl_certfile": _text,
        "ssl_keyfile": _text,
        "ssl_password": _text,
        "ssl_min_version": _tls_version,
        "ssl_ciphers": _text,
        "ssl_include_verify_flags": _verify_flags,
        "ssl_exclude_verify_flags": _verify_flags,
    }
)


class _Options:
    """The options of a URL, each of which has to be taken by somebody."""

    def __init__(self, query: str) -> None:
        self._given: dict[str, str] = {}
        self._known: list[str] = []
        for name, value in parse_qsl(query, keep_blank_values=True):
            if self._given.setdefault(name, value) != value:
                raise InvalidSettingError(f"{_named(name)} stands in the URL twice; leave one of them out")

    def take(self, name: str) -> str | None:
        """Return an option's value, or None if it is not given or empty."""
        self._known.append(name)
        return self._given.pop(name, None) or None

    def tls(self) -> Tls:
        """Return what the options say about TLS."""
        return Tls(**dict(self._tls_values()))

    def _tls_values(self) -> Iterator[tuple[str, Any]]:
        for name, read in _TLS_OPTIONS.items():
            text = self.take(name)
            if text is None:
                continue
            try:
                yield name.removeprefix("ssl_"), read(text)
            except ValueError as error:
                raise InvalidSettingError(f"the option {name} is {error}") from None

    def refuse_rest(self) -> None:
        """Refuse what nobody has taken."""
        for name in self._given:
            if name in _DECIDED_ELSEWHERE:
                raise InvalidSettingError(f"the option {name} is not the URL's to decide; leave it out")
            if name.startswith("ssl_") and "ssl_cert_reqs" not in self._known:
                raise InvalidSettingError(
                    f"the option {_named(name)} says how TLS is done, and this URL means no TLS; write rediss:// or"
                    " rediss+sentinel://"
                )
            guess = nearest(name, self._known)
            advice = f"did you mean {guess}?" if guess else f"it knows {', '.join(sorted(self._known))}"
            raise InvalidSettingError(f"the URL has no option {_named(name)}; {advice}")


def _named(option: str) -> str:
    """Return an option's name, unless it could be a piece of a password that was not percent-encoded."""
    return option if re.fullmatch("[a-z_]{1,40}", option) else "of that name"
