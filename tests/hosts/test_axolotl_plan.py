"""From stores and settings to the plan: whose ids are the target's, and what the counts of aligned tokens are of."""

import json

import numpy as np
import pytest
import tiny
from axolotl_runs import config, prepare
from datasets import Dataset
from records import record_of
from tokenizers import AddedToken

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.counting import count_alignments, count_texts
from fusion_plugins.axolotl.plan import make_plan
from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer
from fusion_plugins.core.fusion.align import align_dtw
from fusion_plugins.core.fusion.pipeline import fuse_text
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize_content
from fusion_plugins.errors import MismatchError
from fusion_plugins.store import StoreWriter, open_store


def target_of(tokenizer):
    return TargetTokenizer(tokenizer, TokenTable.from_tokenizer(tokenizer), {})


def own_copy(tokenizer):
    """The same tokenizer as an object of its own, to be changed."""
    made = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
    )
    made.chat_template = tokenizer.chat_template
    return made


def write_store(material, folder, tokenizer, contents):
    """A store of certain rows over texts or chats."""
    table = TokenTable.from_tokenizer(tokenizer)
    model = open_store(material.folder / "texts-digits").manifest
    manifest = model.model_copy(
        update={"shards": [], "complete": False, "tokenizer_fingerprint": table.fingerprint, "top_k": 1}
    )
    with StoreWriter(folder, manifest, table) as writer:
        for id, content in contents.items():
            text, _ = tokenize_content(tokenizer, table, content)
            size = len(text.input_ids)
            ids = np.append(text.input_ids[1:], 0)[:, None].astype(np.int32)
            zeros = np.zeros(size, np.float32)
            writer.write(record_of(id, text, ids, zeros[:, None], zeros))
        writer.finish()
    return open_store(folder)


def never(stores):
    pytest.fail("counted without need")


def test_statistics_map_every_source(material, run_folder):
    store = str(material.folder / "texts-digits")
    sources = [{"name": name, "store": store} for name in ("one", "other")]
    fusion = {"sources": sources, "projection": {"vocabulary_map": "statistics"}}
    prepare(config(material, run_folder, fusion=fusion), run_folder)
    report = json.loads((run_folder / "model" / "fusion_report.json").read_text())[str(material.texts)]
    assert report["sources"]["one"] == report["sources"]["other"]
    assert report["sources"]["one"]["exact_mass"] > 0


def test_counts_of_parts_are_the_counts_of_the_whole(material, run_folder, monkeypatch):
    rows = [json.loads(line) for line in material.texts.read_text().splitlines()]
    target, store = target_of(tiny.sentencepiece_bpe()), open_store(material.folder / "texts-digits")

    def read(row):
        return row["id"], target.encode(row["text"]).tokens

    (whole,) = count_texts(map(read, rows), target.table.packed, [store])
    monkeypatch.setattr("fusion_plugins.axolotl.counting.BATCH", 7)
    parts = count_alignments(Dataset.from_list(rows), read, target.table.packed, [store, store], process_count=None)
    assert len(parts) == 2
    assert len(whole) > 100
    for found in parts:
        assert [column.tolist() for column in found.pairs()] == [column.tolist() for column in whole.pairs()]


def test_white_space_that_one_template_strips_shifts_no_counts(material, run_folder):
    """The target's template strips the answer, the source's does not: bytes of a span do not correspond one by one."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\n\n the fox jumps over the dog"}]
    store = write_store(material, run_folder / "store", tiny.digit_splitting(), {"chat": chat})
    target = target_of(tiny.sentencepiece_bpe())
    (counts,) = count_texts([("chat", target.encode(chat).tokens)], target.table.packed, [store])
    ids = zip(*(column.tolist() for column in counts.pairs()[:2]), strict=True)
    pairs = [(store.table.tokens[i].strip(), target.table.tokens[j].strip()) for i, j in ids]
    assert len(pairs) > 6
    assert all(left in right or right in left or right == b"</s>" for left, right in pairs)


def test_counting_refuses_a_store_of_other_texts(material):
    target, store = target_of(tiny.sentencepiece_bpe()), open_store(material.folder / "texts-digits")
    with pytest.raises(MismatchError, match="texts-digits: record 't0' is of another text"):
        count_texts([("t0", target.encode("Something else.").tokens)], target.table.packed, [store])


def own_plan(material, tokenizer, **settings):
    store = open_store(material.folder / "texts-target")
    block = FusionBlock.model_validate(
        {"sources": [{"name": "own", "store": str(store.path), "is_target": True}], **settings}
    )
    return make_plan(block, [store], target_of(tokenizer), never)


def test_the_settings_of_time_warping_reach_it(material):
    plan = own_plan(material, tiny.sentencepiece_bpe(), alignment={"method": "dtw", "tie_order": "fusechat"})
    aligner, *_ = plan.sources[0].align.args
    assert (aligner.func, aligner.keywords) == (align_dtw, {"tie_order": "fusechat"})
    wrapped = target_of(tiny.sentencepiece_bpe())
    target = wrapped.encode("The fox has 12 apples.").tokens
    text, _ = tokenize_content(tiny.sentencepiece_bpe(), wrapped.table, "The fox has 12 apples.")
    zeros = np.full(len(text.input_ids), -0.5, np.float32)
    record = record_of("r", text, np.append(text.input_ids[1:], 0)[:, None], zeros[:, None], zeros)
    fused, _ = fuse_text(plan, target, [record])
    assert fused.present[1:-1].all()


def test_tokens_added_for_the_run_leave_the_targets_own_store_usable(material):
    tokenizer = own_copy(tiny.sentencepiece_bpe())
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens([AddedToken("<|im_start|>")])
    plan = own_plan(material, tokenizer, projection={"vocabulary_map": "statistics"})
    projector = plan.sources[0].projector
    size = len(projector.source_bytes.special)
    assert len(projector.target_bytes.special) == size + 2
    assert projector.mapping.target_ids.tolist() == list(range(size))
    assert projector.mapping.exact.all()


def test_another_token_at_the_end_of_texts_is_no_addition(material):
    tokenizer = own_copy(tiny.sentencepiece_bpe())
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    with pytest.raises(MismatchError, match="not have other tokens or other BOS and EOS tokens.*or remove is_target"):
        own_plan(material, tokenizer)
