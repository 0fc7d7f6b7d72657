"""``fusion clean`` on files and folders: what is removed, why, and what stays as it was."""

import json
import random

import pytest
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.inputs import read_prompts
from fusion_plugins.scoring.clean import CleanConfig, clean
from fusion_plugins.store import open_rows

LONG = (
    "A farmer has {n} sheep and sells a third of them at the market before he walks home along the river to his {what}."
)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(tmp_path, rows, **settings):
    report = clean(CleanConfig(prompts=write(tmp_path / "prompts.jsonl", rows), out=str(tmp_path / "out"), **settings))
    kept = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    return report, kept


def prompt(name, text, **more):
    return {"id": name, "text": text, **more}


def test_only_exact_duplicates_are_removed_by_default_and_rows_stay_as_they_were(tmp_path):
    rows = [
        prompt("a", "What is 1 + 1?", domain="math", reference="2", level=3),
        prompt("b", " What is 1 + 1?\r\n", domain="math", reference="2"),
        prompt("c", "what is 1 + 1?"),
        {"id": "d", "messages": [{"role": "user", "content": "What is 1 + 1?"}]},
        {
            "id": "e",
            "messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": "What is 1 + 1?"}],
        },
        prompt("f", "I'm sorry, but I can't help with that."),
        prompt("g", "Wie spät ist es heute in Berlin, bitte?"),
    ]
    report, kept = run(tmp_path, rows)
    assert kept == [rows[0], rows[2], rows[4], rows[5], rows[6]]
    assert (report.read, report.kept) == (7, 5)
    assert [(one.id, one.reason, one.because) for one in report.removed] == [
        ("b", "exact_duplicate", "the same text as a"),
        ("d", "exact_duplicate", "the same text as a"),
    ]
    # The result is what `fusion sample` reads.
    assert [one.text.id for one in read_prompts(str(tmp_path / "out"))] == ["a", "c", "e", "f", "g"]


def test_rows_without_ids_or_with_one_id_may_be_duplicates(tmp_path):
    _, kept = run(tmp_path, [{"text": "x y"}, {"text": "x y"}, prompt("a", "z"), prompt("a", "z")])
    assert kept == [{"text": "x y"}, prompt("a", "z")]


def test_the_same_text_with_other_tools_is_another_prompt(tmp_path):
    def tool(name):
        return [{"type": "function", "function": {"name": name, "parameters": {}}}]

    messages = [{"role": "user", "content": "Look it up."}]
    rows = [{"id": name, "messages": messages, "tools": tool(name[0])} for name in ("ab", "ac", "b")]
    assert [row["id"] for row in run(tmp_path, rows)[1]] == ["ab", "b"]


def test_duplicates_with_another_gold_answer_are_pointed_out(tmp_path):
    rows = [prompt("a", "Q?", reference="2"), prompt("b", "Q?", reference="3"), prompt("c", "Q?", reference="2")]
    report, _ = run(tmp_path, rows)
    assert report.notes == [
        "1 removed duplicates have another gold answer than the prompt that was kept, so one of the two is wrong: "
        "b ('3', kept: a '2')"
    ]


# Near duplicates


def test_near_duplicates_are_removed_and_prompts_with_other_numbers_are_not(tmp_path):
    rows = [
        prompt("a", LONG.format(n=12, what="house")),
        prompt("b", LONG.format(n=12, what="barn")),
        prompt("c", LONG.format(n=15, what="house")),
        prompt("d", LONG.format(n=12, what="house").upper() + "!!"),
        prompt("e", "Something else altogether, of which no three words in a row are in the others."),
    ]
    report, kept = run(tmp_path, rows, near_duplicates=0.8)
    assert [row["id"] for row in kept] == ["a", "c", "e"]
    reasons = {one.id: (one.reason, one.because) for one in report.removed}
    assert reasons["b"][0] == reasons["d"][0] == "near_duplicate"
    assert reasons["b"][1].endswith("are those of a")
    assert reasons["d"][1].startswith("1.00")


