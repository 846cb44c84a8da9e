"""The password of Redis apart from its URL, as deployments keep secrets.

In: a URL and a password.  Out: the URL with the password in it.
"""

import re
from urllib.parse import quote


def with_password(url: str, password: str | None) -> str:
    """Return ``url`` with ``password``, unless it has one of its own.

    Args:
        url: Of any Redis, Sentinels or sockets; it may name a user.
        password: As it is, whatever its characters; None or empty: the URL stays as it is.
    """
    scheme, separator, rest = url.partition("://")
    if not password or not separator:
        return url
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, _, hosts = authority.rpartition("@")
    if ":" in user:
        return url
    return f"{scheme}://{user}:{quote(password, safe='')}@{hosts}{rest.removeprefix(authority)}"
