"""The worker pool: time limits kept by killing, crashes that cost one request, no process left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusion_plugins.errors import ScoringError
from fusion_plugins.scoring.pool import Failure, WorkerPool

ROOT = Path(__file__).parents[2]
ECHO = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request.get("die"):
        os._exit(3)
    time.sleep(request.get("sleep", 0))
    print(json.dumps({"process": os.getpid(), **request}), flush=True)
"""


@pytest.fixture
def echo(tmp_path, monkeypatch):
    """The name of a worker module that answers with the request and its process id."""
    (tmp_path / "echo_worker.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return "echo_worker"


@pytest.fixture
def pool(echo):
    made = WorkerPool(echo, workers=2, timeout=2)
    yield made
    made.close()


def test_a_worker_that_hangs_or_dies_gives_no_verdict_and_is_replaced():
    pool = WorkerPool("fusion_plugins.scoring.math_worker", workers=1, timeout=3)
    try:
        assert pool.map([{"reference": "5", "response": "5"}])[0]["correct"] is True
        os.kill(pool._workers[0]._process.pid, signal.SIGKILL)
        requests = [{"reference": "5", "response": response} for response in ("\\boxed{9^{9^{9^{9}}}}", "\\boxed{5}")]
        tower, good = pool.map(requests)
    finally:
        pool.close()
    assert isinstance(tower, Failure)
    assert tower in ("no verdict within 3 s", "the verifier's process died")
    assert good["correct"] is True


def test_a_worker_that_cannot_start_is_an_error_that_says_what_to_install():
    pool = WorkerPool("fusion_plugins.scoring.no_such_worker", workers=1, timeout=5)
    with pytest.raises(ScoringError, match=r"No module named.*pip install .*\[score\]"):
        pool.map([{}])
    pool.close()


def test_replies_are_in_the_order_of_the_requests_whoever_is_first(pool):
    seconds = [0.4, 0.0, 0.2, 0.0, 0.1]
    replies = pool.map([{"number": number, "sleep": wait} for number, wait in enumerate(seconds)])
    assert [reply["number"] for reply in replies] == list(range(5))
    assert pool.map([]) == []


def test_a_process_serves_many_requests_and_few_requests_start_few_processes(pool, descendants):
    before = set(descendants(os.getpid()))
    found = {pool.map([{}])[0]["process"] for _ in range(5)}
    assert len(found) == 1
    assert set(descendants(os.getpid())) - before == found


def test_a_request_that_hangs_or_crashes_costs_no_other_request(pool):
    started = time.monotonic()
    late, dead, *good = pool.map([{"sleep": 60}, {"die": True}, *({"number": number} for number in range(20))])
    assert (late, dead) == ("no verdict within 2 s", "the verifier's process died")
    assert isinstance(late, Failure)
    assert isinstance(dead, Failure)
    assert [reply["number"] for reply in good] == list(range(20))
    assert time.monotonic() - started < 30


def test_a_killed_process_is_replaced(pool, alive):
    first = pool.map([{}])[0]["process"]
    assert isinstance(pool.map([{"sleep": 60}])[0], Failure)
    assert not alive(first)
    assert pool.map([{}])[0]["process"] != first


def test_a_reply_may_be_longer_than_a_pipe(pool):
    text = "x" * 1_000_000
    assert pool.map([{"text": text}, {"text": text}])[1]["text"] == text


def test_close_ends_processes_that_work(echo, descendants, alive):
    before = set(descendants(os.getpid()))
    closed = WorkerPool(echo, workers=2, timeout=60)
    closed.map([{"sleep": 0.3}, {"sleep": 0.3}])
    made = set(descendants(os.getpid())) - before
    assert len(made) == 2
    asked = [closed._threads.submit(closed._ask, {"sleep": 60}) for _ in range(2)]
    time.sleep(0.2)
    started = time.monotonic()
    closed.close()
    assert time.monotonic() - started < 10
    assert [request.result() for request in asked] == ["the verifier's process died"] * 2
    assert not any(alive(process) for process in made)
    assert set(descendants(os.getpid())) <= before


def test_a_script_without_main_guard_on_standard_input_can_score():
    """What keeps `spawn`, and with it every pool on multiprocessing, out."""
    script = (
        "from fusion_plugins.scoring.math_scorer import MathScorer\n"
        "scorer = MathScorer(workers=1, timeout=60)\n"
        "print(scorer.score([{'reference': '5', 'response': 'It is 5.'}])[0].correct)\n"
        "scorer.close()\n"
    )
    run = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert run.stdout == "True\n", run.stderr


DRIVER = """
from fusion_plugins.scoring.pool import WorkerPool
pool = WorkerPool("fusion_plugins.scoring.math_worker", workers=2, timeout=TIMEOUT)
pool.map([{"reference": "5", "response": "5"}] * 2)
print("ready", flush=True)
try:
    pool.map([{"reference": "5", "response": "\\\\boxed{9^{9^{9^{9}}}}"}] * 4)
finally:
    pool.close()
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_stopped_driver_leaves_no_process_behind(stop, descendants, alive):
    # After SIGKILL nobody kills the processes: their own alarm ends them, five seconds after the time limit.
    code = DRIVER.replace("TIMEOUT", "60" if stop == signal.SIGINT else "2")
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert driver.stdout.readline() == "ready\n"
    time.sleep(0.5)
    children = descendants(driver.pid)
    assert children
    driver.send_signal(stop)
    driver.wait(timeout=30)
    assert driver.returncode != 0
    deadline = time.monotonic() + (5 if stop == signal.SIGINT else 30)
    while any(alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(child) for child in children)


def test_a_request_or_a_reply_that_is_no_json_costs_one_request(tmp_path, monkeypatch):
    worker = (
        "import sys\nprint('ready', flush=True)\nfor line in sys.stdin:\n    print(line.strip()[1:-1], flush=True)\n"
    )
    (tmp_path / "odd_worker.py").write_text(worker)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    pool = WorkerPool("odd_worker", workers=1, timeout=5)
    nested = []
    for _ in range(100_000):
        nested = [nested]
    replies = pool.map([{"a": 1}, {"a": {1, 2}}, {"a": nested}, ["[1]"], [{"a": 1}]])
    pool.close()
    assert [type(reply) for reply in replies] == [Failure] * 4 + [dict]
    assert replies[0] == "the verifier's reply is not JSON"
    assert all("cannot be written as JSON" in reply for reply in replies[1:3])
    assert replies[3] == "the verifier's reply is not one of ours"
