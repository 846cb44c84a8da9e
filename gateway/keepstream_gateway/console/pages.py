"""Pages: what the console sends, and under which rules a browser may use it.

In: a template's name and values.  Out: responses; the files that pages load, from this package alone.

A page may load scripts and styles from here, nothing from elsewhere, and nothing that stands in the page itself: what
a model wrote can then do nothing even if it came to stand in a page as more than text, which escaping prevents.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from starlette.requests import Request
from starlette.responses import Response

from keepstream_gateway.errors import ApiError, not_found

_HERE: Final = Path(__file__).parent
_ASSETS: Final = _HERE / "assets"
_TYPES: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; form-action 'self';"
    " img-src 'self' data:; media-src data:;"  # what stands in the job itself
    " base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
PAGES: Final = (("/", "Overview"), ("/jobs", "Jobs"), ("/rejected", "Rejected"))


class Pages:
    """The templates and files of the console."""

    def __init__(self) -> None:
        self._files = {
            path.relative_to(_ASSETS).as_posix(): (path.read_bytes(), _TYPES[path.suffix])
            for path in sorted(_ASSETS.rglob("*"))
            if path.suffix in _TYPES
        }
        digest = hashlib.sha256(b"".join(content for content, _ in self._files.values()))
        self._version = digest.hexdigest()[:12]  # in addresses, so that browsers may keep the files
        self._templates = Environment(
            loader=PackageLoader("keepstream_gateway.console"),
            autoescape=select_autoescape(default=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals.update(asset=self.address_of, pages=PAGES)

    def address_of(self, name: str) -> str:
        """Return the address of a file."""
        return f"/assets/{self._version}/{name}"

    def render(
        self, template: str, code: int = 200, headers: Mapping[str, str] | None = None, **values: Any
    ) -> Response:
        """Return a page as a response with this status."""
        # What callers wrote may hold half of a surrogate pair, which is no UTF-8.
        html = self._templates.get_template(template).render(values).encode("utf-8", "replace")
        return Response(html, code, {**HEADERS, **(headers or {})}, "text/html; charset=utf-8")

    async def send_file(self, request: Request) -> Response:
        """Answer with a file.

        Raises:
            ApiError: there is none of this name.
        """
        found = self._files.get(request.path_params["name"])
        if found is None:
            raise not_found("file")
        content, kind = found
        is_current = request.path_params["version"] == self._version
        kept = "public, max-age=31536000, immutable" if is_current else "no-store"
        return Response(content, headers={**HEADERS, "Cache-Control": kept}, media_type=f"{kind}; charset=utf-8")


#: What an error's page is called.
_TITLES: Final = {
    400: "That is not how to ask",
    403: "Not allowed",
    404: "There is nothing here",
    409: "That does not go",
    429: "Too much at once",
    503: "A server does not answer",
}


def title_of(error: ApiError) -> str:
    """Return what an error's page is called."""
    return _TITLES.get(error.status, "That went wrong")
