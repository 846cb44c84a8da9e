"""What is shipped keeps its promises: the lock files, the wheel, the image and the compose file."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from keepstream_worker.settings import Settings

ROOT = Path(__file__).parents[2]
LOCKS = ("bench", "build", "dev", "interop", "runtime")
SHARED = ("bench", "build", "runtime")  # installed into one environment with the development lock
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("migrate", "worker")
LONG_RUNNING = ("redis", "postgres", "worker")


def entries(lock: str) -> list[str]:
    """Each requirement of a lock file with its hashes, on one line."""
    text = (ROOT / "requirements" / f"{lock}.txt").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]


def versions(lock: str) -> dict[str, Version]:
    pinned = [Requirement(entry.split(" --hash", 1)[0]) for entry in entries(lock)]
    return {requirement.name: Version(str(requirement.specifier).removeprefix("==")) for requirement in pinned}


# -- lock files --


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_requirement_is_pinned_and_has_hashes(lock: str) -> None:
    pinned = re.compile(r"[a-z0-9-]+==\S+( ; [^\\]+?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*")
    assert [entry for entry in entries(lock) if not pinned.fullmatch(entry)] == []


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_index_and_no_local_path(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    assert re.findall(r"https?://|file:|--(?:index|extra-index|find-links|trusted-host)\S*| /\w+", text) == []


@pytest.mark.parametrize("lock", SHARED)
def test_the_locks_agree_where_they_meet(lock: str) -> None:
    whole, part = versions("dev"), versions(lock)
    shared = part.keys() & whole.keys()
    assert {name: part[name] for name in shared} == {name: whole[name] for name in shared}


def test_the_development_lock_holds_the_environment_of_the_worker_and_the_build_backend() -> None:
    assert versions("dev").keys() >= versions("runtime").keys() | versions("build").keys()


def test_the_locks_hold_what_the_project_asks_for() -> None:
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    runtime = versions("runtime")
    for requirement in (Requirement(text) for group in groups for text in group):
        if requirement.name != "keepstream":
            assert requirement.specifier.contains(runtime[requirement.name]), requirement
    for name, group in PROJECT["dependency-groups"].items():
        locked = versions(name if name in {"bench", "interop"} else "dev")
        for requirement in map(Requirement, group):
            assert requirement.specifier.contains(locked[requirement.name]), requirement


# -- wheel --


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The project's wheel, built as the image builds it."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(target.glob("keepstream-*.whl")))


def test_the_wheel_carries_the_migrations_and_the_type_marker(wheel: zipfile.ZipFile) -> None:
    found = {path.relative_to(ROOT) for path in (ROOT / "migrations").rglob("*.*") if path.suffix != ".pyc"}
    expected = {f"keepstream_worker/{path}" for path in found}
    assert any(name.startswith("keepstream_worker/migrations/versions/") for name in expected)
    assert expected | {"keepstream/py.typed"} <= set(wheel.namelist())


def test_the_wheel_carries_two_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"keepstream", "keepstream_worker"}


def test_the_wheel_without_extras_requires_pydantic_only(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    required = re.findall(r"^Requires-Dist: (\S+?)[<>=;\[ ].*$", wheel.read(name).decode(), re.MULTILINE)
    optional = re.findall(r"^Requires-Dist: (\S+?)[<>=;\[ ].*; .*extra ==.*$", wheel.read(name).decode(), re.MULTILINE)
    assert set(required) - set(optional) == {"pydantic"}


# -- continuous integration --


def test_ci_runs_the_command_that_the_documents_name() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert {"make test", "make check"} <= set(script.read_text().splitlines())


# -- image --


def test_the_image_is_built_from_pinned_tags_and_hash_checked_locks() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(bases) == 2
    assert all(re.fullmatch(r"[\w/.-]+:\d[\w.-]*", base) for base in bases)
    installs = re.findall(r"install .*-r requirements/\S+", DOCKERFILE)
    assert installs
    assert all("--require-hashes" in install for install in installs)


def test_the_image_runs_as_a_numbered_user_that_is_not_root() -> None:
    assert re.findall(r"^USER (\d+)", DOCKERFILE.rpartition("\nFROM ")[2], re.MULTILINE) == ["10001"]


def test_the_worker_is_process_1_of_its_container_and_receives_the_signal() -> None:
    """A shell form would put a shell there, which does not pass SIGTERM on."""
    assert re.search(r'^ENTRYPOINT \["keepstream"\]$', DOCKERFILE, re.MULTILINE)
    assert re.search(r"^STOPSIGNAL SIGTERM$", DOCKERFILE, re.MULTILINE)
    assert re.search(r'^HEALTHCHECK .*CMD \["keepstream", ', DOCKERFILE, re.MULTILINE)
    assert all(isinstance(SERVICES[name]["command"], list) and not SERVICES[name].get("init") for name in OURS)


# -- compose file --


def test_each_service_that_stays_has_a_health_check() -> None:
    for name in LONG_RUNNING:
        assert "healthcheck" in SERVICES[name] or ("build" in SERVICES[name] and "HEALTHCHECK" in DOCKERFILE), name


def test_each_service_image_is_pinned_by_tag() -> None:
    for name, service in SERVICES.items():
        assert re.fullmatch(r"[\w/.-]+:(\d[\w.-]*|\$\{KEEPSTREAM_TAG:-\d[\w.]*\})", service["image"]), name


def test_the_image_tag_is_the_projects_version() -> None:
    assert SERVICES["worker"]["image"] == f"keepstream:${{KEEPSTREAM_TAG:-{PROJECT['project']['version']}}}"


def test_no_service_runs_as_root_or_can_gain_rights() -> None:
    for name, service in SERVICES.items():
        assert "build" in service or service["user"] not in {"root", "0"}, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
    assert all(SERVICES[name]["read_only"] for name in OURS)


def test_no_secret_is_written_into_the_compose_file() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|KEY|TOKEN|SECRET", variable):
                assert value is None or re.fullmatch(r"\$\{\w+:\?.+\}", value), f"{name}: {variable}"
            else:
                assert value is None or not re.search(r"://[^/@]*:[^/@]+@", value), f"{name}: {variable}"


def test_the_worker_is_given_longer_to_stop_than_it_takes() -> None:
    grace = int(SERVICES["worker"]["stop_grace_period"].removesuffix("s"))
    assert grace >= Settings.model_fields["shutdown_grace"].default + 15


def test_compose_sets_only_settings_that_exist() -> None:
    known = {f"KEEPSTREAM_{field.upper()}" for field in Settings.model_fields}
    used = {name for service in OURS for name in SERVICES[service]["environment"] if name.startswith("KEEPSTREAM_")}
    assert used <= known


def test_redis_refuses_writes_rather_than_forgetting_work() -> None:
    command = " ".join(SERVICES["redis"]["command"])
    assert "--maxmemory-policy noeviction" in command
    assert "--appendonly yes --appendfsync everysec" in command


def test_workers_start_after_the_migrations_have_succeeded() -> None:
    assert SERVICES["migrate"]["command"] == ["migrate"]
    assert SERVICES["worker"]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert SERVICES["worker"]["depends_on"]["redis"]["condition"] == "service_healthy"


def test_data_survives_the_containers() -> None:
    assert {volume.partition(":")[0] for name in ("redis", "postgres") for volume in SERVICES[name]["volumes"]} == set(
        COMPOSE["volumes"]
    )
