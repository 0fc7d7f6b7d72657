"""Every documented value of every key of the block arrives behind axolotl's own loading, or is refused."""

import sys
from types import NoneType
from typing import Literal, get_args, get_origin

import pytest
import yaml
from axolotl_runs import FUSED, config, forget_plugins, write_config

from fusion_plugins.axolotl import guards
from fusion_plugins.axolotl.args import FusionBlock, fusion_block
from fusion_plugins.axolotl.block_settings import BlockSettings
from fusion_plugins.axolotl.overrides import apply_overrides
from fusion_plugins.axolotl.response_args import PairArgs
from fusion_plugins.errors import ConfigError
from fusion_plugins.plugins import get_registry

#: values of the keys whose type does not list them; a key that is neither here nor of a listed type fails the test
OPEN = {
    "sources.name": ["a", "ä b"],
    "sources.store": ["stores/a"],
    "sources.domains": [["math"], None, "none", ["a", "数学"]],
    "sources.where": [{"level": {"min": 1}}, None, {"verdict": ["correct", "unknown"], "x": None}],
    "sources.weight": [1, 0, 2.5],
    "sources.weight_by_domain": [{}, {"math": 0, "code": 0.5}],
    "where": [{"reward": {"min": 0.1, "max": 1}}, None, {"verdict": "incorrect", "index": [0, True]}],
    "own_source": ["target", None, "none"],
    "rule_by_domain": [{"math": {"rule": "fixed_weights", "rule_options": {"x": None}}}],
    "weights_from": ["data/scored", None, "none"],
    "rule": list(get_registry("fusion_rules")),
    "rule_options": [{}, {"x": None, "y": [1, None], "z": False}],
    "loss_options": [{}, {"beta": 0.25}, {"clip": 5, "ratio_clip": None}],
    "leave_out_sources": [[], ["a", "数学"]],
    "min_trust": ["inside", "outside"],
    "loss": list(get_registry("losses")),
    "lm_loss_weight": [0, 1, 0.25],
    "temperature": [0.5, 2],
    "loss_chunk": [1, 256, None, "none"],
    "top_k": [1, 100, None, "none"],
    "alignment.method": list(get_registry("aligners")),
    "projection.max_distance": [0, 3, None, "none"],
    "projection.min_mass": [0, 1, 0.5],
    "pairs.rule": list(get_registry("pair_rules")),
    "pairs.options": [{}, {"x": None}],
    "pairs.min_gap": [0.0, None, 0.02, "none"],
    "pairs.max_gap": [None, 0.2, "none", 0.9],
    "pairs.gap_exempt": [[], ["code", "maths"]],
    "pairs.per_prompt": [1, 4, "all"],
    "pairs.min_accuracy": [0, 1, 0.25],
    "pairs.own_source": [None, "none", "sft"],
    "pairs.weight_temperature": [0.02, 3],
    "pairs.texts": ["pairs.jsonl", None, "none"],
    "sft.rule": ["reward", "verdict"],
    "sft.weight_temperature": [0.02, 3],
    "wrpo.alpha": [0, 1, 0.1],
    "reference.sources.name": ["a", "ä b"],
    "reference.sources.store": ["stores/a"],
    "split.sft_share": [0, 1, 0.3],
    "split.verified_dpo_share": [0, 1, 0.3],
    "split.sft_only": [[], ["chinese", "other"]],
    "split.seed": [0, 7],
}
OPEN |= {f"split.{key}": values for key, values in OPEN.items() if key.startswith("pairs.")}


#: keys of pairs whose null means something
NULLABLE_OF_PAIRS = ("min_gap", "max_gap", "own_source", "texts")


def keys(model=FusionBlock, prefix=()):
    """Path of every key, with its documented values."""
    for name, field in model.model_fields.items():
        path, kinds = (*prefix, name), [field.annotation, *get_args(field.annotation)]
        group = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BlockSettings)), None)
        if ".".join(path) in OPEN:
            yield path, OPEN[".".join(path)]
        elif group is not None:
            yield from keys(group, path)
        elif get_origin(field.annotation) is Literal:
            yield path, list(get_args(field.annotation))
        elif field.annotation is bool:
            yield path, [True, False]
        else:
            pytest.fail(f"no values are known for {'.'.join(path)}: {field.annotation}")


def block_of(values):
    block = {}
    for path, value in values.items():
        group = block
        for key in path[:-1]:
            group = group.setdefault(key, [{}])[0] if key == "sources" else group.setdefault(key, {})
        group[path[-1]] = value
    return block


