"""Upkeep: what keeps a deployment going beside the jobs: signs of life, sweeps, cancels, announcements."""
