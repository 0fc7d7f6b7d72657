"""`fusion report` on the folder of a run: its figures are those of the files, and whatever stands in them is text."""

import html
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from report_runs import FUSED, HISTORY, HOSTILE, RECORD, SHOWN, make_run, trained, write_json
from typer.testing import CliRunner

from fusion_plugins.chain.records import Records
from fusion_plugins.chain.settings import load_chain
from fusion_plugins.cli import app
from fusion_plugins.core.fusion.held_out import nats_per_byte
from fusion_plugins.core.fusion.record import supervised_bytes
from fusion_plugins.errors import ConfigError
from fusion_plugins.reports.build import page_of
from fusion_plugins.reports.chain import Options, read_run, run_sections
from fusion_plugins.store import open_store

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run):
    out = run.parent / "page.html"
    result = CliRunner().invoke(app, ["report", str(run), "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out.read_text()


def rows_of(page, label):
    """The cells of the tables of that label."""
    tables = re.findall(rf'aria-label="{re.escape(html.escape(label))}"><table>(.*?)</table>', page, re.DOTALL)
    lines = [re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", line) for table in tables for line in table.split("</tr>")]
    return [[html.unescape(cell) for cell in line] for line in lines if line]


def test_names_and_texts_are_data(page):
    assert "<script" not in page.lower()
    assert SHOWN in page
    for mark in ("\x1b", "\u202e", "</pre></td>"):
        assert mark not in page
    # Nothing is loaded: every address is inside the page.
    assert not re.search(r"(?:src|href)=\"(?!#)|url\((?!#)|@import|<(?:link|iframe|object|embed|img)", page)


def test_secrets_of_settings_are_not_on_the_page(page):
    assert not re.search("hf_secret|sk-[1-4]", page)
    assert "api_key: &#39;***&#39;" in page
    assert "--api-key ***" in page
    assert "learning_rate: 0.125" in page


def test_steps_have_their_state_and_what_is_missing_is_said(page):
    states = {name: state for name, state, *_ in rows_of(page, "Steps")[1:]}
    assert states["train"] == "done"
    assert states["prefer"] == "started, has not ended well"
    assert states["merge"] == "has not run"
    assert "8 of 12 steps are done." in page
    assert "Not done: prefer, merge, plain, measure." in page
    assert "61 s" in page


def test_stores_have_the_counts_of_their_manifests_and_the_domains_of_their_texts(run, page):
    lines = rows_of(page, "Stores")
    for line, name, state in zip(lines[1:], "ab", ("complete", "unfinished"), strict=True):
        manifest = open_store(run / "stores" / name).manifest
        numbers = [f"{value:,}" for value in (manifest.rows, manifest.tokens, manifest.bytes)]
        assert (line[0], line[2], line[4:7], line[8]) == (name, state, numbers, "4")
    assert rows_of(page, "Texts by domain and store")[1:] == [[SHOWN_TEXT, "6", "2"], ["math", "6", "2"]]


SHOWN_TEXT = html.unescape(SHOWN)


def test_who_taught_what_is_what_the_report_of_the_training_says(page):
    heads, *lines = rows_of(page, "Sources")
    found = dict(zip(heads, lines[0], strict=True))
    assert found["source"] == SHOWN_TEXT
    assert found["texts with the lowest CE"] == "30 (75.0%)"
    assert (found["coverage"], found["kept mass"]) == ("83.0%", "70.0%")
    assert (found["unaligned"], found["edited entries"], found["unmapped entries"]) == ("15.0%", "9.0%", "1.0%")
    taught = rows_of(page, "Positions by the source that teaches them")
    assert [line[0] for line in taught] == ["domain", "math", SHOWN_TEXT]
    for name, cells in zip(FUSED["taught"], taught[1:], strict=True):
        counts = FUSED["taught"][name]
        total = sum(counts.values())
        for source, cell in zip(taught[0][1:], cells[1:], strict=True):
            count = counts.get(HOSTILE if source == SHOWN_TEXT else source, 0)
            assert cell == f"{count:,} ({count / total:.1%})"
    assert "75.0% of them with a fused distribution" in page
    assert "3 rows are longer than sequence_len" in page
    assert "7 rows are taught without b, whose store lacks them" in page


def test_curves_have_their_numbers_in_a_table(page):
    heads, *lines = rows_of(page, "Losses, nats")
    assert heads == ["step", "loss", "lm_loss", "fusion_loss"]
    assert [[float(cell) for cell in line] for line in lines] == [
        [entry[name] for name in ("step", "loss", "lm_loss", "fusion_loss")] for entry in HISTORY
    ]
    assert rows_of(page, "Share of the positions that each source teaches")[1] == ["1", "0.6", "0.4"]
    assert "There are no figures yet" in page  # of the training that has not ended


def test_pairs_and_best_answers_are_composed_as_their_reports_say(page):
    assert "12 pairs of 12 of 20 prompts." in page
    assert [SHOWN_TEXT.join(("math/", "/chosen")), "12", "31.5", "30"] in rows_of(page, "Answers of the pairs")
    assert ["gap_too_small", "5"] in rows_of(page, "Dropped pairs")
    assert page.count("33 answers to 33 of 40 prompts.") == 2
    assert rows_of(page, "Answers by source")[1] == ["answers", "30 (90.9%)", "3 (9.1%)"]
    assert "Window of the reward gap: 0.01 to 0.1." in page


def test_example_tokens_have_the_source_that_teaches_them(page):
    tokens = re.findall(r'<span class="(\w+)" title="([^"]*)">(.*?)</span>', page, re.DOTALL)
    taught = [(style, html.unescape(title), html.unescape(text)) for style, title, text in tokens]
    assert taught[:5] == [
        ("same", "(no source)", "<s>"),
        ("c0", SHOWN_TEXT, SHOWN_TEXT),
        ("c6", "(several sources)", " two"),
        ("label", "(the label)", " six"),
        ("plain", "not trained on", "\n"),
    ]
    assert "There is no loss after the training" in page


def test_held_out_texts_have_intervals_and_paired_differences(run, page):
    heads, before, after = rows_of(page, "Held-out cross-entropy")
    store = open_store(run / "00" / "held_out")
    sizes = np.array([float(supervised_bytes(record.text).sum()) for record in store])
    nats = np.array([record.ce_per_byte for record in store]) * sizes
    value, low, high = nats_per_byte(nats[sizes > 0], sizes[sizes > 0])
    assert before == [
        "00-measure",
        "before",
        str((sizes > 0).sum()),
        f"{value:.4g}",
        f"{low:.4f} to {high:.4f}",
        "–",
        "–",
    ]
    assert after[5] == "+0.0000"
    assert rows_of(page, "Printed by steps") == [["step", "accuracy", SHOWN_TEXT], ["measure", "0.625", "3"]]


def test_pictures_are_vectors_with_a_name_and_their_numbers_beside_them(page):
    pictures = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    assert len(pictures) >= 8
    for picture in pictures:
        assert 'role="img" aria-label="' in picture
        assert "<title>" in picture
        assert "<image" not in picture
        # A phone has room for 358 pixels, so none of them shrinks there.
        assert float(re.search(r"max-width: (\d+)px", picture)[1]) <= 358
    # The rewards have their numbers in sentences; tables that are not folded away are below their picture.
    assert page.count("<figcaption>") == page.count("<figure>") - 2 - 3
    boxes = re.findall(r'<div class="wide"[^>]*>', page)
    assert boxes
    assert all('tabindex="0" role="region" aria-label="' in box for box in boxes)


def test_a_damaged_part_is_named_and_the_others_stay(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "stores" / "a" / "manifest.json").write_text("{}")
    (folder / "00" / "held_out" / "manifest.json").write_text("[")
    (folder / "fused" / "fusion_report.json").write_text("{")
    write_json(folder / "dpo" / "fusion_pairs.json", {"pairs": "many"})
    write_json(folder / "doctor" / "doctor.json", {"sources": [3]})
    (folder / ".fusion_run" / "fusion" / "sample.json").write_text("{}")
    (folder / "capture.yml").write_text("a: [")
    write_json(folder / "rounds.json", [{"round": 1}])
    page = html.unescape(page_of(folder, Options()))
    for said in (
        *("stores/a/manifest.json", "held_out/manifest.json", "fused/fusion_report.json: expected JSON"),
        *("dpo cannot be shown", "doctor cannot be shown", "sample.json: expected the record of a step"),
        *("capture.yml cannot be shown", "rounds.json cannot be shown"),
    ):
        assert said in page, said
    assert "Responses by domain and source" in page
    assert "Training: train" in page


def test_a_run_that_has_not_begun_has_a_page(tmp_path):
    steps = [{"name": "one", "command": "do it", "writes": ["out"]}]
    (tmp_path / "fusion.yml").write_text(yaml.safe_dump({"steps": steps}))
    page = page_of(tmp_path, Options())
    assert "0 of 1 steps are done." in page
    assert "No step of this run has measured" in page
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"steps": [*steps, steps[0] | {"name": "two", "writes": []}]}))
    assert "0 of 2 steps are done." in page_of(tmp_path / "other.yaml", Options())
    (tmp_path / "fusion.yml").write_text("steps: 3")
    with pytest.raises(ConfigError, match="steps"):
        page_of(tmp_path, Options())