def test_near_duplicates_are_those_of_brute_force(tmp_path):
    """Every text that is removed is near to one that is kept; of those that should be, hardly one is missed."""
    draw = random.Random(0)
    rows = []
    for number in range(150):
        base = [draw.choice("abcdefghijklmnopqrstuvwxyz") * draw.randint(2, 9) for _ in range(30)]
        for copy in range(3):
            changed = [word if draw.random() > 0.02 * copy else "zz" for word in base]
            rows.append(prompt(f"{number}-{copy}", " ".join(changed)))

    def runs(text):
        found = text.split()
        return {tuple(found[start : start + 3]) for start in range(len(found) - 2)}

    def near(one, other):
        return len(runs(one) & runs(other)) / len(runs(one) | runs(other)) >= 0.8

    _, kept = run(tmp_path, rows, near_duplicates=0.8)
    names = {row["id"] for row in kept}
    expected = []
    for row in rows:
        if not any(
            near(row["text"], other["text"])
            for other in expected
            if other["id"].split("-")[0] == row["id"].split("-")[0]
        ):
            expected.append(row)
    missed = names - {row["id"] for row in expected}
    assert len(missed) <= 3
    for row in rows:
        if row["id"] not in names:
            assert any(near(row["text"], other["text"]) for other in kept)


# Evaluations


@pytest.mark.parametrize(
    "row",
    [
        {"question": "How many sheep does the farmer have after he has sold a third of all his animals?"},
        {"problem": "How many sheep does the farmer have after he has sold a third of all his animals?", "level": 5},
        {
            "messages": [
                {
                    "role": "user",
                    "content": "How many sheep does the farmer have after he has sold a third of all his animals?",
                }
            ]
        },
        {"prompt": ["How many sheep does the farmer have after he has sold a third of all his animals?"]},
    ],
)
def test_prompts_that_hold_a_question_of_an_evaluation_are_removed_with_its_place(tmp_path, row):
    evaluation = write(tmp_path / "gsm8k.jsonl", [row])
    rows = [
        prompt(
            "a", "Think first. How many sheep does the farmer have, after he has sold a third of all his animals? Go."
        ),
        prompt("b", "How many sheep does the farmer have?"),
    ]
    report, kept = run(tmp_path, rows, decontaminate=[evaluation])
    assert [one["id"] for one in kept] == ["b"]
    (removed,) = report.removed
    assert removed.reason == "contaminated"
    assert f"{evaluation}:1: how many sheep does the farmer" in removed.because


def test_an_evaluation_without_a_known_column_is_refused_until_it_is_named(tmp_path):
    evaluation = write(tmp_path / "eval.jsonl", [{"task": "Count the sheep of the farmer, please, now."}])
    rows = [prompt("a", "Count the sheep of the farmer, please, now."), prompt("b", "Hi?")]
    with pytest.raises(
        DataError, match=r"eval.jsonl:1: expected a text in one of the columns .*got task.*decontaminate_columns"
    ):
        run(tmp_path, rows, decontaminate=[evaluation])
    _, kept = run(tmp_path, rows, decontaminate=[evaluation], decontaminate_columns=["task"])
    assert [row["id"] for row in kept] == ["b"]


# Languages and lengths


def test_only_the_languages_that_are_asked_for_stay_and_what_is_not_certain_stays_too(tmp_path):
    rows = [
        prompt("en", "Explain the theory of relativity in simple terms for a child, please."),
        prompt("zh", "请用简单的话向孩子解释相对论，谢谢你的帮助。"),
        prompt("de", "Bitte erkläre einem Kind die Relativitätstheorie in einfachen Worten."),
        prompt("ru", "Объясни ребёнку теорию относительности простыми словами, пожалуйста."),
        prompt(
            "code",
            "```python\ndef berechne_die_summe(erste_zahl, zweite_zahl):\n    return erste_zahl + zweite_zahl\n```",
        ),
        prompt("latex", r"$$\int_0^1 x^2 \, dx = \frac{1}{3}$$"),
        prompt("short", "Hi?"),
    ]
    report, kept = run(tmp_path, rows, languages=["en", "zh"])
    assert [row["id"] for row in kept] == ["en", "zh", "code", "latex", "short"]
    assert {one.id: one.because[:2] for one in report.removed} == {"de": "de", "ru": "ru"}
    _, kept = run(tmp_path, rows, languages=["de"])
    assert [row["id"] for row in kept] == ["de", "code", "latex", "short"]


