"""Teacher outputs that DistillKit has packed: bytes made by its published code, and sets written bit by bit here.

`golden/distillkit.json` was made by running arcee-ai/DistillKit (commit a61c2e7) beside this package: random
distributions, what its compressor packed, and what its own decompressor read from that.
"""

import base64
import doctest
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import source_checks
import tiny
import yaml
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.config import validate
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.inputs import read_texts
from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.store import distillkit, open_store
from fusion_plugins.store.distillkit_bytes import Compression, decode, decode_logprobs, unpack_bits

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "distillkit.json").read_text())
PLAIN = {"d": 420, "k": 6, "exact_k": 6, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": False}
#: DistillKit rounds what it approximates to the type of the exact values
ROUNDING = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 5e-3}


def test_the_examples_run():
    assert doctest.testmod(distillkit).failed == 0


def golden(case, name):
    return np.frombuffer(base64.b64decode(case[name]), np.uint8).reshape(case["positions"], -1)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"d{case['compression']['d']}-k{case['compression']['k']}")
def test_bytes_of_the_published_code_are_read_as_it_reads_them(case):
    compression = Compression(**case["compression"])
    packed, indices = golden(case, "compressed_logprobs"), golden(case, "bytepacked_indices")
    np.testing.assert_array_equal(unpack_bits(indices, compression.index_bits, compression.k), case["ids"])
    expected = np.array(case["logprobs"])
    found = decode_logprobs(packed, compression)
    np.testing.assert_allclose(found, expected, atol=ROUNDING[compression.exact_dtype])
    # As entries of a store: each id once, descending, of at most all the probability.
    ids, logprobs = decode(packed, indices, compression, compression.d)
    assert (np.diff(logprobs) <= 0).all()
    assert (np.exp(logprobs.astype(float)).sum(axis=1) < 1 + 1e-5).all()
    assert sorted(ids[0].tolist()) == sorted(case["ids"][0])


def test_settings_that_do_not_fit_the_bytes_are_refused():
    case = GOLDEN[0]
    wrong = Compression(**(case["compression"] | {"exact_k": 16}))
    with pytest.raises(DataError, match=r"expected 76 bytes per position .* got 140"):
        decode_logprobs(golden(case, "compressed_logprobs"), wrong)
    with pytest.raises(ConfigError, match="at most k together"):
        validate(Compression, PLAIN | {"exact_k": 7}, where="here")


def bits_of(values, width):
    """Pack integers from the highest bit on, as a person would by hand."""
    text = "".join(format(value, f"0{width}b") for value in values)
    text += "0" * (-len(text) % 8)
    return [int(text[at : at + 8], 2) for at in range(0, len(text), 8)]


def row_of(records, cut=False):
    """One row of documents, one after another; with ``cut`` the last token is left out, as packing does."""
    ids, logprobs, indices, marks = [], [], [], []
    for number, record in enumerate(records, start=1):
        size = len(record.text.input_ids)
        ids += record.text.input_ids.tolist()
        marks += [number] * size
        for entries, values in zip(record.topk.ids, record.topk.logprobs, strict=True):
            entries = np.where(entries < 0, 0, entries)
            logprobs.append(list(np.where(np.isfinite(values), values, -np.inf).astype("<f4").tobytes()))
            indices.append(bits_of(entries.tolist(), 9))
    last = len(ids) - (0 if cut else 1)
    columns = {"input_ids": ids, "compressed_logprobs": logprobs[:last], "bytepacked_indices": indices[:last]}
    return columns | ({"attention_mask": marks} if len(records) > 1 else {})


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captured")
    source_checks.checkpoint(folder / "model")
    rows = [{"id": f"t{number}", "text": text} for number, text in enumerate(tiny.TEXTS)]
    source_checks.write_rows(folder / "texts.jsonl", rows)
    capture_texts(source_checks.capture_config(folder / "model", folder / "texts.jsonl", folder / "store", top_k=6))
    return folder


def packed_set(folder, rows, settings=PLAIN):
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "data_0.parquet")
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def importing(folder, captured, tmp_path, *flags):
    arguments = ["store", "import", folder, "--tokenizer", captured / "model", "--out", tmp_path / "out"]
    return CliRunner().invoke(app, [*map(str, arguments), "--texts", str(tmp_path / "texts.jsonl"), *flags])


