"""The axolotl side: ``plugins: [fusion_plugins.axolotl.FusionPlugin]`` and its dataset types.

``fusion_plugins.axolotl.fused`` (texts with fused distributions), ``fusion_plugins.axolotl.best_of_sources``
(supervised fine-tuning on the best responses) and ``fusion_plugins.multi_source_dpo`` (preference pairs). Importing
this package loads neither torch nor axolotl.
"""

from typing import Any

from fusion_plugins.errors import PluginError
from fusion_plugins.install import install_command

__all__ = ["FusionPlugin"]


def __getattr__(name: str) -> Any:
    if name != "FusionPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from fusion_plugins.axolotl.plugin import FusionPlugin
    except ImportError as error:
        # axolotl prints an ImportError and goes on without the plugin: a plain fine-tune that ends with status 0.
        raise PluginError(
            f"fusion_plugins.axolotl.FusionPlugin cannot be imported: {error}. Install the extra: "
            f"{install_command('axolotl')}"
        ) from error
    return FusionPlugin
