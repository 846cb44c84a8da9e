"""The dialects in which a provider can be asked: chat completions, and the Responses API."""
