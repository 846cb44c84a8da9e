"""Jobs whose first target is broken: none fails while another target answers."""

import socket
from pathlib import Path

from keepstream.errors import ErrorCode
from keepstream.results import JobStatus
from tests.cluster import Cluster

PROMPT = [{"role": "user", "content": "Hello"}]
FALLBACKS = [{"provider": "default", "model": "m"}]


def test_the_last_attempt_of_a_job_is_its_fallbacks(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "providers.toml"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        file.write_text(f'[providers.broken]\nbase_url = "http://127.0.0.1:{taken.getsockname()[1]}/v1"\n')
        cluster.start_worker(providers_file=file)
        asked = {"model": "m", "messages": PROMPT}
        saved = cluster.client.enqueue(asked, provider="broken", fallbacks=FALLBACKS, max_attempts=3)
        once = cluster.client.enqueue(asked, provider="broken", fallbacks=FALLBACKS, max_attempts=1)
        alone = cluster.client.enqueue(asked, provider="broken", max_attempts=2)
        result = cluster.wait_for(saved)
        assert result.status is JobStatus.COMPLETED
        made = [(attempt.provider, attempt.outcome, attempt.reason) for attempt in result.attempts]
        broken = [("broken", "failed", "first"), ("broken", "failed", "retry"), ("default", "finished", "fallback")]
        # Its target may have counted as broken before the job's second attempt.
        assert made in (broken, [broken[0], ("default", "finished", "retry")])
        for job_id, tries in ((once, 1), (alone, 2)):
            failed = cluster.wait_for(job_id)
            assert (failed.status, failed.error and failed.error.code) == (JobStatus.FAILED, ErrorCode.CONNECTION)
            assert len(failed.attempts) == tries
