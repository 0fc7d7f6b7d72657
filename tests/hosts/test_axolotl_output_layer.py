"""Losses inside the output layers of real models, against the same losses of the logits that the model returns."""

import copy
import multiprocessing
import traceback

import pytest
import torch
import transformers
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.utils.dict import DictDefault
from axolotl_runs import free_port
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from fusion_plugins.axolotl.trainer import FusionTrainer
from fusion_plugins.core.fusion.logit_change import LogitChange

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
#: model -> configuration and what it does to the output of its output layer
FAMILIES = {
    "Llama": ({}, LogitChange()),
    "Gemma2": ({"final_logit_softcapping": 3.0}, LogitChange(cap=3.0)),
    "Gemma3": ({"final_logit_softcapping": 0.7, "layer_types": ["full_attention"] * 2}, LogitChange(cap=0.7)),
    "Granite": ({"logits_scaling": 6.0}, LogitChange(scale=1 / 6)),
    "Cohere": ({"logit_scale": 0.0625}, LogitChange(scale=0.0625)),
    "Cohere2": ({"logit_scale": 0.3}, LogitChange(scale=0.3)),
    "Mixtral": ({"num_local_experts": 2, "output_router_logits": False}, LogitChange()),
    "Phi": ({}, LogitChange()),  # a bias
}


def model_of(name, **more):
    torch.manual_seed(5)
    prefix = f"{name}Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{prefix}Config")(**SIZES | FAMILIES[name][0] | more)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():  # so that caps bind, and biases are not zero
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=0.6)
    return model


def batch_of(vocabulary=67, k=5, length=9):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(3, vocabulary, (2, length), generator=generator)
    labels = inputs.clone()
    labels[0, :4], labels[1, 6] = -100, -100
    ids = torch.rand(2, length, vocabulary, generator=generator).topk(k, -1).indices.int()
    ids[1, 2], ids[0, :, 3] = -1, -1
    logprobs = torch.randn(2, length, k, generator=generator).log_softmax(-1).masked_fill(ids < 0, -torch.inf)
    return {
        "input_ids": inputs,
        "attention_mask": torch.ones_like(inputs),
        "labels": labels,
        "fused_ids": ids,
        "fused_logprobs": logprobs.view(torch.int32),
        "supervised_positions": int((labels[:, 1:] != -100).sum()),
    }


def trainer_of(model, folder, **fusion):
    arguments = AxolotlTrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=fusion.pop("bf16", False)
    )
    trainer = FusionTrainer(model=model, args=arguments)
    block = {"sources": [{"name": "a", "store": "a"}], "lm_loss_weight": 0.3, **fusion}
    trainer.axolotl_cfg = DictDefault(fusion=block)
    trainer.current_gradient_accumulation_steps = 1
    trainer._training_figures = trainer._new_figures()  # as a training begins
    return trainer


def step(trainer, batch):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradients = {name: one.grad for name, one in trainer.model.named_parameters() if one.grad is not None}
    return loss.detach(), gradients, trainer._figures(trainer._training_figures)


def by_hand(model, batch, weight=0.3):
    """Loss and figures in float64 from the logits that the model returns, position by position."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logprobs = logits.double().log_softmax(-1)
    fused = batch["fused_logprobs"].view(torch.float32).double()
    lm = fusion = entropy = 0.0
    positions = present = agreed = 0
    for row, position in batch["labels"][:, 1:].ne(-100).nonzero().tolist():
        own = logprobs[row, position]
        lm = lm - own[batch["labels"][row, position + 1]]
        positions += 1
        kept = batch["fused_ids"][row, position] >= 0
        if not kept.any():
            continue
        ids, values = batch["fused_ids"][row, position][kept].long(), fused[row, position][kept]
        present += 1
        fusion = fusion - (values.exp() * own[ids]).sum()
        entropy -= (values.exp() * values).sum().item()
        agreed += int(own.argmax() == ids[values.argmax()])
    loss = (weight * lm + (1 - weight) * fusion) / positions
    figures = {
        "lm_loss": lm.item() / positions,
        "fusion_loss": fusion.item() / present,
        "fused_entropy": entropy / present,
        "top1_agreement": agreed / present,
        "fusion_coverage": present / positions,
    }
    return loss, figures


def check(trainer, batch, model=None):
    """The trainer's loss, gradients and figures are those of the logits."""
    model = model or copy.deepcopy(trainer.model)
    expected, figures = by_hand(model, batch)
    model.zero_grad()
    expected.backward()
    loss, gradients, found = step(trainer, batch)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    wanted = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, wanted[name], rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert {name: found[name] for name in figures} == pytest.approx(figures, rel=1e-5)


