"""The base of the contract can be used by a service that has installed nothing but pydantic."""

import subprocess
import sys
from importlib.metadata import packages_distributions

# Pydantic and its own requirements. All else that happens to be installed here is refused to the probe.
LEAN = {"keepstream", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}

PROBE = f"""
import sys
from importlib.abc import MetaPathFinder

class LeanService(MetaPathFinder):
    refused = {sorted({"keepstream_worker", "migrations", *packages_distributions()} - LEAN)}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.refused:
            raise ModuleNotFoundError(f"{{name}} is not installed in a lean service", name=name)

sys.meta_path.insert(0, LeanService())

import keepstream

for name in keepstream.__all__:
    getattr(keepstream, name)
job = keepstream.Job(request={{"model": "m", "messages": [{{"role": "user", "content": "hi"}}]}})
assert keepstream.parse_job(job.model_dump(mode="json", exclude_none=True)) == job
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def test_the_base_needs_pydantic_only() -> None:
    done = run(PROBE)
    assert done.returncode == 0, done.stderr


def test_the_probe_notices_a_heavier_import() -> None:
    assert "celery is not installed in a lean service" in run(PROBE + "\nimport celery").stderr
