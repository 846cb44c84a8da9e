-- What is stored of one job, in plain SQL that SQLite and PostgreSQL both read.  In: a job's id.  Out: four answers.
--   psql "$DATABASE" -v job_id="'0b5e…'" -f raw_query.sql
--   Python's sqlite3: cursor.execute(statement, {"job_id": "0b5e…"}) for each of them

-- The job: how it stands, what it cost, and the SHA-256 of its output as its last event named it.
SELECT status, model, error_code, error_message, partial, output_sha256,
       prompt_tokens, completion_tokens, total_tokens, usage_source
FROM jobs
WHERE tenant = 'default' AND id = :job_id;

-- What the model said, one row a choice.
SELECT "index", content, reasoning, refusal, finish_reason
FROM choices
WHERE tenant = 'default' AND job_id = :job_id
ORDER BY "index";

-- The tools it called.
SELECT choice_index, position, call_id, name, arguments, arguments_valid
FROM tool_calls
WHERE tenant = 'default' AND job_id = :job_id
ORDER BY choice_index, position;

-- The streams it took.
SELECT number, reason, outcome, first_token_ms, error_code, http_status, total_tokens, usage_source
FROM attempts
WHERE tenant = 'default' AND job_id = :job_id
ORDER BY number;