class Widest(TorchDispatchMode):
    """The most rows of any tensor that is as wide as the vocabulary, the layer's own weight left out."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            wide = isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == SIZES["vocab_size"]
            if wide and tensor.shape[0] != SIZES["hidden_size"]:
                self.rows = max(self.rows, tensor.numel() // tensor.shape[-1])
        return out


def rows_held(trainer):
    batch = batch_of(length=20)
    with Widest() as widest:
        step(trainer, batch)
    return widest.rows


@pytest.mark.parametrize("name", FAMILIES)
def test_the_losses_in_the_layer_are_those_of_the_models_logits(name, tmp_path):
    trainer, batch = trainer_of(model_of(name), tmp_path, loss_chunk=4), batch_of()
    check(trainer, batch)
    assert trainer._losses_in_head
    assert trainer._change == FAMILIES[name][1]
    assert rows_held(trainer) == 4, "never the logits of a whole batch"


def adapted(model, **settings):
    torch.manual_seed(6)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():  # a fresh adapter adds nothing
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Granite"])
def test_an_adapter_of_the_output_layer_is_folded_in(name, tmp_path, caplog):
    model = adapted(model_of(name), target_modules=["lm_head", "q_proj"])
    trainer, batch = trainer_of(model, tmp_path, loss_chunk=4), batch_of()
    check(trainer, batch)
    assert trainer._change == FAMILIES[name][1]
    assert "once more" not in caplog.text
    assert [name for name, one in model.named_parameters() if one.grad is not None and "lm_head.lora" in name]
    assert not [name for name, one in model.named_parameters() if one.grad is not None and "base_layer" in name]
    assert rows_held(trainer) == 4


@pytest.mark.parametrize(
    ("settings", "twice"),
    [
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["lm_head"], "use_dora": True}, True),
        ({"target_modules": ["lm_head"], "lora_bias": True}, True),
        ({"target_modules": ["lm_head"], "lora_dropout": 0.4}, False),
    ],
    ids=["trained copy", "DoRA", "bias", "dropout"],
)
def test_other_adapters_of_the_output_layer_are_right_and_named(settings, twice, tmp_path, caplog):
    name = "Phi" if settings.get("lora_bias") else "Gemma2"
    trainer, batch = trainer_of(adapted(model_of(name), **settings), tmp_path, loss_chunk=4), batch_of()
    if settings.get("lora_dropout"):  # random: it must only be in there, and reach the gradients
        first, gradients, _ = step(trainer, batch)
        assert first != step(trainer, batch)[0]
        assert all(torch.isfinite(one).all() for one in gradients.values())
    else:
        check(trainer, batch)
    assert ("runs once more in the backward pass" in caplog.text) is twice
    assert rows_held(trainer) == 4


def test_a_tied_output_layer_gives_the_embeddings_both_gradients(tmp_path):
    model = model_of("Llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check(trainer_of(model, tmp_path, loss_chunk=4), batch_of())


def test_a_frozen_output_layer_has_no_gradient(tmp_path):
    model = model_of("Gemma2", tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    check(trainer_of(model, tmp_path, loss_chunk=4), batch_of())


class Changed(transformers.LlamaForCausalLM):
    """A model that does something of its own to its logits."""

    def __init__(self, config):
        super().__init__(config)
        self.factor = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.after(out.logits)
        return out


AFTER = {
    "trained factor": (lambda self, logits: logits * self.factor, None),
    "token bias": (lambda self, logits: logits + torch.linspace(0, 1, logits.shape[-1]), None),
    "one token forbidden": (lambda self, logits: logits - 9 * (torch.arange(logits.shape[-1]) == 5), None),
    "centred": (lambda self, logits: logits - logits.mean(-1, keepdim=True), None),
    "rounded": (lambda self, logits: logits.bfloat16().float(), None),
    "cap, then factor": (lambda self, logits: 2 * torch.tanh(logits / 5) * 5, LogitChange(2.0, 10.0)),
    "factor, then cap": (lambda self, logits: 3 * torch.tanh(logits * 0.25 / 3), LogitChange(0.25, 3.0)),
    "negative factor": (lambda self, logits: -0.4 * logits, LogitChange(-0.4)),
    "padded vocabulary": (lambda self, logits: logits[..., :64], LogitChange(width=64)),
    "padded and capped": (lambda self, logits: 4 * torch.tanh(logits[..., :66] / 4), LogitChange(1.0, 4.0, 66)),
}


@pytest.mark.parametrize("kind", AFTER)
def test_any_change_of_the_logits_is_found_out(kind, tmp_path, caplog):
    after, change = AFTER[kind]
    torch.manual_seed(5)
    model = type("Changed", (Changed,), {"after": after})(transformers.LlamaConfig(**SIZES | {"vocab_size": 67}))
    if kind != "trained factor":
        model.factor.requires_grad_(False)
    trainer = trainer_of(model, tmp_path, loss_chunk=4)
    check(trainer, batch_of(vocabulary=64))
    assert trainer._losses_in_head is (change is not None)
    if change is None:
        assert "from the logits: the model changes them in a way of its own" in caplog.text
    else:
        assert trainer._change == change


def test_hooks_and_replaced_forward_passes_of_the_layer_count(tmp_path, caplog):
    batch = batch_of()
    hooked = model_of("Llama")
    hooked.lm_head.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 1.5,))
    hooked.lm_head.register_forward_hook(lambda layer, inputs, logits: logits * 0.5)
    trainer = trainer_of(hooked, tmp_path, loss_chunk=4)
    check(trainer, batch)
    assert trainer._change == LogitChange(0.5)
    replaced = model_of("Llama")
    own = replaced.lm_head.forward
    replaced.lm_head.forward = lambda hidden: own(hidden) + hidden.sum(-1, keepdim=True) * torch.arange(67) / 67
    check(trainer_of(replaced, tmp_path, loss_chunk=4), batch, model=replaced)
    assert "runs once more in the backward pass" in caplog.text


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_autocast_to_bfloat16_is_near_float32(name, tmp_path):
    model, batch = model_of(name), batch_of()
    loss, gradients, _ = step(trainer_of(copy.deepcopy(model), tmp_path), batch)
    trainer = trainer_of(model, tmp_path, bf16=True)
    with trainer.accelerator.autocast():
        low, lows, _ = step(trainer, batch)
    assert trainer._losses_in_head
    assert low.item() == pytest.approx(loss.item(), rel=0.02)
    for key, gradient in gradients.items():
        assert (lows[key] - gradient).norm() <= 0.05 * gradient.norm() + 1e-4, key


def test_a_compiled_model_computes_its_losses_in_the_layer(tmp_path):
    trainer, batch = trainer_of(model_of("Cohere"), tmp_path, loss_chunk=4), batch_of()
    plain = copy.deepcopy(trainer.model)
    trainer.model = torch.compile(trainer.model, backend="aot_eager")
    expected, _ = by_hand(plain, batch)
    expected.backward()
    compiled = []
    for _ in range(3):
        loss, gradients, _ = step(trainer, batch)
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[0] > 0, "the model runs compiled"
    assert compiled[1:] == compiled[:1] * 2, "no step compiles anew"
    assert trainer._losses_in_head
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[f"_orig_mod.{key}"], parameter.grad, rtol=2e-4, atol=2e-6)


def test_the_probe_takes_no_random_numbers_and_leaves_no_trace(tmp_path):
    model = adapted(model_of("Gemma2"), target_modules=["lm_head", "q_proj"], lora_dropout=0.4)
    trainer, batch = trainer_of(model, tmp_path), batch_of()
    inputs = {name: value for name, value in batch.items() if "fused" not in name and name != "supervised_positions"}
    before = torch.get_rng_state()
    assert trainer._head_is_last(model, inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert not model._forward_hooks
    assert not model.get_base_model()._forward_hooks
    assert "forward" not in vars(trainer._head(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_too_little_memory_for_the_probe_is_no_reason_to_leave_the_layer(tmp_path, monkeypatch):
    """axolotl may begin anew with a smaller batch (auto_find_batch_size)."""
    trainer, batch = trainer_of(model_of("Llama"), tmp_path), batch_of()

    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_probed_logits", full)
        with pytest.raises(torch.OutOfMemoryError):
            trainer.compute_loss(trainer.model, batch)
    trainer.compute_loss(trainer.model, batch)
    assert trainer._losses_in_head


class Asking(TorchDispatchMode):
    """Refuses what makes a program wait for a GPU, and shapes that depend on data, in the code of this package.

    The model's and axolotl's own code does ask here and there.
    """

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "lift_fresh", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_stack(None)]
        caller = next(name for name in files if name != __file__ and "/torch/" not in name)
        if "/fusion_plugins/" in caller:
            self.seen += 1
            indices = args[1] if function.overloadpacket is torch.ops.aten.index else []
            by_mask = any(one is not None and one.dtype == torch.bool for one in indices)
            assert not by_mask, "a mask as an index"
            assert not any(name in str(function) for name in self.REFUSED), f"asks the device: {function}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Granite"])
def test_no_step_waits_for_the_device(name, tmp_path, monkeypatch):
    model = adapted(model_of(name), target_modules=["lm_head"]) if name == "Granite" else model_of(name)
    trainer, batch = trainer_of(model, tmp_path, loss_chunk=4), batch_of()
    step(trainer, batch)  # the probe asks
    assert trainer._losses_in_head
    with Asking() as asking:
        trainer.compute_loss(trainer.model, dict(batch)).backward()
    assert asking.seen > 200
    monkeypatch.setattr(FusionTrainer, "lm_weight", property(lambda _: batch["labels"].double().mean().item()))
    with Asking(), pytest.raises(AssertionError, match="asks the device: aten._local_scalar_dense"):
        trainer.compute_loss(trainer.model, dict(batch))


#: case -> model, and what is sharded by itself beside the layers and the model
SHARDED = {
    "capped": ("Gemma2", []),
    "an adapter": ("Granite", []),
    "the output layer by itself": ("Llama", ["lm_head"]),
    "an adapter by itself": ("Granite", ["lm_head.lora_A.default", "lm_head.lora_B.default"]),
    "outputs in 16 bits": ("Gemma2", []),
}


def sharded_model(case):
    name, _ = SHARDED[case]
    return adapted(model_of(name), target_modules=["lm_head"]) if name == "Granite" else model_of(name)


class Gathers(TorchDispatchMode):
    """Counts how many times weights are gathered."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "allgather" in str(function)
        return function(*args, **(kwargs or {}))


