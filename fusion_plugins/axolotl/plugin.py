"""The plugin that axolotl loads: checks the configuration, and hands over schema, trainer and collator."""

import sys
from functools import partial, wraps
from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger

from fusion_plugins.axolotl.args import fusion_block
from fusion_plugins.axolotl.fingerprint import stamp_datasets
from fusion_plugins.axolotl.guards import BEST, DPO, check_config, check_ready, dataset_types
from fusion_plugins.axolotl.losses import INFIFPO, PAIR_TRAINERS, WRPO
from fusion_plugins.axolotl.overrides import apply_overrides
from fusion_plugins.axolotl.prepared import kept_reports, remove_leftovers, write_reports
from fusion_plugins.axolotl.report import taught_lines
from fusion_plugins.axolotl.response_args import WRPOArgs
from fusion_plugins.axolotl.training_record import keep_record
from fusion_plugins.errors import PluginError

LOG = get_logger(__name__)
#: bytes of the batches that wait for one process
WAITING_BYTES = 1 << 30
#: bytes per position of axolotl's own columns
_PLAIN_BYTES = 4 * 8


class FusionPlugin(BasePlugin):
    """LLM fusion in axolotl; ``plugins: [fusion_plugins.axolotl.FusionPlugin]`` and a ``fusion:`` block."""

    def register(self, cfg: Any) -> None:
        """Check the raw configuration and let its content reach the hash of the prepared dataset.

        Nothing is checked for a command that trains nothing, as far as axolotl tells.

        Raises:
            ConfigError: naming every problem.
        """
        apply_overrides(cfg, sys.argv[1:])
        if cfg.get("inference") or cfg.get("merge_lora"):
            return
        block = check_config(cfg)
        if _has_pairs(cfg):
            # Not through `get_trainer_cls`: axolotl would leave out the reference model.
            cfg["trainer_cls"] = cfg.get("trainer_cls") or PAIR_TRAINERS[cfg["rl"]]
        stamp_datasets(cfg, block)
        remove_leftovers(cfg)

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Check, before `train` and `preprocess` load anything, that what they need is there; axolotl loads the rows.

        Raises:
            ConfigError: naming every problem.
        """
        check_ready(cfg, fusion_block(cfg), rows_wanted=preprocess)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Write the reports of the prepared datasets into the run's own folder, whichever run prepared them.

        So it is with what `fusion report` says of the training itself.

        Raises:
            PluginError: the trainer is not the one that takes pairs as they are tokenized.
        """
        write_reports(cfg)
        if cfg.trainer_cls == WRPO:
            trainer.settings = fusion_block(cfg).wrpo or WRPOArgs()
        if _is_fused(cfg):
            for name, report in kept_reports(cfg):
                for line in taught_lines(report):
                    LOG.info(f"{name}: {line}")
            limit_prefetch(trainer, positions=cfg.micro_batch_size * cfg.sequence_len)
        if _has_pairs(cfg) and type(trainer).__name__ != str(cfg.trainer_cls).rpartition(".")[2]:
            raise PluginError(
                f"a dataset of type {DPO} needs the trainer {cfg.trainer_cls}, but another plugin brought "
                f"{type(trainer).__name__}, which would tokenize the pairs anew. Remove that plugin."
            )
        keep_record(cfg, trainer)

    def pre_model_load(self, cfg: Any) -> None:
        """Spare a run whose reference is in its dataset the loading of a reference model."""
        if cfg.trainer_cls == INFIFPO:
            load_no_reference_model()

    def get_input_args(self) -> str:
        """Return the import path of the schema of the ``fusion:`` block."""
        return "fusion_plugins.axolotl.args.FusionArgs"

    def get_trainer_cls(self, cfg: Any) -> Any:
        """Return the trainer of runs with fused distributions or weighted answers; None leaves axolotl's own."""
        if _is_fused(cfg):
            from fusion_plugins.axolotl.trainer import FusionTrainer

            return FusionTrainer
        if _is_weighted(cfg):
            from fusion_plugins.axolotl.weighted_sft import WeightedTrainer

            return WeightedTrainer
        return None

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> Any:
        """Return the collator of runs with fused distributions or weighted answers, and which of axolotl's it wraps."""
        if not _is_fused(cfg) and not _is_weighted(cfg):
            return None
        from fusion_plugins.axolotl.collator import FusionCollator
        from fusion_plugins.axolotl.weighted_sft import WeightedCollator

        block, packed = fusion_block(cfg), cfg.eval_sample_packing if is_eval else cfg.sample_packing
        settings: dict[str, Any] = {"inner": _stock_collator(cfg, packed=packed)}
        if block.prepared == "stores":
            from fusion_plugins.axolotl.text_rows import text_fuser

            settings["fuser"] = partial(text_fuser, block=block)
        return FusionCollator if _is_fused(cfg) else WeightedCollator, settings