def read(block, path):
    value = block
    for key in path:
        value = value[0] if isinstance(value, list) else value
        value = getattr(value, key)
    if isinstance(value, dict):
        return {key: own.model_dump() if isinstance(own, BlockSettings) else own for key, own in value.items()}
    return value


def loaded(material, folder, block):
    """The block as a run sees it."""
    from axolotl.cli.config import load_cfg

    forget_plugins()
    settings = config(material, folder) | {"fusion": block}
    return fusion_block(load_cfg(str(write_config(settings, folder))))


def let_keys_be_together_that_no_run_uses_together(monkeypatch):
    monkeypatch.setattr(guards, "_idle", lambda block: [])
    monkeypatch.setattr(guards, "_losses", lambda cfg, block: [])
    monkeypatch.setattr(guards, "problems_of_fusion_loss", lambda block: [])
    monkeypatch.setattr(PairArgs, "problems", lambda pairs: ())


def test_every_documented_value_of_every_key_arrives(material, run_folder, monkeypatch):
    let_keys_be_together_that_no_run_uses_together(monkeypatch)
    known = dict(keys())
    assert {(".".join(path)) for path in known} >= set(OPEN)
    for number in range(max(map(len, known.values()))):
        given = {path: values[min(number, len(values) - 1)] for path, values in known.items()}
        block = loaded(material, run_folder, block_of(given))
        for path, value in given.items():
            assert read(block, path) == (None if value == "none" else value), ".".join(path)


def test_a_null_arrives_or_is_refused(material, run_folder, monkeypatch):
    """axolotl drops nulls when it writes its configuration, and a default would take their place."""
    let_keys_be_together_that_no_run_uses_together(monkeypatch)
    paths = [*dict(keys()), ("pairs",), ("sft",), ("split",), ("alignment",), ("projection",)]
    base = {("sources", "name"): "a", ("sources", "store"): "b"}
    taken, messages = [], {}
    for path in paths:
        try:
            block = loaded(material, run_folder, block_of(base | {path: None}))
        except ConfigError as error:
            messages[path[-1]] = str(error)
        else:
            taken.append(".".join(path))
            assert read(block, path) is None
    nullable = ["top_k", "loss_chunk", "projection.max_distance", "pairs", "sft", "split"]
    nullable += ["sources.domains", "sources.where", "where", "own_source", "weights_from"]
    nullable += [f"{group}.{key}" for group in ("pairs", "split.pairs") for key in NULLABLE_OF_PAIRS]
    assert sorted(taken) == sorted(nullable)
    assert len(messages) > 20
    assert all(f"{key}: " in message for key, message in messages.items())


def test_a_key_that_takes_null_has_a_word_for_it():
    for model in BlockSettings.__subclasses__():
        for name, field in model.model_fields.items():
            kinds = set(get_args(field.annotation))
            if NoneType in kinds and kinds & {int, float}:
                assert "none for" in field.description, f"{model.__name__}.{name}"


@pytest.mark.parametrize("value", [True, "nothing", [], {}])
def test_a_word_or_a_truth_value_is_no_number(value):
    for block in ({"lm_loss_weight": value}, {"top_k": value}, {"pairs": {"min_gap": value}}):
        with pytest.raises(ConfigError, match="1 wrong setting"):
            fusion_block({"fusion": {"sources": [{"name": "a", "store": "b"}]} | block})


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--fusion.lm_loss_weight", "0.2"], "lm_loss_weight", 0.2),
        (["--fusion.lm-loss-weight=0.2", "--learning-rate", "1"], "lm_loss_weight", 0.2),
        (["run.yml", "--fusion.keep_truncated", "--launcher", "python"], "keep_truncated", True),
        (["--fusion.keep_truncated"], "keep_truncated", True),
        (["--fusion.pairs.min_gap", "none"], "pairs", {"min_gap": "none"}),
        (["--fusion.pairs.min-gap", "-1", "--fusion.pairs.max_gap=null"], "pairs", {"min_gap": -1, "max_gap": None}),
        (["--fusion.rule_options={temperature: 2}"], "rule_options", {"temperature": 2}),
    ],
)
def test_options_of_the_command_line_reach_the_block(arguments, key, value):
    cfg = {"fusion": {"sources": []}}
    apply_overrides(cfg, arguments)
    assert cfg["fusion"][key] == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fusion-lm-loss-weight", "0.2"], "--fusion-lm-loss-weight: axolotl ignores"),
        (["--fusoin.lm_loss_weight=0.2"], "--fusoin.lm_loss_weight=0.2: axolotl ignores"),
        (["--fusion_lm_loss_weight=0.2"], "--fusion.KEY VALUE"),
        (["--no-fusion.keep_truncated"], "axolotl ignores"),
        (["--lm_loss_weight", "0.2"], "axolotl ignores"),
        (["--fusion", "x"], "axolotl ignores"),
        (["--fusion.sources.0.store", "x"], "expected a group of settings in fusion.sources"),
        (["--fusion.rule_options", "{"], "expected a YAML value"),
    ],
)
def test_options_that_would_be_ignored_are_refused(arguments, message):
    with pytest.raises(ConfigError) as error:
        apply_overrides({"fusion": {"sources": []}}, arguments)
    assert message in str(error.value)


