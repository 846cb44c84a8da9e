"""Providers: requests to LLM providers, and what their answers mean."""
