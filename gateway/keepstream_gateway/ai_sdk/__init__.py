"""The AI SDK's room: streams for `useChat`."""
