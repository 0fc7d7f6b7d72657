"""LLM fusion (FuseLLM, FuseChat, FuseChat-3.0) inside stock axolotl and mergekit.

Importing this package loads neither torch nor a host. Public names: ``FusionError``, ``hookimpl`` and, resolved on
first use because axolotl looks preference dataset types up as ``package.attribute``, ``multi_source_dpo``.
"""

from fusion_plugins.errors import FusionError

__version__ = "0.1.0"
__all__ = ["FusionError", "__version__", "hookimpl", "multi_source_dpo"]


def __getattr__(name: str) -> object:  # not Any: typing would cost every interpreter start some milliseconds
    if name == "multi_source_dpo":
        from fusion_plugins.axolotl.multi_source_dpo import multi_source_dpo

        return multi_source_dpo
    if name == "hookimpl":
        from fusion_plugins.hookspecs import hookimpl

        return hookimpl
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
