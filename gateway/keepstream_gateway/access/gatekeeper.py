"""The gatekeeper: a request's credentials become an ``Access``.

In: requests, and the keyring.  Out: ``Access``; or a 401 without a hint as to what was wrong with a key, a 403 where a
key lacks a right; tokens for one job.
"""

import time
from collections.abc import Callable
from typing import Final

from starlette.requests import Request

from keepstream.client import api_keys
from keepstream_gateway.access import tokens
from keepstream_gateway.access.keyring import Keyring
from keepstream_gateway.access.rights import Access, May, Right
from keepstream_gateway.errors import ApiError, not_found

_SCHEME: Final = "bearer "


class Gatekeeper:
    """Says who may do what.

    Args:
        keyring: The API keys.
        secret: Goes into the signatures of tokens.
        clock: Seconds since the epoch.
    """

    def __init__(self, keyring: Keyring, secret: str = "", clock: Callable[[], float] = time.time) -> None:
        self._keyring = keyring
        self._secret = secret.encode()
        self._clock = clock

    async def require(self, request: Request, right: Right = Right.API) -> Access:
        """Return the access of a request with an API key, which must have this right.

        Raises:
            ApiError: 401 or 403.
            StoreUnavailableError: the database did not answer.
        """
        key = _key_of(request)
        if key is None:
            raise _unauthorized("no API key was given; send it as 'Authorization: Bearer ks_…'")
        return await self.check_key(key, right)

    async def check_key(self, key: str, right: Right = Right.API) -> Access:
        """Return the access of an API key, which must have this right; raises as ``require``."""
        key_id = api_keys.id_of(key)
        stored = None if key_id is None else await self._keyring.find(key_id)
        if stored is None or not api_keys.is_key_of(key, stored):
            raise _unauthorized("the API key is not known here, or has been revoked")
        if right not in stored.rights:
            raise ApiError(403, f"this API key lacks the right '{right}'", "missing_right")
        return Access(stored.tenant, stored.id, stored.rights)

    async def require_job(self, request: Request, job_id: str, may: May = May.READ) -> Access:
        """Return the access of a request about one job: with an API key, or with a token for this job.

        Raises:
            ApiError: 401, 403, or 404 for a token of another job.
            StoreUnavailableError: the database did not answer.
        """
        access = await self.identify(request)
        self.confine(access, job_id, may)
        return access

    async def identify(self, request: Request) -> Access:
        """Return the access of a request with an API key or a token; ``confine`` says what a token is good for.

        A token may also stand where keys do, so that it is in no address where it need not be.

        Raises:
            ApiError: 401 or 403.
            StoreUnavailableError: the database did not answer.
        """
        key, token = _key_of(request), request.query_params.get("token")
        if key is not None and api_keys.id_of(key) is None and tokens.read(key) is not None:
            return await self._check_token(key)
        return await (self.require(request) if token is None or key is not None else self._check_token(token))

    @staticmethod
    def confine(access: Access, job_id: str, may: May = May.READ) -> None:
        """Refuse an access by a token that is for another job, or not for this; a key is for all of its tenant's.

        Raises:
            ApiError: 403, or 404 for a token of another job.
        """
        if access.job_id is None:
            return
        if access.job_id != job_id:
            raise not_found()
        if may not in access.may:
            raise ApiError(403, f"this token does not allow to {may}", "missing_right")

    async def make_token(self, access: Access, job_id: str, seconds: float, may: frozenset[May]) -> tuple[str, int]:
        """Return a token for one job, and when it expires in seconds since the epoch.

        Raises:
            ApiError: the key has been revoked meanwhile.
            StoreUnavailableError: the database did not answer.
        """
        stored = await self._keyring.find(access.key_id)
        if stored is None:
            raise _unauthorized("the API key has been revoked")
        claims = tokens.Claims(access.key_id, job_id, int(self._clock() + seconds), may)
        return tokens.sign(claims, stored.hash, self._secret), claims.expires_at

    async def _check_token(self, token: str) -> Access:
        read = tokens.read(token)
        refusal = _unauthorized("the token is not valid, or its key has been revoked; ask for a new one")
        if read is None:
            raise refusal
        claims, signature, payload = read
        stored = await self._keyring.find(claims.key_id)
        if stored is None or not tokens.is_signed(payload, signature, stored.hash, self._secret):
            raise refusal
        if claims.expires_at <= self._clock():
            raise ApiError(401, "the token has expired; ask for a new one", "token_expired")
        return Access(stored.tenant, stored.id, job_id=claims.job_id, may=claims.may)


def _key_of(request: Request) -> str | None:
    header = request.headers.get("authorization", "")
    return header[len(_SCHEME) :].strip() if header.lower().startswith(_SCHEME) else None


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
