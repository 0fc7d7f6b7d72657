"""``fusion score`` on files of other tools, and on responses whose gold answers were corrected."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

import fusion_plugins.scoring.score as score_module
from fusion_plugins.cli import app
from fusion_plugins.core.key_set import KeySet
from fusion_plugins.errors import DataError, StoreError
from fusion_plugins.scoring.base import Score
from fusion_plugins.scoring.responses import key_of, open_responses, outdated
from fusion_plugins.scoring.score import ScoreConfig, ScoreReport, score_responses
from fusion_plugins.store import RowManifest, RowWriter, open_rows

ROW = {"prompt_id": "p1", "source": "a", "prompt": "1 + 1?", "response": "2", "reference": "2", "domain": "math"}


class Equal:
    """A response is correct when it is the reference."""

    domains = None
    facts: Mapping[str, Any] = {"version": 1}

    def __init__(self) -> None:
        self.asked: list[str] = []

    def score(self, rows: Sequence[Mapping[str, Any]]) -> list[Score]:
        self.asked += [f"{row['prompt_id']}/{row['source']}/{row['index']}" for row in rows]
        return [Score(correct=row["response"] == row["reference"]) for row in rows]

    def close(self) -> None:
        pass


class Long(Equal):
    """The reward is the length."""

    def score(self, rows: Sequence[Mapping[str, Any]]) -> list[Score]:
        self.asked += [row["prompt_id"] for row in rows]
        return [Score(reward=float(len(row["response"]))) for row in rows]


@pytest.fixture
def scorers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Equal]:
    known = {"equal": Equal(), "long": Long()}
    monkeypatch.setattr(score_module, "lookup", lambda kind, name: lambda **options: known[name])
    return known


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_folder(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = {name: "string" for name in ("prompt_id", "source", "response", "domain", "reference")}
    columns |= {"index": "int64", "prompt": "json", "tests": "json"}
    with RowWriter(path, RowManifest(stage="responses", columns=columns, key=("prompt_id", "source", "index"))) as out:
        for row in rows:
            out.write({"index": 0, **row})
        out.finish()
    return str(path)


def score(responses: str | list[str], out: Path, scorer: str = "equal", **more: Any) -> ScoreReport:
    return score_responses(ScoreConfig(responses=responses, out=str(out), scorers={scorer: {}}, **more))


CHAT = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "你好?"}]
ROWS = [
    ROW,
    ROW | {"response": "3", "temperature": 0.7},
    ROW | {"source": "b", "reference": 2},
    {"prompt_id": 7, "source": "a", "messages": CHAT, "response": "", "tests": ["assert f()"], "index": 4},
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_files_of_other_tools_are_scored(tmp_path: Path, scorers: dict[str, Equal], suffix: str) -> None:
    file = str(tmp_path / f"responses.{suffix}")
    if suffix == "jsonl":
        write_lines(Path(file), ROWS)
    else:  # where one type per column is needed, and rows have nulls for what they lack
        texts = [{"prompt_id": str(row["prompt_id"]), "reference": str(row.get("reference"))} for row in ROWS]
        names = {name: None for row in ROWS for name in row}
        pq.write_table(pa.Table.from_pylist([names | row | text for row, text in zip(ROWS, texts, strict=True)]), file)
    report = score(file, tmp_path / "scored")
    assert (report.scored, report.present) == (4, 0)
    scored = open_rows(tmp_path / "scored")
    assert scored.manifest.complete
    assert scored.manifest.provenance == {"responses": file}
    assert scored.keys() == [("p1", "a", 0), ("p1", "a", 1), ("p1", "b", 0), ("7", "a", 4)]
    assert [row["correct"] for row in scored] == [True, False, True, False]
    last = scored["7", "a", 4]
    assert (last["prompt"], last["domain"], last["tests"]) == (CHAT, "instruction", ["assert f()"])


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_a_response_is_put_in_front_of_it(tmp_path: Path, name: str) -> None:
    rows = [
        ROW | {name: "1 and 1\n"},
        ROW | {name: "1 and", "response": None, "finish_reason": "length"},
        ROW | {name: "1 and 1", "response": None, "finish_reason": "stop"},
        ROW | {name: "said twice", "response": "<think>\nsaid twice\n</think>\n\n2"},
        ROW | {name: " "},
        ROW | {name: {"effort": "low"}},
        ROW | {name: None, "thinking": "so"} if name != "thinking" else ROW | {name: "so"},
    ]
    found = [row["response"] for row in open_responses(write_lines(tmp_path / "responses.jsonl", rows))]
    assert found == [
        "<think>\n1 and 1\n</think>\n\n2",
        "<think>\n1 and",
        "<think>\n1 and 1\n</think>\n\n",
        "<think>\nsaid twice\n</think>\n\n2",
        "2",
        "2",
        "<think>\nso\n</think>\n\n2",
    ]


def test_a_row_with_neither_response_nor_reasoning_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got no response"):
        open_responses(write_lines(tmp_path / "responses.jsonl", [ROW | {"response": None, "reasoning": ""}]))


def test_a_file_is_continued_where_it_stopped_and_where_it_grew(tmp_path: Path, scorers: dict[str, Equal]) -> None:
    file = write_lines(tmp_path / "responses.jsonl", ROWS)
    assert score(file, tmp_path / "scored", limit=2).scored == 2
    assert not open_rows(tmp_path / "scored").manifest.complete
    assert score(file, tmp_path / "scored").scored == 2
    assert open_rows(tmp_path / "scored").manifest.complete
    write_lines(tmp_path / "responses.jsonl", [*ROWS, ROW | {"response": "two"}])
    report = score(file, tmp_path / "scored")
    assert (report.scored, report.present, report.renewed) == (1, 4, 0)
    assert scorers["equal"].asked == ["p1/a/0", "p1/a/1", "p1/b/0", "7/a/4", "p1/a/2"]


def test_several_files_are_one_set(tmp_path: Path, scorers: dict[str, Equal]) -> None:
    files = [write_lines(tmp_path / f"{name}.jsonl", [ROW | {"source": name}]) for name in "ab"]
    assert score(files, tmp_path / "scored").scored == 2
    settings = tmp_path / "score.yml"
    settings.write_text(yaml.safe_dump({"responses": files, "scorers": {"equal": {}}}))
    run = CliRunner().invoke(app, ["score", "-c", str(settings), "--out", str(tmp_path / "scored")])
    assert "0 responses scored" in " ".join(run.output.split())
    doubled = [files[0], write_lines(tmp_path / "c.jsonl", [ROW | {"index": 0}])]
    with pytest.raises(
        DataError, match=r"c.jsonl:1: .* index 0 of prompt 'p1', source 'a', got a second one; .*a.jsonl:1"
    ):
        score(doubled, tmp_path / "other")


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in ROW.items() if name not in names}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without("response"), "expected prompt_id, source, prompt .*; got no response. Add"),
        (without("prompt_id", "prompt"), "expected .*; got no prompt_id, no prompt or messages"),
        (ROW | {"source": None}, "expected .*; got no source"),
        (ROW | {"messages": CHAT}, "expected prompt or messages, got both. Remove one. Expected are prompt_id"),
        (ROW | {"response": ["2"]}, r"expected text in 'response', got \['2'\]"),
        (ROW | {"domain": 3}, "expected text in 'domain', got 3"),
        (ROW | {"prompt": ""}, "expected a text or a list of messages as the prompt, got ''"),
        (ROW | {"prompt": [{"role": "user"}]}, "expected messages with role and content as text"),
        (
            without("prompt") | {"messages": [{"role": "assistant", "content": "2"}]},
            "expected a prompt that ends with the user's message, got the assist",
        ),
        (ROW | {"index": "0"}, "expected a number from 0 in 'index', got '0'"),
        (ROW | {"index": True}, "expected a number from 0 in 'index', got True"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_by_its_line_before_anything_is_scored(
    tmp_path: Path, scorers: dict[str, Equal], row: dict[str, Any], message: str
) -> None:
    file = write_lines(tmp_path / "responses.jsonl", [ROW, row])
    with pytest.raises(DataError, match=rf"responses.jsonl:2: {message}"):
        score(file, tmp_path / "scored")
    assert scorers["equal"].asked == []
    assert not (tmp_path / "scored").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"prompt_id": \n', "r.jsonl:1: expected one JSON object per line"),
        (b'\n"text"\n', "r.jsonl:2: expected a JSON object, (came|got) str"),
        (b'{"prompt_id": "\xff"}\n', "r.jsonl:1: expected one JSON object per line, in UTF-8"),
        (json.dumps(ROW | {"response": "\ud800"}).encode(), "r.jsonl:1: expected values that JSON and UTF-8 can write"),
    ],
)
def test_a_broken_file_is_refused_by_its_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "r.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=message):
        open_responses(str(tmp_path / "r.jsonl"))


def test_what_is_neither_folder_nor_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.parquet").write_bytes(b"PAR1")
    (tmp_path / "r.csv").write_text("a,b")
    with pytest.raises(DataError, match="r.parquet: expected a Parquet file, got other bytes"):
        open_responses(str(tmp_path / "r.parquet"))
    for name in ("r.csv", "absent.jsonl"):
        with pytest.raises(DataError, match=f"{name}: expected a .jsonl or .parquet file, got "):
            open_responses(str(tmp_path / name))
    with pytest.raises(StoreError, match="absent: expected a store or a folder of responses, got no folder"):
        open_responses(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("column", "value"),
    [("reference", "3"), ("domain", "code"), ("tests", ["assert g()"]), ("prompt", "1 + 2?"), ("response", "3")],
)
@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_row_that_was_corrected_is_scored_anew_and_it_is_said(
    tmp_path: Path,
    scorers: dict[str, Equal],
    capsys: pytest.CaptureFixture[str],
    form: str,
    column: str,
    value: object,
) -> None:
    rows = [ROW | {"tests": ["assert f()"]}, ROW | {"prompt_id": "p2"}, ROW | {"source": "b"}]
    corrected = [rows[0], rows[1] | {column: value}, rows[2]]
    before, after = (
        [write_lines(tmp_path / f"{name}.jsonl", some) for name, some in (("before", rows), ("after", corrected))]
        if form == "file"
        else [write_folder(tmp_path / name, some) for name, some in (("before", rows), ("after", corrected))]
    )
    score(before, tmp_path / "scored")
    scorers["equal"].asked.clear()
    report = score(after, tmp_path / "scored")
    assert (report.scored, report.present, report.renewed) == (1, 2, 1)
    assert scorers["equal"].asked == ["p2/a/0"]
    said = capsys.readouterr().err
    assert f"1 rows of {tmp_path / 'scored'} are scored again, because the responses have changed" in said
    assert f"{column} in 1. The first: prompt_id 'p2', source 'a', index 0" in said
    scored = open_rows(tmp_path / "scored")
    assert scored.manifest.complete
    assert scored["p2", "a", 0][column] == value
    assert scored["p2", "a", 0]["correct"] is (column not in {"reference", "response"})
    assert score(after, tmp_path / "scored").renewed == 0


def test_rows_that_have_changed_are_found_with_the_keys_of_the_folder(tmp_path: Path) -> None:
    rows = [ROW | {"prompt_id": name, "index": 0} for name in ("p1", "p2", "p3")]
    responses = open_responses(str(write_folder(tmp_path / "after", [rows[0], rows[1] | {"response": "4"}, rows[2]])))
    keys = KeySet(key_of(row, responses.manifest) for row in rows)
    changed = outdated(responses, rows, ["equal"], keys)
    assert changed == outdated(responses, rows, ["equal"]) == {key_of(rows[1], responses.manifest): ["response"]}
    assert len(keys) == 3, "nothing but numbers was added"


def test_a_corrected_verdict_of_an_earlier_scorer_reaches_the_later_one(
    tmp_path: Path, scorers: dict[str, Equal]
) -> None:
    rows = [ROW, ROW | {"prompt_id": "p2"}]
    score(write_lines(tmp_path / "r.jsonl", rows), tmp_path / "first")
    score(str(tmp_path / "first"), tmp_path / "second", "long")
    score(write_lines(tmp_path / "r.jsonl", [ROW | {"reference": "9"}, rows[1]]), tmp_path / "first")
    assert score(str(tmp_path / "first"), tmp_path / "second", "long").renewed == 1
    assert {row["prompt_id"]: (row["correct"], row["reward"]) for row in open_rows(tmp_path / "second")} == {
        "p1": (False, 1.0),
        "p2": (True, 1.0),
    }
    assert scorers["long"].asked == ["p1", "p2", "p1"]


@pytest.mark.parametrize("killed", ["while rows are taken out", "after they were scored anew"])
def test_a_run_that_is_killed_over_corrected_rows_leaves_no_old_verdict(
    tmp_path: Path, scorers: dict[str, Equal], killed: str
) -> None:
    """What a killed run leaves is the old shard, which no manifest lists."""
    out = tmp_path / "scored"
    score(write_lines(tmp_path / "before.jsonl", [ROW, ROW | {"prompt_id": "p2"}]), out)
    (shard,) = out.glob("shard-*")
    old = shard.read_bytes()
    after = write_lines(tmp_path / "after.jsonl", [ROW | {"reference": "9"}, ROW | {"prompt_id": "p2"}])
    if killed == "while rows are taken out":
        with RowWriter(out, open_rows(out).manifest) as writer:
            writer.drop([("p1", "a", 0)])
    else:
        score(after, out)
    shard.write_bytes(old)
    score(after, out)
    assert {row["prompt_id"]: row["correct"] for row in open_rows(out)} == {"p1": False, "p2": True}
    assert not shard.exists()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(("true", "false"), [(True, False), (1, 0), (1.0, 0.0), ("true", "False"), ("1", "0")])
def test_verdicts_of_other_tools_are_kept_in_whatever_form(
    tmp_path: Path, scorers: dict[str, Equal], kind: str, true: Any, false: Any
) -> None:
    rows = [{**ROW, "prompt_id": f"p{place}", "correct": value} for place, value in enumerate((true, false, None))]
    path = tmp_path / f"answers.{kind}"
    if kind == "jsonl":
        write_lines(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    settings = {"responses": str(path), "out": str(tmp_path / "scored"), "scorers": {"long": {}}}
    score_responses(ScoreConfig.model_validate(settings))
    assert [row["correct"] for row in open_rows(tmp_path / "scored")] == [True, False, None]


def test_a_verdict_that_is_none_is_an_error_that_names_its_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "answers.jsonl", [ROW, {**ROW, "source": "b", "correct": 0.5}])
    with pytest.raises(DataError, match=r"answers\.jsonl.*2.*'correct': expected a verdict .* got 0\.5"):
        open_responses(path)


def test_the_verdict_of_a_scorer_comes_before_that_of_another_tool(tmp_path: Path, scorers: dict[str, Equal]) -> None:
    path = write_lines(tmp_path / "answers.jsonl", [{**ROW, "correct": "false"}])
    settings = {"responses": path, "out": str(tmp_path / "scored"), "scorers": {"equal": {}}}
    score_responses(ScoreConfig.model_validate(settings))
    assert [row["correct"] for row in open_rows(tmp_path / "scored")] == [True]
