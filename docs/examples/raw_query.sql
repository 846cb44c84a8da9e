-- What is stored of one job, in plain SQL for SQLite and PostgreSQL.  In: a job's id.  Out: four result sets.
--   psql "$DATABASE" -v job_id="'0b5e…'" -f raw_query.sql
--   Python's sqlite3: cursor.execute(statement, {"job_id": "0b5e…"}) for each of them

-- The job: its status, what it cost, and the SHA-256 of its output, as in its last event.
SELECT status, provider, model, class, error_code, error_message, partial, output_sha256,
       prompt_tokens, completion_tokens, total_tokens, usage_source
FROM keepstream_jobs
WHERE tenant = 'default' AND id = :job_id;

-- What the model said, one row a choice; the README says which of it the next request gives back.
SELECT "index", content, reasoning, refusal, finish_reason, extra
FROM keepstream_choices
WHERE tenant = 'default' AND job_id = :job_id
ORDER BY "index";

-- The tools it called.
SELECT choice_index, position, call_id, type, name, arguments, arguments_valid, extra
FROM keepstream_tool_calls
WHERE tenant = 'default' AND job_id = :job_id
ORDER BY choice_index, position;

-- The streams it took, and whom each asked.
SELECT number, reason, provider, model, outcome, first_token_ms, error_code, http_status, total_tokens, usage_source
FROM keepstream_attempts
WHERE tenant = 'default' AND job_id = :job_id
ORDER BY number;
