"""Answers in JSON, whatever texts are in them.

In: values, some of which callers wrote.  Out: responses.

A caller's text may hold half of a surrogate pair, where a program has cut it in the midst of a character: JSON can
express that, and so jobs with it are accepted. UTF-8 cannot, so it is answered as it came: escaped.
"""

import json
from typing import Any

from starlette.responses import JSONResponse


class JsonResponse(JSONResponse):
    """A response with a value as JSON."""

    def render(self, content: Any) -> bytes:
        """Return the value as JSON."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")  # Python's escape for such a half is JSON's
