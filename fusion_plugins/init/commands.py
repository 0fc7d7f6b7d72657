"""The command ``fusion init``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fusion_plugins.errors import ConfigError
from fusion_plugins.terminal import console, say

# The modules that read models load torch and transformers. They are imported inside, so that `fusion --help` is fast.

_PAIRS = "may be given several times"


def init(
    method: Annotated[
        str | None, typer.Argument(help="fusellm, fusechat, fusechat3 or rounds; without it everything is asked for.")
    ] = None,
    more_sources: Annotated[
        list[str] | None, typer.Argument(help="Further sources, so that `--sources A B` works.", metavar="[SOURCE]...")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Folder or hub name of the model to train.")] = None,
    sources: Annotated[list[str] | None, typer.Option(help="Folders or hub names of the models to learn from.")] = None,
    texts: Annotated[
        str | None, typer.Option("--texts", "--prompts", help="JSONL or Parquet file or folder, or hf:ORG/NAME.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="Where the text or chat of a row stands, in keys of axolotl's dataset entries: "
            "{field: content}, or {field_messages: conversations, message_property_mappings: {role: from, content: "
            "value}}.",
            show_default="text or messages",
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder to write.", show_default="the method's name")] = None,
    backend: Annotated[
        str | None, typer.Option(help="What runs the sources: transformers or vllm.", show_default="transformers")
    ] = None,
    vllm: Annotated[str | None, typer.Option(help="Environment with vLLM, where the sources run.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of the machine that trains.", show_default="as here")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="Memory of a GPU in GB.", show_default="as here")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="none, lora or qlora.", show_default="what the GPUs have room for")
    ] = None,
    sequence_len: Annotated[int | None, typer.Option(help="Tokens of a training row.")] = None,
    lm_loss_weight: Annotated[float | None, typer.Option(help="Lambda, the weight of the language-model loss.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Entries per position in the stores.")] = None,
    rule: Annotated[str | None, typer.Option(help="Fusion rule.", show_default="min_ce; rounds: fixed_weights")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences per step, over all GPUs.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the texts.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the (first) training.")] = None,
    pad_token: Annotated[str | None, typer.Option(help="Token of the target to pad with.")] = None,
    own: Annotated[bool, typer.Option("--own/--no-own", help="Capture the target itself, too.")] = True,
    merge: Annotated[str | None, typer.Option(help="fusechat: varm or fusechat_sce.", show_default="varm")] = None,
    samples: Annotated[int | None, typer.Option(help="fusechat3, rounds: answers per prompt and source.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="fusechat3, rounds: longest answer in tokens.")] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="fusechat3, rounds: reward model of the prompts that cannot be verified.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the reward model.")
    ] = False,
    rounds: Annotated[int | None, typer.Option(help="rounds: how many.", show_default="2")] = None,
    tuned: Annotated[
        bool, typer.Option("--tuned", help="rounds: the target was tuned on answers of these sources before.")
    ] = False,
    held_out: Annotated[
        str | None, typer.Option(help="rounds: texts that the target is measured on after every round.")
    ] = None,
    chat_template: Annotated[
        list[str] | None, typer.Option(help=f"MODEL=FILE with its chat template ({_PAIRS}).")
    ] = None,
    facts: Annotated[
        list[str] | None, typer.Option(help=f"MODEL={{window: N, parameters: N, ...}}, said by hand ({_PAIRS}).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write the files although something cannot work.")] = False,
) -> None:
    """Plan a whole run: read the models and the texts, choose what depends on them, and write every file.

    For example: `fusion init fusellm --target meta-llama/Llama-2-7b-hf --sources mosaicml/mpt-7b --texts corpus.jsonl`,
    or `fusion init` to be asked.
    """
    from fusion_plugins.config import validate
    from fusion_plugins.init.plan import make_plan
    from fusion_plugins.init.settings import InitConfig
    from fusion_plugins.init.write import files_of, write_files

    named = [*(sources or []), *(more_sources or [])]
    values: dict[str, Any] = {
        "method": method,
        "target": target,
        "sources": named or None,
        "texts": texts,
        "columns": None if columns is None else _mapping("--columns", columns, "{field: content}"),
        "out": out,
        "backend": backend,
        "vllm": vllm,
        "gpus": gpus,
        "gpu_memory": gpu_memory,
        "adapter": adapter,
        "sequence_len": sequence_len,
        "lm_loss_weight": lm_loss_weight,
        "top_k": top_k,
        "rule": rule,
        "batch": batch,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "pad_token": pad_token,
        "own": own,
        "merge": merge,
        "samples": samples,
        "max_tokens": max_tokens,
        "reward_model": reward_model,
        "trust_remote_code": trust_remote_code,
        "rounds": rounds,
        "tuned": tuned,
        "held_out": held_out,
        "chat_templates": _pairs("--chat-template", chat_template),
        "facts": {name: _facts(name, text) for name, text in _pairs("--facts", facts).items()},
    }
    asked = method is None
    if asked:
        values |= _ask(values)
    given = {name: value for name, value in values.items() if value is not None}
    given.setdefault("out", given.get("method", ""))
    plan = make_plan(validate(InitConfig, given, where="the command line"))
    _show(plan)
    stops = [finding for finding in plan.findings if finding.stops]
    if stops and not force:
        raise ConfigError(
            f"{len(stops)} of the things above cannot work; nothing was written. Change what they name, or add --force."
        )
    files = files_of(plan)
    if asked and not typer.confirm(f"Write {len(files)} files into {plan.config.out}?", default=True):
        raise typer.Abort
    write_files(files, Path(plan.config.out))
    folder = plan.config.out
    say(f"{len(files)} files written into {folder}. Read its README.md, then: cd {folder} && fusion run")


def _ask(values: dict[str, Any]) -> dict[str, Any]:
    """Ask for what was not given."""
    from fusion_plugins.init.settings import METHODS, ON_PROMPTS

    for name, about in METHODS.items():
        say(f"{name}: {about}")
    answers: dict[str, Any] = {"method": typer.prompt("Method", default="fusellm")}
    if values["target"] is None:
        answers["target"] = typer.prompt("Target (folder or hub name of the model to train)")
    if values["sources"] is None:
        answers["sources"] = typer.prompt("Sources (folders or hub names, with spaces between)").split()
    if values["texts"] is None:
        what = "Prompts" if answers["method"] in ON_PROMPTS else "Texts"
        answers["texts"] = typer.prompt(f"{what} (.jsonl or .parquet file or folder)")
    if answers["method"] == "rounds" and not values["tuned"]:
        answers["tuned"] = typer.confirm("Was the target tuned on answers of these sources before?", default=False)
    if values["out"] is None:
        answers["out"] = typer.prompt("Folder to write", default=answers["method"])
    if values["gpus"] is None:
        from fusion_plugins.init.machine import this_machine

        answers["gpus"] = typer.prompt("GPUs of the machine that trains", default=this_machine().gpus, type=int)
    return answers


def _pairs(flag: str, given: list[str] | None) -> dict[str, str]:
    pairs = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"{flag}: expected MODEL=VALUE, got {text!r}")
        pairs[name] = value
    return pairs


def _facts(name: str, text: str) -> Any:
    from fusion_plugins.config import validate
    from fusion_plugins.init.models import ModelFacts

    flag = f"--facts {name}"
    return validate(ModelFacts, _mapping(flag, text, "{window: 4096}"), where=flag).model_dump()


def _mapping(flag: str, text: str, example: str) -> dict[str, Any]:
    from fusion_plugins.config import parse_yaml

    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: expected YAML such as {example}, got an error: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{flag}: expected YAML such as {example}, got {text!r}")
    return values


def _show(plan: Any) -> None:
    from fusion_plugins.init.write import chosen_settings

    table = Table("setting", "value", "why")
    for name, value, why in chosen_settings(plan):
        table.add_row(name, value, why)
    messages = console(stderr=True)
    messages.print(table)
    for finding in sorted(plan.findings, key=lambda finding: not finding.stops):
        messages.print(f"{'cannot work' if finding.stops else 'look'}: {finding.about}: {finding.text}")
