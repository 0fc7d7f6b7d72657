"""The rates that ``paper_runs.py`` and ``engine_simulation.py`` calculate with.

Those of this package are measured on one core of a small machine, by the benchmark that is named. There was no GPU:
what a model takes is calculated from its size, as floating point operations at a share of the peak of one H100, and
marked so.
"""

#: microseconds of one core per token at K = 64 (`bench_capture.py`): the thread that drives the model, reader, writer
MODEL_WAITS, READER, WRITER = 3.3, 2.4, 6.9
#: of the writer's thread: to join small shards
JOIN = 0.3
#: the same as the first when all of it was in the model's thread
MODEL_WAITED = 24.2
#: bytes per token of a store at K = 64, of a real model's output (`real_store_size.py`)
STORE_BYTES = 164.5
#: tokens per shard at K = 64, and bytes of the manifest per shard
SHARD_TOKENS, MANIFEST_BYTES_PER_SHARD, MANIFEST_LIMIT = 2**24 // 64, 300, 2**26
#: bytes of memory per text, prompt or response (`bench_size.py` promises it)
INDEX_BYTES = 100
#: bytes per second that sha256 reads when a merge links shards
CHECKSUM_SPEED = 1.0e9
#: bytes per token of a prepared dataset with fused rows at K = 64 and ids of four bytes, and of one that names stores;
#: both with axolotl's own columns
PREPARED_ROWS, PREPARED_STORES = 397, 11
#: microseconds of one core per response that is sampled (`bench_size.py`), and most bytes of a response per token: its
#: text, ids and log-probabilities before they are compressed
SAMPLED, RESPONSE_BYTES = 146, 12
#: not measured: peak of an H100 in bfloat16, share of it that a forward pass reaches, and while tokens are generated
#: one by one for many requests
PEAK, PREFILL_SHARE, DECODE_SHARE = 989e12, 0.4, 0.1
