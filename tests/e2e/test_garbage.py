"""Queue items that are not jobs do no harm, and each is accounted for."""

from pathlib import Path

from tests.chaos import garbage
from tests.chaos.sandbox import Sandbox


def test_every_kind_of_garbage_is_recorded_and_good_jobs_between_finish(tmp_path: Path) -> None:
    report = garbage.run(Sandbox(tmp_path, "sqlite"), seed=1, number=4 * len(garbage.KINDS))
    assert report.failures == {}
    assert report.counts["kinds"] == len(garbage.KINDS)
