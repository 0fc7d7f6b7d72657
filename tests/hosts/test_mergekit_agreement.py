"""`fusion merge-check` says yes exactly where the merge succeeds and equals a computation by hand.

Every case is a folder of models and a configuration. It is checked, then merged by mergekit, and the merged tensors are
compared with the formula of VaRM written out. The verdict is stated as well, so that a check and a merge that are wrong
in the same way do not agree by chance.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import merging
import pytest
import tiny
import torch
import yaml
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from fusion_plugins.errors import MergeError
from fusion_plugins.mergekit.check import check_merge

WIDTH, INNER, VOCABULARY, LAYERS = 16, 24, 40, 2
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}
UP = "model.layers.0.mlp.up_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass
class Case:
    """A merge: configuration, mergekit's flags, and what the merged model must hold (None: the merge must not work)."""

    config: dict
    expected: dict[str, torch.Tensor] | None = None
    flags: list[str] = field(default_factory=list)
    tolerance: float = 1e-6


def llama(seed, *, base=None, vocabulary=VOCABULARY, inner=INNER, layers=LAYERS, head=True):
    """Tensors of a Llama: random, or those of a base, moved by another amount in every tensor."""
    shapes = {EMBEDDING: (vocabulary, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(layers):
        inside = {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (WIDTH // 2, WIDTH),
            "self_attn.v_proj": (WIDTH // 2, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (inner, WIDTH),
            "mlp.up_proj": (inner, WIDTH),
            "mlp.down_proj": (WIDTH, inner),
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inside.items()}
    if head:
        shapes[HEAD] = (vocabulary, WIDTH)
    return moved({name: torch.zeros(shape) for name, shape in shapes.items()} if base is None else base, seed)


def moved(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for name, tensor in tensors.items():
        amount = 0.1 * torch.rand((), generator=generator) + 0.01
        changed[name] = tensor + amount.to(tensor.dtype) * torch.randn(tensor.shape, generator=generator).to(
            tensor.dtype
        )
    return changed


def save(folder, tensors, config=LLAMA, *, shards=1, tokenizer=None):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    index = {}
    for number in range(shards):
        part = names[number::shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def varm(base, tuned, *, prior=None, unit=lambda name: name):
    """VaRM, written out: the mean square of the change over a unit is the weight of a model in it."""
    prior = prior or (lambda name: [1.0] * len(tuned))
    base = {name: tensor.double() for name, tensor in base.items()}
    deltas = [{name: model[name].double() - tensor for name, tensor in base.items()} for model in tuned]
    merged = {}
    for name, tensor in base.items():
        members = [other for other in base if unit(other) == unit(name)]
        count = sum(base[other].numel() for other in members)
        values = [sum(float((delta[other] ** 2).sum()) for other in members) / count for delta in deltas]
        values = [value * factor for value, factor in zip(values, prior(name), strict=True)]
        total = sum(values)
        merged[name] = tensor + sum(
            (value / total) * delta[name] if total else 0 * delta[name]
            for value, delta in zip(values, deltas, strict=True)
        )
    return merged


def three(folder, change=lambda name, tensors: tensors, configs=None, **settings):
    """Save a base and two tuned models after a change, and return their configuration and their tensors."""
    base = llama(0)
    models = {"base": base, "one": llama(1, base=base), "two": llama(2, base=base)}
    models = {name: change(name, dict(tensors)) for name, tensors in models.items()}
    for name, tensors in models.items():
        save(folder / name, tensors, (configs or {}).get(name, LLAMA))
    return config_of(folder, **settings), models


def config_of(folder, **settings):
    folders = {name: folder / name for name in ("base", "one", "two")}
    return merging.config_of(folders, "one", "two", **({"dtype": "float32"} | settings))


def merged_of(models):
    return varm(models["base"], [models["one"], models["two"]])


CASES: dict[str, tuple[Callable[[Path], Case], bool]] = {}


def case(ok):
    def register(build):
        CASES[build.__name__] = (build, ok)
        return build

    return register


@case(True)
def plain(folder):
    config, models = three(folder)
    return Case(config, merged_of(models))


@case(True)
def shards_beside_single_files(folder):
    config, models = three(folder)
    shutil.rmtree(folder / "one")
    save(folder / "one", models["one"], shards=3)
    return Case(config, merged_of(models))


@case(True)
def a_stale_shard_that_the_index_does_not_name(folder):
    case = shards_beside_single_files(folder)
    save_file(llama(7, vocabulary=50), folder / "one" / "model-00004-of-00004.safetensors", metadata={"format": "pt"})
    return case


@case(True)
def a_stale_single_file_beside_the_index(folder):
    case = shards_beside_single_files(folder)
    save_file(llama(7), folder / "one" / "model.safetensors", metadata={"format": "pt"})
    return case


@case(True)
def stale_copies_in_every_shard_that_the_index_names(folder):
    case = shards_beside_single_files(folder)
    stale = llama(7, vocabulary=50)
    for file in (folder / "one").glob("*.safetensors"):
        save_file(stale | load_file(file), file, metadata={"format": "pt"})
    return case


@case(False)
def stale_copies_merged_by_a_method_of_mergekit(folder):
    case = stale_copies_in_every_shard_that_the_index_names(folder)
    case.config |= {"merge_method": "linear", "parameters": {"weight": 1.0}}
    del case.config["base_model"]
    case.expected = None
    return case


@case(True)
def pickled(folder):
    config, models = three(folder)
    (folder / "one" / "model.safetensors").unlink()
    torch.save(models["one"], folder / "one" / "pytorch_model.bin")
    return Case(config, merged_of(models))


@case(True)
def all_bfloat16(folder):
    config, models = three(folder, lambda _, tensors: {key: each.bfloat16() for key, each in tensors.items()})
    return Case(config, merged_of(models))


@case(True)
def all_float16_without_dtype(folder):
    config, models = three(folder, lambda _, tensors: {key: each.half() for key, each in tensors.items()})
    del config["dtype"]
    return Case(config, merged_of(models), tolerance=1e-3)


@case(True)
def mixed_dtypes(folder):
    dtypes = {"base": torch.bfloat16, "one": torch.float64, "two": torch.float16}
    config, models = three(folder, lambda name, tensors: {key: each.to(dtypes[name]) for key, each in tensors.items()})
    return Case(config, merged_of(models))


@case(True)
def another_dtype_in_the_output(folder):
    config, models = three(folder, out_dtype="bfloat16")
    return Case(config, merged_of(models), tolerance=2**-8)


@case(True)
def tied_heads(folder):
    def change(_, tensors):
        return {name: tensor for name, tensor in tensors.items() if name != HEAD}

    config, models = three(folder, change, dict.fromkeys(("base", "one", "two"), LLAMA | {"tie_word_embeddings": True}))
    return Case(config, merged_of(models))


@case(True)
def a_tied_model_beside_an_untied_base(folder):
    def change(name, tensors):
        return tensors if name != "one" else {key: tensor for key, tensor in tensors.items() if key != HEAD}

    config, models = three(folder, change, {"one": LLAMA | {"tie_word_embeddings": True}})
    models["one"][HEAD] = models["one"][EMBEDDING]
    return Case(config, merged_of(models))


@case(False)
def an_untied_model_beside_a_tied_base(folder):
    """The merged model would have a head, and a configuration that says it has none."""

    def change(name, tensors):
        return tensors if name != "base" else {key: tensor for key, tensor in tensors.items() if key != HEAD}

    config, _ = three(folder, change, {"base": LLAMA | {"tie_word_embeddings": True}})
    return Case(config)


@case(True)
def priors(folder):
    config, models = three(folder)
    config["models"][0]["parameters"] = {"weight": 3.0}
    return Case(config, varm(models["base"], [models["one"], models["two"]], prior=lambda _: [3.0, 1.0]))


@case(True)
def filters_and_gradients(folder):
    """The prior grows over the layers, from 0 to 4, in the feed-forward part only."""
    config, models = three(folder)
    setting = [{"filter": "mlp", "value": [0.0, 4.0]}, {"value": 2.0}]
    config["models"][0]["parameters"] = {"weight": setting}

    def prior(name):
        return [(4.0 if ".layers.1." in name else 0.0) if "mlp" in name else 2.0, 1.0]

    return Case(config, varm(models["base"], [models["one"], models["two"]], prior=prior))


@case(True)
def layers_as_units(folder):
    config, models = three(folder, parameters={"granularity": "layer"})

    def unit(name):
        return name.split(".")[2] if ".layers." in name else name

    return Case(config, varm(models["base"], [models["one"], models["two"]], unit=unit))


@case(True)
def slices(folder):
    """One layer: layer 1 of every model."""
    config, models = three(folder)
    del config["models"]
    sources = [{"model": str(folder / name), "layer_range": [1, 2]} for name in ("base", "one", "two")]
    config["slices"] = [{"sources": sources}]

    def cut(tensors):
        kept = {name: tensor for name, tensor in tensors.items() if ".layers.0." not in name}
        return {name.replace(".layers.1.", ".layers.0."): tensor for name, tensor in kept.items()}

    return Case(config, merged_of({name: cut(tensors) for name, tensors in models.items()}))


def with_tokens(folder, **settings):
    """A base of 300 tokens; a model with the same, one with two more. The rows of the tensors follow the tokenizer."""
    small = tiny.byte_level(300)
    large = type(small).from_pretrained(saved_tokenizer(folder / "larger", small))
    large.add_tokens(["<|first|>", "<|second|>"])
    sizes = {"base": len(small), "one": len(small), "two": len(large)}
    base = llama(0, vocabulary=sizes["two"])
    models = {"base": base, "one": llama(1, base=base), "two": llama(2, base=base)}
    for name, tensors in models.items():
        for part in (EMBEDDING, HEAD):
            tensors[part] = tensors[part][: sizes[name]].clone()
        tokenizer = large if name == "two" else small
        save(folder / name, tensors, LLAMA | {"vocab_size": sizes[name]}, tokenizer=tokenizer)
    return config_of(folder, **settings), models


def saved_tokenizer(folder, tokenizer):
    tokenizer.save_pretrained(folder)
    return folder


def cut_to_base(models):
    rows = len(models["base"][HEAD])
    two = {name: each[:rows] if name in (HEAD, EMBEDDING) else each for name, each in models["two"].items()}
    return models | {"two": two}


@case(False)
def added_tokens_without_a_tokenizer_setting(folder):
    return Case(with_tokens(folder)[0])


@case(True)
def added_tokens_with_the_tokenizer_of_the_base(folder):
    config, models = with_tokens(folder, tokenizer={"source": "base"})
    return Case(config, merged_of(cut_to_base(models)))


def filled(models):
    """mergekit gives the models that lack a token the row of the only one that has it."""
    rows = len(models["base"][HEAD])
    for name in ("base", "one"):
        for part in (HEAD, EMBEDDING):
            models[name][part] = torch.cat([models[name][part], models["two"][part][rows:]])
    return models


@case(True)
def added_tokens_with_the_union_of_tokenizers(folder):
    config, models = with_tokens(folder, tokenizer={"source": "union"})
    return Case(config, merged_of(filled(models)))


@case(True)
def added_tokens_with_the_tokenizer_of_a_model(folder):
    config, models = with_tokens(folder)
    config["tokenizer_source"] = str(folder / "two")
    return Case(config, merged_of(filled(models)))


@case(True)
def rows_padded_to_a_multiple(folder):
    config, models = with_tokens(folder, tokenizer={"source": "base", "pad_to_multiple_of": 64})
    models = cut_to_base(models)
    for tensors in models.values():
        for part in (HEAD, EMBEDDING):
            rows = tensors[part]
            tensors[part] = torch.cat([rows, rows.mean(dim=0).expand(-len(rows) % 64, -1)])
    return Case(config, merged_of(models))


@case(False)
def a_tokenizer_wider_than_its_model(folder):
    config, _ = with_tokens(folder, tokenizer={"source": "base"})
    shutil.rmtree(folder / "base")
    tensors = llama(0, vocabulary=len(tiny.byte_level(300)) - 5)
    wide = LLAMA | {"vocab_size": len(tensors[HEAD])}
    save(folder / "base", tensors, wide, tokenizer=tiny.byte_level(300))
    return Case(config)


@case(False)
def a_broken_tokenizer_that_the_merge_needs(folder):
    config, _ = with_tokens(folder, tokenizer={"source": "base"})
    (folder / "base" / "tokenizer.json").write_text('{"model": ')
    return Case(config)


@case(True)
def a_broken_tokenizer_that_the_merge_does_not_need(folder):
    config, models = three(folder)
    (folder / "one" / "tokenizer.json").write_text('{"model": ')
    return Case(config, merged_of(models))


def experts(folder, architecture, *, stored=("mlp", "gate_proj", "up_proj", "down_proj"), **sizes):
    """A mixture of experts as transformers stores it: one tensor per expert, under the names of `stored`."""
    import transformers

    torch.manual_seed(0)
    shape = {key: LLAMA[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")}
    config = getattr(transformers, f"{architecture}Config")(**shape, num_key_value_heads=1, **sizes)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    model.save_pretrained(folder / "base")
    base = tiny.tensors_of(folder / "base")
    models = {"base": base, "one": moved(base, 1), "two": moved(base, 2)}
    written = json.loads((folder / "base" / "config.json").read_text())
    for name in ("one", "two"):
        save(folder / name, models[name], written)
    models = {name: stacked(tensors, *stored) for name, tensors in models.items()}
    return Case(config_of(folder), merged_of(models))


def stacked(tensors, block, gate, up, down):
    """transformers 5 holds the experts of a layer in two tensors, and mergekit merges those."""
    kept = {name.replace(block, "mlp"): tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(LAYERS):
        start, end = f"model.layers.{layer}.{block}.experts", f"model.layers.{layer}.mlp.experts"
        count = sum(name.startswith(start) and name.endswith(f"{up}.weight") for name in tensors)

        def part(expert, name, start=start):
            return tensors[f"{start}.{expert}.{name}.weight"]

        rows = [torch.cat([part(each, gate), part(each, up)]) for each in range(count)]
        kept[f"{end}.gate_up_proj"] = torch.stack(rows)
        kept[f"{end}.down_proj"] = torch.stack([part(each, down) for each in range(count)])
    return kept


@case(True)
def experts_that_mergekit_infers_olmoe(folder):
    return experts(folder, "Olmoe", intermediate_size=INNER, num_experts=4, num_experts_per_tok=2)


@case(True)
def experts_that_mergekit_infers_with_a_shared_expert(folder):
    sizes = {"intermediate_size": INNER, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    return experts(folder, "Qwen2Moe", num_experts=4, num_experts_per_tok=2, **sizes)


@case(True)
def experts_that_mergekit_knows(folder):
    sizes = {"intermediate_size": INNER, "num_local_experts": 4, "num_experts_per_tok": 2}
    return experts(folder, "Mixtral", stored=("block_sparse_moe", "w1", "w3", "w2"), **sizes)


@case(False)
def an_expert_that_a_model_lacks(folder):
    case = experts_that_mergekit_infers_olmoe(folder)
    tensors = tiny.tensors_of(folder / "one")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, folder / "one" / "model.safetensors", metadata={"format": "pt"})
    case.expected = None
    return case


def adapter(folder, base, *, seed=1, resize=None, **settings):
    """A LoRA of a saved model with random weights, and what it adds to them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize:
        model.resize_token_embeddings(resize)
    settings = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": False,
    } | settings
    tuned = get_peft_model(model, LoraConfig(**settings))
    if settings.get("modules_to_save"):
        with torch.no_grad():
            tuned.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.05)
    tuned.save_pretrained(folder)
    state = load_file(folder / "adapter_model.safetensors")
    added = {}
    for name, down in state.items():
        if "lora_A" in name:
            target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            added[target] = state[name.replace("lora_A", "lora_B")] @ down * (4 / 2)
    return added, state


def with_adapter(folder, **settings):
    config, models = three(folder)
    added, state = adapter(folder / "lora", folder / "base", **settings)
    config["models"][1] = {"model": f"{folder / 'base'}+{folder / 'lora'}"}
    models["two"] = {name: tensor + added.get(name, 0) for name, tensor in models["base"].items()}
    return Case(config, merged_of(models), flags=["--lora-merge-cache", str(folder / "cache")]), models, state


@case(True)
def an_adapter(folder):
    return with_adapter(folder)[0]


@case(True)
def an_adapter_with_a_saved_head(folder):
    case, models, _ = with_adapter(folder, modules_to_save=["lm_head"])
    models["two"][HEAD] = models["base"][HEAD] + 0.05
    case.expected = merged_of(models)
    return case


@case(False)
def an_adapter_without_a_place_to_merge_it(folder):
    case = with_adapter(folder)[0]
    case.flags, case.expected = [], None
    return case


@case(False)
def an_adapter_trained_with_more_tokens(folder):
    case = with_adapter(folder, resize=VOCABULARY + 6)[0]
    case.expected = None
    return case


@case(False)
def an_adapter_of_a_wider_base(folder):
    case = with_adapter(folder)[0]
    save(folder / "wide", llama(5, inner=2 * INNER), LLAMA | {"intermediate_size": 2 * INNER})
    shutil.rmtree(folder / "lora")
    adapter(folder / "lora", folder / "wide")
    case.expected = None
    return case


@case(False)
def an_adapter_of_a_deeper_base(folder):
    """PEFT leaves out what has no place, without an error: the merge works, and is wrong."""
    case = with_adapter(folder)[0]
    save(folder / "deep", llama(5, layers=3), LLAMA | {"num_hidden_layers": 3})
    shutil.rmtree(folder / "lora")
    adapter(folder / "lora", folder / "deep")
    case.expected = None
    return case


@case(False)
def an_adapter_trained_on_after_its_merged_copy_was_made(folder):
    case, models, _ = with_adapter(folder)
    merging.run_merge(folder, case.config, *case.flags, name="first")
    added, _ = adapter(folder / "lora", folder / "base", seed=2)
    models["two"] = {name: tensor + added.get(name, 0) for name, tensor in models["base"].items()}
    case.expected = merged_of(models)
    return case


@case(False)
def a_missing_tensor(folder):
    config, _ = three(folder, lambda name, tensors: tensors if name != "one" else without(tensors, UP))
    return Case(config)


@case(False)
def a_tensor_that_the_base_lacks(folder):
    config, _ = three(
        folder, lambda name, tensors: tensors if name != "base" else without(tensors, "model.norm.weight")
    )
    return Case(config)


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


@case(True)
def a_tensor_that_only_a_tuned_model_has(folder):
    """transformers does not read it either."""
    config, models = three(
        folder, lambda name, tensors: tensors | ({"extra.weight": torch.ones(3)} if name == "one" else {})
    )
    return Case(config, merged_of(models))


@case(True)
def integer_buffers_that_all_models_share(folder):
    config, models = three(folder, lambda _, tensors: tensors | {"model.position_ids": torch.arange(600)})
    return Case(config, {name: each for name, each in merged_of(models).items() if name != "model.position_ids"})


@case(True)
def masks_of_other_dtypes_that_mergekit_drops(folder):
    dtypes = {"base": torch.uint8, "one": torch.bool, "two": torch.float32}
    config, models = three(folder, lambda name, tensors: tensors | {"model.mask": torch.ones(4, dtype=dtypes[name])})
    return Case(config, {name: each for name, each in merged_of(models).items() if name != "model.mask"})


def bert(folder, positions, **settings):
    """A model whose positions mergekit merges like weights: `positions` gives those of base, one and two."""
    import transformers

    torch.manual_seed(0)
    sizes = {key: LLAMA[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")}
    config = transformers.BertConfig(**sizes, intermediate_size=INNER, max_position_embeddings=600)
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "base")
    base = tiny.tensors_of(folder / "base")
    models = {"base": base, "one": moved(base, 1), "two": moved(base, 2)}
    written = json.loads((folder / "base" / "config.json").read_text())
    shutil.rmtree(folder / "base")
    for (name, tensors), numbers in zip(models.items(), positions, strict=True):
        save(folder / name, tensors | {"bert.embeddings.position_ids": numbers}, written)
    return config_of(folder, **settings), models


@case(True)
def positions_that_the_dtype_would_round(folder):
    positions = torch.arange(600).reshape(1, -1)
    config, models = bert(folder, [positions] * 3, dtype="bfloat16")
    models = {name: {key: each.bfloat16() for key, each in tensors.items()} for name, tensors in models.items()}
    return Case(config, merged_of(models) | {"bert.embeddings.position_ids": positions}, tolerance=2**-7)


@case(False)
def positions_that_differ(folder):
    positions = torch.arange(600).reshape(1, -1)
    return Case(bert(folder, [positions, positions, positions + 1])[0])


@case(False)
def biases_that_mergekit_drops(folder):
    def change(_, tensors):
        return tensors | {f"model.layers.{layer}.self_attn.q_proj.bias": torch.ones(WIDTH) for layer in range(LAYERS)}

    biased = LLAMA | {"attention_bias": True}
    config, models = three(folder, change, dict.fromkeys(("base", "one", "two"), biased))
    return Case(config, merged_of(models))


@case(False)
def another_shape(folder):
    config, _ = three(folder)
    shutil.rmtree(folder / "two")
    save(folder / "two", llama(2, inner=2 * INNER), LLAMA | {"intermediate_size": 2 * INNER})
    return Case(config)


@case(False)
def another_architecture(folder):
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    return Case(three(folder, configs={"two": mistral})[0])


@case(True)
def an_average(folder):
    config, models = three(folder, merge_method="linear", parameters={"weight": 1.0})
    del config["base_model"]
    return Case(config, {name: (models["one"][name] + models["two"][name]) / 2 for name in models["one"]})


@case(False)
def a_chat_template_that_does_not_exist(folder):
    return Case(with_tokens(folder, tokenizer={"source": "base"}, chat_template="alpacca")[0])


@case(False)
def a_broken_configuration(folder):
    config, _ = three(folder)
    (folder / "one" / "config.json").write_text('{"architectures": [')
    return Case(config)


@case(False)
def a_missing_base(folder):
    config, _ = three(folder)
    shutil.rmtree(folder / "base")
    return Case(config)


@case(False)
def an_empty_folder(folder):
    config, _ = three(folder)
    shutil.rmtree(folder / "two")
    (folder / "two").mkdir()
    return Case(config)


@case(False)
def a_truncated_file(folder):
    config, _ = three(folder)
    file = folder / "two" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return Case(config)


@case(False)
def a_truncated_shard(folder):
    case = shards_beside_single_files(folder)
    file = folder / "one" / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    case.expected = None
    return case


@case(False)
def an_index_of_other_shards(folder):
    case = shards_beside_single_files(folder)
    file = folder / "one" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][UP] = next(shard for shard in index["weight_map"].values() if shard != index["weight_map"][UP])
    file.write_text(json.dumps(index))
    case.expected = None
    return case


QUANTIZED = {}


def quantized(change, *, key=None, models=("base", "one", "two")):
    def build(folder):
        config = LLAMA | ({"quantization_config": key} if key else {})

        def of_some(name, tensors):
            return change(tensors) if name in models else tensors

        return Case(three(folder, of_some, dict.fromkeys(models, config))[0])

    return build


def replaced(tensors, parts):
    """Every projection as a quantizer stores it: `parts` maps a weight to {suffix: tensor}."""
    stored = {}
    for name, tensor in tensors.items():
        made = parts(tensor) if "_proj.weight" in name else {".weight": tensor}
        stored |= {name.removesuffix(".weight") + suffix: part for suffix, part in made.items()}
    return stored


def float8(scale):
    def parts(weight):
        largest = weight.abs().max() / 448
        return {".weight": (weight / largest).to(torch.float8_e4m3fn), scale: largest.reshape(1, 1)}

    return lambda tensors: replaced(tensors, parts)


def codes(dtype, *, weight=".weight", **others):
    def parts(tensor):
        made = {weight: torch.randint(0, 100, tensor.shape, dtype=dtype)}
        return made | {suffix: torch.ones(len(tensor)).to(kind) for suffix, kind in others.items()}

    return lambda tensors: replaced(tensors, parts)


GPTQ = {".qzeros": torch.int32, ".scales": torch.float16, ".g_idx": torch.int32}
BITSANDBYTES = {
    ".weight.absmax": torch.float32, ".weight.quant_map": torch.float32,
    ".weight.quant_state.bitsandbytes__nf4": torch.uint8,
}  # fmt: skip
QUANTIZED |= {
    "fp8_with_inverse_scales": quantized(float8(".weight_scale_inv"), key={"quant_method": "fp8"}),
    "fp8_with_scales_and_no_configuration": quantized(float8(".weight_scale")),
    "fp8_beside_full_precision": quantized(float8(".weight_scale"), models=("two",)),
    "int8_of_bitsandbytes": quantized(codes(torch.int8, **{".SCB": torch.float32})),
    "int8_and_nothing_else": quantized(codes(torch.int8), models=("one",)),
    "gptq": quantized(
        codes(
            torch.int32, weight=".qweight", **{".qzeros": torch.int32, ".scales": torch.float16, ".g_idx": torch.int32}
        ),
        key={"quant_method": "gptq", "bits": 4},
    ),
    "awq": quantized(codes(torch.int32, weight=".qweight", **{".qzeros": torch.int32, ".scales": torch.float16})),
    "nf4_of_bitsandbytes": quantized(codes(torch.uint8, **BITSANDBYTES)),
    "compressed_tensors": quantized(codes(torch.int32, weight=".weight_packed", **{".weight_scale": torch.bfloat16})),
    "mxfp4": quantized(codes(torch.uint8, weight="_blocks", **{"_scales": torch.uint8})),
    "codes_in_a_float_dtype": quantized(codes(torch.float16, **{".weight_scale": torch.float16})),
    "a_configuration_that_says_so": quantized(dict, key={"quant_method": "bitsandbytes", "load_in_4bit": True}),
}


def outcome(folder, case):
    """Check the case and merge it; return the check, the error of the merge or None, and whether it is as expected."""
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump(case.config))
    cache = case.flags[1] if case.flags else None
    check = check_merge(path, out=folder / "out", options=MergeOptions(lora_merge_cache=cache))
    try:
        merged = merging.merge(folder, case.config, *case.flags, *(["--lora-merge-dtype", "float32"] if cache else []))
    except Exception as error:
        return check, error, False
    return check, None, case.expected is not None and same(merged, case.expected, case.tolerance)


def same(merged, expected, tolerance):
    return set(merged) == set(expected) and all(
        merged[name].shape == tensor.shape
        and torch.allclose(merged[name].double(), tensor.double(), rtol=tolerance, atol=tolerance)
        for name, tensor in expected.items()
    )


@pytest.mark.parametrize("name", CASES)
def test_the_check_says_yes_exactly_where_the_merge_is_right(name, tmp_path):
    build, ok = CASES[name]
    check, error, right = outcome(tmp_path, build(tmp_path))
    errors = [finding.text for finding in check.findings if finding.level == "error"]
    assert right == ok, f"the merge: {error!r}"
    assert check.ok == ok, f"the check: {errors}; the merge: {error!r}"


@pytest.mark.parametrize("dtype", ["float32", None])
@pytest.mark.parametrize("method", ["varm", "fusechat_sce"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_checkpoints_are_refused_by_the_check_and_by_the_merge(name, method, dtype, tmp_path):
    case = QUANTIZED[name](tmp_path)
    case.config |= {"merge_method": method, "dtype": dtype}
    check, error, _ = outcome(tmp_path, case)
    assert isinstance(error, MergeError)
    assert "is quantized" in str(error)
    assert "full precision" in str(error)
    errors = [finding for finding in check.findings if finding.level == "error"]
    assert any("is quantized" in finding.text and "full precision" in finding.cure for finding in errors), errors
    assert not (tmp_path / "out").exists()
