"""What talks to source models: texts and prompts in, top-k log-probabilities and responses out.

``capture`` and ``sample`` drive any backend (``transformers``, ``vllm``, ``openai``, ``ray``). Importing this package
loads none of them.
"""
