"""The worker: takes jobs from the queue, runs them as streaming completions, publishes and stores the output.

In: jobs, as ``keepstream`` describes them.  Out: events on Redis and rows in the database.  Begin reading with
``keepstream_worker.app``, which puts everything together, and ``keepstream_worker.jobs.engine``, which is the life
of a job.
"""
