"""What the tests of the vLLM backend share: the least demanding settings, and a server on this machine.

Neither this module nor the tests that use it import vLLM at the top: they are collected in environments without it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import source_checks
import tiny

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
#: eager: nothing is compiled; the memory that vLLM wants to find free is a small part of the machine's
ENGINE = {"enforce_eager": True, "gpu_memory_utilization": 0.05, "max_num_seqs": 16}


def checkpoint(folder: Path) -> Path:
    """A SentencePiece source whose output matrix is 16 rows wider than its vocabulary.

    Its own generation config would make every response the same: no run may use it.
    """
    tokenizer = tiny.sentencepiece_bpe()
    source_checks.checkpoint(folder, tokenizer=tokenizer, vocab_size=len(tokenizer) + 16, seed=1)
    path = folder / "generation_config.json"
    settings = {"do_sample": True, "top_k": 1, "top_p": 0.01, "repetition_penalty": 1.9, "temperature": 0.02}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


class Server:
    """vLLM's own OpenAI-compatible server."""

    def __init__(self, model: Path | str, log: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.log, self.flags = model, log, flags
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        flags = ["--model", str(self.model), "--served-model-name", "served", "--dtype", "float32"]
        flags += ["--host", "127.0.0.1", "--port", str(self.port), "--max-logprobs", "-1", "--enforce-eager"]
        flags += ["--gpu-memory-utilization", str(ENGINE["gpu_memory_utilization"]), "--generation-config", "auto"]
        flags += ["--max-num-seqs", str(ENGINE["max_num_seqs"]), *self.flags]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags],
                env=os.environ | ENVIRONMENT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(self.url.removesuffix("/v1") + "/health", timeout=5)
                return
            except OSError:
                time.sleep(0.3)
        raise AssertionError(f"the server did not start in {seconds} s: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """End it and its workers without warning."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
