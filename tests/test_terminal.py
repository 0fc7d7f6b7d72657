"""What the consoles print: names as they are, tables that fit, messages that can be copied."""

from io import StringIO

import pytest
from rich.table import Table

from fusion_plugins.terminal import console

NAMES = ["[/INST]", "[bold]x[/]", ":warning:", "\x1b[31mred", "half \ud83d", "中文"]


def _printed(*objects, **options):
    file = StringIO()
    console(file=file, **options).print(*objects)
    return file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_printed_as_it_is_in_messages_tables_and_titles(name):
    shown = name.replace("\x1b", r"\x1b").replace("\ud83d", r"\ud83d")
    table = Table(name, title=name)
    table.add_row(name)
    assert _printed(name) == f"{shown}\n"
    assert _printed(table).count(shown) == 3


def test_a_long_message_stays_in_one_line_and_a_table_does_not_exceed_the_width():
    assert _printed("word " * 100, width=40).count("\n") == 1
    table = Table("column")
    table.add_row("word " * 100)
    assert max(map(len, _printed(table, width=40).splitlines())) <= 40


def test_a_pipe_has_room_for_a_table():
    table = Table("column")
    table.add_row("x" * 150)
    assert "x" * 150 in _printed(table)
