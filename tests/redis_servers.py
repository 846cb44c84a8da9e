"""Servers that Redis URLs can lead to: behind TLS, behind Sentinels, at a Unix socket.

In: the embedded Valkey; Debian's Redis where a test asks for it.
Out: their URLs, to the tests; faults: a certificate that is not right, a fail-over.
"""

import asyncio
import contextlib
import gc
import resource
import ssl
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest
import redis
import trustme
from typing_extensions import override

from keepstream_worker.dev_stack.embedded import EmbeddedProcess, EmbeddedValkey, free_port
from tests.services import debian_program

_PIECE: Final = 65_536
SERVICE: Final = "mymaster"  #: What the Sentinels call their servers.
_TIMEOUT: Final = 60.0  #: Seconds for Sentinels to agree, which takes a second or two on an idle machine.


class Certificates:
    """An authority of the test's own, and what it has issued, as files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._authority = trustme.CA()
        self.authority_file = directory / "ca.pem"  #: The authority's own certificate, for ``ssl_ca_certs``.
        self._authority.cert_pem.write_to_path(str(self.authority_file))

    def issue(self, *names: str) -> tuple[Path, Path]:
        """Issue a certificate for these host names and addresses; return its file and its key's."""
        issued = self._authority.issue_cert(*names)
        stem = names[0].replace("*", "any")
        certificate, key = self._directory / f"{stem}.pem", self._directory / f"{stem}.key"
        certificate.unlink(missing_ok=True)
        for part in issued.cert_chain_pems:
            part.write_to_path(str(certificate), append=True)
        issued.private_key_pem.write_to_path(str(key))
        return certificate, key

    def server_context(self, *names: str, clients: bool = False) -> ssl.SSLContext:
        """Return the context of a server that has these names; ``clients``: and asks for their certificates."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*self.issue(*names))
        if clients:
            context.load_verify_locations(self.authority_file)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


#: For tests whose clients leave a ``RedisTls`` in the middle of the handshake: asyncio may lose sight of what it
#: had opened for them, which is told of whenever the garbage collector finds it.
HANDSHAKES_BREAK: Final = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


class RedisTls:
    """TLS in front of a local server's port; a context manager that listens while it is entered.

    The embedded Valkey is built without TLS, so its connections are decrypted here.
    """

    def __init__(self, target: int, context: ssl.SSLContext) -> None:
        self.port = free_port()
        self._target = target
        self._context = context
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="tls", daemon=True)
        self._connections: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self.served = 0  #: Clients that have accepted the present certificate.

    def url(self, host: str = "localhost", *, db: int = 0, user: str = "", **options: str) -> str:
        """Return the URL, with these options; ``user``: what stands before the ``@``."""
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"rediss://{user}{'@' if user else ''}{host}:{self.port}/{db}?{query}"

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        asyncio.run_coroutine_threadsafe(self._end_rest(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        # Clients that left in the middle of their handshake: asyncio has lost sight of what it opened for them.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()

    def use(self, context: ssl.SSLContext) -> None:
        """End all connections, and serve new ones by another context: with another certificate, for instance."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._context = context
        self.served = 0
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._context)

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._connections:
            writer.transport.abort()
        await asyncio.gather(*self._connections.values(), return_exceptions=True)

    async def _end_rest(self) -> None:
        """End what had no connection yet, in the middle of its handshake for instance."""
        while True:
            for transport in list(self._loop._transports.values()):  # type: ignore[attr-defined]  # else unknown
                transport.abort()
            await asyncio.sleep(0)  # what was aborted is closed in the loop's next round
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            if not rest:
                return
            # Not cancelled: a connection that was just accepted would not be closed.
            await asyncio.wait(rest, timeout=0.1)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[writer] = task
        self.served += 1
        try:
            target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self._target)
            try:
                async with asyncio.TaskGroup() as directions:
                    directions.create_task(_forward(reader, target_writer))
                    directions.create_task(_forward(target_reader, writer))
            finally:
                target_writer.close()
        except* OSError:
            pass  # either side is gone, and so is the other now
        finally:
            del self._connections[writer]
            writer.transport.abort()


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(_PIECE):
        writer.write(piece)
        await writer.drain()
    raise ConnectionResetError


class ValkeyAtSocket(EmbeddedValkey):
    """A Valkey that listens at a Unix socket as well."""

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.directory / "redis.sock"

    @override
    def _command(self) -> list[str]:
        return [*super()._command(), "--unixsocket", str(self.socket)]


