"""The dev stack: servers for the demo, for development and for tests, where no service is installed."""
