"""API keys: who may call the gateway, for which tenant, and what with.

In: a connection inside a transaction.  Out: rows of the table of keys; new keys, which are shown once and stored as
hashes only.

A key is ``ks_<id>_<secret>``.  The id is public and finds the row; the secret has 256 random bits, so a plain SHA-256
is as good as a slow hash, and comparing takes the same time whatever is compared.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Row, select, update

from keepstream import names, tables
from keepstream.errors import InvalidArgumentError
from keepstream.names import Right
from keepstream.tables import api_keys

_ID: Final = re.compile(r"[0-9a-f]{12}")
_KEY: Final = re.compile(rf"ks_({_ID.pattern})_[A-Za-z0-9_\-]{{43}}")
_NAME_CHARACTERS: Final = 128


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key as it is stored: without its secret."""

    id: str
    hash: str  #: SHA-256 (hex) of the whole key.
    tenant: str
    name: str
    rights: frozenset[Right]
    created_at: datetime
    revoked_at: datetime | None

    @property
    def prefix(self) -> str:
        """How the key begins, by which people know it."""
        return f"ks_{self.id}_"


def create(connection: Connection, tenant: str, name: str, rights: frozenset[Right]) -> tuple[StoredKey, str]:
    """Store a new key; return it, and the key itself, which nobody can ever tell again.

    Raises:
        InvalidArgumentError: the tenant or name cannot be used, or there is no right.
    """
    if re.fullmatch(names.ID_PATTERN, tenant) is None:
        raise InvalidArgumentError("tenant: consists of letters, digits, '.', '_' and '-', at most 128 of them")
    if not 1 <= len(name) <= _NAME_CHARACTERS or not name.isprintable():
        raise InvalidArgumentError(f"name: a text on one line, of 1 to {_NAME_CHARACTERS} characters")
    if not rights:
        raise InvalidArgumentError(f"rights: at least one of {', '.join(Right)}")
    key_id = secrets.token_hex(6)
    key = f"ks_{key_id}_{secrets.token_urlsafe(32)}"
    values = {"id": key_id, "hash": _hash(key), "tenant": tenant, "name": name, "rights": sorted(rights)}
    connection.execute(api_keys.insert().values(created_at=tables.now(), **values))
    stored = _read(connection, key_id)
    assert stored is not None
    return stored, key


def find(connection: Connection, key_id: str) -> StoredKey | None:
    """Return a key that has not been revoked, or None."""
    return find_all(connection, [key_id]).get(key_id)


def find_all(connection: Connection, key_ids: Collection[str]) -> dict[str, StoredKey]:
    """Return those of some keys, by id, that there are and that have not been revoked."""
    valid = select(api_keys).where(api_keys.c.id.in_(key_ids), api_keys.c.revoked_at.is_(None))
    return {row.id: _stored(row) for row in connection.execute(valid)}


def list_keys(connection: Connection, tenant: str | None = None) -> list[StoredKey]:
    """Return the keys of a tenant, or of all, the newest first; also those that have been revoked."""
    query = select(api_keys).order_by(api_keys.c.created_at.desc(), api_keys.c.id)
    if tenant is not None:
        query = query.where(api_keys.c.tenant == tenant)
    return [_stored(row) for row in connection.execute(query)]


def revoke(connection: Connection, key_id: str) -> StoredKey | None:
    """Let a key be refused from now on, once and for all; return it, or None if there is no such key."""
    ended = update(api_keys).where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
    connection.execute(ended.values(revoked_at=tables.now()))
    return _read(connection, key_id)


def id_of(key: str) -> str | None:
    """Return the id in a key; None: no key looks so."""
    match = _KEY.fullmatch(key)
    return None if match is None else match[1]


def is_id(text: str) -> bool:
    """Whether a key may have this id."""
    return _ID.fullmatch(text) is not None


def is_key_of(key: str, stored: StoredKey) -> bool:
    """Whether this is the key that is stored so."""
    return hmac.compare_digest(_hash(key), stored.hash)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _read(connection: Connection, key_id: str) -> StoredKey | None:
    row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
    return None if row is None else _stored(row)


def _stored(row: Row[Any]) -> StoredKey:
    known = {right.value for right in Right}  # a newer version may know more
    rights = frozenset(Right(right) for right in row.rights if right in known)
    return StoredKey(row.id, row.hash, row.tenant, row.name, rights, row.created_at, row.revoked_at)