class DebianRedis(EmbeddedProcess):
    """Debian's Redis, at a TLS port only, or as a Sentinel that speaks TLS only."""

    def __init__(
        self, certificates: Certificates, *, configuration: tuple[str, ...] = (), sentinel: bool = False
    ) -> None:
        binary = debian_program("redis-server")
        super().__init__("debian redis")
        self.port = free_port()
        self._binary = binary
        self._options_of_role = ["--sentinel"] if sentinel else ["--save", ""]
        certificate, key = certificates.issue("127.0.0.1", "localhost")
        self._configuration = self.directory / "redis.conf"
        lines = (
            "port 0",
            f"tls-port {self.port}",
            "bind 127.0.0.1",
            f"dir {self.directory}",
            f"tls-cert-file {certificate}",
            f"tls-key-file {key}",
            f"tls-ca-cert-file {certificates.authority_file}",
            "tls-auth-clients no",
            "tls-replication yes",
            *configuration,
        )
        self._configuration.write_text("\n".join(lines) + "\n")

    @override
    def _command(self) -> list[str]:
        return [str(self._binary), str(self._configuration), *self._options_of_role]

    @override
    def _is_ready(self) -> bool:
        with redis.Redis(port=self.port, ssl=True, ssl_cert_reqs="none", socket_timeout=5) as client:
            try:
                return bool(client.info("server")["process_id"] == self.pid)
            except redis.RedisError:
                return False


class ClusterNode(EmbeddedValkey):
    """A node of a Redis Cluster, by itself."""

    @override
    def _command(self) -> list[str]:
        # The port for other nodes would be this one's and 10,000, where anybody may have a connection.
        return [*super()._command(), "--cluster-enabled", "yes", "--cluster-port", str(free_port())]


class ReplicatedValkey(EmbeddedValkey):
    """A Valkey that is the replica of another, or their first master. It remembers which over restarts."""

    def __init__(
        self, master: EmbeddedValkey | None = None, password: str | None = None, *, persistent: bool = False
    ) -> None:
        super().__init__(persistent=persistent)
        self.password = password
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {self.directory}",
            'save ""',
            f"appendonly {'yes' if persistent else 'no'}",
            "repl-diskless-sync-delay 0",
            "repl-ping-replica-period 1",
        ]
        if master is not None:
            lines.append(f"replicaof 127.0.0.1 {master.port}")
        if password is not None:
            lines += [f"requirepass {password}", f"masterauth {password}"]
        self._file = self.directory / "valkey.conf"  # Sentinels have it keep there what it has become
        self._file.write_text("\n".join(lines) + "\n")

    @override
    def _command(self) -> list[str]:
        return [str(self._binary), str(self._file)]

    @override
    def _options(self) -> dict[str, Any]:
        return {"restore_signals": False}  # so that a full disk is an error, and not SIGXFSZ

    @override
    def _is_ready(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.info("server")["process_id"] == self.pid)
            except redis.RedisError:
                return False

    def client(self) -> redis.Redis:
        """Return a client of this very server."""
        return redis.Redis(port=self.port, password=self.password, socket_timeout=5, decode_responses=True)

    def fill_disk(self) -> None:
        """Let no file of the server grow any more, as if its disk were full (Linux only)."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))

    def free_disk(self) -> None:
        """End ``fill_disk``."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class Sentinel(EmbeddedProcess):
    """One Sentinel, which watches one master and takes it for dead after so many seconds of silence."""

    def __init__(
        self, master: ReplicatedValkey, *, quorum: int, dead_after: float, password: str | None = None
    ) -> None:
        super().__init__("sentinel")
        self._binary = master._binary
        self.port = free_port()
        self.password = password
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {self.directory}",
            f"sentinel monitor {SERVICE} 127.0.0.1 {master.port} {quorum}",
            f"sentinel down-after-milliseconds {SERVICE} {int(dead_after * 1000)}",
            f"sentinel failover-timeout {SERVICE} 10000",
        ]
        if master.password is not None:
            lines.append(f"sentinel auth-pass {SERVICE} {master.password}")
        if password is not None:
            lines += [f"requirepass {password}", f"sentinel sentinel-pass {password}"]
        self._file = self.directory / "sentinel.conf"  # it keeps what it learns in this file
        self._file.write_text("\n".join(lines) + "\n")

    @override
    def _command(self) -> list[str]:
        return [str(self._binary), str(self._file), "--sentinel"]

    @override
    def _is_ready(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.info("server")["process_id"] == self.pid)
            except redis.RedisError:
                return False

    def client(self) -> redis.Redis:
        """Return a client of this very Sentinel."""
        return redis.Redis(port=self.port, password=self.password, socket_timeout=5, decode_responses=True)

    def state(self) -> dict[str, Any]:
        """Return what it knows of the master."""
        with self.client() as client:
            state: dict[str, Any] = client.sentinel_master(SERVICE)
        return state


