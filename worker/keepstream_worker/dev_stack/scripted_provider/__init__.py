"""The scripted provider: an OpenAI-compatible server without a model, for demo, tests and benchmarks.

In: chat-completions requests.
Out: streams, and faults, as the ``script`` in each request says; refusals, as the limits say that it was given.
"""

from keepstream_worker.dev_stack.scripted_provider.connection import Request
from keepstream_worker.dev_stack.scripted_provider.server import ScriptedProvider

__all__ = ["Request", "ScriptedProvider"]
