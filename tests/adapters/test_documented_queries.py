"""The queries that the documents show to operators are accepted by a real PostgreSQL with our tables."""

import re
from pathlib import Path
from typing import Final

from keepstream.client.database import make_engine
from keepstream_worker.store import schema

ROOT: Final = Path(__file__).parents[2]
DOCUMENTS: Final = (ROOT / "README.md", ROOT / "docs" / "operations" / "running.md")


def queries() -> list[str]:
    """Return each statement of each block of SQL."""
    blocks = [block for path in DOCUMENTS for block in re.findall(r"```sql\n(.*?)```", path.read_text(), re.DOTALL)]
    return [statement.strip() for block in blocks for statement in block.split(";") if statement.strip()]


def test_each_query_of_the_documents_is_accepted(postgres_url: str) -> None:
    found = queries()
    assert len(found) > 5
    engine = make_engine(postgres_url, writer=True)
    schema.migrate(engine)
    try:
        with engine.connect() as connection:
            for query in found:
                connection.exec_driver_sql(query).all()
    finally:
        engine.dispose()
