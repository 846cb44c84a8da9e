"""The dev stack: servers for demo, development and tests, with nothing installed."""
