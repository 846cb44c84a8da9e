"""Intake: messages of the Celery queue become jobs of this worker."""
