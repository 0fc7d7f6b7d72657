"""Data set type ``fusion_plugins.axolotl.fused``: texts or chats whose sources are fused into targets.

axolotl imports this module by the name of the type and calls :func:`load`.
"""

from typing import Any

from fusion_plugins.axolotl.dataset import FusedRows
from fusion_plugins.axolotl.guards import FUSED, require_plugin

__all__ = ["load"]


def load(tokenizer: Any, cfg: Any, ds_cfg: Any = None) -> FusedRows:
    """Return the strategy that prepares one data set.

    Raises:
        PluginError: the plugin is not configured or not loaded.
        ConfigError: the ``fusion:`` block is missing or wrong.
    """
    return FusedRows(tokenizer, cfg, ds_cfg or {}, require_plugin(cfg, FUSED))
