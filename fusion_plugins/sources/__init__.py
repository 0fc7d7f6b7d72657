"""What asks source models: texts and prompts in, top-k log-probabilities and responses out.

``capture`` and ``sample`` work with any backend (``transformers``, ``vllm``, ``openai``, ``ray``). Importing this
package loads none of them. Reading order: ``capture`` (or ``sample``), ``batches``, ``backends/base``, one backend.
"""
