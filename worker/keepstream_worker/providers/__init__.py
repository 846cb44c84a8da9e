"""Providers: send requests to LLM providers and make sense of their answers."""
