"""What runs a source model: transformers, vLLM, OpenAI-compatible servers, or Ray Data with one of the first two."""