def test_lengths_are_in_characters(tmp_path):
    rows = [prompt("a", "x"), prompt("b", "x" * 5), prompt("c", "x" * 6)]
    report, kept = run(tmp_path, rows, min_characters=2, max_characters=5)
    assert [row["id"] for row in kept] == ["b"]
    assert {one.id: one.reason for one in report.removed} == {"a": "too_short", "c": "too_long"}


# Responses


@pytest.fixture
def answered(tmp_path, response, write_responses):
    texts = [
        "I'm sorry, but I can't help with that.",
        "<think>\nI'm sorry, but I can't help.\n</think>\n\nYes, it is 4.",
        "Four.",
    ]
    rows = [response(name, "a", index, text) for name in ("p1", "p2") for index, text in enumerate(texts)]
    for row in rows:
        row["prompt"] = "Question"  # two ids, one text
    return write_responses(tmp_path / "responses", rows)


def test_refusals_and_duplicates_are_removed_from_responses_and_the_folder_stays_one(tmp_path, answered):
    settings = {"responses": answered, "out": str(tmp_path / "clean"), "refusals": True, "min_characters": 3}
    report = clean(CleanConfig(**settings))
    kept = open_rows(tmp_path / "clean")
    assert [(row["prompt_id"], row["index"]) for row in kept] == [("p1", 1), ("p1", 2)]
    assert {reason: count for reason, (count, _) in report.counts().items()} == {"exact_duplicate": 3, "refusal": 1}
    before = open_rows(answered)
    assert kept.manifest.columns == before.manifest.columns
    assert all(kept[key] == before[key] for key in kept.keys())
    assert kept.manifest.complete
    # Again, and with other settings.
    assert clean(CleanConfig(**settings)).kept == 2
    assert len(open_rows(tmp_path / "clean")) == 2
    with pytest.raises(Exception, match="cleaned: .*refusals"):
        clean(CleanConfig(**settings | {"refusals": False}))


# The command, the report, and mistakes


def test_the_command_prints_counts_with_examples_and_names_all_rows_in_the_report(tmp_path):
    rows = [prompt("a", "What?"), prompt("b", "What?"), prompt("c", "Why?"), {"id": "d", "text": ""}]
    file = write(tmp_path / "prompts.jsonl", rows)
    arguments = ["clean", "--prompts", file, "--out", str(tmp_path / "out"), "--set", "on_unusable=skip"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "exact_duplicate" in result.output
    assert "2 of 4 rows kept" in result.output
    report = json.loads((tmp_path / "out" / "clean_report.json").read_text())
    assert (report["read"], report["kept"]) == (4, 2)
    assert report["removed"]["exact_duplicate"] == {
        "count": 1,
        "example": {"id": "b", "reason": "exact_duplicate", "because": "the same text as a", "text": "What?"},
    }
    assert [(row["id"], row["reason"]) for row in report["rows"]] == [("b", "exact_duplicate"), ("d", "unusable")]
    assert report["settings"]["exact_duplicates"] is True


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"refusals": True}, ConfigError, "refusals are answers"),
        ({"responses": "r"}, ConfigError, "either prompts or responses"),
        ({"min_characters": 9, "max_characters": 3}, ConfigError, "min_characters up to max_characters"),
        ({"near_duplicates": 1.5}, ConfigError, "near_duplicates"),
        ({"languages": ["english"]}, ConfigError, "codes such as en, zh.*got english"),
        ({"decontaminate": ["./nowhere.jsonl"]}, DataError, "nowhere.jsonl"),
        ({"max_characters": 1}, DataError, "worth keeping, got none of 2: 2 too_long"),
    ],
)
def test_mistakes_are_named(tmp_path, settings, error, message):
    from fusion_plugins.config import validate

    file = write(tmp_path / "prompts.jsonl", [prompt("a", "What?"), prompt("b", "Why?")])
    with pytest.raises(error, match=message):
        clean(validate(CleanConfig, {"prompts": file, "out": str(tmp_path / "out"), **settings}, where="clean.yml"))


def test_one_id_for_two_texts_and_the_folder_of_the_prompts_are_refused(tmp_path):
    with pytest.raises(DataError, match="one prompt per id, got another text for 'a'"):
        run(tmp_path, [prompt("a", "What?"), prompt("a", "Why?")])
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "prompts.jsonl", [prompt("a", "What?")])
    with pytest.raises(ConfigError, match="another folder than that of the prompts"):
        clean(CleanConfig(prompts=str(folder), out=str(folder)))
