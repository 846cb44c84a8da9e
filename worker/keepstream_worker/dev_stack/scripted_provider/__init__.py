"""The scripted provider: an OpenAI-compatible server without a model.

In: chat-completions requests.  Out: streams made as each request's ``script`` says.  Exists so that
demo, tests and benchmarks need no key, no network and no luck to meet a provider and its faults.
"""

from keepstream_worker.dev_stack.scripted_provider.connection import Request
from keepstream_worker.dev_stack.scripted_provider.server import ScriptedProvider

__all__ = ["Request", "ScriptedProvider"]
