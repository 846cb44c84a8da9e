"""The client: jobs in, events and results out. Needs the extra ``client``."""

from keepstream.client.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]
