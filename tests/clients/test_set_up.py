"""The tools of these tests work: the packages are those that are locked, and a browser shows a page and its errors."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstream_worker.dev_stack.embedded import free_port
from tests import node
from tests.chromium import BrowserError, Page
from tests.site import Site

PAGE = """<!doctype html><title>A page</title>
<button>Press me</button><p></p>
<script>
  document.querySelector("button").onclick = () => { document.querySelector("p").textContent = "Pressed." };
  console.error("told in red");
  setTimeout(() => nothing.here);
</script>"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "index.html").write_text(PAGE)
    with Site(tmp_path) as site:
        yield site.url


def test_the_packages_are_those_that_are_locked() -> None:
    wanted = json.loads((node.CLIENTS / "package.json").read_text())["dependencies"]
    found = node.run("versions.mjs", sorted(wanted))
    assert {package["name"]: package["version"] for package in found} == {
        name: version.rpartition("@")[2] for name, version in wanted.items()
    }
    assert all(package["exports"] for package in found)


def test_a_page_is_opened_read_and_used(page: Page, site: str, tmp_path: Path) -> None:
    page.open(site)
    assert page.text("button") == "Press me"
    page.click("button")
    page.wait_for("document.querySelector('p').textContent === 'Pressed.'", "the button to do its work")
    assert page.evaluate("new Promise(done => setTimeout(() => done([1, 'two'])))") == [1, "two"]
    picture = tmp_path / "page.png"
    page.screenshot(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_errors_of_a_page_are_seen(page: Page, site: str) -> None:
    page.open(f"{site}/index.html")
    page.wait_for("true", "the page to answer")
    page.evaluate("fetch('/missing')")
    assert "told in red" in page.errors
    assert any("nothing is not defined" in error for error in page.errors)
    assert any("404" in error for error in page.errors)
    assert (404, f"{site}/missing") in page.responses
    with pytest.raises(BrowserError, match="ERR_CONNECTION_REFUSED"):
        page.open(f"http://127.0.0.1:{free_port()}/")
