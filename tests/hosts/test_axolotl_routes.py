"""Which source teaches which row, in the real axolotl: conditions, missing texts, rules by domain, own answers."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import tiny
from axolotl_runs import FUSED, config, logged, prepare, train

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.collator import FUSED_IDS, FUSED_SOURCE
from fusion_plugins.axolotl.routes import Table, columns_needed, make_routes
from fusion_plugins.config import validate
from fusion_plugins.core.fusion.pipeline import FusionPlan, FusionSource
from fusion_plugins.core.fusion.project import Projector
from fusion_plugins.core.fusion.record import build_record
from fusion_plugins.core.fusion.routing import fuse_routed
from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.fusion.vocabulary_map import identity_map
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.errors import ConfigError, DataError, MismatchError
from fusion_plugins.sources.sample import COLUMNS
from fusion_plugins.store import RowManifest, RowWriter, open_store

IN_ORDER = {"curriculum_sampling": True, "shuffle_merged_datasets": False}


def block(entries, **changes):
    sources = [{"name": f"s{n}", "store": f"stores/{n}"} | own for n, own in enumerate(entries)]
    return validate(FusionBlock, {"sources": sources, **changes}, where="fusion")


def table(columns, answers=False):
    count = len(next(iter(columns.values())))
    return Table("rows.jsonl", [f"t{n}" for n in range(count)], [f"row {n}" for n in range(count)], columns, answers)


class Ids(set):
    """A store, as far as routes look at one."""

    path = "stores/x"
    manifest = type("Manifest", (), {"complete": True})

    def ids(self):
        return list(self)


@pytest.fixture(scope="module")
def everything():
    return Ids(f"t{n}" for n in range(100_000))


# Many texts: no source teaches what it is not meant for


def test_of_a_hundred_thousand_texts_none_is_taught_by_a_source_that_was_not_meant(everything):
    """Each source predicts a token of its own, besides the text's next one: what is taught says who teaches it."""
    count, random = 100_000, np.random.default_rng(5)
    domains = random.choice(["math", "code", "chat", "law"], count).tolist()
    levels = random.integers(0, 5, count).tolist()
    settings = block(
        [
            {"domains": ["math"]},
            {"domains": ["math", "code"], "where": {"level": {"min": 2}}},
            {"where": {"level": [0, 1]}},
        ],
        on_no_source="lm_loss",
        on_missing_text="skip_source",
        rule_by_domain={"math": "avg_ce"},
    )
    half = Ids(f"t{n}" for n in range(0, count, 2))
    started = time.perf_counter()
    routes = make_routes(
        table({"domain": domains, "level": levels}), settings, [everything, half, everything], "target"
    )
    assert time.perf_counter() - started < 60
    tokenizer = tiny.byte_level()
    tokens = TokenTable.from_tokenizer(tokenizer)
    projector = Projector.of(tokens, tokens, identity_map(tokens))
    text = tokenize(tokenizer, tokens, "a")
    size = len(text.input_ids)
    own = [100 + number for number in range(3)]
    values = np.full((size, 1), -0.1, np.float32), np.full(size, -3.0, np.float32)
    said = [build_record("t", text, TopK(np.full((size, 1), token, np.int32), *values)) for token in own]
    plan = FusionPlan(tuple(FusionSource(f"s{s}", projector) for s in range(3)), width=4)
    wanted = [routes.distinct[number] for number in routes.numbers]
    seen = 0
    for start in range(0, count, 20_000):
        part = slice(start, start + 20_000)
        fused, _ = fuse_routed(plan, [text] * 20_000, [[one] * 20_000 for one in said], [None] * 20_000, wanted[part])
        for b in range(20_000):
            n = start + b
            meant = [
                domains[n] == "math",
                domains[n] in ("math", "code") and levels[n] >= 2 and n % 2 == 0,
                levels[n] < 2,
            ]
            taught = set(fused.ids[fused.offsets[b] : fused.offsets[b + 1]].ravel().tolist()) - {
                -1,
                int(text.input_ids[-1]),
            }
            assert taught <= {token for token, is_meant in zip(own, meant, strict=True) if is_meant}
            assert bool(taught) == any(meant)
            seen += bool(taught)
    assert 0 < seen < count
    counted = {domain: {f"s{s}": 0 for s in range(3)} | {"(no source)": 0} for domain in set(domains)}
    for n, route in enumerate(wanted):
        for name in [f"s{s}" for s in route.sources] or ["(no source)"]:
            counted[domains[n]][name] += 1
    assert {d: {k: v for k, v in own.items() if v} for d, own in counted.items()} == routes.texts
    assert routes.without["s1"] == sum(
        domains[n] in ("math", "code") and levels[n] >= 2 for n in range(1, count, 2)
    )  # fmt: skip


