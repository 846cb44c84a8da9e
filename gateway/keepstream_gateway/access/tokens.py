"""Tokens for one job: what a browser may have in its URL, for a while.

In: an access and a secret.  Out: a signed text, and what it says.  Pure.

A token says which job, whose, until when, what is allowed, and which API key made it; nothing is stored.  Its signature
needs that key's stored hash and the deployment's secret, so revoking the key or changing the secret ends its tokens.
"""

import base64
import hashlib
import hmac
import json
from dataclasses import dataclass
from typing import Final

from keepstream_gateway.access.rights import May

_SIGNATURE_BYTES: Final = hashlib.sha256().digest_size
_LONGEST: Final = 1024  #: Characters; ids have 128 at most.


@dataclass(frozen=True, slots=True)
class Claims:
    """What a token says."""

    key_id: str
    job_id: str
    expires_at: int  #: Seconds since the epoch.
    may: frozenset[May]


def sign(claims: Claims, key_hash: str, secret: bytes) -> str:
    """Return the token that says ``claims``, by an API key with this hash."""
    fields = [claims.key_id, claims.job_id, claims.expires_at, sorted(claims.may)]
    payload = json.dumps(fields, separators=(",", ":")).encode()
    return _encode(_signature(payload, key_hash, secret) + payload)


def read(token: str) -> tuple[Claims, bytes, bytes] | None:
    """Return what a token claims, with the signature and the bytes that are signed; None: it is no token.

    Nothing is true of it before ``is_signed`` says so.
    """
    if len(token) > _LONGEST:
        return None
    try:
        whole = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        signature, payload = whole[:_SIGNATURE_BYTES], whole[_SIGNATURE_BYTES:]
        key_id, job_id, expires_at, may = json.loads(payload)
        claims = Claims(key_id, job_id, expires_at, frozenset(map(May, may)))
    except (ValueError, TypeError, RecursionError):
        return None
    is_whole = isinstance(key_id, str) and isinstance(job_id, str) and type(expires_at) is int
    return (claims, signature, payload) if is_whole else None


def is_signed(payload: bytes, signature: bytes, key_hash: str, secret: bytes) -> bool:
    """Whether the holder of an API key with this hash has signed this; takes the same time whatever the signature."""
    return hmac.compare_digest(_signature(payload, key_hash, secret), signature)


def _signature(payload: bytes, key_hash: str, secret: bytes) -> bytes:
    derived = hmac.digest(secret or b"keepstream", key_hash.encode(), "sha256")
    return hmac.digest(derived, payload, "sha256")


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
