"""docs/scale.md has the tables that its script calculates from measured rates, and the simulation is a sound one."""

import doctest
from dataclasses import replace
from pathlib import Path

import engine_simulation
import paper_runs
import pytest
from engine_simulation import Engine, Work, simulate
from rates import CHECKSUM_SPEED

PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()


@pytest.mark.parametrize(
    "table", [paper_runs.capture_table, paper_runs.sample_table, paper_runs.engine_table, paper_runs.limits_table]
)
def test_the_page_has_the_tables_of_the_script(table):
    assert table() in PAGE


def test_sizes_and_times_have_units_that_suit_them():
    assert [paper_runs.size(n) for n in (900, 5e6, 88e6, 1.2e9, 938e9, 2.8e12)] == [
        "1 kB",
        "5.0 MB",
        "88 MB",
        "1.2 GB",
        "938 GB",
        "2.8 TB",
    ]
    assert [paper_runs.hours(seconds) for seconds in (290, 3600, 63_700)] == ["5 min", "1.0 h", "17.7 h"]


#: nothing fails, waits or differs
STEADY = Engine("steady", 2, gpus=4, start=0, failure_every=1e15, disk=1e15, spread=0)
WORK = Work("work", 64 * engine_simulation.UNIT_TOKENS, 7e9, 0.4, pack=0, stored=1)


def test_the_example_of_the_simulation_runs():
    assert doctest.testmod(engine_simulation).failed == 0


@pytest.mark.parametrize("own_parts", [True, False])
@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_without_disturbances_it_takes_what_division_says(gpus, own_parts):
    work = replace(WORK, gpus=gpus)
    found = simulate(work, replace(STEADY, own_parts=own_parts), seed=1)
    joined = work.tokens * work.stored / CHECKSUM_SPEED if own_parts else 0
    assert found.wall - joined == pytest.approx(work.tokens / (work.rate * 8 / gpus), rel=1e-6)
    assert found.gpus == 8
    assert found.busy["the GPUs"] == pytest.approx(1)


def test_the_slowest_resource_sets_the_time():
    packing = replace(WORK, pack=50.0)
    one = simulate(packing, replace(STEADY, writers=1, own_parts=False), seed=1)
    assert one.wall == pytest.approx(packing.tokens * 50e-6, rel=0.05)
    assert one.busy["the process that writes"] > 0.95
    four = simulate(packing, replace(STEADY, writers=4, own_parts=False), seed=1)
    assert four.wall == pytest.approx(one.wall / 4, rel=0.05)
    slow = simulate(replace(WORK, stored=200), replace(STEADY, disk=1e7), seed=1)
    written = (WORK.tokens * 200 + 2 * 2 * WORK.parameters) / 1e7  # with the weights that two nodes read
    assert slow.wall - WORK.tokens * 200 / CHECKSUM_SPEED == pytest.approx(written, rel=0.05)
    assert slow.busy["the disk"] > 0.95


@pytest.mark.parametrize("own_parts", [True, False])
@pytest.mark.parametrize("writers", [None, 1])
def test_failures_cost_time_and_lose_nothing(own_parts, writers):
    steady = replace(STEADY, own_parts=own_parts, writers=writers, disk=1e12)
    broken = replace(steady, failure_every=60, repair=20, start=5, mean_wait=5)
    quiet = simulate(WORK, steady, seed=3)
    run = engine_simulation._Run(WORK, broken, seed=3)
    stored = []
    keep = run._stored
    run._stored = lambda who, unit: (stored.append(unit), keep(who, unit))
    run.go()
    assert sorted(stored) == list(range(64))
    assert run.failures > 0
    assert run.now > quiet.wall
    assert run.computed > quiet.busy["the GPUs"] * (quiet.wall - 1) * 8  # what was lost is computed again


def test_a_worker_that_is_lost_again_before_it_has_started_starts_once():
    run = engine_simulation._Run(WORK, replace(STEADY, failure_every=60, repair=100, start=5, disk=1e12), seed=3)
    started, start = [], run._start

    def watched(who, unit):
        started.append(run.workers[who].begun)
        start(who, unit)

    run._start = watched
    run.go()
    assert len(started) > len(run.workers)
    assert set(started) == {None}


def test_a_seed_decides_everything():
    engine = replace(STEADY, failure_every=2000, spread=0.2, mean_wait=60, gives_back=True)
    assert simulate(WORK, engine, 5) == simulate(WORK, engine, 5)
    assert simulate(WORK, engine, 5) != simulate(WORK, engine, 6)


def test_gpus_that_are_given_back_are_held_for_less_time():
    uneven = replace(STEADY, spread=0.5)
    held = simulate(WORK, uneven, 2)
    given = simulate(WORK, replace(uneven, gives_back=True), 2)
    assert given.gpu_seconds < held.gpu_seconds
    assert held.wall == given.wall
    # Where the next free worker takes the next unit, nobody waits for the slowest.
    assert simulate(WORK, replace(uneven, own_parts=False), 2).wall < held.wall
