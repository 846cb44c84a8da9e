"""What programs read of a command is JSON, whatever callers wrote."""

import json

from keepstream_worker.commands.output import json_text
from tests.job_stories import new_job

HALF = "\ud800"  #: Of a character, as JSON can express it.


def test_half_of_a_character_is_written_as_it_came() -> None:
    request = {"model": "m", "messages": [{"role": "user", "content": f"ä{HALF}"}]}
    job = new_job(request=request, metadata={"title": HALF})
    for indent in (None, 2):
        text = json_text(job, indent)
        text.encode()
        assert r"ä\ud800" in text
        read = json.loads(text)
        assert (read["request"], read["metadata"]) == (request, {"title": HALF})
        assert len(text.splitlines()) == 1 or indent


def test_it_is_the_json_of_the_contract() -> None:
    job = new_job()
    assert json_text(job) == job.model_dump_json()
    assert json_text(job, 2) == job.model_dump_json(indent=2)