def sharded_steps(rank, folder, port, results):
    """One of two processes that hold half of every weight; both get the same batch."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    found = {}
    for case, (_, alone) in SHARDED.items():
        model = sharded_model(case)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16)  # what accelerate makes of `bf16`
        policy = {"mesh": mesh, "mp_policy": low if case == "outputs in 16 bits" else MixedPrecisionPolicy()}
        for layer in [*map(base.get_submodule, alone), *base.model.layers, model]:
            fully_shard(layer, **policy)
        trainer, batch = trainer_of(model_of("Llama"), folder, loss_chunk=4), batch_of()
        trainer.model = model
        step(trainer, batch)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with Gathers() as plain:
            model(**inputs).logits.float().sum().backward()
        with Gathers() as ours:
            step(trainer, batch)
        loss, gradients, figures = step(trainer, batch)  # what is gathered is freed, and gathered again
        whole = {key: gradient.full_tensor() for key, gradient in gradients.items()}
        found[case] = (loss, whole, figures, trainer._losses_in_head, trainer._said, (ours.count, plain.count))
    if rank == 0:
        torch.save(found, results)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Case -> what a step of two processes gave."""
    folder = tmp_path_factory.mktemp("sharded")
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    port, results = free_port(), folder / "results"
    processes = [
        context.Process(target=sharded_steps, args=(rank, folder, port, results), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    return torch.load(results)


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARDED)
def test_weights_that_two_processes_share_are_trained_as_whole_ones(sharded, case):
    """FSDP2, on the CPU. The output layer runs once, and each weight is gathered as often as the model alone does."""
    loss, gradients, found, in_head, said, (ours, plain) = sharded[case]
    model = sharded_model(case)
    expected, figures = by_hand(model, batch_of())
    expected.backward()
    assert in_head
    assert not [message for message in said if "once more" in message], said
    assert ours == plain > 0
    if case == "outputs in 16 bits":
        assert loss.item() == pytest.approx(expected.item(), rel=0.02)
        assert loss.item() != loss.bfloat16().float().item(), "the sums are not rounded"
        assert found["fusion_coverage"] == figures["fusion_coverage"]
        for key, parameter in model.named_parameters():
            assert (gradients[key] - parameter.grad).norm() <= 0.05 * parameter.grad.norm() + 1e-4, key
        return
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[key], parameter.grad, rtol=2e-4, atol=2e-6)
