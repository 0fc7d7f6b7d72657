"""An axolotl plugin that turns on what axolotl always turns off: one token count for all processes."""

from axolotl.integrations.base import BasePlugin


class AveragingPlugin(BasePlugin):
    def get_training_args(self, cfg):
        return {"average_tokens_across_devices": True}
