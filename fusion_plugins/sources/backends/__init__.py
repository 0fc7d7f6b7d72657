"""What runs a source model: transformers, vLLM, OpenAI-compatible servers, or vLLM on Ray Data."""
