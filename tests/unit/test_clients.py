"""The sync and the async client offer the same: names, arguments, defaults."""

import inspect

import pytest

from keepstream import AsyncClient, Client


def public_names(client: type) -> set[str]:
    return {name for name in dir(client) if not name.startswith("_")}


def test_both_clients_have_the_same_public_names() -> None:
    assert public_names(Client) == public_names(AsyncClient)


@pytest.mark.parametrize("name", ["__init__", *sorted(public_names(Client))])
def test_both_clients_take_the_same_arguments(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(client, name)) for client in (Client, AsyncClient))
    assert ours.parameters == theirs.parameters
