"""``python -m tests.conformance [CASES.jsonl]``: see ``runner``."""

import logging

from tests.conformance.runner import main

logging.getLogger("keepstream").setLevel(logging.ERROR)  # the first cases wait for the worker's start
raise SystemExit(main())
