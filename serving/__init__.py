"""The endpoint: an OpenAI-compatible API over the registered model versions, on Ray Serve."""