# Rows without a source, and texts that a store lacks


DOMAINS = {"domain": ["math", "code", "", None]}


@pytest.mark.parametrize(
    ("policy", "left", "named"), [("skip", [0, 1], ["row 2", "row 3"]), ("lm_loss", [0, 1, 2, 3], [])]
)
def test_rows_without_a_source_are_left_out_or_trained_on_without_fusion(policy, left, named, everything):
    settings = block([{"domains": ["math"]}, {"domains": ["code", "math"]}], on_no_source=policy)
    routes = make_routes(table(DOMAINS), settings, [everything] * 2, "target")
    assert np.flatnonzero(routes.numbers >= 0).tolist() == left
    assert [row.row for row in routes.untaught] == named
    assert [routes.distinct[n].sources for n in routes.numbers[:2]] == [(0, 1), (1,)]


def test_rows_without_a_source_are_refused_unless_the_configuration_says_otherwise(everything):
    with pytest.raises(MismatchError, match=r"2 of 4 rows .*row 2, domain 'instruction'.*on_no_source: skip"):
        make_routes(table(DOMAINS), block([{"domains": ["math", "code"]}]), [everything], "target")
    with pytest.raises(MismatchError, match="no source takes part in any row"):
        make_routes(table(DOMAINS), block([{"domains": ["law"]}], on_no_source="skip"), [everything], "target")


def test_a_store_needs_only_the_texts_that_its_source_teaches(everything):
    settings = block([{"domains": ["math"]}, {}])
    routes = make_routes(table(DOMAINS), settings, [Ids({"t0"}), everything], "target")
    assert [routes.distinct[n].sources for n in routes.numbers] == [(0, 1), (1,), (1,), (1,)]


@pytest.mark.parametrize("policy", ["raise", "skip", "skip_source"])
def test_a_text_that_a_store_lacks_costs_the_run_the_row_or_the_source(policy, everything):
    settings = block([{}, {}], on_missing_text=policy)
    lacking = Ids({"t0", "t2"})
    if policy == "raise":
        with pytest.raises(MismatchError, match=r"2 of 4 are missing, the first of them 't1'.*skip_source"):
            make_routes(table(DOMAINS), settings, [everything, lacking], "target")
        return
    routes = make_routes(table(DOMAINS), settings, [everything, lacking], "target")
    kept = np.flatnonzero(routes.numbers >= 0).tolist()
    assert kept == ([0, 2] if policy == "skip" else [0, 1, 2, 3])
    assert [routes.distinct[routes.numbers[n]].sources for n in kept] == (
        [(0, 1), (0, 1)] if policy == "skip" else [(0, 1), (0,), (0, 1), (0,)]
    )
    assert routes.without == ({} if policy == "skip" else {"s1": 2})
    # A row that no other source teaches is left out, and is none that is taught without this one.
    alone = block([{"domains": ["chat"]}, {}], on_missing_text=policy, on_no_source="skip")
    found = make_routes(table(DOMAINS), alone, [everything, lacking], "target").without
    taught = sum(domain == "chat" for n, domain in enumerate(DOMAINS["domain"]) if n in (1, 3))
    assert found == ({} if policy == "skip" else {"s1": taught})
    # A store of other texts is a mistake in any case; what the message proposes is not what was set already.
    with pytest.raises(
        MismatchError, match=r"4 of 4 are missing.*ids such as 'other'.*which rows 's1' teaches"
    ) as error:
        make_routes(table(DOMAINS), settings, [everything, Ids({"other"})], "target")
    assert "on_missing_text" not in str(error.value)


