"""What a folder is, and the page of each kind of folder."""

import html

import pytest
from report_runs import HOSTILE, RECORD, SHOWN, make_run, trained, write_json
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.errors import DataError, StoreError
from fusion_plugins.reports.build import page_of
from fusion_plugins.reports.chain import Options
from fusion_plugins.reports.kinds import SIGNS, Kind, kind_of, require_kind
from fusion_plugins.store import open_store
from fusion_plugins.store.rows import RowManifest, RowWriter

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "run")


KINDS = {
    ".": Kind.RUN,
    "fusion.yml": Kind.RUN,
    "stores/a": Kind.STORE,
    "stores/b": Kind.STORE,
    "responses": Kind.RESPONSES,
    "scored": Kind.SCORED,
    "fused": Kind.TRAINED,
    "dpo": Kind.TRAINED,
    "doctor": Kind.EXAMINED,
}


@pytest.mark.parametrize("name", KINDS)
def test_each_folder_is_known_and_has_a_page_of_its_own(name, run, tmp_path):
    assert kind_of(run / name) is KINDS[name]
    if KINDS[name] is Kind.RUN:
        return  # it has tests of its own
    result = CliRunner().invoke(app, ["report", str(run / name), "--out", str(tmp_path / "page.html"), "--no-losses"])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page.lower()
    assert "\u202e" not in page
    if name != "stores/b":
        assert SHOWN in page


def test_without_an_option_the_page_goes_into_the_folder_or_beside_the_file(run):
    CliRunner().invoke(app, ["report", str(run / "doctor")])
    assert (run / "doctor" / "fusion_report.html").is_file()
    CliRunner().invoke(app, ["report", str(run / "fusion.yml"), "--set", "examples=0"])
    assert (run / "fusion_report.html").is_file()


def test_a_checkpoint_alone_is_a_trained_model(tmp_path):
    for step, loss in ((9, 1.5), (10, 1.25)):
        state = {"global_step": step, "log_history": [{"step": step, "loss": loss}]}
        write_json(tmp_path / f"checkpoint-{step}" / "trainer_state.json", state)
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text("{")  # a kill left it so
    assert kind_of(tmp_path) is Kind.TRAINED
    page = page_of(tmp_path, Options())
    assert "has not ended" in page
    assert '<td class="number">1.25</td>' in page


def test_an_unknown_folder_is_an_error_that_lists_what_it_could_be(run, tmp_path):
    (tmp_path / "file.txt").write_text("")
    for path, got in (
        (tmp_path, "a folder without"),
        (tmp_path / "none", "no folder"),
        (tmp_path / "file.txt", "no YAML"),
    ):
        with pytest.raises(DataError, match=got) as error:
            require_kind(path)
        for kind, sign in SIGNS.items():
            assert f"{kind} ({sign})" in str(error.value)
    with pytest.raises(DataError, match=r"inside it a \(store\), b \(store\)"):
        require_kind(run / "stores")


def test_other_rows_and_damaged_folders_are_refused(tmp_path):
    manifest = RowManifest(stage="other", columns={"id": "string"}, key=("id",))
    with RowWriter(tmp_path / "rows", manifest) as writer:
        writer.finish()
    with pytest.raises(DataError, match="expected one of"):
        page_of(tmp_path / "rows", Options())
    (tmp_path / "rows" / "manifest.json").write_text("{}")
    with pytest.raises(StoreError):
        page_of(tmp_path / "rows", Options())
    trained(tmp_path / "model", report={"x": {"texts": 3}})
    with pytest.raises(DataError, match="got another form"):
        page_of(tmp_path / "model", Options())
    trained(tmp_path / "model", report={}, training={"version": 2})
    with pytest.raises(DataError, match="expected version 1, got 2"):
        page_of(tmp_path / "model", Options())
    trained(tmp_path / "model", training=[1])
    with pytest.raises(DataError, match="expected a JSON object, got list"):
        page_of(tmp_path / "model", Options())


def test_a_store_shows_losses_of_its_first_texts(run):
    page = html.unescape(page_of(run / "stores" / "a", Options()))
    store = open_store(run / "stores" / "a")
    record = next(iter(store))
    loss = -float(record.topk.token_logprobs[0])
    assert f'title="{loss:.2f} nats">{store.table.bytes_of(int(record.text.input_ids[1])).decode()}</span>' in page
    assert f"The first 3 of {len(store)} texts" in page


def test_losses_of_models_that_cannot_be_run_are_said_to_be_missing(tmp_path):
    trained(tmp_path, training=RECORD | {"base_model": str(tmp_path)})
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(HOSTILE)
    page = page_of(tmp_path, Options(losses=True))
    assert "a model could not be run" in page
    assert "a model could not be run" in page_of(tmp_path, Options())
    assert "not asked for" in page_of(tmp_path, Options(losses=False))
    trained(tmp_path, training=RECORD | {"base_model": "org/large"})
    assert "--losses` loads org/large" in page_of(tmp_path, Options())


def test_the_help_has_examples():
    text = CliRunner().invoke(app, ["report", "--help"], env={"COLUMNS": "200"}).output
    assert "fusion report ." in " ".join(text.split())
    assert "--losses" in text
