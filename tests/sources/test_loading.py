"""Tokenizers and prompts of sources."""

import copy
import json
import shutil
from datetime import date

import pytest
import source_checks
import tiny
import transformers
from tokenizers import normalizers

from fusion_plugins.doctor.sides import open_side
from fusion_plugins.errors import ConfigError, SourceError, TokenizerError
from fusion_plugins.sources.backends.base import SampleRequest, Sampling, SourceSettings
from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.sources.capture_config import CaptureConfig
from fusion_plugins.sources.loading import (
    capture_tokenizer,
    chat_messages,
    chat_template_hash,
    load_config,
    load_tokenizer,
    local_response,
    prompt_ids,
    prompt_text,
    response_text,
    split_prompts,
    vocabulary_size,
)


def test_the_models_revision_is_not_asked_of_another_repository_with_the_tokenizer(model, monkeypatch):
    asked = []
    load = transformers.AutoTokenizer.from_pretrained

    def recorded(name, revision, **arguments):
        asked.append(revision)
        return load(name, **arguments)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", recorded)
    load_tokenizer(SourceSettings(model="org/model", tokenizer=str(model), revision="v2"))
    load_tokenizer(SourceSettings(model=str(model), revision="v2"))
    assert asked == [None, "v2"]


def test_what_cannot_be_loaded_is_named_with_its_source(tmp_path, model):
    with pytest.raises(SourceError, match="source 'nothing': cannot load the tokenizer.*Check the name"):
        load_tokenizer(SourceSettings(model=str(tmp_path / "nothing")))
    with pytest.raises(SourceError, match="source 'nothing': cannot load"):
        load_config(SourceSettings(model=str(tmp_path / "nothing")))
    with pytest.raises(ConfigError, match="source 'llama': cannot read chat_template"):
        load_tokenizer(SourceSettings(model=str(model), chat_template=str(tmp_path / "nothing.jinja")))
    with pytest.raises(ConfigError, match="source 'm': capture through a server needs `tokenizer`"):
        capture_tokenizer(SourceSettings(model="org/m", backend="openai"))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("tokenizer.json", lambda values: values["model"]["vocab"].update(zzz=-1)),
        ("tokenizer_config.json", lambda values: values.update(model_max_length="long")),
        ("tokenizer_config.json", lambda values: values.update(tokenizer_class=["a"])),
        ("config.json", lambda values: values.update(vocab_size="many")),
        ("config.json", lambda values: values.update(num_attention_heads=0)),
        ("config.json", lambda values: values.update(rope_parameters={"rope_type": "none", "rope_theta": 1.0})),
        ("config.json", lambda values: values.update(intermediate_size=7)),
    ],
)
def test_a_damaged_model_is_one_line_whatever_transformers_raises(model, tmp_path, file, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(model, folder)
    values = json.loads((folder / file).read_text())
    damage(values)
    (folder / file).write_text(json.dumps(values))
    texts = source_checks.write_rows(tmp_path / "t.jsonl", [{"id": "a", "text": "the fox"}])
    with pytest.raises(SourceError, match="source 'damaged': cannot load") as refusal:
        capture_texts(CaptureConfig(model=str(folder), texts=str(texts), out=str(tmp_path / "out")))
    assert "\n" not in str(refusal.value)
    if file.startswith("tokenizer"):
        with pytest.raises(ConfigError, match="which is neither"):
            open_side(str(folder), {"a": "the fox"})


def test_a_device_that_does_not_exist_is_one_line(model, tmp_path):
    texts = source_checks.write_rows(tmp_path / "t.jsonl", [{"id": "a", "text": "the fox"}])
    options = {"options": {"device": "gpu"}, "texts": str(texts), "out": str(tmp_path / "out")}
    with pytest.raises(SourceError, match="cannot load .* device string: gpu"):
        capture_texts(CaptureConfig(model=str(model), **options))


def test_a_template_file_replaces_the_template_and_changes_its_hash(tmp_path, model):
    file = tmp_path / "chatml.jinja"
    file.write_text(tiny.CHATML + " ")
    own = load_tokenizer(SourceSettings(model=str(model)))
    other = load_tokenizer(SourceSettings(model=str(model), chat_template=str(file)))
    assert other.chat_template == file.read_text()
    assert len({chat_template_hash(own), chat_template_hash(other), chat_template_hash(None)}) == 3


def test_the_vocabulary_ends_behind_the_highest_id():
    tokenizer = tiny.byte_level()
    assert vocabulary_size(tokenizer) == max(tokenizer.get_vocab().values()) + 1


def test_a_system_prompt_is_put_before_prompts_that_have_none():
    assert chat_messages("hi", None) == [{"role": "user", "content": "hi"}]
    brief = {"role": "system", "content": "Be brief."}
    assert chat_messages("hi", "Be brief.") == [brief, {"role": "user", "content": "hi"}]
    own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "hi", "name": None}]
    assert chat_messages(own, "Be brief.") == [own[0], {"role": "user", "content": "hi"}]


