"""Lanes and pools: what of the waiting jobs belongs together, as numbers that everybody computes alike.

In: of a job what they depend on, from the client's and the store's statements.  Out: the ids of its lane and its pool.
Pure.

A lane is what waits together: one tenant's jobs of one class on one queue.  A pool is what waits for the same: jobs of
one queue and class with the same targets.  Their ids are hashes, so that nobody has to ask the database for one.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache


def lane_id(tenant: str, job_class: str, queue: str) -> int:
    """Return the number of a lane."""
    return _number("lane", tenant, job_class, queue)


def pool_id(queue: str, job_class: str, chain: Sequence[tuple[str, str]]) -> int:
    """Return the number of a pool."""
    return _number("pool", queue, job_class, *(part for target in chain for part in target))


@lru_cache(maxsize=4096)  # most jobs are of few lanes and pools
def _number(*parts: str) -> int:
    """Return a hash of 63 bits: among a million lanes two share one once in ten million deployments."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
