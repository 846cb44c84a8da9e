"""The console's room: a page for people."""
