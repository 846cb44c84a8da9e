"""Sessions: who has signed in to the console, without a store and without the key in the browser.

In: a stored API key, a secret, the time.  Out: the text of a cookie, and what it says.  Pure.

A session says which key signed in and until when.  Its signature needs the key's stored hash and the deployment's
secret, so revoking the key or changing the secret ends its sessions.  Each session has a token of its own that goes
into forms: a page of somebody else's, which may make a browser send the cookie, cannot know it.
"""

import base64
import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass
from typing import Final

COOKIE: Final = "keepstream_console"
SECONDS: Final = 12 * 3600  #: For which a session lasts.

_SIGNATURE_BYTES: Final = hashlib.sha256().digest_size
_LONGEST: Final = 512  #: Characters of a cookie.


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody who has signed in."""

    key_id: str
    name: str  #: Of the key, as people know it.
    form_token: str  #: What a form that changes something must bring.


@dataclass(frozen=True, slots=True)
class Claims:
    """What a cookie says; nothing of it is true before ``is_signed`` says so."""

    key_id: str
    expires_at: int  #: Seconds since the epoch.
    signature: bytes
    payload: bytes  #: What is signed.


def sign(key_id: str, key_hash: str, secret: bytes, now: float) -> str:
    """Return the cookie of a new session."""
    payload = json.dumps([key_id, int(now) + SECONDS, secrets.token_hex(8)], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(_signature(payload, key_hash, secret) + payload).decode()


def read(cookie: str) -> Claims | None:
    """Return what a cookie says; None: it is none of ours."""
    if len(cookie) > _LONGEST:
        return None
    try:
        whole = base64.b64decode(cookie, altchars=b"-_", validate=True)
        signature, payload = whole[:_SIGNATURE_BYTES], whole[_SIGNATURE_BYTES:]
        key_id, expires_at, _ = json.loads(payload)
    except (ValueError, TypeError, RecursionError):
        return None
    is_whole = isinstance(key_id, str) and type(expires_at) is int
    return Claims(key_id, expires_at, signature, payload) if is_whole else None


def is_signed(claims: Claims, key_hash: str, secret: bytes, now: float) -> bool:
    """Whether a session with the key of this hash was begun so, and has not ended."""
    is_ours = hmac.compare_digest(_signature(claims.payload, key_hash, secret), claims.signature)
    return is_ours and now < claims.expires_at


def form_token(claims: Claims) -> str:
    """Return the token for the forms of a session."""
    return hmac.new(claims.signature, b"form", "sha256").hexdigest()


def is_form_token(given: str, session: Session) -> bool:
    """Whether a form of this session has brought its token; takes the same time whatever it brought."""
    return hmac.compare_digest(given.encode(), session.form_token.encode())


def _signature(payload: bytes, key_hash: str, secret: bytes) -> bytes:
    derived = hmac.digest(secret or b"keepstream", b"console:" + key_hash.encode(), "sha256")
    return hmac.digest(derived, payload, "sha256")
