"""A small run of the chaos suite: a few jobs, a few joins, one deploy. ``make chaos`` is the long form."""

from pathlib import Path

import pytest

from tests.chaos import chaos, deploy, live_join
from tests.chaos.sandbox import Sandbox


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_every_job_is_accounted_for_after_everything_has_failed_at_random(tmp_path: Path, database: str) -> None:
    report = chaos.run(Sandbox(tmp_path, database), seed=3, jobs=15)
    assert report.failures == {}


def test_rolling_deploy_is_not_noticed(tmp_path: Path) -> None:
    report = deploy.run(Sandbox(tmp_path, "sqlite"), seed=1, generations=2, workers=1, grace=4.0, slack=2.5)
    assert report.failures == {}


def test_followers_that_join_at_random_moments_lose_and_double_nothing(tmp_path: Path) -> None:
    report = live_join.run(Sandbox(tmp_path, "sqlite"), seed=1, joins=200, deltas=80)
    assert report.failures == {}
