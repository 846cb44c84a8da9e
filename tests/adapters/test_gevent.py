"""A client in a process that gevent has patched: greenlets use it, and none is kept from its turn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from keepstream import names, tables
from tests.cluster import PATIENCE

pytestmark = pytest.mark.slow


def test_greenlets_use_one_client_and_nothing_blocks_them(redis_url: str, postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    tables.metadata.create_all(engine)
    engine.dispose()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("KEEPSTREAM_")}
    done = subprocess.run(
        [sys.executable, "-c", "from tests.gevent_service import main; main()"],
        env=inherited | {names.ENV_REDIS_URL: redis_url, names.ENV_DATABASE_URL: postgres_url},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["wrong"] == []
    # Each waits for a second, which is a hundred turns of an idle machine; one that is blocked gives none.
    assert seen["ticks during a slow statement"] >= 3
    assert seen["ticks while following"] >= 3
    assert seen["child"] == 0
    assert "use Client" in seen["async"]
