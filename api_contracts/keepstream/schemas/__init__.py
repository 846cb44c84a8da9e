"""The contract as JSON Schema and AsyncAPI documents, for services in any language."""
