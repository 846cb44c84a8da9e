"""Who may: API keys of tenants, and short-lived tokens for one job.

In: the credentials of requests, and the table of keys.  Out: ``Access``, or an ``ApiError``.
"""
