"""Rows that refer to their texts: what the loader makes of them is what a preparation would have made."""

import copy
import json
import pickle
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from axolotl.utils.collators import DataCollatorForSeq2Seq
from axolotl_runs import FUSED, capture, config, logged, prepare, train, write_rows

from fusion_plugins.axolotl import fused, fused_rows, plugin
from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.collator import FusionCollator
from fusion_plugins.axolotl.guards import check_ready
from fusion_plugins.axolotl.target_tokenizer import EncodedText
from fusion_plugins.axolotl.text_rows import pack_text, text_fuser, unpack_text
from fusion_plugins.core.fusion.routing import Route
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import ConfigError, FusionError, MismatchError, StoreError

IN_ORDER = {"curriculum_sampling": True, "shuffle_merged_datasets": False}
TERMS = ("loss", "lm_loss", "fusion_loss", "fusion_coverage", "grad_norm")


def terms(trainer, *names):
    return [logged(trainer, name) for name in names or TERMS]


@pytest.fixture
def exact_rows(monkeypatch):
    """Rows that keep every bit of their distributions."""
    monkeypatch.setattr(fused_rows, "LOGPROB_TYPE", "float32")


def both(material, run_folder, **changes):
    """Train with rows and with references to the stores."""
    block = changes.pop("fusion", {})
    trainers = []
    for prepared in ("rows", "stores"):
        folder = run_folder / prepared
        trainers.append(train(config(material, folder, fusion=block | {"prepared": prepared}, **changes), folder))
    return trainers


@pytest.mark.slow
def test_fusing_in_the_loader_trains_bit_for_bit_as_fusing_before(material, run_folder, exact_rows):
    rows, stores = both(material, run_folder, val_set_size=6, eval_steps=1, dataloader_num_workers=0)
    assert terms(rows) == terms(stores)
    evaluated = ("eval_loss", "eval_fusion_loss", "eval_fusion_coverage")
    assert terms(rows, *evaluated) == terms(stores, *evaluated)
    origins = ("kept_mass", "share_digits", "share_target")
    assert terms(rows, *origins) == terms(stores, *origins)
    assert [values[-1] for values in terms(rows, *(f"eval_{name}" for name in origins))] == pytest.approx(
        origins_of(rows.eval_dataset), rel=1e-6
    )
    report = json.loads((run_folder / "stores" / "model" / "fusion_report.json").read_text())
    assert report == json.loads((run_folder / "rows" / "model" / "fusion_report.json").read_text())


def origins_of(rows):
    """Kept mass and share of either source over the fused positions of prepared rows, one after the other."""
    kept, taught = 0.0, [0, 0, 0]
    for row in rows:
        width = len(row["fused_ids"]) // len(row["labels"])
        for position, label in enumerate(row["labels"][1:]):
            if label != -100 and row["fused_ids"][position * width] >= 0:
                kept += float(row["fused_kept"][position])
                taught[row["fused_source"][position]] += 1
    return [kept / sum(taught), *(number / sum(taught) for number in taught[:2])]


@pytest.mark.slow
def test_so_it_does_with_packing_several_datasets_and_workers(material, run_folder, exact_rows, monkeypatch, caplog):
    monkeypatch.setattr(plugin, "WAITING_BYTES", 1 << 18)
    lines = material.texts.read_text().splitlines(keepends=True)
    parts = [run_folder / "a.jsonl", run_folder / "b.jsonl"]
    for path, own in zip(parts, (lines[:10], lines[10:20]), strict=True):
        path.write_text("".join(own))
    test = write_rows(run_folder / "c.jsonl", [json.loads(line) for line in lines[20:]])
    settings = {
        "datasets": [{"path": str(path), "type": FUSED} for path in parts],
        "test_datasets": [{"path": str(test), "type": FUSED, "split": "train"}],
        "sample_packing": True,
        "eval_sample_packing": True,
        "sequence_len": 256,
        "micro_batch_size": 1,
        "eval_steps": 2,
        "val_set_size": 0,
        "dataloader_num_workers": 2,
        "dataloader_prefetch_factor": 64,
        "fusion": {"rule": "token_min_ce"},
    }
    rows, stores = both(material, run_folder, **settings)
    assert terms(rows) == terms(stores)
    assert terms(rows, "eval_fusion_loss") == terms(stores, "eval_fusion_loss")
    # 256 positions of 32 + 8 * 6 bytes, for each of two workers.
    assert [trainer.args.dataloader_prefetch_factor for trainer in (rows, stores)] == [6, 6]
    assert "dataloader_prefetch_factor is 6 in place of 64: a batch takes 0.0 MB, and 2 worker(s)" in caplog.text


def test_compact_rows_train_to_within_a_thousandth(material, run_folder):
    rows, stores = both(material, run_folder, **IN_ORDER)
    for got, exact in zip(terms(rows), terms(stores), strict=True):
        assert got == pytest.approx(exact, rel=1e-3)
    features = prepare(config(material, run_folder / "again"), run_folder / "again")[1].features
    assert [features[name].feature.dtype for name in ("fused_ids", "fused_logprobs")] == ["int16", "float16"]