def test_a_prompt_is_a_chat_where_there_is_a_template_and_plain_where_there_is_none():
    tokenizer, bare = tiny.byte_level(), copy.deepcopy(tiny.byte_level())
    bare.chat_template = None
    chat = tokenizer.apply_chat_template(chat_messages("hi", None), tokenize=False, add_generation_prompt=True)
    assert prompt_text(tokenizer, "hi", "auto", None) == prompt_text(tokenizer, "hi", "chat", None) == (chat, False)
    assert prompt_text(tokenizer, "hi", "plain", None) == prompt_text(bare, "hi", "auto", None) == ("hi", True)
    with pytest.raises(ConfigError, match="has no chat template. Name a file with one in `chat_template`"):
        prompt_text(bare, "hi", "chat", None)
    with pytest.raises(ConfigError, match="template 'plain' takes prompts with 'text', got one with 'messages'"):
        prompt_text(tokenizer, chat_messages("hi", None), "plain", None)


def test_a_template_that_refuses_messages_is_an_error_of_the_source():
    tokenizer = copy.deepcopy(tiny.byte_level())
    tokenizer.chat_template = "{{ raise_exception('no system prompts here') }}"
    with pytest.raises(SourceError, match="refuses a prompt: no system prompts here. Use another chat_template"):
        prompt_text(tokenizer, "hi", "chat", None)


def test_a_model_continues_a_prompt_so_it_does_not_end_with_eos():
    class Ending:
        chat_template, eos_token_id = None, 9

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [1, *text.encode(), 9, 9]}

    assert prompt_ids(Ending(), "ab", Sampling(), None) == [1, *b"ab"]


def test_a_response_is_cut_before_the_first_of_its_stop_strings():
    tokenizer = tiny.byte_level()
    ids = tokenizer("one two three")["input_ids"]
    assert response_text(tokenizer, ids, ()) == ("one two three", False)
    assert response_text(tokenizer, ids, ("three", "two")) == ("one ", True)
    assert response_text(tokenizer, ids, ("four",)) == ("one two three", False)


def special(*tokens):
    tokenizer = copy.deepcopy(tiny.byte_level())
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def answered(tokenizer, prompt, text, stop=(), ended=True):
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text)]
    generated = [*ids[1], tokenizer.eos_token_id] if ended else ids[1]
    logprobs = [-1.0] * len(generated)
    return local_response(tokenizer, ids[0], ids[1], stop, ended=ended, generated=generated, logprobs=logprobs)


def test_reasoning_that_the_prompt_has_opened_is_whole_in_the_response():
    tokenizer = tiny.byte_level()
    assert answered(tokenizer, "<think>\n", "6 * 7\n</think>\n\n42").text == "<think>\n6 * 7\n</think>\n\n42"
    assert answered(tokenizer, "Why <think>?\n", "Because").text == "Because"
    cut = answered(tokenizer, "<think>", "6 * 7 is", ended=False)
    assert (cut.text, cut.finish_reason) == ("<think>\n6 * 7 is", "length")


