"""`fusion rounds`: the configurations and steps that it writes, what it refuses, and what it says of the outcome."""

import json
import re
import shutil
import sys

import pytest
import yaml
from axolotl_runs import ROOT, row_folder, scored
from store_contents import make_store
from typer.testing import CliRunner

from fusion_plugins.chain.outcome import outcomes, table_of, write_outcomes
from fusion_plugins.chain.records import Records
from fusion_plugins.chain.round_configs import load_rounds
from fusion_plugins.chain.round_settings import RoundsConfig
from fusion_plugins.chain.rounds import consistency, remove_broken_checkpoints, write_rounds
from fusion_plugins.chain.settings import load_chain
from fusion_plugins.cli import app
from fusion_plugins.config import validate
from fusion_plugins.core.fusion.record import supervised_bytes
from fusion_plugins.errors import ChainError, ConfigError, DataError, FusionError
from fusion_plugins.inputs import open_prompts
from fusion_plugins.store import open_store

TRAIN = {
    "base_model": "x",
    "plugins": ["fusion_plugins.axolotl.FusionPlugin"],
    "datasets": [{"path": "y", "type": "fusion_plugins.axolotl.fused"}],
    "fusion": {
        "sources": [{"name": "a", "store": "z"}, {"name": "b", "store": "z"}],
        "loss": "reverse_kl",
        "rule": "fixed_weights",
    },
    "learning_rate": 0.1,
    "output_dir": "w",
}
ROUNDS = {
    "target": "target",
    "rounds": 2,
    "out": "made",
    "sample": {"prompts": "prompts.jsonl", "n": 3, "max_tokens": 8, "seed": 5},
    "capture": {"top_k": 9},
    "sources": [{"name": "a", "model": "org/a"}, {"name": "b", "model": "b", "top_k": 7}],
    "train": {"config": "train.yml"},
}


