"""The fingerprint of a checkpoint: what it notices, what it does not look at, and that it stays what it was."""

import hashlib
import os
import shutil
import struct

import pytest

import fusion_plugins.checkpoint_fingerprint as module
from fusion_plugins.checkpoint_fingerprint import checkpoint_fingerprint

HEADER = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'


def tensors(values):
    return struct.pack("<Q", len(HEADER)) + HEADER + struct.pack("<4f", *values)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model-1.safetensors").write_bytes(tensors([1, 2, 3, 4]))
    (folder / "model-2.safetensors").write_bytes(tensors([5, 6, 7, 8]))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_weights_of_the_same_size_with_other_values_are_another_checkpoint(checkpoint):
    before = checkpoint_fingerprint(checkpoint)
    (checkpoint / "model-2.safetensors").write_bytes(tensors([5, 6, 7, 9]))
    assert checkpoint_fingerprint(checkpoint) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "config.json").write_text('{"model_type": "other"}'),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "model-2.safetensors").rename(folder / "model-3.safetensors"),
        lambda folder: (folder / "model-2.safetensors").unlink(),
        lambda folder: (folder / "model-0.safetensors").write_bytes(tensors([0, 0, 0, 0])),
    ],
)
def test_other_files_are_another_checkpoint(checkpoint, change):
    before = checkpoint_fingerprint(checkpoint)
    change(checkpoint)
    assert checkpoint_fingerprint(checkpoint) != before


def test_only_contents_count(checkpoint, tmp_path):
    before = checkpoint_fingerprint(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "copy", copy_function=shutil.copy)
    assert checkpoint_fingerprint(str(tmp_path / "copy")) == before
    (checkpoint / "README.md").write_text("trained on")
    (checkpoint / "training_args.bin").write_bytes(b"0")
    (checkpoint / "tokenizer.json").write_text('{"changed": true}')
    os.utime(checkpoint / "model-1.safetensors", (1, 1))
    assert checkpoint_fingerprint(checkpoint) == before


def test_other_files_count_when_they_are_named(checkpoint):
    also = ("*.json", "*.py")
    plain, before = checkpoint_fingerprint(checkpoint), checkpoint_fingerprint(checkpoint, also=also)
    assert plain != before
    (checkpoint / "tokenizer.json").write_text("[]")
    changed = checkpoint_fingerprint(checkpoint, also=also)
    (checkpoint / "modeling.py").write_text("")
    assert len({before, changed, checkpoint_fingerprint(checkpoint, also=also)}) == 3
    assert checkpoint_fingerprint(checkpoint, also=("*.safetensors", "config.json")) == plain


def test_a_name_on_a_hub_and_a_folder_without_weights_have_none(tmp_path):
    assert checkpoint_fingerprint("org/model") is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"0")
    assert checkpoint_fingerprint(tmp_path) is None
    (tmp_path / "pytorch_model.bin").write_bytes(b"0")
    old = checkpoint_fingerprint(tmp_path)
    assert old is not None
    # transformers prefers safetensors, so that files of the older form beside them do not count.
    (tmp_path / "model.safetensors").write_bytes(tensors([1, 2, 3, 4]))
    new = checkpoint_fingerprint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"1")
    assert old != checkpoint_fingerprint(tmp_path) == new


def test_what_is_hashed_and_in_which_form_stays_the_same(checkpoint):
    """Manifests keep fingerprints of earlier versions."""
    parts = [b'{"model_type": "llama"}']
    for name, values in (("model-1", [1, 2, 3, 4]), ("model-2", [5, 6, 7, 8])):
        parts += [f"{name}.safetensors:{len(tensors(values))};".encode(), tensors(values)]
    assert checkpoint_fingerprint(checkpoint) == hashlib.sha256(b"".join(parts)).hexdigest()


def test_large_files_are_read_in_part_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLED_BLOCKS", 4)
    monkeypatch.setattr(module, "LEAST_BLOCKS", 4)
    file, size = tmp_path / "model.safetensors", 1_000_000
    content = bytearray(struct.pack("<Q", 100) + bytes(size - 8))

    def marks():
        file.write_bytes(content)
        module._hash.cache_clear()
        return checkpoint_fingerprint(tmp_path), checkpoint_fingerprint(tmp_path, whole_bytes=1 << 16)

    found = [marks()]
    content[50] = 1  # in the header
    found.append(marks())
    content[-1] = 1  # in the last block
    found.append(marks())
    content[size // 2] = 1  # between two blocks
    found.append(marks())
    assert len({whole for whole, _ in found}) == 4
    assert len({part for _, part in found}) == 3
    assert found[2][1] == found[3][1]


def test_it_is_computed_anew_only_when_a_file_has_changed(checkpoint, monkeypatch):
    before = checkpoint_fingerprint(checkpoint)
    monkeypatch.setattr(module.hashlib, "sha256", lambda: pytest.fail("hashed again"))
    assert checkpoint_fingerprint(checkpoint) == before
    os.utime(checkpoint / "model-1.safetensors", ns=(1, 1))
    with pytest.raises(pytest.fail.Exception, match="hashed again"):
        checkpoint_fingerprint(checkpoint)


def test_weights_alone_are_fingerprinted_where_the_configuration_does_not_count(checkpoint):
    def weights(pattern="model*.safetensors"):
        return checkpoint_fingerprint(checkpoint, weight_files=(pattern,), with_config=False)

    before = weights()
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "adapter.safetensors").write_bytes(tensors([1, 1, 1, 1]))
    assert weights() == before
    assert weights("*.safetensors") != before
    (checkpoint / "model-2.safetensors").write_bytes(tensors([5, 6, 7, 9]))
    assert weights() != before
    assert weights("pytorch*.bin") is None
