"""Keepstream against OpenAI-compatible servers that others wrote: ``make interop``."""
