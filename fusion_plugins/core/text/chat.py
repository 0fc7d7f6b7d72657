"""Render a chat with a model's own template and find the bytes of what the assistant generated in it.

A template is a program, so it is not parsed. The chat is rendered a second time with marks in place of the assistant's
reasoning, answers and names of called tools; the text around the marks is what the template adds. Where a turn begins
is what the prompt alone, rendered with ``add_generation_prompt``, ends with: everything after it was generated, the
reasoning's tags and the syntax of calls included. Tool results, tool schemas and other roles never are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fusion_plugins.core.text.marks import Marks
from fusion_plugins.core.text.rendering import (
    EndlessTemplateError,
    Messages,
    Render,
    dict_arguments,
    in_known_form,
    shaped,
    shapes,
    with_calls,
)
from fusion_plugins.core.text.turns import RenderedChat, find_parts, find_turn, in_bytes
from fusion_plugins.errors import DataError


def generated_spans(
    render: Render, messages: Sequence[Mapping[str, Any]], *, roles: Sequence[str] = ("assistant",)
) -> RenderedChat:
    """Render a chat and find what the assistant generated.

    Reasoning may be given as ``<think> ... </think>`` at the start of the content, or under one of the keys
    ``reasoning_content``, ``reasoning`` and ``thinking``; the template gets the form that it knows. The arguments of
    tool calls may be given as a dict or as JSON; the template gets what it can render.

    Args:
        render: (messages, add_generation_prompt) -> text, such as ``lambda m, prompt:
            tokenizer.apply_chat_template(m, tools=tools, tokenize=False, add_generation_prompt=prompt)``.
        messages: dicts with ``role``, and ``content`` or ``tool_calls``.
        roles: whose turns to find. Of other roles than the assistant a turn is its content alone.

    Raises:
        DataError: there is no such turn, the template refuses the chat, does not render a turn or a call, or changes a
            text beyond stripping it.

    Example:
        >>> def render(messages, prompt):
        ...     turns = [f"<{m['role']}>{m['content']}<end>" for m in messages]
        ...     return "".join(turns) + "<assistant>" * prompt
        >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        >>> found = generated_spans(render, chat)
        >>> [found.text.encode()[turn.start:turn.stop] for turn in found.turns]
        [b'Ho<end>']
    """
    chat = [with_calls(message) for message in messages]
    if not any(message.get("role") in roles for message in chat):
        raise DataError(
            f"expected a chat with at least one {' or '.join(roles)} message, got the roles "
            f"{[message.get('role') for message in chat]}. Leave the chat out."
        )
    problem: DataError | None = None
    for shape in shapes(chat):
        in_shape = shaped(render, shape)
        try:
            return _found(in_shape, in_known_form(in_shape, chat), roles)
        except EndlessTemplateError:
            raise
        except DataError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _found(render: Render, chat: Messages, roles: Sequence[str]) -> RenderedChat:
    text = render(chat, False)
    # A template that writes arguments as they are writes a dict as Python does, not as JSON.
    if any(str(arguments) in text for arguments in dict_arguments(chat)):
        raise DataError("expected the chat template to write arguments as JSON. Give them as JSON text.")
    marks = Marks(chat, roles)
    layout = find_parts(text, marks.split(render(marks.marked(chat), False)), marks)
    return in_bytes(text, [find_turn(render, marks, layout, chat, index) for index in marks.turns], layout.unchanged)
