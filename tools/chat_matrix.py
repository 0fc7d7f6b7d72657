"""Which kinds of chats each chat template can render so that what the assistant generated is found again.

    python tools/chat_matrix.py                      # the templates that trl ships
    python tools/chat_matrix.py llama.jinja ...      # others, or folders of models

Prints the table of docs/chats.md and the reasons of what is refused.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fusion_plugins.core.text.chat import generated_spans
from fusion_plugins.core.text.rendering import Render
from fusion_plugins.core.text.turns import RenderedChat
from fusion_plugins.errors import DataError

Chat = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _answer(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def _call(city: str, number: int = 1) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": {"city": city}}
    return {"id": f"call0000{number}", "type": "function", "function": function}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "a city"}},
                "required": ["city"],
            },
        },
    }
]
_CALL = _answer(None, tool_calls=[_call("Paris")])
_RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "18 degrees"}
_SUM, _DOUBLE = _user("What is 2 + 3?"), _user("And twice that?")
_FIVE, _TEN = "<think>\nTwo and three.\n</think>\n\nFive.", "<think>\nTwice five.\n</think>\n\nTen."

#: kind of chat -> messages and tools
CHATS: dict[str, Chat] = {
    "plain": ([_SUM, _answer("Five."), _DOUBLE, _answer("Ten.")], None),
    "system": ([{"role": "system", "content": "Be brief."}, _SUM, _answer("Five.")], None),
    "reasoning": ([_SUM, _answer(_FIVE)], None),
    "reasoning, 2 turns": ([_SUM, _answer(_FIVE), _DOUBLE, _answer(_TEN)], None),
    "reasoning key": ([_SUM, _answer("Five.", reasoning_content="Two and three.")], None),
    "tool call": ([_user("Is it warm in Paris?"), _CALL], TOOLS),
    "parallel calls": ([_user("And in Rome?"), _answer(None, tool_calls=[_call("Paris"), _call("Rome", 2)])], TOOLS),
    "tool result": ([_user("Is it warm in Paris?"), _CALL, _RESULT, _answer("Rather cool.")], TOOLS),
}


def renderer(template: str, tools: Sequence[Mapping[str, Any]] | None = None, **options: Any) -> Render:
    """Return what renders messages with a template, as transformers does."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(messages: list[dict[str, Any]], prompt: bool) -> str:
        texts, _ = render_jinja_template(
            [messages], tools, chat_template=template, add_generation_prompt=prompt,
            bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", **options,
        )  # fmt: skip
        return str(texts[0])

    return render


def outcome(template: str, kind: str) -> RenderedChat | str:
    """Return a chat of some kind as a template renders it, or why it is refused."""
    messages, tools = CHATS[kind]
    try:
        return generated_spans(renderer(template, tools), messages)
    except DataError as error:
        return str(error)


def trl_templates() -> dict[str, str]:
    """Return name -> text of the templates that trl ships, without its variants for training."""
    return {name: text for name, text in _shipped().items() if not name.endswith("_training")}


def training_templates() -> dict[str, str]:
    """Return name -> text of trl's variants, which say what the assistant generated with ``{% generation %}``."""
    return {name: text for name, text in _shipped().items() if name.endswith("_training")}


def _shipped() -> dict[str, str]:
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        raise SystemExit("expected the package trl, which ships templates, got none. Install it, or name templates.")
    files = sorted(Path(spec.origin).with_name("chat_templates").glob("*.jinja"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def matrix(templates: Mapping[str, str]) -> dict[str, dict[str, RenderedChat | str]]:
    """Return template -> kind -> outcome."""
    return {name: {kind: outcome(text, kind) for kind in CHATS} for name, text in templates.items()}


def table(found: Mapping[str, Mapping[str, RenderedChat | str]]) -> str:
    """Return the matrix in Markdown, with counts in the last line."""
    lines = [f"| template | {' | '.join(CHATS)} |", f"|---|{'---|' * len(CHATS)}"]
    for name, row in found.items():
        lines.append(f"| {name} | {' | '.join('refused' if isinstance(row[kind], str) else 'yes' for kind in CHATS)} |")
    counts = [sum(not isinstance(row[kind], str) for row in found.values()) for kind in CHATS]
    lines.append(f"| **of {len(found)}** | {' | '.join(f'**{count}**' for count in counts)} |")
    return "\n".join(lines)


def named_templates(places: Iterable[str | Path]) -> dict[str, str]:
    """Return name -> text of templates in files, or in folders of models and tokenizers."""
    paths = [Path(place) for place in places]
    return {path.stem if path.is_file() else path.name: _template(path) for path in paths}


def _template(path: Path) -> str:
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if (file := path / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    config = path / "tokenizer_config.json"
    template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    if not isinstance(template, str):
        raise SystemExit(f"{path}: expected chat_template.jinja, or a template in tokenizer_config.json, got neither")
    return template


def main() -> None:
    """Print the table, then the reasons."""
    found = matrix(named_templates(sys.argv[1:]) if sys.argv[1:] else trl_templates())
    print(table(found), end="\n\n")
    for name, row in found.items():
        for kind, result in row.items():
            if isinstance(result, str):
                print(f"{name}, {kind}: {result}")


if __name__ == "__main__":
    main()