@pytest.mark.parametrize("packed", [False, True])
def test_an_imported_store_is_what_a_capture_of_the_same_teacher_is(captured, tmp_path, packed):
    records = list(open_store(captured / "store"))
    rows = [row_of(records, cut=True)] if packed else [row_of([record]) for record in records]
    folder = packed_set(tmp_path / "set", rows)
    result = importing(folder, captured, tmp_path)
    assert result.exception is None, result.output
    texts = {text.id: text.content for text in read_texts(tmp_path / "texts.jsonl")}
    assert sorted(texts.values()) == sorted(tiny.TEXTS)
    imported = open_store(tmp_path / "out")
    assert imported.manifest.complete
    assert len(imported) == len(records)
    by_text = {tuple(record.text.input_ids): record for record in imported}
    for record in records:
        other = by_text[tuple(record.text.input_ids)]
        np.testing.assert_array_equal(record.text.ends, other.text.ends)
        # Two entries may be equal once they are rounded to float16.
        np.testing.assert_array_equal(np.sort(record.topk.ids), np.sort(other.topk.ids))
        np.testing.assert_allclose(record.topk.logprobs, other.topk.logprobs, atol=1e-3)
        # Of a token outside the entries only a bound is known.
        held = (record.topk.ids[:-1] == record.text.input_ids[1:, None]).any(axis=1)
        own, bound = record.topk.token_logprobs[:-1], other.topk.token_logprobs[:-1]
        np.testing.assert_allclose(own[held], bound[held], atol=1e-3)
        assert (own[~held] <= bound[~held] + 1e-3).all()
        assert np.isfinite(bound).all()
    assert importing(folder, captured, tmp_path).exception is None  # again: nothing is added
    assert len(open_store(tmp_path / "out")) == len(records)


def test_what_cannot_be_read_is_named_and_may_be_left_out(captured, tmp_path):
    records = list(open_store(captured / "store"))
    good, other = row_of(records[:1]), row_of(records[1:2])
    broken = {
        "ids": other | {"input_ids": [9999] * len(other["input_ids"])},
        "short": other | {"input_ids": other["input_ids"][:-3]},
        "older": {"input_ids": [1, 2], "compressed_logprobs": None, "bytepacked_indices": None},
    }
    for name, row in broken.items():
        folder = packed_set(tmp_path / name, [good, row])
        with pytest.raises(DataError, match=r"data_0.parquet:2: expected"):
            raise importing(folder, captured, tmp_path / name).exception
        result = importing(folder, captured, tmp_path / name, "--on-unusable", "skip")
        assert result.exception is None, result.output
        assert "data_0.parquet:2" in result.output
        assert len(open_store(tmp_path / name / "out")) == 1
    # One document of a packed row that begins within a character costs none of the others.
    mixed = row_of(records[:3])
    first = len(records[0].text.input_ids)
    table = open_store(captured / "store").table
    mixed["input_ids"][first] = table.tokens.index(b"\xb6")
    folder = packed_set(tmp_path / "mixed", [mixed])
    result = importing(folder, captured, tmp_path / "mixed", "--on-unusable", "skip")
    assert f"data_0.parquet:1, tokens {first} to " in result.output
    assert len(open_store(tmp_path / "mixed" / "out")) == 2
    # A file that was there is not written over.
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "texts.jsonl").write_text("mine")
    failed = importing(folder, captured, kept, "--on-unusable", "skip")
    assert "which holds something else" in str(failed.exception)
    assert (kept / "texts.jsonl").read_text() == "mine"
    (tmp_path / "ids" / "compression_config.yaml").unlink()
    assert "logprob_compressor" in str(importing(tmp_path / "ids", captured, tmp_path).exception)


def test_a_tokenizer_that_is_not_there_is_one_message(captured, tmp_path):
    folder = packed_set(tmp_path / "set", [row_of(list(open_store(captured / "store"))[:1])])
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(ConfigError, match=f"cannot load the tokenizer '{missing}': "):
            distillkit.import_distillkit(
                str(folder), tmp_path / "out", tmp_path / "texts.jsonl", tokenizer=str(missing)
            )
