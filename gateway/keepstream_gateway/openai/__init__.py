"""OpenAI's shapes: its Responses API, chat completions and models, in front of Keepstream's jobs."""
