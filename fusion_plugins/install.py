"""Which extra brings which package, and the command that installs it from where this package came from."""

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from fusion_plugins.errors import ConfigError

#: top-level module -> the extra of this package that brings it
EXTRA_OF = {
    "accelerate": "axolotl",
    "axolotl": "axolotl",
    "click": "mergekit",
    "datasketch": "clean",
    "datasets": "axolotl",
    "deepspeed": "axolotl",
    "httpx": "server",
    "huggingface_hub": "transformers",
    "jinja2": "report",
    "latex2sympy2_extended": "score",
    "markupsafe": "report",
    "math_verify": "score",
    "matplotlib": "report",
    "mergekit": "mergekit",
    "peft": "axolotl",
    "py3langid": "clean",
    "pytest": "score",
    "ray": "ray",
    "safetensors": "transformers",
    "tenacity": "server",
    "tokenizers": "transformers",
    "torch": "transformers",
    "transformers": "transformers",
    "trl": "axolotl",
    "vllm": "vllm",
}


def install_command(extra: str) -> str:
    """Return the command that adds an extra to the environment.

    The package is on no index. pip notes down which checkout or wheel it was installed from; where that is no longer
    there, the command names a placeholder for it.
    """
    options, place = _origin()
    return f"pip install {options}'{place}[{extra}]'"


def missing_package(error: ModuleNotFoundError, what: str) -> str | None:
    """Return what to say where ``what`` needs a package that is not installed.

    Returns:
        None if no extra brings the module: then it is not the user who has to install it.
    """
    module = (error.name or "").partition(".")[0]
    if module not in EXTRA_OF:
        return None
    apart = ", in an environment of its own" if module == "vllm" else ""  # it and axolotl need different versions
    return f"{what} needs the package {module}, which is not installed: {install_command(EXTRA_OF[module])}{apart}"


def missing_package_error(error: ModuleNotFoundError, what: str, otherwise: str = "") -> Exception:
    """Return what to raise where ``what`` needs a package that is not installed.

    Args:
        error: the import that failed.
        what: what needs the package.
        otherwise: what can be done instead of installing it, as a sentence.

    Returns:
        A :class:`ConfigError`; ``error`` itself where a module of this package is missing, which no user can install.
    """
    module = (error.name or "").partition(".")[0]
    if module in ("", "fusion_plugins"):
        return error
    message = missing_package(error, what) or f"{what} needs the package {module}, which is not installed; install it"
    return ConfigError(f"{message}. {otherwise}" if otherwise else message)


def _origin() -> tuple[str, str]:
    """Return options of pip and the place of the package."""
    try:
        text = distribution("fusion-plugins").read_text("direct_url.json")
        origin = json.loads(text or "{}")
        parts = urlsplit(origin.get("url", ""))
        place = Path(url2pathname(parts.path))
        if parts.scheme == "file" and place.exists():
            return "-e " if origin.get("dir_info", {}).get("editable") else "", str(place)
    except (PackageNotFoundError, ValueError, AttributeError):
        pass
    return "", "PATH/TO/fusion_plugins"
