"""Telemetry: what the worker says about itself."""