def test_another_rule_needs_no_new_preparation_and_other_stores_do(material, run_folder):
    settings = config(material, run_folder, fusion={"prepared": "stores"}, max_steps=1, **IN_ORDER)
    first = logged(train(settings, run_folder), "fusion_loss")
    folders = prepared_in(run_folder)
    other = {"rule": "avg_ce", "top_k": 3, "metric": "token", "alignment": {"method": "offsets_strict"}}
    other |= {"projection": {"vocabulary_map": "exact", "chain": False}}
    second = logged(train(settings | {"fusion": settings["fusion"] | other}, run_folder), "fusion_loss")
    assert first != second
    assert prepared_in(run_folder) == folders
    one = settings["fusion"] | {"sources": material.sources("texts", "digits")}
    prepare(settings | {"fusion": one}, run_folder)
    assert prepared_in(run_folder) > folders


def prepared_in(folder):
    return {path.name for path in (folder / "prepared").iterdir() if path.is_dir()}


def test_stores_are_needed_while_training_and_must_be_the_same(material, run_folder):
    shutil.copytree(material.folder / "texts-digits", run_folder / "store")
    block = {"prepared": "stores", "sources": [{"name": "digits", "store": str(run_folder / "store")}]}
    settings = config(material, run_folder, fusion=block, max_steps=1, **IN_ORDER)
    _, rows = prepare(settings, run_folder)
    shutil.rmtree(run_folder / "store")
    with pytest.raises(StoreError, match="/store: expected a store .* got no folder"):
        train(settings, run_folder)
    with pytest.raises(ConfigError, match="source 'digits': .*/store: expected a store .* got no folder"):
        check_ready(settings, FusionBlock(**settings["fusion"]), rows_wanted=False)
    shutil.copytree(material.folder / "chats-digits", run_folder / "store")
    fuse = text_fuser(tiny.sentencepiece_bpe(), FusionBlock(**block))
    with pytest.raises(MismatchError, match="holds no record 't[0-9]+'.* prepare the dataset again"):
        fuse([rows[0]], [rows[0]["fused_text"]])


@pytest.mark.parametrize("vocabulary_map", ["statistics", "one_to_many"])
def test_maps_that_go_by_counts_are_refused(material, run_folder, vocabulary_map):
    block = {"prepared": "stores", "projection": {"vocabulary_map": vocabulary_map}}
    with pytest.raises(ConfigError, match=f"prepared: stores cannot be combined with vocabulary_map: {vocabulary_map}"):
        prepare(config(material, run_folder, fusion=block), run_folder)


def test_the_report_counts_a_part_of_many_texts_and_every_text_is_compared(material, run_folder, monkeypatch, caplog):
    monkeypatch.setattr(fused, "REPORTED", 7)
    rows = [json.loads(line) for line in material.texts.read_text().splitlines()]
    rows[5]["text"] = "Another text under a known id, which no store was captured from."
    path = write_rows(run_folder / "rows.jsonl", rows)
    data = [{"path": str(path), "type": FUSED}]
    settings = config(material, run_folder, datasets=data, fusion={"prepared": "stores", "on_unusable": "skip"})
    _, prepared = prepare(settings, run_folder)
    report = json.loads((run_folder / "model" / "fusion_report.json").read_text())[str(path)]
    assert report["texts"] == 6, "every fourth of 24"
    assert "the report counts 6 of 23 texts" in caplog.text
    assert len(prepared) == 23
    (left_out,) = report["unusable"]
    assert "row 6, id 't5'" in left_out["row"]
    with pytest.raises(FusionError, match=r"row 6, id 't5': source 'digits': "):
        prepare(settings | {"fusion": settings["fusion"] | {"on_unusable": "raise"}}, run_folder)


def test_rows_count_the_sources_of_a_part_of_many_texts_and_everything_else_of_all(
    material, run_folder, monkeypatch, caplog
):
    settings = config(material, run_folder, fusion={"prepared": "rows", "on_unusable": "skip"})

    def prepared(name):
        _, rows = prepare({**settings, "dataset_prepared_path": str(run_folder / name)}, run_folder)
        (report,) = json.loads((run_folder / "model" / "fusion_report.json").read_text()).values()
        return rows, report

    every, whole = prepared("every")
    monkeypatch.setattr(fused, "REPORTED", 7)
    some, part = prepared("some")
    assert every.data.to_pydict() == some.data.to_pydict(), "the rows are the same"
    assert "the figures of each source are of one text in 4" in caplog.text
    for key in ("texts", "positions", "fused_positions", "chosen"):
        assert part[key] == whole[key]
    for name, source in part["sources"].items():
        assert 0 < source["positions"] < whole["sources"][name]["positions"] == whole["positions"]
        assert 0 < source["exact_mass"] < whole["sources"][name]["exact_mass"]


class _Told:
    """A store that tells how many tokens its texts have."""

    def __init__(self, tokens, texts):
        self.manifest, self._texts = SimpleNamespace(tokens=tokens), texts

    def __len__(self):
        return self._texts


