"""Bytes per token of stores that a real model writes: SmolLM2-135M-Instruct, which `make real-assets` fetches.

    python benchmarks/real_store_size.py [--tokens 6000] [--top-k 1 10 64 128]

Prints one line per K. The texts are this project's documents and code, and worked problems of GSM8K.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.sources.capture_config import CaptureConfig
from fusion_plugins.store import Manifest

ROOT = Path(__file__).parent.parent
MODEL = ROOT / ".cache" / "real" / "smollm2"
#: characters of one text
PIECE = 1500
CHARACTERS_PER_TOKEN = 3.5


def write_texts(path: Path, tokens: int) -> Path:
    """Write pieces of prose, code and worked problems in turn, until there are about as many tokens."""
    kinds = ("docs/*.md", "fusion_plugins/core/**/*.py", "benchmarks/texts/*.jsonl")
    texts = ["\n".join(file.read_text(encoding="utf-8") for file in sorted(ROOT.glob(kind))) for kind in kinds]
    count = max(1, int(tokens * CHARACTERS_PER_TOKEN / PIECE))
    pieces = [text[at : at + PIECE] for at in range(0, PIECE * count, PIECE) for text in texts][:count]
    path.write_text("".join(json.dumps({"id": str(n), "text": piece}) + "\n" for n, piece in enumerate(pieces)))
    return path


def measure(folder: Path, texts: Path, top_k: int) -> tuple[int, float]:
    """Capture the texts; return the tokens, and the bytes of the store per token."""
    capture_texts(CaptureConfig(model=str(MODEL), texts=str(texts), out=str(folder), top_k=top_k))
    manifest = Manifest.load(folder)
    return manifest.tokens, manifest.bytes / manifest.tokens


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 10, 64, 128])
    options = parser.parse_args(arguments)
    if not MODEL.is_dir():
        sys.exit(f"expected the model in {MODEL}, found nothing. Run `make real-assets`.")
    with tempfile.TemporaryDirectory() as work:
        texts = write_texts(Path(work) / "texts.jsonl", options.tokens)
        for top_k in options.top_k:
            tokens, size = measure(Path(work) / str(top_k), texts, top_k)
            print(f"K = {top_k}: {size:.1f} bytes per token over {tokens:,} tokens")


if __name__ == "__main__":
    main()
