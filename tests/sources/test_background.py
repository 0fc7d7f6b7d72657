"""Work beside the model: in order, one at a time, and no error is lost."""

import threading
import time

import pytest

from fusion_plugins.sources.background import Background, ahead


def test_jobs_run_in_their_order_in_another_thread_while_the_caller_goes_on():
    done, started, go_on = [], threading.Event(), threading.Event()

    def first():
        started.set()
        assert go_on.wait(10)
        done.append(threading.current_thread())

    with Background() as writing:
        writing.submit(first)
        assert started.wait(10)
        writing.check()
        assert done == []
        go_on.set()
        writing.submit(lambda: done.append("second"))
    assert done[0] is not threading.current_thread()
    assert done[1:] == ["second"]


@pytest.mark.parametrize("ask", ["check", "submit", "end"])
def test_the_error_of_a_job_is_raised_by_the_next_call_and_nothing_runs_after_it(ask):
    done = []

    def fail():
        raise OSError("the disk is full")

    def write():
        with Background() as writing:
            writing.submit(fail)
            try:
                while ask == "check":
                    writing.check()
                    time.sleep(0.001)
                if ask == "submit":
                    writing.submit(lambda: done.append("late"))
            finally:
                if ask != "end":
                    writing.submit(lambda: done.append("later"))

    with pytest.raises(OSError, match="the disk is full"):
        write()
    assert done == []


def test_the_block_ends_only_when_its_job_has_ended_also_after_an_error():
    done = []

    def slow():
        time.sleep(0.1)
        done.append("slow")

    def write():
        with Background() as writing:
            writing.submit(slow)
            raise KeyError("of the caller")

    with pytest.raises(KeyError):
        write()
    assert done == ["slow"]


def test_items_are_made_one_ahead_in_order_and_an_error_arrives_in_its_place():
    made = []

    def items():
        for number in range(5):
            if number == 3:
                raise ValueError("no third")
            made.append(number)
            yield number

    taken = ahead(items())
    assert next(taken) == 0
    assert max(made) <= 1
    assert [next(taken), next(taken)] == [1, 2]
    with pytest.raises(ValueError, match="no third"):
        next(taken)
    assert list(ahead([])) == []


def test_who_stops_early_leaves_no_thread():
    before = threading.active_count()
    taken = ahead(iter(range(100)))
    next(taken)
    taken.close()
    assert threading.active_count() == before