@pytest.mark.parametrize(
    ("texts", "stores", "step"),
    [
        (1000, [(200_000, 1000)], 1),
        (1001, [(200_000, 1000)], 2),
        (10_000, [(2_000_000, 10_000)], 10),
        (10_000, [(20_000_000, 10_000), (20, 10_000)], 77),
        (3, [(3 << 40, 3)], 3),
        (0, [(0, 0)], 0),
        (2001, [], 3),
    ],
)
def test_the_report_counts_up_to_a_thousand_texts_and_fewer_of_long_ones(texts, stores, step):
    """All sources are projected for them: no more than about 262,144 tokens."""
    assert fused._counting_step(texts, [_Told(*store) for store in stores]) == step


TRAINED = [None, np.zeros((0, 2), np.int32), np.array([[1, 4], [7, 70_000]], np.int32)]


@pytest.mark.parametrize("trained", TRAINED, ids=["all", "none", "two"])
@pytest.mark.parametrize("widths", [[0, 1, 2], [255, 256, 0], [70_000, 1, 1], [], [3] * 1000], ids=len)
@pytest.mark.parametrize("id", ["a", "é\0", ""])
def test_a_packed_text_comes_back(trained, widths, id):
    n = len(widths)
    tokens = TokenizedText(
        np.arange(n, dtype=np.int32),
        np.cumsum(widths, dtype=np.int32),
        np.array([[0, sum(widths)]], np.int32),
        np.arange(n) % 3 != 1,
    )
    text = EncodedText(tokens, tokens.input_ids + 1, trained)
    route = Route(tuple(range(n % 5)) + (300,), "数学" * (n % 3))
    packed = pack_text(id, text, route)
    for form in (packed, packed.tolist(), packed.astype(np.int64)):
        got, found, same = unpack_text(form, tokens.input_ids.tolist(), text.labels.astype(np.int64))
        assert (got, same) == (id, route)
        for name in vars(tokens):
            np.testing.assert_array_equal(getattr(found.tokens, name), getattr(tokens, name))
            assert getattr(found.tokens, name).dtype == getattr(tokens, name).dtype
        np.testing.assert_array_equal(found.labels, text.labels)
        assert (found.trained is None) == (trained is None)
        if trained is not None:
            np.testing.assert_array_equal(found.trained, trained)


def test_a_row_takes_few_bytes(material, run_folder):
    _, rows = prepare(config(material, run_folder, fusion={"prepared": "stores"}), run_folder)
    tokens = sum(map(len, rows["input_ids"]))
    assert sum(map(len, rows["fused_text"])) < 3 * tokens, "short texts; about one byte per token of longer ones"
    assert set(rows.column_names) == {"input_ids", "attention_mask", "labels", "fused_text"}


def test_the_collator_can_be_sent_to_a_spawned_worker(material, run_folder):
    block = {"prepared": "stores", "sources": material.sources()}
    _, rows = prepare(config(material, run_folder, fusion=block), run_folder)
    fuser = partial(text_fuser, block=FusionBlock(**block))
    collator = FusionCollator(
        copy.deepcopy(tiny.sentencepiece_bpe()), inner=DataCollatorForSeq2Seq, fuser=fuser, padding=True
    )
    collator.tokenizer.pad_token = "<unk>"
    arrays = rows.with_format("numpy").__getitems__([3, 1, 2])
    lists = rows.__getitems__([3, 1, 2])
    one, other = collator(arrays), pickle.loads(pickle.dumps(collator))(lists)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(other[name]))


@pytest.mark.parametrize("prepared", ["rows", "stores"])
def test_the_same_text_under_several_ids_is_one_row_with_deduplication(material, run_folder, prepared):
    """In one dataset and in two, texts and chats; what differs in one letter, or is trained in another way, stays."""
    hello = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello, 12 cats."}]
    asked = [{"role": "user", "content": "Hello!"}, hello[1]]
    files = {
        "a": [("a", "The 12 cats."), ("b", "The 12 cats."), ("c", "The 12 cats!")],
        "b": [("d", "The 12 cats."), ("e", "Other cats."), ("f", "Other cats.")],
        "c": [("g", hello), ("h", asked), ("i", hello)],
    }
    (run_folder / "texts").mkdir()
    for name, rows in files.items():
        key = "messages" if name == "c" else "text"
        write_rows(run_folder / "texts" / f"{name}.jsonl", [{"id": id, key: content} for id, content in rows])
    store = capture(run_folder / "texts", material.target, run_folder / "store")
    data = [{"path": str(run_folder / "texts" / f"{name}.jsonl"), "type": FUSED} for name in files]
    data.append(data[2] | {"roles_to_train": ["user", "assistant"]})
    settings = config(
        material,
        run_folder,
        datasets=data,
        fusion={"sources": [{"name": "target", "store": str(store), "is_target": True}], "prepared": prepared},
        **IN_ORDER,
    )
    assert len(prepare(settings, run_folder)[1]) == 12
    cfg, found = prepare(settings | {"dataset_exact_deduplication": True}, run_folder)
    seen = [(tuple(row["input_ids"]), tuple(row["labels"])) for row in found]
    assert len(seen) == len(set(seen)) == 7, "3 texts, 2 chats, and these with both roles"