def limit_prefetch(trainer: Any, positions: int) -> None:
    """Let fewer batches wait where they would take more memory than :data:`WAITING_BYTES`.

    axolotl's default is 256 batches per worker, which are small without distributions. Two per worker are enough to
    keep it busy.

    Args:
        trainer: its arguments are changed.
        positions: of a batch, at most.
    """
    args = trainer.args
    workers, given = args.dataloader_num_workers, args.dataloader_prefetch_factor
    rows = trainer.train_dataset or trainer.eval_dataset
    if not (workers and given and rows):
        return
    size = positions * (_PLAIN_BYTES + 8 * trainer.data_collator.width(rows[0]))
    most = max(2, WAITING_BYTES // (workers * size))
    if given > most:
        args.dataloader_prefetch_factor = most
        LOG.info(
            f"fusion: dataloader_prefetch_factor is {most} in place of {given}: a batch takes {size / 1e6:.1f} MB, and "
            f"{workers} worker(s) of each process would keep {workers * given} of them in shared memory"
        )


def load_no_reference_model() -> None:
    """Let axolotl load no reference model where the dataset holds what it would say.

    axolotl itself spares only adapters and ORPO the second copy of the model. Where it does not ask this function, the
    trainer lets the copy go.
    """
    from axolotl import train

    load = train.setup_reference_model
    if getattr(load, "spares_infifpo", False):
        return

    @wraps(load)
    def setup_reference_model(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        return None if cfg.trainer_cls == INFIFPO else load(cfg, *args, **kwargs)

    setup_reference_model.spares_infifpo = True  # type: ignore[attr-defined]
    train.setup_reference_model = setup_reference_model


def _stock_collator(cfg: Any, *, packed: bool) -> type:
    """The collator that axolotl would choose without us."""
    from axolotl.monkeypatch.multipack import SUPPORTED_MULTIPACK_MODEL_TYPES
    from axolotl.utils import collators

    if not packed:
        return collators.DataCollatorForSeq2Seq
    numbered = (
        cfg.attn_implementation == "flex_attention"
        or cfg.model_config_type in SUPPORTED_MULTIPACK_MODEL_TYPES
        or (cfg.model_config_type == "llama" and cfg.attn_implementation != "flash_attention_2")
    )
    return collators.V2BatchSamplerDataCollatorForSeq2Seq if numbered else collators.BatchSamplerDataCollatorForSeq2Seq


def _has_pairs(cfg: Any) -> bool:
    return DPO in [*dataset_types(cfg), *dataset_types(cfg, "test_datasets")]


def _is_weighted(cfg: Any) -> bool:
    sft = (cfg.fusion or {}).get("sft") or {}
    return not cfg.rl and BEST in dataset_types(cfg) and sft.get("per_prompt") == "all"


def _is_fused(cfg: Any) -> bool:
    return not cfg.rl and bool(cfg.fusion and cfg.fusion.get("sources"))