class SentinelSet:
    """A master, its replicas, and three Sentinels; a context manager that starts them, and gives them time to agree.

    Args:
        replicas: Servers besides the master.
        persistent: Whether each write is in a file before it is acknowledged.
        password: Of the servers.
        sentinel_password: Of the Sentinels.
        dead_after: Seconds of silence after which a master is replaced: by default more than a living one of a busy
            machine is silent for.
    """

    def __init__(
        self,
        *,
        replicas: int = 1,
        persistent: bool = False,
        password: str | None = None,
        sentinel_password: str | None = None,
        dead_after: float = 30.0,
    ) -> None:
        first = ReplicatedValkey(password=password, persistent=persistent)
        others = (ReplicatedValkey(first, password, persistent=persistent) for _ in range(replicas))
        self.servers = [first, *others]
        self.sentinels = [
            Sentinel(first, quorum=2, dead_after=dead_after, password=sentinel_password) for _ in range(3)
        ]
        self._password = password
        self._sentinel_password = sentinel_password

    def __enter__(self) -> Self:
        try:
            for server in self.servers:
                server.start()
            with ThreadPoolExecutor(len(self.sentinels)) as threads:
                list(threads.map(Sentinel.start, self.sentinels))
            self.wait_until_settled()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything."""
        for process in (*self.sentinels, *self.servers):
            process.close()

    @property
    def url(self) -> str:
        """The URL of the servers' database 0, by the Sentinels."""
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        user = f":{self._password}@" if self._password else ""
        option = f"?sentinel_password={self._sentinel_password}" if self._sentinel_password else ""
        return f"redis+sentinel://{user}{hosts}/{SERVICE}/0{option}"

    @property
    def master(self) -> ReplicatedValkey:
        """The server that the first Sentinel that answers calls the master."""
        for sentinel in self.sentinels:
            with contextlib.suppress(redis.RedisError):
                port = sentinel.state()["port"]
                return next(server for server in self.servers if server.port == port)
        raise AssertionError("no Sentinel answers")

    def wait_until_settled(self) -> None:
        """Wait until the Sentinels know each other and the replicas, and these are in step with a living master."""
        self._wait(self._agreed, "the Sentinels to know each other and the replicas")

    def order_fail_over(self) -> ReplicatedValkey:
        """Have the Sentinels replace a living master, which learns of it only seconds later; return the new master."""
        old = self.master

        def ordered() -> bool:  # refused while it has not heard of a replica for some seconds
            with self.sentinels[0].client() as client:
                client.execute_command("SENTINEL", "FAILOVER", SERVICE)
            return True

        self._wait(ordered, "a Sentinel to take the order")
        return self.wait_for_new_master(old)

    def hand_over(self) -> ReplicatedValkey:
        """Let a replica take over from a living master, which becomes a replica; return the new master."""
        old = self.master
        self.order_fail_over()
        # Until it knows, it goes on taking writes, which it will forget.
        self._wait(lambda: _role(old) == "slave", "the old master to know that it is a replica")
        return self.master

    def fail_over(self) -> ReplicatedValkey:
        """Kill the master, and wait until a replica has taken over; return the new master."""
        old = self.master
        old.kill()
        return self.wait_for_new_master(old)

    def wait_for_new_master(self, old: ReplicatedValkey) -> ReplicatedValkey:
        """Wait until all Sentinels name the same new master, and it says so itself."""

        def changed() -> bool:
            ports = {sentinel.state()["port"] for sentinel in self.sentinels}
            if len(ports) > 1 or ports == {old.port}:
                return False
            return _role(self.master) == "master"

        self._wait(changed, "a new master")
        return self.master

    def _agreed(self) -> bool:
        states = [sentinel.state() for sentinel in self.sentinels]
        return all(
            state["num-other-sentinels"] == len(self.sentinels) - 1
            and state["num-slaves"] == len(self.servers) - 1
            and state["flags"] == "master"
            for state in states
        ) and all(self._in_step(server) for server in self.servers if server.port != states[0]["port"])

    @staticmethod
    def _in_step(replica: ReplicatedValkey) -> bool:
        with replica.client() as client:
            return bool(client.info("replication").get("master_link_status") == "up")

    @staticmethod
    def _wait(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _TIMEOUT
        while time.monotonic() < deadline:
            with contextlib.suppress(redis.RedisError):
                if condition():
                    return
            time.sleep(0.05)
        raise AssertionError(f"waited {_TIMEOUT:g} s in vain for {what}")


def _role(server: ReplicatedValkey) -> str:
    with server.client() as client:
        return str(client.info("replication")["role"])