def test_numbers_that_no_float_holds_do_not_end_the_page(tmp_path):
    huge = "1" + "0" * 400
    (tmp_path / "said.json").write_text(f'{{"large": {huge}, "right": 3, "done": true, "mean": 0.5}}')
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": int(huge)}]
    trained(tmp_path / "model", training=RECORD | {"log_history": history})
    steps = [
        {"name": "measure", "command": "say", "stdout": "said.json"},
        {"name": "train", "command": "do", "writes": ["model"]},
    ]
    (tmp_path / "fusion.yml").write_text(yaml.safe_dump({"steps": steps}))
    page = html.unescape(page_of(tmp_path, Options()))
    printed = [["step", "large", "right", "mean"], ["measure", "inf", "3", "0.5"]]
    assert rows_of(page, "Printed by steps") == printed
    assert "model cannot be shown" in page


def test_results_of_other_settings_are_named(tmp_path):
    """A step that was done is not done with the settings of now: its figures are those of before."""
    (tmp_path / "a.yml").write_text("lr: 1")
    steps = [
        {"name": name, "command": f"do a.yml {name}", "writes": [f"made-{name}"]}
        for name in ("same", "edited", "other", "gone")
    ]
    (tmp_path / "fusion.yml").write_text(yaml.safe_dump({"steps": steps}))
    chain = load_chain(tmp_path / "fusion.yml")
    records = Records(chain)
    records.folder.mkdir(parents=True)
    for name, step in chain.steps.items():
        if name != "gone":
            (tmp_path / f"made-{name}").mkdir()
        plan = replace(records.planned(step), done=True, seconds=1.0)
        records.save(name, replace(plan, command=["do"]) if name == "other" else plan)
    assert [state.said for state in read_run(tmp_path).states.values()] == [
        *("done", "done", "done, with another command", "done, but made-gone is missing")
    ]
    (tmp_path / "a.yml").write_text("lr: 2")
    found = read_run(tmp_path)
    assert found.states["edited"].said == "done, before a.yml was changed"
    page = page_of(tmp_path, Options())
    assert "Done with other settings: same, edited, other." in page
    assert "3 of 4 steps are done." in page