@pytest.mark.parametrize(
    ("sources", "changes", "message"),
    [
        ([{"domains": []}], {}, "domains is empty"),
        ([{"domains": ["a"], "where": {"domain": "b"}}], {}, "two conditions on one column"),
        ([{"where": {"verdict": "wrong"}}], {}, "verdict: expected some of correct, incorrect, unknown"),
        ([{"weight": 2}], {}, "are for the rule fixed_weights"),
        ([{"weight": -1}], {"rule": "fixed_weights"}, "greater than or equal to 0"),
        ([{"weight_by_domain": {"math": -1}}], {"rule": "fixed_weights"}, "expected a weight that is not negative"),
        ([{}], {"rule": "fixed_weights", "rule_options": {"weights": [1]}}, "give each entry of sources a weight"),
        ([{"weight": 2}], {"rule": "fixed_weights", "weights_from": "x"}, "has one already; remove one"),
        ([{}], {"rule_by_domain": {"math": {"rul": "avg_ce"}}}, "rule_by_domain.math.rul: "),
        ([{}], {"on_no_source": "lm_loss", "lm_loss_weight": 0.0}, "they would teach nothing; give it a weight"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(sources, changes, message):
    with pytest.raises(ConfigError, match=message):
        block(sources, **changes)


def test_conditions_on_columns_that_no_row_has_are_refused(everything):
    with pytest.raises(
        ConfigError, match=r"source 's0': where: expected columns of rows.jsonl, which are domain; got levl"
    ):
        make_routes(table(DOMAINS), block([{"where": {"levl": 1}}]), [everything], "target")
    rows = replace(table({"source": ["a"]}), all_columns=["text", "level", "source"])
    with pytest.raises(ConfigError, match=r"which are level, source, text; got levl"):
        make_routes(rows, block([{"where": {"levl": 1}}]), [everything], "target")


SCORED = {
    "domain": ["math", "math", "code", "code"],
    "correct": [True, False, True, None],
    "scores": [{"math": {"correct": True}}, None, {"code": {"correct": True, "trust": "inside"}}, None],
    "reward": [0.1, 0.2, 0.3, None],
    "level": [1, 2, 3, 4],
}


@pytest.mark.parametrize(
    ("where", "taught"),
    [
        ({"trust": "inside"}, [2]),
        ({"trust": "outside", "verdict": ["correct", "incorrect"]}, [0, 1]),
        ({"trust": "outside", "domain": "code"}, [3]),
        ({"verdict": "correct"}, [0, 2]),
        ({"reward": {"min": 0.2}, "level": [2, 3]}, [1, 2]),
    ],
)
def test_a_source_takes_part_where_its_conditions_say_whatever_columns_hold_that(where, taught, everything):
    settings = block([{"where": where}, {}])
    columns = {name: SCORED[name] for name in columns_needed(settings, list(SCORED))}
    routes = make_routes(table(columns), settings, [everything] * 2, "target")
    assert [n for n, number in enumerate(routes.numbers) if 0 in routes.distinct[number].sources] == taught


def test_a_condition_on_a_column_that_is_not_there_is_told_with_all_that_are(everything):
    settings = block([{"where": {"levl": 1}}])
    own = {name: SCORED[name] for name in columns_needed(settings, list(SCORED))}
    with pytest.raises(ConfigError, match="which are correct, domain, level, reward, scores; got levl"):
        make_routes(replace(table(own), all_columns=list(SCORED)), settings, [everything], "target")


# The target's own answers

OWN = {"source": ["target", "teacher", "target"], "domain": ["math", "math", "code"], "model": [None] * 3}


@pytest.mark.parametrize("rule", ["min_ce", "token_min_ce", "avg_ce"])
@pytest.mark.parametrize(
    ("columns", "changes"),
    [
        (OWN, {"own_source": "target"}),
        (OWN | {"source": ["s1", "x", "x"]}, {}),
        (OWN | {"model": ["target/../target", "x", "x"], "source": ["x"] * 3}, {}),
        (OWN | {"is_target": [True, None, False]}, {}),
    ],
)
def test_cross_entropy_does_not_choose_between_sources_on_own_answers(
    rule, columns, changes, everything, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target").mkdir()
    settings = block([{}, {"is_target": True}], rule=rule, **changes)
    with pytest.raises(
        ConfigError, match=rf"fusion.rule: {rule} .*(row 0).*shares the target's mistakes.*weights_from"
    ):
        make_routes(table(columns, True), settings, [everything] * 2, "target")


@pytest.mark.parametrize(
    ("sources", "changes"),
    [
        ([{"domains": ["math"]}, {"domains": ["code"]}], {}),
        ([{}, {}], {"rule": "fixed_weights"}),
        ([{}, {"domains": ["code"]}], {"rule_by_domain": {"code": "fixed_weights"}}),
    ],
)
def test_routes_and_fixed_weights_do(sources, changes, everything):
    settings = block(sources, own_source="target", **changes)
    routes = make_routes(table(OWN, True), settings, [everything] * 2, "target")
    assert (routes.numbers >= 0).all()
    # Texts that are no answers may say what they like in such columns.
    make_routes(table(OWN), block([{}, {}], own_source="target"), [everything] * 2, "target")


# Real runs


RESPONSES = [
    ("math", "target", False, "stop", "12 + 30 = 43"),
    ("math", "teacher", True, "stop", "12 + 30 = 42"),
    ("math", "target", True, "stop", "12 + 30 = 42"),
    ("code", "target", None, "length", "def add(left, right):"),
    ("code", "teacher", True, "stop", "return left + right"),
    ("chat", "target", None, "stop", "The dog sleeps."),
    ("chat", "target", None, "stop", " "),
]


@pytest.fixture(scope="module")
def answers(material, tmp_path_factory):
    """A folder of responses, a store of the maths and code, and one of everything but code."""
    folder = tmp_path_factory.mktemp("answers")
    columns = COLUMNS | {"correct": "bool", "level": "json", "kind": "json"}
    with RowWriter(
        folder / "responses", RowManifest(stage="responses", columns=columns, key=("source", "index"))
    ) as rows:
        for n, (domain, source, correct, finish, response) in enumerate(RESPONSES):
            row = {"prompt_id": f"p{n // 2}", "index": n, "prompt": f"{domain} {n // 2}?", "response": response}
            kept = {"level": n, "kind": "hard" if n == 0 else None}
            rows.write(row | kept | {"domain": domain, "source": source, "correct": correct, "finish_reason": finish})
        rows.finish()
    for name, where in (("digits", {"domain": ["math", "code"]}), ("bytes", {"domain": ["math", "chat"]})):
        from fusion_plugins.sources.capture import capture_texts
        from fusion_plugins.sources.capture_config import CaptureConfig

        out = str(folder / name)
        capture_texts(
            CaptureConfig(
                texts=str(folder / "responses"), model=str(material.folder / name), out=out, top_k=16, where=where
            )
        )
    return folder


def routed(answers, **changes):
    entries = [
        {"name": name, "store": str(answers / name), "is_target": False, **changes.pop(name, {})}
        for name in ("digits", "bytes")
    ]
    return {"sources": entries, "own_source": "target", **changes}


def fused_config(material, answers, run_folder, fusion, **changes):
    datasets = [{"path": str(answers / "responses"), "type": FUSED}]
    return config(material, run_folder, datasets=datasets, fusion=fusion, min_sample_len=1, **IN_ORDER, **changes)


BY_DOMAIN = {"digits": {"domains": ["math", "code"]}, "bytes": {"domains": ["chat"]}}


def test_a_folder_of_responses_is_trained_on_by_the_sources_of_its_domains(material, answers, run_folder):
    settings = fused_config(material, answers, run_folder, routed(answers, **BY_DOMAIN))
    _, rows = prepare(settings, run_folder)
    report = json.loads((run_folder / "model" / "fusion_report.json").read_text())[str(answers / "responses")]
    # The same answer twice is two rows, as often as it was sampled, and one record.
    assert len(rows) == 6
    assert report["empty_answers"] == 1
    assert report["texts_of_sources"] == {"math": {"digits": 3}, "code": {"digits": 2}, "chat": {"bytes": 1}}
    assert set(report["taught"]["math"]) <= {"digits", "(no source)"}
    assert set(report["taught"]["chat"]) <= {"bytes", "(no source)"}
    tokenizer = tiny.sentencepiece_bpe()
    for row, (domain, _, _, finish, response) in zip(rows, RESPONSES, strict=False):
        labels = [token for token in row["labels"] if token != -100]
        assert tokenizer.decode(labels).strip() == response + ("</s>" if finish == "stop" else "")
        assert set(np.array(row[FUSED_SOURCE])[np.array(row[FUSED_SOURCE]) >= 0]) == {0 if domain != "chat" else 1}
        # A position without a label has no distribution either.
        width = len(row[FUSED_IDS]) // len(row["labels"])
        taught = (np.array(row[FUSED_IDS]).reshape(-1, width) >= 0).any(axis=-1)
        assert not (taught & np.append(np.array(row["labels"][1:]) == -100, True)).any()
        assert taught.any()


def test_rows_that_refer_to_their_texts_are_taught_alike_and_another_rule_needs_no_new_preparation(
    material, answers, run_folder, tmp_path
):
    fusion = routed(answers, **BY_DOMAIN, rule_by_domain={"math": "fixed_weights"})
    found = []
    for prepared in ("rows", "stores"):
        settings = fused_config(material, answers, tmp_path / prepared, fusion | {"prepared": prepared})
        trainer = train(settings, tmp_path / prepared)
        found.append([logged(trainer, name) for name in ("loss", "fusion_coverage", "share_digits", "share_bytes")])
    # Rows hold log-probabilities in float16.
    assert found[0] == [pytest.approx(values, rel=2e-4) for values in found[1]]
    from fusion_plugins.axolotl.args import fusion_block
    from fusion_plugins.axolotl.fingerprint import content_hash

    entry = {"path": str(answers / "responses"), "type": FUSED}

    def stamp(prepared, **changes):
        cfg = fused_config(material, answers, run_folder, fusion | {"prepared": prepared} | changes)
        return content_hash(cfg, fusion_block(cfg), entry)

    other_route = [s | {"domains": None} for s in fusion["sources"]]
    weighted = [s | {"weight": 2.0} for s in fusion["sources"]]
    for prepared in ("rows", "stores"):
        same = stamp(prepared)
        for changes in (
            {"where": {"domain": "math"}},
            {"on_no_source": "skip"},
            {"own_source": "x"},
            {"on_missing_text": "skip_source"},
            {"sources": other_route},
        ):
            assert stamp(prepared, **changes) != same, changes
        for changes in ({"rule_by_domain": {}}, {"sources": weighted}):
            assert (stamp(prepared, **changes) != same) == (prepared == "rows"), changes


def test_own_answers_are_refused_to_min_ce_and_wrong_answers_are_one_line(material, answers, run_folder, capfd):
    with pytest.raises(ConfigError, match="shares the target's mistakes"):
        prepare(fused_config(material, answers, run_folder, routed(answers, where={"domain": "math"})), run_folder)
    # Columns of prompts that the responses keep are JSON in the folder.
    fusion = {"where": {"verdict": "incorrect", "level": {"max": 1}}, "rule": "fixed_weights"}
    fusion = routed(answers, digits={"weight": 3.0, "where": {"kind": "hard"}}, **fusion)
    _, rows = prepare(fused_config(material, answers, run_folder, fusion), run_folder)
    assert len(rows) == 1
    fusion = routed(answers, where={"verdict": "incorrect", "domain": "chat"}, rule="fixed_weights")
    with pytest.raises(DataError, match="fusion.where: expected some rows"):
        prepare(fused_config(material, answers, run_folder, fusion), run_folder)


def test_weights_measured_on_verified_answers_are_those_of_the_sources(answers, tmp_path):
    from fusion_plugins.axolotl.plan import measured_weights

    found = measured_weights(str(answers / "responses"), ["target", "teacher"])
    assert found == {
        "target": {"math": pytest.approx(2 / 4), "": pytest.approx(2 / 4)},
        "teacher": {"math": pytest.approx(2 / 3), "code": pytest.approx(2 / 3), "": pytest.approx(3 / 4)},
    }
    with pytest.raises(ConfigError, match="got none of someone"):
        measured_weights(str(answers / "responses"), ["teacher", "someone"])


def test_verdicts_that_a_program_can_forge_weigh_nothing_where_they_do_not_count(material, run_folder, tmp_path):
    from fusion_plugins.axolotl.plan import measured_weights

    scores = [{"code": {"correct": True, "trust": trust}} for trust in ("inside", "inside", "outside")]
    with RowWriter(
        tmp_path / "scored",
        RowManifest(stage="scored", columns=COLUMNS | {"correct": "bool", "scores": "json"}, key=("source", "index")),
    ) as rows:
        for n, given in enumerate([*scores, None, {"math": {"correct": False}}]):
            row = {"prompt_id": "p", "index": n, "prompt": "?", "response": "!", "domain": "code", "source": "teacher"}
            rows.write(row | {"finish_reason": "stop", "correct": n < 3 if given else None, "scores": given})
        rows.finish()
    folder = str(tmp_path / "scored")
    assert measured_weights(folder, ["teacher"]) == {"teacher": {"code": 4 / 6, "": 4 / 6}}
    assert measured_weights(folder, ["teacher"], sure=True) == {"teacher": {"code": 2 / 4, "": 2 / 4}}
    with pytest.raises(ConfigError, match=r"that no program can forge \(min_trust: outside\) of every source"):
        measured_weights(folder, ["teacher", "nobody"], sure=True)
    # The setting is idle where nothing reads verdicts.
    from fusion_plugins.axolotl.guards import _idle

    sources = [{"name": "teacher", "store": folder}]
    given = {"sources": sources, "min_trust": "outside"}
    assert any("min_trust" in said and "where: {trust: outside}" in said for said in _idle(block([], **given)))
    assert not any("min_trust" in said for said in _idle(block([], rule="fixed_weights", weights_from=folder, **given)))


def test_a_source_without_a_verdict_in_a_domain_does_not_outweigh_those_that_were_judged(material, answers):
    from fusion_plugins.axolotl.plan import make_plan
    from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer

    names = {"target": "digits", "teacher": "bytes"}
    sources = [{"name": name, "store": str(answers / store)} for name, store in names.items()]
    settings = block([], rule="fixed_weights", weights_from=str(answers / "responses"), sources=sources)
    stores = [open_store(source["store"]) for source in sources]
    plan = make_plan(settings, stores, TargetTokenizer.of(tiny.sentencepiece_bpe(), {}), lambda stores: [])
    weights = {domain: [source.weight_in(domain) for source in plan.sources] for domain in ("math", "code", "chat", "")}
    assert weights == {
        "math": pytest.approx([2 / 4, 2 / 3]),
        "code": pytest.approx([1 / 2, 2 / 3]),  # of the target no answer there has a verdict
        "chat": [1 / 2, 1 / 2],
        "": pytest.approx([2 / 4, 3 / 4]),  # texts without a column for their domain
    }


@pytest.mark.parametrize(
    ("sources", "changes", "named"),
    [
        ([{"weight_by_domain": {"math": 0}}, {"domains": ["code"]}], {}, "above 0 of s0 .*domain 'math'"),
        ([{"weight": 0}, {"weight": 0, "weight_by_domain": {"math": 1}}], {}, "above 0 of s0, s1 .*domain 'code'"),
        ([{}, {"domains": ["math"]}], {"rule": "min_ce", "loss": "advantage"}, "min_ce .*s0, s1 .*domain 'math'"),
        ([{}, {}], {"rule_by_domain": {"code": "avg_ce"}, "loss": "advantage"}, "avg_ce .*s0, s1 .*domain 'code'"),
    ],
)
def test_a_route_that_its_rule_cannot_fuse_is_refused_before_anything_is(sources, changes, named, everything):
    settings = block(sources, **{"rule": "fixed_weights"} | changes)
    with pytest.raises(ConfigError, match=named):
        make_routes(table({"domain": ["math", "code"]}), settings, [everything] * 2, "target")


def test_a_source_without_a_weight_is_counted_in_no_text(everything):
    entries = [{}, {"weight_by_domain": {"math": 0}}]
    for changes, in_math in (({}, {"s0": 1}), ({"rule_by_domain": {"math": "min_ce"}}, {"s0": 1, "s1": 1})):
        settings = block(entries, **{"rule": "fixed_weights"} | changes)
        routes = make_routes(table({"domain": ["math", "code"]}), settings, [everything] * 2, "target")
        assert routes.texts == {"math": in_math, "code": {"s0": 1, "s1": 1}}


def test_rows_that_refer_to_texts_are_looked_at_again_with_a_rule_of_another_kind(material, answers, run_folder):
    """Fixed weights suit own answers and cross-entropies do not: rows of the one must not let the other pass."""
    fusion = routed(answers, where={"domain": "math"}, rule="fixed_weights", prepared="stores")
    _, rows = prepare(fused_config(material, answers, run_folder, fusion), run_folder)
    assert len(rows) == 3
    with pytest.raises(ConfigError, match="shares the target's mistakes"):
        prepare(fused_config(material, answers, run_folder, fusion | {"rule": "min_ce"}), run_folder)


def test_a_cut_answer_keeps_its_own_record_beside_a_whole_one_of_the_same_words(material, run_folder):
    from fusion_plugins.axolotl.text_rows import unpack_text
    from fusion_plugins.sources.capture import capture_texts
    from fusion_plugins.sources.capture_config import CaptureConfig

    manifest = RowManifest(stage="responses", columns=COLUMNS, key=("source", "index"))
    with RowWriter(run_folder / "responses", manifest) as rows:
        for n, finish in enumerate(["length", "stop", "stop", "abort"]):
            row = {"prompt_id": "p", "index": n, "prompt": "12 + 30?", "response": "12 + 30 = 42", "source": "a"}
            rows.write(row | {"finish_reason": finish})
        rows.finish()
    texts, out = str(run_folder / "responses"), str(run_folder / "store")
    capture_texts(CaptureConfig(texts=texts, model=str(material.folder / "digits"), out=out, top_k=4))
    fusion = {"sources": [{"name": "digits", "store": out}], "prepared": "stores"}
    settings = fused_config(material, run_folder, run_folder, fusion, dataset_exact_deduplication=True)
    _, rows = prepare(settings, run_folder)
    named = [unpack_text(row["fused_text"], row["input_ids"], row["labels"]) for row in rows]
    assert len(named) == len({id for id, _, _ in named}) == 2
    report = json.loads((run_folder / "model" / "fusion_report.json").read_text())[texts]
    assert report["unfinished_answers"] == 2
    store = open_store(out)
    for id, text, _ in named:
        assert (2 in text.labels) == (len(store[id].text.input_ids) == max(len(record.text.ends) for record in store))


def test_rows_are_called_by_their_place_in_the_dataset_also_where_conditions_leave_some_out(
    material, answers, run_folder
):
    fusion = routed(answers, digits={"domains": ["code"]}, where={"domain": ["code", "chat"]}, on_no_source="skip")
    fusion["sources"] = fusion["sources"][:1]
    _, rows = prepare(fused_config(material, answers, run_folder, fusion), run_folder)
    report = json.loads((run_folder / "model" / "fusion_report.json").read_text())[str(answers / "responses")]
    assert len(rows) == 2
    (left_out,) = report["without_source"]
    place = next(n for n, row in enumerate(RESPONSES) if row[0] == "chat")
    assert f": row {place + 1}, id" in left_out["row"]
