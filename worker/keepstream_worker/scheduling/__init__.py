"""Scheduling: which job is next, and when to ask.

In: what the store reads under the turn; messages, ends of jobs and known moments.  Out: jobs, to the engine.
"""