def test_a_run_in_a_run_has_its_parts_on_the_page(tmp_path):
    inner = {"steps": [{"name": "01-train", "command": "x", "writes": ["model"]}]}
    trained(tmp_path / "rounds" / "model", report={"answers": FUSED})
    (tmp_path / "rounds" / "fusion.yml").write_text(yaml.safe_dump(inner))
    outer = {"steps": [{"name": "rounds", "command": "fusion rounds", "writes": ["rounds"]}]}
    (tmp_path / "fusion.yml").write_text(yaml.safe_dump(outer))
    titles = [section.title for section in run_sections(read_run(tmp_path), Options())]
    assert {"Steps", "rounds: Steps", "rounds: Training: 01-train"} <= set(titles)
    (tmp_path / "rounds" / "fusion.yml").write_text("steps: 3")
    assert "rounds cannot be shown" in page_of(tmp_path, Options())


def test_the_page_stays_small_however_many_trainings_there_are(tmp_path):
    names = [f"train-{number}" for number in range(5)]
    tokens = {"ids": [5] * 160, "tokens": ["word "] * 160, "supervised": [True] * 160, "sources": ["a"] * 160}
    examples = [{"row": number, "of_tokens": 160, **tokens} for number in range(8)]
    history = [{"step": step, "loss": 3.0} for step in range(2000)]
    for name in names:
        trained(tmp_path / name, training=RECORD | {"examples": examples, "log_history": history})
    steps = [{"name": name, "command": "x", "writes": [name]} for name in names]
    (tmp_path / "fusion.yml").write_text(yaml.safe_dump({"steps": steps}))
    found = read_run(tmp_path)
    assert found.problems == []
    page = page_of(tmp_path, Options(losses=False))
    assert len(page.encode()) < 1_000_000
    assert len(re.findall("<h3>Row ", page)) == 10  # two of each training, twelve at most in all
    few = run_sections(found, Options(losses=False, examples=0))
    assert not any(part.title.startswith("Row ") for section in few for part in section.parts)
