"""Upkeep: what keeps a deployment going beside the jobs: heartbeats, sweeps, cancels, terminal events of others."""
