"""The gateway: Keepstream over HTTP, for everything that speaks it.

In: requests of OpenAI's SDKs, of browsers and of other programs.  Out: jobs, their live events and their results, by
the client of the contract; nothing of the worker is known here.
"""
