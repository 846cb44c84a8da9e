"""``import keepstream`` costs next to nothing, and its base can be used by a service that has only pydantic."""

import subprocess
import sys
from importlib import import_module
from importlib.metadata import packages_distributions

import pytest

import keepstream

pytestmark = pytest.mark.slow

# Pydantic and its own requirements. All else that happens to be installed here is refused to the probe.
LEAN = {"keepstream", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
CLIENTS = {"AsyncClient", "Client"}


def probe(refused: set[str]) -> str:
    """Return the beginning of a program in which the packages ``refused`` are not installed."""
    return f"""
import sys
from importlib.abc import MetaPathFinder

class Service(MetaPathFinder):
    refused = {sorted(refused)}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.refused:
            raise ModuleNotFoundError(f"{{name}} is not installed in this service", name=name)

sys.meta_path.insert(0, Service())

import keepstream
"""


LEAN_SERVICE = probe({"keepstream_worker", "migrations", *packages_distributions()} - LEAN)
USE_OF_THE_BASE = f"""
for name in set(keepstream.__all__) - {CLIENTS}:
    getattr(keepstream, name)
job = keepstream.Job(request={{"model": "m", "messages": [{{"role": "user", "content": "hi"}}]}})
assert keepstream.parse_job(job.model_dump(mode="json", exclude_none=True)) == job
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def test_the_base_needs_pydantic_only() -> None:
    done = run(LEAN_SERVICE + USE_OF_THE_BASE)
    assert done.returncode == 0, done.stderr


def test_the_probe_notices_a_heavier_import() -> None:
    assert "celery is not installed in this service" in run(LEAN_SERVICE + "\nimport celery").stderr


def test_importing_the_package_loads_nothing_but_itself() -> None:
    code = "import sys; before = set(sys.modules); import keepstream; print(*set(sys.modules) - before)"
    loaded = {name.partition(".")[0] for name in run(code).stdout.split()}
    assert "keepstream" in loaded
    assert loaded - {"keepstream"} <= sys.stdlib_module_names


@pytest.mark.parametrize("name", sorted(CLIENTS))
@pytest.mark.parametrize("how", ["from keepstream import {}", "import keepstream; keepstream.{}"])
def test_a_client_without_its_extra_says_what_to_install(name: str, how: str) -> None:
    error = run(LEAN_SERVICE + how.format(name)).stderr.splitlines()[-1]
    assert error.startswith(f"ImportError: keepstream.{name} needs '")
    assert "which is not installed" in error
    assert "pip install 'keepstream[client]'" in error


@pytest.mark.parametrize("package", ["pydantic", "pydantic_core"])  # the base requires them
def test_any_other_missing_package_is_reported_as_it_is(package: str) -> None:
    code = probe({package}) + "\nkeepstream.Client('redis://127.0.0.1:1')"
    error = run(code).stderr.splitlines()[-1]
    assert error == f"ModuleNotFoundError: {package} is not installed in this service" or (
        error.startswith(f"ModuleNotFoundError: {package}.") and "extra" not in error
    )


def test_a_client_needs_neither_celery_nor_kombu_nor_the_worker() -> None:
    refused = {"keepstream_worker", "celery", "kombu", "vine", "billiard", "packaging", "hiredis"}
    done = run(probe(refused) + "\nkeepstream.Client('redis://127.0.0.1:1', database_url='sqlite:///x.db')")
    assert done.returncode == 0, done.stderr


def test_a_missing_driver_of_postgresql_says_which_extra_to_install() -> None:
    make = "\nkeepstream.Client('redis://127.0.0.1:1', database_url='{}')"
    error = run(probe({"psycopg"}) + make.format("postgresql://user:hunter2@127.0.0.1/x")).stderr
    assert "InvalidSettingError: database_url (KEEPSTREAM_DATABASE_URL): PostgreSQL needs 'psycopg'" in error
    assert "pip install 'keepstream[postgres]'" in error
    assert "hunter2" not in error
    other = run(probe({"sqlite3"}) + make.format("sqlite:///x.db")).stderr.splitlines()[-1]
    assert other == "ModuleNotFoundError: sqlite3 is not installed in this service"


def test_every_public_name_is_where_the_package_looks_for_it() -> None:
    assert set(keepstream._MODULES) == set(keepstream.__all__)
    for name, module in keepstream._MODULES.items():
        assert getattr(keepstream, name) is getattr(import_module(module), name)


def test_the_package_lists_its_public_names_and_no_others_exist() -> None:
    assert set(keepstream.__all__) <= set(dir(keepstream))
    with pytest.raises(AttributeError, match="no attribute 'Klient'"):
        keepstream.Klient  # noqa: B018
