"""The sandbox as the driver sees it: failing closed, ending what it started."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fusion_plugins.scoring.sandbox as sandbox_module
import fusion_plugins.scoring.sandbox_limits as limits_module
import fusion_plugins.scoring.sandbox_worker as worker_module
from fusion_plugins.errors import ConfigError, ScoringError
from fusion_plugins.scoring.sandbox import Limits, Sandbox


def test_a_wall_that_does_not_hold_is_named(monkeypatch, short_limits):
    monkeypatch.setitem(sandbox_module.LAYERS, "imaginary layer", "assert not home")
    with pytest.raises(ScoringError, match="does not isolate; broken isolation layers: imaginary layer"):
        Sandbox(Limits(**short_limits))


def test_nothing_of_a_program_survives_its_sandbox(tmp_path, short_limits):
    # The folder of packages is in the command line of every process of this sandbox, and of no other.
    folder = tmp_path / "fusion-sandbox-survivor"
    folder.mkdir()
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)\n"
    inside = Sandbox(Limits(**short_limits), packages=[str(folder)])
    before = _processes_with(folder)
    assert inside.run(program, ["pass"]).tests[0].verdict == "passed"
    assert _processes_with(folder) == before
    inside.close()
    deadline = time.monotonic() + 20
    while _processes_with(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _processes_with(folder)


def test_processes_are_found_while_they_run(tmp_path, short_limits):
    folder = tmp_path / "fusion-sandbox-running"
    folder.mkdir()
    inside = Sandbox(Limits(**short_limits), packages=[str(folder)])
    runs = threading.Thread(target=inside.run, args=("", ["import time; time.sleep(100)"]))
    runs.start()
    deadline = time.monotonic() + 60
    while len(_processes_with(folder)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(_processes_with(folder)) >= 3
    inside.close()
    runs.join(timeout=60)
    while _processes_with(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _processes_with(folder)


def test_a_closed_sandbox_kills_a_program_that_another_thread_starts(short_limits):
    inside = Sandbox(Limits(**short_limits))
    inside.close()
    started = time.monotonic()
    outcome = inside.run("", ["import time; time.sleep(100)"])
    assert outcome.failure == "the sandbox is closed"
    assert time.monotonic() - started < short_limits["wall_seconds"]


def test_limits_that_are_not_above_0_are_named():
    with pytest.raises(ConfigError, match="limits above 0, got memory: 0, disk: -1; leave a limit out"):
        Limits(memory=0, disk=-1)


def test_a_helper_that_is_killed_or_stopped_is_a_reason_and_the_next_run_works(short_limits, monkeypatch, descendants):
    inside = Sandbox(Limits(**short_limits))
    for number, reason in (
        (signal.SIGKILL, "the sandbox ended with status"),
        (signal.SIGSTOP, "gave no verdict in time"),
    ):
        assert inside.run("", ["pass"]).tests[0].verdict == "passed"
        (helper,) = (process for process in descendants(os.getpid()) if _is_runner(process, inside))
        monkeypatch.setattr(worker_module, "GRACE_SECONDS", 0.5)
        os.kill(helper, number)
        outcome = inside.run("", ["pass"])
        monkeypatch.undo()
        assert reason in outcome.failure
        assert outcome.tests == ()
    assert inside.run("", ["pass"]).tests[0].verdict == "passed"
    inside.close()


def _is_runner(process, inside):
    (worker,) = inside._all
    return process in limits_module.children(worker.process.pid)


FORK = "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        {}\n        os._exit(0)\n"
#: program that takes together what each of its processes may take alone -> verdict, part of the reason
TOGETHER = {
    "memory": (
        FORK.format("kept = b'x' * (120 << 20); time.sleep(9)") + "time.sleep(9)",
        "crashed",
        "512 MiB of memory",
    ),
    "memory that is shared": (
        "import mmap\nkept = []\n"
        + FORK.format("m = mmap.mmap(-1, 120 << 20); m[:] = bytes(120 << 20); time.sleep(9)")
        + "time.sleep(9)",
        "crashed",
        "512 MiB of memory",
    ),
    "memory of a child's children": (
        FORK.replace("8", "5").format("os.fork() or os.setsid(); kept = b'x' * (75 << 20); time.sleep(9)")
        + "time.sleep(9)",
        "crashed",
        "512 MiB of memory",
    ),
    "processor time": (
        FORK.format("end = time.time() + 0.9\n        while time.time() < end: pass") + "time.sleep(9)",
        "timeout",
        "time limit",
    ),
}


@pytest.mark.parametrize("what", TOGETHER)
def test_all_processes_of_a_test_share_its_limits(sandbox, what):
    code, verdict, reason = TOGETHER[what]
    started = time.monotonic()
    (test,) = sandbox.run(code, ["pass"]).tests
    assert (test.verdict, reason in test.error) == (verdict, True), test
    assert time.monotonic() - started < 20


def test_a_test_finds_nothing_of_the_one_before(sandbox):
    spoil = (
        "import builtins, sys, os, random, json, unittest\nbuiltins.len = json.loads = None\n"
        "sys.modules['re'] = None\nunittest.TestCase.assertEqual = None\n"
        "open('/tmp/left', 'w').write('x')\nos.environ['LEFT'] = 'x'\nos.chdir('/')\n"
        "secret = 'the ' + 'expected ' + 'value'\nos.umask(0o777)\nsys.path.insert(0, '/tmp')"
    )
    clean = (
        "import ctypes, gc, os, re, json, sys, unittest\n"
        "assert len(json.loads('[1]')) == 1 and unittest.TestCase.assertEqual\n"
        "assert os.listdir('/tmp') == [] and 'LEFT' not in os.environ and os.getcwd() == "
        "'/tmp' and '/tmp' not in sys.path\nwanted = 'the ' + 'expected ' + 'value'\n"
        "assert sum(wanted in repr(thing) for thing in gc.get_objects() if type(thing) "
        "in (str, bytes, dict)) <= 1"
    )
    for _ in range(2):
        assert [test.verdict for test in sandbox.run("", [spoil, clean]).tests] == ["passed", "passed"]
    draws = {sandbox.run("import random", [f"assert random.random() * {n} < 0.5"]).tests[0].verdict for n in [1] * 12}
    assert draws == {"passed", "failed"}


def test_what_fills_the_disk_is_a_verdict_and_gone_in_the_next_test(sandbox):
    fill = {
        "bytes": "for n in range(99):\n    open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))",
        "files": "for n in range(10**6):\n    open(f'/tmp/{n}', 'w').close()",
        "folders": "import os\nfor n in range(10**6):\n    os.mkdir(f'/tmp/{n}')",
    }
    for code in fill.values():
        full, after = sandbox.run(
            "", [code, "import os; open('x', 'wb').write(bytes(1 << 20)); assert os.listdir() == ['x']"]
        ).tests
        assert full.verdict == "failed"
        assert "No space left on device" in full.error
        assert after.verdict == "passed"
    # Also where the checks need the disk themselves.
    test = {"kind": "pytest", "source": "def test_a():\n    assert False"}
    (found,) = sandbox.run(
        fill["files"]
        .replace("open", "try:\n        open")
        .replace("close()", "close()\n    except OSError:\n        break"),
        [test],
    ).tests
    assert found.verdict == "failed"


def _processes_with(folder):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            pass
    return found


def test_a_killed_driver_takes_its_programs_with_it(descendants, alive):
    code = (
        "from fusion_plugins.scoring.sandbox import Sandbox, Limits\n"
        "sandbox = Sandbox(Limits(wall_seconds=300, total_seconds=300))\nprint('ready', flush=True)\n"
        "sandbox.run('', ['import time; time.sleep(300)'])\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True
    )
    assert driver.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while not (children := descendants(driver.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    children = descendants(driver.pid) or children
    assert children
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    while time.monotonic() < deadline and any(alive(child) for child in children):
        time.sleep(0.05)
    assert not any(alive(child) for child in children)
