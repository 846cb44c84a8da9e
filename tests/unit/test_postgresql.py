"""What the options of a URL come to, and what a failed connection means."""

import pytest

from keepstream.client.postgresql import explain_failure, plan_session

LOCK, STATEMENT = "SET LOCAL lock_timeout = E'10000'", "SET LOCAL statement_timeout = E'30000'"
IDLE = "SET LOCAL idle_in_transaction_session_timeout = E'8000'"


@pytest.mark.parametrize(
    ("given", "options", "begin"),
    [
        ("", "", f"BEGIN; {LOCK}; {STATEMENT}; {IDLE}"),
        ("-csearch_path=a", "", f"BEGIN; {LOCK}; {STATEMENT}; {IDLE}; SELECT set_config('search_path', E'a', true)"),
        (
            "-c lock_timeout=1s -c work_mem=1MB",
            "-c work_mem=1MB",
            f"BEGIN; SET LOCAL lock_timeout = E'1s'; {STATEMENT}; {IDLE}",
        ),
        ("--Statement-Timeout=0", "", f"BEGIN; {LOCK}; SET LOCAL statement_timeout = E'0'; {IDLE}"),
        ("-clock_timeout=1 -clock_timeout=2", "", f"BEGIN; SET LOCAL lock_timeout = E'2'; {STATEMENT}; {IDLE}"),
        (
            "-cidle-in-transaction-session-timeout=1min",
            "",
            f"BEGIN; {LOCK}; {STATEMENT}; SET LOCAL idle_in_transaction_session_timeout = E'1min'",
        ),
        ("-e -S 64", "-e -S 64", f"BEGIN; {LOCK}; {STATEMENT}; {IDLE}"),
        ("-cjit=--lock_timeout=1", "-cjit=--lock_timeout=1", f"BEGIN; {LOCK}; {STATEMENT}; {IDLE}"),
        (
            r"-csearch_path=\"My\ schema\",o'b",
            "",
            f"BEGIN; {LOCK}; {STATEMENT}; {IDLE}; SELECT set_config('search_path', E'\"My schema\",o''b', true)",
        ),
    ],
)
def test_search_path_and_time_outs_are_set_in_each_transaction(given: str, options: str, begin: str):
    assert plan_session(given) == (options, begin)


@pytest.mark.parametrize(
    ("sentence", "passes"),
    [
        ('connection to server at "password", port 1 failed: Connection refused', True),
        ("failed to resolve host 'FATAL: ssl': [Errno -2] Name or service not known", True),
        ("connection timeout expired", True),
        ("connection failed: ... failed: FATAL:  the database system is starting up", True),
        ("connection failed: ... failed: FATAL:  sorry, too many clients already", True),
        ("connection failed: ... failed: FATAL:  no more connections allowed (max_client_conn)", True),
        ("connection failed: ... failed: FATAL:  pgbouncer cannot connect to server", True),
        ("server login has been failing, try again later (server_login_retry)", True),
        ("eine andere Sprache", True),
        ('connection failed: ... failed: FATAL:  Passwort-Authentifizierung für Benutzer "x" fehlgeschlagen', False),
        ("connection failed: ... failed: FATAL:  no such user", False),
        ('connection failed: ... failed: FATAL:  database "recovery" does not exist', False),
        ("connection failed: ... failed: SSL error: certificate verify failed", False),
        ('connection failed: ... failed: server certificate for "a" does not match host name "b"', False),
        ("unable to open database file", False),
        ("database is locked", True),
    ],
)
def test_only_what_may_pass_is_waited_for(sentence: str, passes: bool):  # noqa: FBT001  # a case's answer
    assert explain_failure(sentence).passes is passes
