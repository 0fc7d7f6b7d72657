"""Names of models that can only be folders."""

import pytest

from fusion_plugins.errors import FusionError
from fusion_plugins.model_names import is_same_model, missing_folder
from fusion_plugins.sources.backends.base import SourceSettings
from fusion_plugins.sources.loading import load_config, load_tokenizer


@pytest.mark.parametrize(
    "name", ["../nomodel", "./nomodel", "/no/model", "~/model", "a/b/c", "models\\llama", "a b", ""]
)
def test_a_path_to_nothing_is_named_and_the_hub_is_not_asked(name):
    assert f"there is no folder {name!r}" in missing_folder(name)
    for load in (load_config, load_tokenizer):
        with pytest.raises(FusionError, match="there is no folder") as refusal:
            load(SourceSettings(model=name))
        assert "alphanumeric" not in str(refusal.value)


def test_folders_that_are_there_and_names_of_the_hub_pass_and_a_file_does_not(tmp_path):
    assert missing_folder(str(tmp_path)) is None
    assert missing_folder("gpt2") is None
    assert missing_folder("Qwen/Qwen2.5-0.5B") is None
    (tmp_path / "model.gguf").write_bytes(b"x")
    assert "got the file" in missing_folder(str(tmp_path / "model.gguf"))


def test_two_spellings_of_one_folder_are_one_model_and_two_folders_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("model")
    for name in ("model", "./model", "other/../model", "link", str(tmp_path / "model")):
        assert is_same_model(name, "model")
    for name in ("other", "org/model", None):
        assert not is_same_model(name, "model")
    assert is_same_model("org/model", "org/model")