@pytest.fixture
def load(tmp_path):
    for name in ("target", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
    rows = [{"id": f"p{i}", "text": f"Say {i}!", "domain": "math", "reference": str(i)} for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def loaded(training=None, flags=None, **keys):
        (tmp_path / "train.yml").write_text(yaml.safe_dump(TRAIN | (training or {})))
        (tmp_path / "rounds.yml").write_text(yaml.safe_dump(ROUNDS | keys))
        return load_rounds(tmp_path / "rounds.yml", flags or {})

    return loaded


def _read(folder, *names):
    return [yaml.safe_load((folder / name).read_text()) for name in names]


def test_each_round_starts_from_the_checkpoint_of_the_one_before(load, tmp_path):
    chain = write_rounds(load())
    assert list(chain.sorter().static_order()) == [
        *("01-sample", "01-capture-a", "01-capture-b", "01-train"),
        *("02-sample", "02-capture-a", "02-capture-b", "02-train"),
    ]
    assert load_chain(tmp_path / "made" / "fusion.yml").settings == chain.settings
    first, second = _read(tmp_path / "made", "01/sample.yml", "02/sample.yml")
    assert first == {
        **{"prompts": "prompts.jsonl", "n": 3, "seed": 5, "out": "made/01/responses"},
        "sources": [{"max_tokens": 8, "name": "target", "model": "target"}],
    }
    assert (second["seed"], second["sources"][0]["model"]) == (6, "made/01/model")
    a, b, train = _read(tmp_path / "made", "02/capture-a.yml", "02/capture-b.yml", "02/train.yml")
    assert a == {"top_k": 9, "name": "a", "model": "org/a", "texts": "made/02/responses", "out": "made/02/stores/a"}
    assert (b["top_k"], b["out"]) == (7, "made/02/stores/b")
    assert train == TRAIN | {
        "base_model": "made/01/model",
        "output_dir": "made/02/model",
        "dataset_prepared_path": "made/02/prepared",
        "datasets": [TRAIN["datasets"][0] | {"path": "made/02/responses"}],
        "fusion": TRAIN["fusion"] | {"sources": [{"name": name, "store": f"made/02/stores/{name}"} for name in "ab"]},
        "auto_resume_from_checkpoints": True,
        "seed": 42,
    }
    step = chain.steps["02-train"]
    assert step.words == ["axolotl", "train", "made/02/train.yml"]
    assert str(tmp_path / "made/02/responses") in chain.reads(step)
    assert str(tmp_path / "made/02/train.yml") in chain.reads(step)
    # A name of the hub is no file.
    assert not any("org" in path for path in chain.reads(chain.steps["01-capture-a"]))
    assert str(tmp_path / "b") in chain.reads(chain.steps["01-capture-b"])
    sources = [{"name": "a", "model": "made-by/a"}, {"name": "b", "model": str(tmp_path / "b")}]
    chain = write_rounds(load(sources=sources))
    assert chain.reads(chain.steps["02-capture-a"]) == [
        str(tmp_path / "made/02" / name) for name in ("responses", "capture-a.yml")
    ]
    assert str(tmp_path / "b") in chain.reads(chain.steps["02-capture-b"])


def test_more_rounds_leave_the_first_ones_as_they_are(load, tmp_path):
    few = write_rounds(load())
    before = {name: Records(few).planned(step) for name, step in few.steps.items()}
    many = write_rounds(load(flags={"rounds": 3}))
    assert len(many.steps) == 12
    assert {name: Records(many).planned(many.steps[name]) for name in before} == before


def test_scores_and_the_target_itself_take_part_where_they_are_asked_for(load, tmp_path):
    sources = [*TRAIN["fusion"]["sources"], {"name": "own", "store": "z", "is_target": True}]
    target = {"top_k": 3}
    chain = write_rounds(
        load({"fusion": TRAIN["fusion"] | {"sources": sources}}, score={"scorers": {"math": {}}}, target_capture=target)
    )
    assert [name for name in chain.steps if name.startswith("02")] == [
        *("02-sample", "02-score", "02-capture-a", "02-capture-b", "02-capture-own", "02-train")
    ]
    own, score, train = _read(tmp_path / "made", "02/capture-own.yml", "02/score.yml", "02/train.yml")
    assert own == {
        **{"top_k": 3, "name": "own", "model": "made/01/model", "texts": "made/02/scored"},
        "out": "made/02/stores/own",
    }
    assert score == {"scorers": {"math": {}}, "responses": "made/02/responses", "out": "made/02/scored"}
    assert train["datasets"][0]["path"] == "made/02/scored"
    assert train["fusion"]["sources"][2] == {"name": "own", "store": "made/02/stores/own", "is_target": True}
    assert _read(tmp_path / "made", "02/sample.yml")[0]["sources"][0]["name"] == "own"


def test_engines_and_environments_are_passed_on(load, tmp_path):
    here = {"env": "vllm", "variables": {"CUDA_VISIBLE_DEVICES": 1}}
    sample = ROUNDS["sample"] | {"backend": "vllm", "options": {"tensor_parallel_size": 2}, **here}
    sources = [
        {"name": "a", "model": "org/a", "backend": "openai", "options": {"urls": ["http://host/v1"]}},
        {"name": "b", "model": "b", "backend": "ray", "env": "vllm"},
    ]
    settings = {"sample": sample, "sources": sources, "environments": {"vllm": ".venv-vllm"}}
    chain = write_rounds(load(**settings))
    (step, a, b) = (chain.steps[f"01-{name}"] for name in ("sample", "capture-a", "capture-b"))
    assert (step.env, step.variables, a.env, b.env) == ("vllm", {"CUDA_VISIBLE_DEVICES": 1}, None, "vllm")
    assert chain.where(step) == str(tmp_path / ".venv-vllm")
    (source,) = _read(tmp_path / "made", "01/sample.yml")[0]["sources"]
    assert (source["backend"], source["options"]) == ("vllm", {"tensor_parallel_size": 2})
    assert _read(tmp_path / "made", "01/capture-a.yml")[0]["options"] == {"urls": ["http://host/v1"]}
    assert "env" not in _read(tmp_path / "made", "01/capture-b.yml")[0]


def test_a_lora_is_merged_before_the_next_round(load, tmp_path):
    chain = write_rounds(load({"adapter": "lora"}))
    assert chain.steps["01-merge"].words == ["axolotl", "merge-lora", "made/01/merge.yml"]
    merge, sample = _read(tmp_path / "made", "01/merge.yml", "02/sample.yml")
    assert (merge["lora_model_dir"], merge["output_dir"]) == ("made/01/model", "made/01")
    assert sample["sources"][0]["model"] == "made/01/merged"
    assert list(chain.sorter().static_order()).index("01-merge") == 4


def test_each_round_takes_the_next_prompts(load, tmp_path):
    write_rounds(load(prompts_per_round=3, rounds=3))
    made = [
        [json.loads(line) for line in (tmp_path / "made" / name / "prompts.jsonl").read_text().splitlines()]
        for name in ("01", "02", "03")
    ]
    assert [" ".join(row["id"] for row in rows) for rows in made] == ["p0 p1 p2", "p3 p4 p0", "p1 p2 p3"]
    assert made[0][1] == {"id": "p1", "text": "Say 1!", "domain": "math", "reference": "1"}
    assert _read(tmp_path / "made", "03/sample.yml")[0]["prompts"] == "made/03/prompts.jsonl"
    with pytest.raises(ConfigError, match="at least 6 prompts"):
        write_rounds(load(prompts_per_round=6))


def test_prompts_under_another_name_are_written_under_the_usual_one(load, tmp_path, capfd):
    rows = [{"question": f"Say {n}!", "level": n} for n in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = ROUNDS["sample"] | {"columns": {"field": "question"}}
    write_rounds(load(rounds=2, prompts_per_round=2, sample=sample))
    assert "columns that are not read: level." in capfd.readouterr().err
    second = (tmp_path / "made" / "02" / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in second] == ["Say 2!", "Say 3!"]
    assert "columns" not in _read(tmp_path / "made", "02/sample.yml")[0]
    write_rounds(load(rounds=2, sample=sample))
    assert _read(tmp_path / "made", "02/sample.yml")[0]["columns"] == {"field": "question"}


def test_the_prompts_of_a_round_have_the_columns_that_its_answers_keep(load, tmp_path):
    rows = [{"text": f"Say {n}!", "page": {"n": n}} for n in range(4)] + [{"text": "Say 4!"}, {"text": "Say 5!"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_rounds(load(rounds=3, prompts_per_round=2, sample=ROUNDS["sample"] | {"keep_columns": ["page"]}))
    second, third = (tmp_path / "made" / name / "prompts.jsonl" for name in ("02", "03"))
    assert [json.loads(line)["page"] for line in second.read_text().splitlines()] == [{"n": 2}, {"n": 3}]
    # Where none of them has a value, it is a column all the same: the step that samples would miss it.
    assert [prompt.kept for prompt in open_prompts(third, keep=["page"])] == [{}, {}]


@pytest.mark.parametrize("column", ["domain", "page"])
def test_a_round_of_which_a_source_would_capture_nothing_is_refused_before_the_first_step(column, load, tmp_path):
    sample = ROUNDS["sample"] | {"keep_columns": ["page"]}
    where = {"verdict": "incorrect", column: ["code", 7]}
    sources = [{"name": "a", "model": "org/a"}, {"name": "b", "model": "b", "where": where}]
    values = ["code", "math", "math", "code", "math", "math"]

    def settings(order):
        score = {"scorers": {"math": {}}}
        rounds = load(rounds=2, prompts_per_round=3, sample=sample, score=score, sources=sources)
        rows = [{"text": f"Say {n}!", "domain": "math", "page": "x", column: values[n]} for n in order]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return rounds

    with pytest.raises(ConfigError, match=rf"prompts in round 2 .*source 'b'.*{column}.*code.*mix it"):
        write_rounds(settings([0, 3, 1, 2, 4, 5]))
    write_rounds(settings(range(6)))


def test_conditions_on_columns_that_the_answers_will_not_have_are_refused_before_they_are_sampled(load):
    level = {"level": {"min": 2}}
    sources = [ROUNDS["sources"][0] | {"where": level}, ROUNDS["sources"][1]]
    of_training = {"fusion": TRAIN["fusion"] | {"where": level}}
    taught = [{"name": "a", "store": "z", "where": level}, {"name": "b", "store": "z"}]
    of_source = {"fusion": TRAIN["fusion"] | {"sources": taught}}
    kept = ROUNDS["sample"] | {"keep_columns": ["level"]}
    for place, training, keys in (
        ("rounds.yml: where of the capture a", None, {"sources": sources}),
        ("train.yml: fusion.where", of_training, {}),
        ("train.yml: where of the source a", of_source, {}),
    ):
        with pytest.raises(ConfigError, match=rf"{place}: expected columns .*, got level\. .*sample\.keep_columns"):
            load(training, **keys)
        assert load(training, sample=kept, **keys)
    verdict = {"fusion": TRAIN["fusion"] | {"where": {"verdict": "incorrect"}}}
    with pytest.raises(ConfigError, match="got verdict.*verdicts and rewards come from `score`"):
        load(verdict)
    assert load(verdict, score={"scorers": {"math": {}}})
    assert load({"fusion": TRAIN["fusion"] | {"where": {"domain": "math", "finish_reason": "stop"}}})


def test_the_condition_of_all_captures_is_that_of_a_source_unless_it_has_its_own_or_none(load, tmp_path):
    capture, prompts = {"where": {"domain": "code"}}, [{"text": f"Say {domain}!", "domain": domain} for domain in "ab"]

    def write(**own):
        sources = [{"name": name, "model": "b", **own} for name in "ab"]
        rounds = load(rounds=1, prompts_per_round=2, sources=sources, capture=capture)
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
        return write_rounds(rounds)

    with pytest.raises(ConfigError, match="prompts in round 1 .*source 'a'.*code"):
        write()
    assert write(where=None)
    assert write(where={"domain": "a"})


def test_prompts_that_cannot_be_used_are_left_out_of_all_rounds_where_that_is_asked_for(load, tmp_path, capsys):
    load()
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": "empty", "text": ""}\n' + file.read_text())
    with pytest.raises(DataError, match="empty"):
        write_rounds(load(prompts_per_round=3))
    write_rounds(load(prompts_per_round=3, sample=ROUNDS["sample"] | {"on_unusable": "skip"}))
    lines = (tmp_path / "made" / "01" / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["p0", "p1", "p2"]
    said = capsys.readouterr().err
    assert re.search("left out of all rounds: .*empty", " ".join(said.split()))
    assert "1 prompts cannot be used" in said


def test_a_training_that_runs_in_another_environment_is_checked_without_torch(load, monkeypatch):
    plugins = ["fusion_plugins.axolotl.plugin.FusionPlugin"]
    wrong = {"plugins": plugins, "fusion": TRAIN["fusion"] | {"loss_options": {"beta": 1}}}
    with pytest.raises(ConfigError, match="takes no options"):
        load(wrong)
    monkeypatch.setattr("fusion_plugins.chain.round_configs.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "fusion_plugins.axolotl.fusion_losses", None)
    load(wrong)
    with pytest.raises(ConfigError, match="los: unknown key"):
        load({"fusion": TRAIN["fusion"] | {"los": "jsd"}})


@pytest.mark.parametrize(
    ("keys", "train", "said"),
    [
        ({"sample": {"prompts": "p", "backend": "openai"}}, {}, "would go on with the checkpoint"),
        ({"capture": {"backend": "openai"}}, {}, "would go on with the checkpoint"),
        ({"sample": {"prompts": "p", "temperatur": 1}}, {}, "temperatur: unknown key"),
        ({"sample": {}}, {}, "prompts: missing"),
        ({"capture": {"top_k": 0}}, {}, "capture of a: 1 wrong setting(s): top_k"),
        ({"sources": [{"name": "a", "model": "a"}, {"name": "b", "model": "b", "backnd": 1}]}, {}, "backnd: unknown"),
        ({"score": {"scorers": {"math": {}}, "out_": 1}}, {}, "out_: unknown key"),
        ({"sources": [{"name": "a", "model": "a"}]}, {}, "a, b, got a"),
        ({"sources": [{"name": "a", "model": "a"}, {"name": "a", "model": "b"}]}, {}, "expected different names"),
        ({"sources": [{"name": "../a", "model": "a"}]}, {}, "sources.0: expected a name"),
        ({"sources": [{"name": "a"}]}, {}, "and a model"),
        ({"rounds": 0}, {}, "rounds"),
        ({"train": {"config": "none.yml"}}, {}, "cannot read the config file"),
        ({"held_out": {}}, {}, "either command or texts"),
        ({"held_out": {"command": "measure"}}, {}, "expected {model} in it"),
        ({}, {"datasets": []}, "expected one dataset of the type"),
        ({}, {"datasets": TRAIN["datasets"] * 2}, "got 2"),
        ({}, {"fusion": {}}, "expected `fusion.sources`"),
        # What only the training would refuse, when everything has been sampled and captured.
        ({}, {"fusion": TRAIN["fusion"] | {"los": "jsd"}}, "train.yml: fusion: 1 wrong setting(s): los: unknown key"),
        ({}, {"fusion": TRAIN["fusion"] | {"rule": "avg_ce"}}, "avg_ce cannot choose between a, b on the target's own"),
        ({}, {"fusion": TRAIN["fusion"] | {"loss": "advantage", "rule": "min_ce"}}, "shares the target's mistakes"),
        ({}, {"fusion": TRAIN["fusion"] | {"loss_options": {"beta": 1}}}, "reverse_kl takes no options, got 'beta'"),
        ({}, {"plugins": None}, "plugins: expected fusion_plugins.axolotl.FusionPlugin among them, got None"),
        ({}, {"datasets": [*TRAIN["datasets"], {"path": "z", "type": "chat_template"}]}, "got chat_template too"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(keys, train, said, load, tmp_path):
    with pytest.raises(ConfigError) as refused:
        load(train, **keys)
    assert said in str(refused.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("report", "known", "said"),
    [
        (None, None, "is not known: there is no target/fusion_sft.json"),
        ({"by_source": {"a": 3, "b": 1}}, None, "the sources are among those"),
        ({"one": {"by_source": {"a": 3}}, "more": {"by_source": {"b": 3}}}, None, "the sources are among those"),
        ({"by_source": {"a": 3, "c": 1}}, None, "WARNING: the target was tuned on answers of a, c"),
        ({"by_source": {"a": 3}}, ["org/a", "b"], "those that the target was tuned on (sft_sources)"),
        (None, ["c"], "not of a, b"),
    ],
)
def test_sources_that_are_not_those_of_the_sft_stage_are_named(report, known, said, load, tmp_path):
    rounds = load(**({"sft_sources": known} if known else {}))
    if report is not None:
        (tmp_path / "target" / "fusion_sft.json").write_text(json.dumps(report))
    assert said in consistency(rounds)


def test_only_checkpoints_that_a_kill_left_incomplete_are_removed(load, tmp_path):
    rounds = load()
    for name, state in (("4", "{}"), ("8", '{"step'), ("12", None)):
        folder = tmp_path / "made" / "01" / "model" / f"checkpoint-{name}"
        folder.mkdir(parents=True)
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    remove_broken_checkpoints(rounds)
    assert [path.name for path in (tmp_path / "made" / "01" / "model").iterdir()] == ["checkpoint-4"]


def test_the_outcome_is_a_table_a_file_and_a_plot(load, tmp_path):
    rounds = load(held_out={"command": "measure {model}"}, score={"scorers": {"math": {}}}, rounds=1)
    chain = write_rounds(rounds)
    assert chain.steps["00-measure"].words == ["measure", "target"]
    assert chain.steps["01-measure"].words == ["measure", "made/01/model"]
    rows = [row | {"correct": row["index"] == 0} for row in scored(4)]
    row_folder(tmp_path / "made" / "01" / "responses", rows)
    row_folder(tmp_path / "made" / "01" / "scored", rows)
    (tmp_path / "made" / "00").mkdir()
    (tmp_path / "made" / "00" / "held_out").write_text('loading\n{"$loss$": 2, "share": 0.25, "name": "x"}\n\n')
    found = outcomes(rounds, ["00-measure", "01-sample", "01-score"])
    assert [(each.round, each.answers, each.measured) for each in found] == [
        (0, None, {"$loss$": 2.0, "share": 0.25}),
        (1, 36, {}),
    ]
    assert found[1].correct == pytest.approx(1 / 3)
    assert len(table_of(found).columns) == 5
    (tmp_path / "made" / "01" / "held_out").write_text('{"$loss$": 1.5, "share": 0.5}')
    data, plot = write_outcomes(rounds, outcomes(rounds, ["00-measure", "01-measure"]))
    assert [row["measured"]["share"] for row in json.loads(data.read_text())] == [0.25, 0.5]
    picture = plot.read_text()
    assert picture.startswith("<?xml")
    assert "$loss$" in picture
    # Of texts, every byte counts the same.
    (tmp_path / "made" / "00" / "held_out").unlink()
    store = open_store(make_store(tmp_path / "made" / "00" / "held_out", range(12)))
    sizes = [int(supervised_bytes(record.text).sum()) for record in store]
    assert len(set(sizes)) > 1
    nats = sum(record.ce_per_byte * size for record, size in zip(store, sizes, strict=True))
    assert outcomes(rounds, ["00-measure"])[0].measured == {"nats per byte": pytest.approx(nats / sum(sizes))}
    shutil.rmtree(store.path)
    (tmp_path / "made" / "00" / "held_out").write_text("nothing measured")
    with pytest.raises(ChainError, match=r"`measure \{model\}` prints, got 'nothing measured'"):
        outcomes(rounds, ["00-measure"])


def test_held_out_texts_are_measured_by_a_capture(load):
    chain = write_rounds(load(held_out={"texts": "prompts.jsonl"}))
    words = chain.steps["01-measure"].words
    assert words[:6] == ["fusion", "capture", "--model", "made/01/model", "--texts", "prompts.jsonl"]
    assert chain.needs(chain.steps["01-measure"]) == ["01-train"]
    chain = write_rounds(load(held_out={"texts": "hf:org/texts:test"}))
    assert chain.steps["01-measure"].reads == ["made/01/model"]


def test_what_is_written_behind_a_link_is_where_the_steps_look(load, tmp_path):
    load(out="../made")
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    for name in ("rounds.yml", "train.yml", "prompts.jsonl"):
        shutil.move(tmp_path / name, tmp_path / "disk" / "runs" / name)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "runs")
    chain = write_rounds(load_rounds(tmp_path / "runs" / "rounds.yml", {}))
    words = chain.steps["01-sample"].words
    assert (chain.folder / words[-1]).is_file()
    assert load_chain(tmp_path / "disk" / "made" / "fusion.yml").folder == chain.folder == tmp_path / "disk" / "runs"


def test_prompts_of_the_hub_are_dealt_to_the_rounds(load, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("fusion_plugins.chain.rounds.open_prompts", lambda paths, **_: asked.extend(paths) or [])
    with pytest.raises(ConfigError, match="at least 2 prompts"):
        write_rounds(load(sample={"prompts": ["hf:org/prompts", "prompts.jsonl"]}, prompts_per_round=2))
    assert asked == ["hf:org/prompts", str(tmp_path / "prompts.jsonl")]


def test_a_failure_is_told_also_where_the_outcome_cannot_be_shown(load, tmp_path, monkeypatch):
    load(held_out={"command": "measure {model}"})
    monkeypatch.setattr("fusion_plugins.chain.run.run_chain", _fails)
    monkeypatch.setattr("fusion_plugins.chain.outcome.outcomes", lambda *_: (tmp_path / "none").read_text())
    failed = CliRunner().invoke(app, ["rounds", "-c", str(tmp_path / "rounds.yml")])
    assert str(failed.exception) == "step 01-train failed"
    assert "the outcome cannot be shown: " in failed.output


def _fails(*_, **__):
    raise ChainError("step 01-train failed")


def test_without_a_file_or_with_a_step_that_fails_the_command_says_so(load, tmp_path):
    assert isinstance(CliRunner().invoke(app, ["rounds"]).exception, ConfigError)
    load(sample=ROUNDS["sample"] | {"prompts": "none.jsonl"})
    failed = CliRunner().invoke(app, ["rounds", "-c", str(tmp_path / "rounds.yml")])
    assert isinstance(failed.exception, FusionError)
    assert "none.jsonl" in str(failed.exception)
    assert "is not known: there is no target/fusion_sft.json" in failed.output


def test_the_examples_of_the_documents_and_of_the_folder_are_valid(tmp_path):
    page = (ROOT / "docs" / "running.md").read_text()
    chain, rounds = re.findall(r"^```yaml\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "fusion.yml").write_text(chain)
    made = load_chain(tmp_path / "fusion.yml")
    assert made.needs(made.steps["measure"]) == ["train"]
    validate(RoundsConfig, yaml.safe_load(rounds), where="docs/running.md")
    example = write_rounds(load_rounds(_copied(tmp_path) / "rounds.yml", {}))
    assert example.needs(example.steps["02-sample"]) == ["01-train"]
    before = load_chain(tmp_path / "fusion.yml")
    assert before.settings.steps[-1].name == "tune"
    assert before.needs(before.steps["score"]) == ["sample"]


def _copied(folder):
    for file in (ROOT / "examples" / "rounds").iterdir():
        shutil.copy(file, folder)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"text": f"Say {i}!"}) + "\n" for i in range(60)))
    return folder
