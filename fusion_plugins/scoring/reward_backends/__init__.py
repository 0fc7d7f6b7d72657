"""What runs a reward model: transformers or vLLM in this process, a server, or Ray's actors. Start with ``base``."""
