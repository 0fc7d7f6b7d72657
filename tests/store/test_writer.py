"""A store resumes where it stopped, only as what it was, and takes only records that fit it."""

from pathlib import Path

import pytest
from store_samples import manifest, record, table

from fusion_plugins.errors import DataError, MismatchError
from fusion_plugins.store import StoreWriter, open_store


def test_the_next_writer_knows_what_is_done(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, manifest(), table()) as writer:
        writer.write(record(1))
    assert not open_store(tmp_path).manifest.complete
    with StoreWriter(tmp_path, manifest(), table()) as writer:
        assert writer.done_ids == {"text-0001"}
        writer.write(record(2))
        writer.finish()
    store = open_store(tmp_path)
    assert store.ids() == ["text-0001", "text-0002"]
    assert store.manifest.complete


def write_and_raise(path: Path, error: BaseException) -> None:
    with StoreWriter(path, manifest(), table()) as writer:
        writer.write(record(1))
        raise error


def test_an_error_in_the_block_keeps_what_was_written(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_and_raise(tmp_path, ZeroDivisionError())
    assert open_store(tmp_path).ids() == ["text-0001"]


def test_ctrl_c_keeps_what_was_written_and_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_and_raise(tmp_path, KeyboardInterrupt())
    assert open_store(tmp_path).ids() == ["text-0001"]
    assert "1 records are safe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "other"),
        ("tokenizer_fingerprint", None),
        ("top_k", 8),
        ("temperature", 2.0),
        ("texts_fingerprint", "changed"),
        ("template_hash", "changed"),
        ("dtype", "bfloat16"),
    ],
)
def test_another_run_is_refused_with_both_values(tmp_path: Path, field: str, value: object) -> None:
    StoreWriter(tmp_path, manifest(), table()).close()
    other = table(301)
    tokens = other if field == "tokenizer_fingerprint" else table()
    wanted = manifest(**{field: other.fingerprint if value is None else value})
    old, new = getattr(manifest(), field), getattr(wanted, field)
    with pytest.raises(MismatchError, match=f"{field}: the folder has {old!r}, expected {new!r}"):
        StoreWriter(tmp_path, wanted, tokens)


def test_a_table_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="Build both from the same tokenizer"):
        StoreWriter(tmp_path, manifest(), table(301))


def test_a_record_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, manifest(4), table()) as writer:
        with pytest.raises(DataError, match=r"expected topk_ids of shape \(\d+, 4\), got \(\d+, 5\)"):
            writer.write(record(1, top_k=5))
        writer.write(record(1))
        with pytest.raises(DataError, match="already holds 'text-0001'"):
            writer.write(record(1))
        writer.flush()
        with pytest.raises(DataError, match="already holds 'text-0001'"):
            writer.write(record(1))