def test_keys_of_a_sweep_reach_the_block_and_keys_beside_it_are_refused():
    cfg = {"fusion": {"sources": [], "lm_loss_weight": 0.9}, "fusion.lm_loss_weight": 0.3, "fusion.sft.rule": "verdict"}
    apply_overrides(cfg, [])
    assert cfg == {"fusion": {"sources": [], "lm_loss_weight": 0.3, "sft": {"rule": "verdict"}}}
    with pytest.raises(ConfigError, match="lm_loss_weight: axolotl ignores this key beside the block"):
        apply_overrides({"fusion": {}, "lm_loss_weight": 0.3}, [])
    apply_overrides({"fusion": {}, "adapter": "lora"}, ["--adapter", "lora", "--trl.beta", "1"])
    shared = ["a list that the block takes over with a YAML anchor"]
    apply_overrides({"fusion": {"sources": shared}, "sources": shared}, [])


def test_the_command_line_is_obeyed_and_its_misspelt_keys_are_named(material, run_folder, monkeypatch):
    from axolotl.cli.config import load_cfg

    path = str(write_config(config(material, run_folder), run_folder))
    monkeypatch.setattr(sys, "argv", ["train", path, "--fusion.lm_loss_weight", "0.2", "--fusion.top_k=none"])
    forget_plugins()
    block = fusion_block(load_cfg(path))
    assert (block.lm_loss_weight, block.top_k) == (0.2, None)
    forget_plugins()
    monkeypatch.setattr(sys, "argv", ["axolotl", path, "--fusion.lm_los_weight", "0.2"])
    with pytest.raises(ConfigError, match="lm_los_weight: unknown key"):
        load_cfg(path)
    forget_plugins()
    monkeypatch.setattr(sys, "argv", ["axolotl"])
    # What axolotl's own launchers hand over.
    assert fusion_block(load_cfg(path, fusion__lm_loss_weight="0.3")).lm_loss_weight == 0.3
    forget_plugins()
    assert fusion_block(load_cfg(path, **{"fusion.lm_loss_weight": 0.4})).lm_loss_weight == 0.4


def test_what_yaml_reads_as_text_is_still_a_number(material, run_folder):
    text = yaml.safe_dump(config(material, run_folder)).replace("lm_loss_weight: 0.5", "lm_loss_weight: 5e-1")
    (run_folder / "text.yml").write_text(text)
    from axolotl.cli.config import load_cfg

    forget_plugins()
    assert fusion_block(load_cfg(str(run_folder / "text.yml"))).lm_loss_weight == 0.5


BEST, DPO = "fusion_plugins.axolotl.best_of_sources", "fusion_plugins.multi_source_dpo"
SOURCES = {"sources": [{"name": "a", "store": "b"}]}


def problems(block, entry, **settings):
    """What the plugin says about a raw configuration."""
    cfg = {"fusion": block, "datasets": [{"path": "x", **entry}], **settings}
    try:
        guards.check_config(cfg)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("block", "named"), [
    ({"sft": {}, "lm_loss_weight": 0.5}, "fusion.lm_loss_weight: for fused distributions alone"),
    ({"sft": {}, "projection": {"chain": False}, "loss": "kl"}, "fusion.loss, fusion.projection: for fused"),
    ({"sft": {}, "on_missing_text": "skip"}, "fusion.on_missing_text"),
    (SOURCES | {"pairs": {}, "keep_truncated": True}, "fusion.keep_truncated, fusion.pairs: for scored responses"),
    (SOURCES | {"alignment": {"tie_order": "fusechat"}}, "fusion.alignment.tie_order: for dtw alone"),
    (SOURCES | {"projection": {"vocabulary_map": "exact", "max_distance": 3}}, "fusion.projection.max_distance"),
    ({"sft": {}, "pairs": {"rule": "verdict", "max_gap": "none"}}, "fusion.pairs.max_gap: pairs of the rule verdict"),
])  # fmt: skip
def test_a_setting_that_would_do_nothing_is_refused(block, named):
    kind = FUSED if block.get("sources") else BEST
    assert named in problems(block, {"type": kind})


