"""Texts of one batch along several routes: each is fused as it would be alone, with the sources of its route."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from records import record_of

from fusion_plugins.core.fusion.fuse import RULES
from fusion_plugins.core.fusion.pipeline import FusionPlan, FusionSource, fuse_texts
from fusion_plugins.core.fusion.project import Projector
from fusion_plugins.core.fusion.routing import Route, fuse_routed, routed_plan, taught_positions
from fusion_plugins.core.fusion.teachers import LABEL, NOTHING, SEVERAL
from fusion_plugins.core.fusion.vocabulary_map import identity_map
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.errors import MismatchError

NAMES = ("sums", "prose", "code")


def material(count=12, seed=0):
    """A plan of three sources over one tokenizer, texts, and what each source says about each of them."""
    tokenizer = tiny.byte_level()
    table = TokenTable.from_tokenizer(tokenizer)
    projector = Projector.of(table, table, identity_map(table))
    plan = FusionPlan(tuple(FusionSource(name, projector) for name in NAMES), width=4)
    texts = [tokenize(tokenizer, table, f"{tiny.TEXTS[n % 6][:30]} {n}") for n in range(count)]
    random = np.random.default_rng(seed)
    records = []
    for _ in NAMES:
        own = []
        for n, text in enumerate(texts):
            size = len(text.input_ids)
            ids = random.integers(10, 200, (size, 3))
            ids[:, 1] += 100
            ids[:, 2] = np.append(text.input_ids[1:], 3)
            ids[:, :2] += (ids[:, :2] == ids[:, 2:]).astype(int)
            logprobs = -np.sort(random.uniform(0.5, 4, (size, 3)), axis=-1).astype(np.float32) - 1
            own.append(record_of(f"t{n}", text, ids, logprobs, logprobs[:, 2]))
        records.append(own)
    return plan, texts, records


ROUTES = [Route((0, 1, 2)), Route((0,), "math"), Route((), "chat"), Route((1, 2), "code"), Route((2,), "math")]


def test_each_text_is_fused_as_it_is_alone():
    plan, texts, records = material()
    plan = replace(plan, rules={"code": (RULES["avg_ce"], {}), "chat": (RULES["token_min_ce"], {})})
    routes = [ROUTES[n % len(ROUTES)] for n in range(len(texts))]
    needed = [
        [r if s in route.sources else None for r, route in zip(own, routes, strict=True)]
        for s, own in enumerate(records)
    ]
    fused, report = fuse_routed(plan, texts, needed, [None] * len(texts), routes)
    for b, route in enumerate(routes):
        place = slice(fused.offsets[b], fused.offsets[b + 1])
        if not route.sources:
            assert (fused.ids[place] == -1).all()
            assert (fused.source[place] == -1).all()
            assert fused.best[b] == -1
            continue
        alone, _ = fuse_texts(routed_plan(plan, route), [texts[b]], [[records[s][b]] for s in route.sources])
        for name in ("ids", "logprobs", "leftover", "kept"):
            np.testing.assert_array_equal(getattr(fused, name)[place], getattr(alone, name))
        numbers = np.array([*route.sources, -1])
        np.testing.assert_array_equal(fused.source[place], numbers[alone.source])
        assert fused.best[b] == numbers[alone.best[0]]
    assert report.texts == len(texts)
    assert report.untaught == sum(not route.sources for route in routes)
    assert list(report.sources) == list(NAMES)
    assert report.positions == sum(len(text.input_ids) - 1 for text in texts)
    for s, name in enumerate(NAMES):
        own = sum(len(text.input_ids) - 1 for text, route in zip(texts, routes, strict=True) if s in route.sources)
        assert report.sources[name].positions == own


def test_a_whole_batch_of_one_route_is_what_it_was_without_routes():
    plan, texts, records = material()
    plain, expected = fuse_texts(plan, texts, records)
    fused, report = fuse_routed(plan, texts, records, [None] * len(texts), [Route((0, 1, 2))] * len(texts))
    for name in ("ids", "logprobs", "leftover", "kept", "source", "best", "offsets"):
        np.testing.assert_array_equal(getattr(fused, name), getattr(plain, name))
    assert report == expected


def test_weights_are_those_of_the_sources_that_take_part_in_the_domain():
    plan, texts, records = material(2)
    sources = [
        replace(s, weight=w, weights={"math": m}) for s, w, m in zip(plan.sources, (1, 2, 5), (1, 0, 3), strict=True)
    ]
    plan = replace(plan, sources=tuple(sources), rule=RULES["fixed_weights"])
    for domain, weights in (("math", (1, 3)), ("code", (1, 5))):
        found, _ = fuse_routed(plan, texts, records, [None] * 2, [Route((0, 2), domain)] * 2)
        expected = replace(plan, sources=(sources[0], sources[2]), rule_options={"weights": weights})
        wanted, _ = fuse_texts(expected, texts, [records[0], records[2]])
        np.testing.assert_array_equal(found.ids, wanted.ids)
        np.testing.assert_array_equal(found.logprobs, wanted.logprobs)


def test_positions_are_counted_by_domain_and_source():
    plan, texts, records = material()
    plan = replace(plan, rules={"code": (RULES["avg_ce"], {})})
    routes = [ROUTES[n % len(ROUTES)] for n in range(len(texts))]
    fused, _ = fuse_routed(plan, texts, records, [None] * len(texts), routes)
    trained = np.concatenate([np.append(np.ones(len(text.input_ids) - 1, bool), False) for text in texts])
    trained[3] = False
    found = taught_positions(fused, trained, NAMES, [route.domain for route in routes])
    expected = {}
    for b, route in enumerate(routes):
        for place in range(fused.offsets[b], fused.offsets[b + 1]):
            if not trained[place]:
                continue
            kind = NOTHING
            if (fused.ids[place] >= 0).any():
                kind = NAMES[fused.source[place]] if fused.source[place] >= 0 else SEVERAL
            own = expected.setdefault(route.domain, {})
            own[kind] = own.get(kind, 0) + 1
    assert found == expected
    assert set(found["chat"]) == {NOTHING}
    assert set(found["math"]) <= {"sums", "code", NOTHING}
    assert LABEL not in found["math"]


def test_a_record_that_is_missing_on_its_route_is_an_error():
    plan, texts, records = material(2)
    with pytest.raises(MismatchError, match="record of text 1 of source 'prose'"):
        fuse_routed(plan, texts, [records[0], [records[1][0], None]], [None] * 2, [Route((0, 1))] * 2)
