"""Recorded and hand-made streams, through a real worker: what it stores and publishes is what each case expects."""

import pytest

from tests.conformance.runner import CASES, play_files


async def test_all_cases_come_out_as_expected(capsys: pytest.CaptureFixture[str]) -> None:
    failed = await play_files(CASES)
    assert not failed, capsys.readouterr().out
