"""Fixtures of the tests with other people's clients.

In: Debian's Chromium and Node, and the packages that ``make test-clients`` installs; what is absent skips its tests.
Out: a browser, pages.
"""

from collections.abc import Iterator

import pytest

from tests.chromium import Chromium, Page


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    """A browser, which the tests of a process share."""
    with Chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium: Chromium) -> Iterator[Page]:
    """An empty page with storage of its own."""
    with chromium.page() as page:
        yield page
