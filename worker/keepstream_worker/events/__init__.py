"""Events: what followers are told, by way of Redis."""
