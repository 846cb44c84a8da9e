"""An attempt's time-outs."""

import pytest

from keepstream_worker.jobs.attempt import first_token_timeout


@pytest.mark.parametrize(
    ("tries", "remaining", "seconds"),
    [
        (1, 3600.0, 120.0),
        (2, 3480.0, 240.0),
        (3, 3200.0, 480.0),
        (5, 1000.0, 1000.0),
        (0, 3600.0, 120.0),
        (10_000, 3600.0, 3600.0),
        (3, 0.0, 1.0),
    ],
)
def test_the_first_token_time_out_doubles_within_the_total_time(tries: int, remaining: float, seconds: float) -> None:
    assert first_token_timeout(120.0, tries=tries, remaining_seconds=remaining) == seconds
