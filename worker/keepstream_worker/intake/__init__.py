"""Intake: from the Celery queue to this worker's event loop, one message at a time."""
