"""A small run of the chaos suite: a few jobs, joins and gateways, one deploy. ``make chaos`` is the long form."""

from pathlib import Path

import pytest

from tests.chaos import chaos, deploy, gateway, live_join
from tests.chaos.sandbox import Sandbox


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_every_job_is_accounted_for_after_everything_has_failed_at_random(tmp_path: Path, database: str) -> None:
    report = chaos.run(Sandbox(tmp_path, database), seed=3, jobs=15)
    assert report.failures == {}


def test_rolling_deploy_is_not_noticed(tmp_path: Path) -> None:
    report = deploy.run(Sandbox(tmp_path, "sqlite"), seed=1, generations=2, workers=1, grace=6.0, slack=5.0)
    assert report.failures == {}


def test_followers_that_join_at_random_moments_lose_and_double_nothing(tmp_path: Path) -> None:
    report = live_join.run(Sandbox(tmp_path, "sqlite"), seed=1, joins=200, deltas=80)
    assert report.failures == {}


def test_clients_resume_at_other_gateways_while_these_and_redis_die(tmp_path: Path) -> None:
    faults = ("gateway killed", "Redis' master killed", "gateway stopped")
    report = gateway.run(Sandbox(tmp_path, "sqlite"), seed=1, clients=20, per_job=4, seconds=5.0, faults=faults)
    assert report.failures == {}
