"""What decides numbers and responses is in a fingerprint, what only decides the speed is not."""

import struct

import pytest

from fusion_plugins.sources.backends.base import Sampling, SourceSettings
from fusion_plugins.sources.fingerprints import numeric_options, revision_of, sampling_fingerprint, stored_dtype
from fusion_plugins.sources.loading import load_config


@pytest.mark.parametrize("size", [50_000_000, 300_000_000])
def test_small_changes_of_the_weights_are_noticed(tmp_path, size):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.truncate(size)
    settings = SourceSettings(model=str(tmp_path))
    marks = [revision_of(settings, None)]
    for place in (0, 400_000, size - 300_000):
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"\1" * 300_000)
        marks.append(revision_of(settings, None))
    (tmp_path / "config.json").write_text('{"rope_theta": 5}')
    marks.append(revision_of(settings, None))
    assert len(set(marks)) == len(marks)


def test_what_changes_the_numbers_changes_the_fingerprint_and_what_changes_the_speed_does_not(model):
    def mark(**settings):
        return sampling_fingerprint(SourceSettings(model=str(model), **settings), Sampling(), None)

    plain = mark()
    assert plain == mark(dtype="float32")  # as stored
    assert plain == mark(backend="vllm", options={"engine": {"tensor_parallel_size": 2, "max_num_seqs": 4}})
    different = [
        mark(dtype="bfloat16"),
        mark(backend="vllm", options={"engine": {"quantization": "fp8"}}),
        mark(backend="vllm", options={"engine": {"kv_cache_dtype": "fp8"}}),
        mark(backend="vllm", options={"engine": {"dtype": "float16"}}),
        mark(backend="openai", options={"extra_body": {"min_p": 0.2}}),
    ]
    assert len({plain, *different}) == 6
    ray = {"backend": "vllm", "options": {"engine": {"quantization": "fp8"}}}
    assert mark(backend="ray", options=ray) == different[1]


def test_fingerprints_are_those_that_stores_and_responses_of_earlier_versions_hold(tmp_path):
    """A fingerprint that changed would refuse to resume an old store. The second file is read in part."""
    header = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    start = struct.pack("<Q", len(header)) + header
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model-1.safetensors").write_bytes(start + struct.pack("<4f", 1, 2, 3, 4))
    with (tmp_path / "model-2.safetensors").open("wb") as file:
        file.write(start + struct.pack("<4f", 5, 6, 7, 8))
        file.truncate(70_000_000)
        file.seek(35_000_000)
        file.write(b"\1" * 40_000)
    assert revision_of(SourceSettings(model=str(tmp_path)), None) == "weights:207ef692e488fd8491745c4ac63c780d"
    server = SourceSettings(model="served", backend="openai", options={"extra_body": {"min_p": 0.2}})
    sampling = Sampling(temperature=0.7, top_p=0.8, stop=("\n",), system="Be brief.")
    assert sampling_fingerprint(server, sampling, None) == "d24c114c11128ef6"


def test_without_safetensors_in_a_folder_the_commit_or_the_setting_is_the_revision(tmp_path):
    settings = SourceSettings(model=str(tmp_path), revision="main")
    (tmp_path / "pytorch_model.bin").write_bytes(b"1")
    assert revision_of(settings, "abc") == "abc"
    assert revision_of(settings, None) == "main"
    assert revision_of(SourceSettings(model="org/model"), None) is None


def test_only_options_that_change_answers_are_numeric():
    engine = {"quantization": "fp8", "tensor_parallel_size": 2, "kv_cache_dtype": None}
    for backend, options in (
        ("vllm", {"engine": engine}),
        ("ray", {"backend": "vllm", "options": {"engine": engine}}),
    ):
        assert numeric_options(SourceSettings(model="m", backend=backend, options=options)) == {"quantization": "fp8"}
    assert numeric_options(SourceSettings(model="m", backend="openai", options={"concurrency": 2})) == {}


def test_the_dtype_is_the_one_that_is_set_or_the_checkpoints(model):
    settings = SourceSettings(model=str(model))
    config = load_config(settings)
    assert stored_dtype(settings, config) == "float32"
    assert stored_dtype(settings.model_copy(update={"dtype": "bfloat16"}), config) == "bfloat16"
    engine = settings.model_copy(update={"options": {"engine": {"dtype": "float16"}}})
    assert stored_dtype(engine, config) == "float16"