def test_settings_that_do_something_or_are_the_defaults_are_not_refused():
    """axolotl writes every default into the configurations that it saves."""
    whole = FusionBlock(sft={}, pairs={"rule": "verdict"}, split={}).model_dump()
    assert problems(whole, {"type": BEST}) == ""
    assert problems(whole, {"type": DPO}, rl="dpo") == ""
    fused = SOURCES | {"alignment": {"method": "dtw", "tie_order": "fusechat"}, "projection": {"max_distance": 3}}
    assert problems(FusionBlock(**fused).model_dump(), {"type": FUSED}) == ""


@pytest.mark.parametrize(("block", "named"), [
    (SOURCES | {"rule_options": {"missing": "mask", "temperature": 2}}, "rule_options: min_ce takes missing, got 't"),
    ({"sft": {}, "pairs": {"options": {"min_gap": 1}}}, "fusion.pairs.options: same_source takes no options"),
])  # fmt: skip
def test_an_option_that_the_rule_does_not_take_is_refused(block, named):
    with pytest.raises(ConfigError, match=named):
        guards.check_ready({}, fusion_block({"fusion": block}), rows_wanted=False)


@pytest.mark.parametrize("key", ["pairs.min_gap", "projection.chain", "split.seed"])
def test_a_group_of_the_block_without_its_name_is_refused(key):
    with pytest.raises(ConfigError, match=f"--{key}"):
        apply_overrides({"fusion": {}}, [f"--{key}", "1"])
    with pytest.raises(ConfigError, match=f"{key}: axolotl ignores this key"):
        apply_overrides({"fusion": {}, key: 1}, [])


@pytest.mark.parametrize("arguments", [["--fusion.top_k="], ["--fusion.top_k", ""], ["--fusion.pairs.min-gap= "]])
def test_an_option_without_a_value_is_no_null(arguments):
    with pytest.raises(ConfigError, match="expected a value, got none"):
        apply_overrides({"fusion": {"top_k": 4}}, arguments)


@pytest.mark.parametrize("key", ["filed_messages", "train_on_inputs", "reward_model"])
@pytest.mark.parametrize("kind", [FUSED, BEST, DPO])
def test_an_unknown_key_of_a_dataset_is_refused(kind, key):
    block, settings = (SOURCES, {}) if kind == FUSED else ({"sft": {}, "pairs": {}}, {"rl": kind == DPO and "dpo"})
    found = problems(block, {"type": kind, key: None}, **settings)
    assert f"datasets: {key}: axolotl has no such key" in found
    assert ("did you mean field_messages?" in found) == (key == "filed_messages")


@pytest.mark.parametrize("kind", [BEST, DPO])
def test_keys_of_chats_are_refused_for_scored_responses(kind):
    settings = {"rl": "dpo"} if kind == DPO else {}
    keys = {
        "field_messages": "chat", "roles_to_train": ["user"], "train_on_eos": "none", "drop_system_message": True,
        "chat_template": "chatml", "preprocess_shards": 2, "message_field_training": "train", "temperature": 2,
    }  # fmt: skip
    found = problems({"sft": {}, "pairs": {}}, {"type": kind, **keys}, **settings)
    assert [key for key in keys if f"datasets: {key} cannot be used with `type: {kind}`" not in found] == []
    loading = {"split": "train", "name": "a", "data_files": ["a"], "ds_type": "json", "revision": "b", "shards": None}
    assert problems({"sft": {}, "pairs": {}}, {"type": kind, **loading}, **settings) == ""


def test_training_on_prompts_is_refused_for_the_best_answers():
    assert "train_on_inputs cannot" in problems({"sft": {}}, {"type": BEST}, train_on_inputs=True)
    assert problems({"sft": {}}, {"type": BEST}, train_on_inputs=False) == ""
