"""Prompts and chats as messages."""

from fusion_plugins.core.text.messages import as_messages


def test_a_text_is_one_message_of_the_user():
    assert as_messages("Hi?") == [{"role": "user", "content": "Hi?"}]
    assert as_messages("") == [{"role": "user", "content": ""}]


def test_messages_keep_their_order_and_every_key_with_a_value():
    chat = [
        {"role": "system", "content": "", "name": None},
        {"role": "assistant", "content": "1", "tool_calls": [], "weight": 0},
        {"role": "user", "content": None},
    ]
    assert as_messages(chat) == [
        {"role": "system", "content": ""},
        {"role": "assistant", "content": "1", "tool_calls": [], "weight": 0},
        {"role": "user"},
    ]
    assert as_messages([]) == []


def test_the_messages_that_are_given_are_not_changed():
    given = [{"role": "user", "content": "Hi?", "name": None}]
    made = as_messages(given)
    made[0]["content"] = "other"
    made.append({"role": "assistant", "content": "Hi."})
    assert given == [{"role": "user", "content": "Hi?", "name": None}]