def test_marks_of_reasoning_stay_also_where_they_are_special_tokens():
    tokenizer = special("<think>", "</think>")
    assert (
        answered(tokenizer, "Hi<|im_end|>", "<think>hm</think>\n\nfive<|im_end|>").text == "<think>hm</think>\n\nfive"
    )
    assert answered(tokenizer, "Hi<think>", "hm</think>\nfive").text == "<think>\nhm</think>\nfive"
    assert answered(tokenizer, "Hi", "five<|im_end|>").text == "five"


def test_channels_become_reasoning_and_answer_and_calls_of_tools_are_refused():
    tokenizer = special("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")
    analysis = "<|channel|>analysis<|message|>6 * 7<|end|>"
    final = "<|start|>assistant<|channel|>final<|message|>42"
    assert answered(tokenizer, "<|start|>assistant", analysis + final).text == "<think>\n6 * 7\n</think>\n\n42"
    assert answered(tokenizer, "<|start|>assistant", "<|channel|>final<|message|>42 STOP", ("STOP",)).text == "42 "
    cut = answered(tokenizer, "<|start|>assistant", "<|channel|>analysis<|message|>6 * 7 is", ended=False)
    assert (cut.text, cut.finish_reason) == ("<think>\n6 * 7 is", "length")
    call = "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    assert "call of a tool" in answered(tokenizer, "<|start|>assistant", analysis + call).reason


def test_arguments_of_the_template_reach_it_as_json_has_them():
    tokenizer = copy.deepcopy(tiny.byte_level())
    tokenizer.chat_template = "{{ messages[0].content }}{{ '' if enable_thinking else '<no>' }}{{ day }}"
    options = {"enable_thinking": False, "day": date(2026, 1, 2)}
    ids = prompt_ids(tokenizer, "hi", Sampling(chat_template_kwargs=options), None)
    assert tokenizer.decode(ids) == "hi<no>2026-01-02"
    assert (
        tokenizer.decode(prompt_ids(tokenizer, "hi", Sampling(chat_template_kwargs={"enable_thinking": True}), None))
        == "hi"
    )
    with pytest.raises(ValueError, match="no effect with `template: plain`"):
        Sampling(template="plain", chat_template_kwargs=options)


def test_prompts_that_leave_no_room_are_told_apart_from_the_others():
    tokenizer = tiny.byte_level()
    requests = [SampleRequest(text, Sampling(max_tokens=8, template="plain"), 0) for text in ("a", "a" * 50)]
    prompts, refused = split_prompts(tokenizer, requests, 20)
    assert list(prompts) == [0]
    assert list(refused) == [1]
    assert "max_tokens 8 exceed the model's 20 tokens" in refused[1].reason


def test_a_tokenizer_that_loses_text_is_refused_before_any_model_is_loaded(tmp_path):
    tokenizer = copy.deepcopy(tiny.byte_level())
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\n", "")
    tokenizer.save_pretrained(tmp_path / "deaf")  # a folder without weights
    lost = r"loses or changes newlines, .*'one\\ntwo\\n\\nthree\\n' becomes 'onetwothree'"
    for backend in ("transformers", "vllm", "ray"):
        settings = SourceSettings(model=str(tmp_path / "deaf"), backend=backend)
        with pytest.raises(TokenizerError, match=f"source 'deaf': .*{lost}"):
            load_tokenizer(settings)
    texts = source_checks.texts(tmp_path / "texts.jsonl")
    with pytest.raises(TokenizerError, match=lost):
        capture_texts(source_checks.capture_config(tmp_path / "deaf", texts, tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_known_changes_of_texts_are_reported(tmp_path, model):
    texts = source_checks.texts(tmp_path / "texts.jsonl")
    assert capture_texts(source_checks.capture_config(model, texts, tmp_path / "none")).text_changes == ()
    source_checks.checkpoint(tmp_path / "prefix", tokenizer=tiny.sentencepiece_bpe())
    report = capture_texts(source_checks.capture_config(tmp_path / "prefix", texts, tmp_path / "store"))
    assert report.text_changes == ("a space before the text",)
