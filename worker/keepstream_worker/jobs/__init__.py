"""Jobs: the life of one job, attempt by attempt."""
