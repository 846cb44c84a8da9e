"""``python -m tests.conformance [CASES.jsonl]``: see ``runner``."""

from tests.conformance.runner import main

raise SystemExit(main())
