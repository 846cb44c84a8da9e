"""The worker: takes jobs from the queue, runs them as streaming completions, publishes and stores the output.

In: jobs, as ``api_contracts`` describes them.  Out: events on Redis and rows in the database.  Begin reading
with ``worker.app``, which puts everything together, and ``worker.engine``, which is the life of a job.
"""
