"""The guard: who may see the console.

In: requests.  Out: a ``Session``, a response that asks to sign in, or an ``ApiError``.
"""

import time
from collections.abc import Mapping
from typing import Final
from urllib.parse import parse_qsl, quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from keepstream.client import api_keys
from keepstream_gateway.access.rights import Right
from keepstream_gateway.bodies import read_body
from keepstream_gateway.console import session as sessions
from keepstream_gateway.console.pages import HEADERS, Pages
from keepstream_gateway.console.session import COOKIE, Session
from keepstream_gateway.context import Context
from keepstream_gateway.errors import ApiError, invalid

_FORM_BYTES: Final = 16_384
_KNOWN_RIGHT: Final = (
    "This key works, but lacks the right 'console'. Make one that has it:"
    " keepstream keys create --name me --right console"
)
_UNKNOWN: Final = "This key is not known here, or has been revoked."


class Guard:
    """Lets people in, and knows them again."""

    def __init__(self, context: Context, pages: Pages) -> None:
        secret = context.settings.token_secret
        self._secret = secret.get_secret_value().encode() if secret else b""
        self._context = context
        self._pages = pages

    async def session_of(self, request: Request) -> Session | None:
        """Return the session of a request; None: nobody has signed in, or not with a key that still counts.

        Raises:
            StoreUnavailableError: the database did not answer.
        """
        claims = sessions.read(request.cookies.get(COOKIE, ""))
        if claims is None:
            return None
        stored = await self._context.keyring.find(claims.key_id)
        if stored is None or Right.CONSOLE not in stored.rights:
            return None
        if not sessions.is_signed(claims, stored.hash, self._secret, time.time()):
            return None
        return Session(stored.id, stored.name, sessions.form_token(claims))

    def ask(self, request: Request) -> Response:
        """Return the answer to a request that needs a session and has none."""
        if request.method != "GET" or "hx-request" in request.headers:
            return Response("sign in first", 401, HEADERS)
        if request.headers.get("sec-fetch-site") == "cross-site":
            # A link from elsewhere comes without the cookie, also of those who have signed in; from here it is sent.
            return self._pages.render("onward.html", address=_path_of(request))
        return RedirectResponse(f"/login?next={quote(_path_of(request))}", 303, HEADERS)

    async def form_of(self, request: Request, session: Session) -> Mapping[str, str]:
        """Return what a form of this session has brought.

        Raises:
            ApiError: it is not a form of this session's.
        """
        form = await read_form(request)
        if not sessions.is_form_token(form.get("token", ""), session):
            raise ApiError(403, "This form is not of your session; load the page again, and repeat it.", "wrong_form")
        return form

    async def show_login(self, request: Request) -> Response:
        """Ask for a key."""
        return self._login_page(request.query_params.get("next", ""))

    async def log_in(self, request: Request) -> Response:
        """Begin a session with the key that was typed."""
        if request.headers.get("sec-fetch-site", "same-origin") not in {"same-origin", "none"}:
            raise ApiError(403, "Sign in on the console's own page.", "wrong_form")
        form = await read_form(request)
        key, wanted = form.get("key", "").strip(), form.get("next", "")
        try:
            access = await self._context.gatekeeper.check_key(key, Right.CONSOLE)
        except ApiError as error:
            return self._login_page(wanted, error.status, _KNOWN_RIGHT if error.status == 403 else _UNKNOWN)
        stored = await self._context.keyring.find(access.key_id)
        if stored is None or not api_keys.is_key_of(key, stored):
            return self._login_page(wanted, 401, _UNKNOWN)
        answer = RedirectResponse(_local(wanted), 303, HEADERS)
        cookie = sessions.sign(stored.id, stored.hash, self._secret, time.time())
        answer.set_cookie(
            COOKIE,
            cookie,
            max_age=sessions.SECONDS,
            path="/",
            secure=_is_secure(request),
            httponly=True,
            samesite="strict",
        )
        return answer

    async def log_out(self, request: Request, session: Session) -> Response:
        """End a session in this browser."""
        await self.form_of(request, session)
        answer = RedirectResponse("/login", 303, HEADERS)
        answer.delete_cookie(COOKIE, path="/", secure=_is_secure(request), httponly=True, samesite="strict")
        return answer

    def _login_page(self, wanted: str, code: int = 200, problem: str = "") -> Response:
        return self._pages.render("login.html", code, next=_local(wanted), problem=problem)


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a form, each with the value that came last.

    Raises:
        ApiError: it is none, too large, or does not come in time.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise ApiError(415, "The body must be a form.", "unsupported_media_type")
    body = await read_body(request, _FORM_BYTES)
    try:
        return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=50))
    except ValueError:
        raise invalid("The form has more fields than any of ours.") from None


def _path_of(request: Request) -> str:
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


def _local(address: str) -> str:
    """Return an address, if it is one of this site; else the overview's."""
    is_path = address.startswith("/") and not address.startswith(("//", "/\\")) and address.isprintable()
    return address if is_path else "/"


def _is_secure(request: Request) -> bool:
    """Whether the browser came by TLS, as far as we or a proxy in front can tell."""
    return "https" in (request.url.scheme, request.headers.get("x-forwarded-proto", "").partition(",")[0].strip())
