"""API keys, on each database: made once, found by their id, refused after they are revoked."""

import pytest
from sqlalchemy import Engine, text

from keepstream.client import api_keys
from keepstream.errors import InvalidArgumentError
from keepstream.names import Right

API = frozenset({Right.API})


def test_a_key_is_found_by_its_id_and_nothing_but_the_key_fits(engine: Engine) -> None:
    with engine.begin() as connection:
        made, key = api_keys.create(connection, "shop", "web", API)
        _, other = api_keys.create(connection, "shop", "web", API)
    key_id = api_keys.id_of(key)
    assert key_id is not None
    with engine.begin() as connection:
        stored = api_keys.find(connection, key_id)
    assert stored == made
    assert (stored.tenant, stored.name, stored.rights) == ("shop", "web", API)
    assert key.startswith(stored.prefix)
    assert api_keys.is_key_of(key, stored)
    assert not api_keys.is_key_of(other, stored)
    assert not api_keys.is_key_of(stored.prefix + other[len(stored.prefix) :], stored)


def test_the_key_itself_is_not_stored(engine: Engine) -> None:
    with engine.begin() as connection:
        _, key = api_keys.create(connection, "shop", "web", API)
        rows = connection.execute(text("SELECT * FROM keepstream_api_keys")).all()
    assert len(rows) == 1
    assert key.split("_", 2)[2] not in str(rows)


def test_a_revoked_key_is_listed_and_not_found(engine: Engine) -> None:
    with engine.begin() as connection:
        first, _ = api_keys.create(connection, "a", "first", API)
        second, _ = api_keys.create(connection, "b", "second", frozenset(Right))
    with engine.begin() as connection:
        revoked = api_keys.revoke(connection, first.id)
        assert revoked is not None
        assert revoked.revoked_at is not None
        assert api_keys.find(connection, first.id) is None
        assert api_keys.find(connection, second.id) == second
    with engine.begin() as connection:
        again = api_keys.revoke(connection, first.id)
        assert again == revoked  # it keeps its time
        assert api_keys.revoke(connection, "none") is None
        assert {key.id for key in api_keys.list_keys(connection)} == {first.id, second.id}
        assert [key.id for key in api_keys.list_keys(connection, "b")] == [second.id]


@pytest.mark.parametrize(
    ("tenant", "name", "rights", "complaint"),
    [
        ("a b", "x", API, "tenant: "),
        ("", "x", API, "tenant: "),
        ("a", "", API, "name: "),
        ("a", "x" * 129, API, "name: "),
        ("a", "x\ny", API, "name: "),
        ("a", "x", frozenset(), "rights: "),
    ],
)
def test_what_cannot_be_a_key_is_refused(
    engine: Engine, tenant: str, name: str, rights: frozenset[Right], complaint: str
) -> None:
    with engine.begin() as connection, pytest.raises(InvalidArgumentError, match=complaint):
        api_keys.create(connection, tenant, name, rights)


@pytest.mark.parametrize("text", ["", "ks_", "sk-abc", "ks_0123456789ab", "ks_0123456789ab_short", "ks_\u0661_x"])
def test_what_looks_like_no_key_has_no_id(text: str) -> None:
    assert api_keys.id_of(text) is None
