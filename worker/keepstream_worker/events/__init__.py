"""Events: what followers hear of jobs, by way of Redis."""
