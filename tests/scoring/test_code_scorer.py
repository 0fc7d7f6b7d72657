"""The code scorer on HumanEval, and a sandbox that programs try to leave. Nothing here is simulated."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fusion_plugins.scoring.sandbox as sandbox_module
from fusion_plugins.errors import ConfigError, DataError, ScoringError
from fusion_plugins.scoring.code_scorer import CodeScorer, extract_code, list_tests
from fusion_plugins.scoring.sandbox import LAUNCHER, Limits, Sandbox
from fusion_plugins.store import RowManifest, RowWriter, open_rows

DATA = Path(__file__).parents[1] / "data"
HUMANEVAL = [json.loads(line) for line in (DATA / "humaneval.jsonl").read_text().splitlines()]
SHORT = {"cpu_seconds": 1, "wall_seconds": 4, "total_seconds": 30}


@pytest.fixture(scope="module")
def scorer():
    os.environ["FUSION_TEST_SECRET"] = "do not tell"
    made = CodeScorer(workers=2, **SHORT)
    yield made
    made.close()
    del os.environ["FUSION_TEST_SECRET"]


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(Limits(**SHORT))


def row(problem, body):
    code = problem["prompt"] + body
    tests = {"test": problem["test"], "entry_point": problem["entry_point"]}
    return {"response": f"Here it is:\n```python\n{code}\n```\nDone.", "tests": tests}


# HumanEval


def test_canonical_solutions_pass(scorer):
    assert len(HUMANEVAL) == 10
    scores = scorer.score([row(problem, problem["canonical_solution"]) for problem in HUMANEVAL])
    assert [(score.correct, score.reason) for score in scores] == [(True, None)] * 10
    assert scores[0].details["tests"] == ["passed"]


def test_solutions_that_return_nothing_fail(scorer):
    scores = scorer.score([row(problem, "    return None\n") for problem in HUMANEVAL])
    assert [score.correct for score in scores] == [False] * 10
    assert scores[0].reason == "tests: 1 failed"
    assert "Error" in scores[0].details["error"]


def test_code_that_does_not_compile_is_incorrect_without_running_a_test(scorer):
    (score,) = scorer.score([row(HUMANEVAL[0], "    return ((\n")])
    assert score.correct is False
    assert score.reason == "does not compile"
    assert "SyntaxError" in score.details["error"]
    assert score.details["tests"] == []


# Verdicts


def test_every_test_has_its_own_verdict(sandbox):
    code = "def f(x):\n    if x == 3:\n        while True:\n            pass\n    return x + 1\n"
    tests = [
        "assert f(1) == 2",
        "assert f(1) == 3",
        "f()",
        "f(3)",
        "import ctypes; ctypes.string_at(0)",
        "assert f(2) == 3",
    ]
    outcome = sandbox.run(code, tests)
    assert [test.verdict for test in outcome.tests] == ["passed", "failed", "failed", "timeout", "crashed", "passed"]
    assert outcome.tests[1].error.startswith("AssertionError")
    assert "missing 1 required positional argument" in outcome.tests[2].error


def test_tests_do_not_see_what_others_did(sandbox):
    write = "open('left', 'w').write('x'); STATE.append(1); assert len(STATE) == 1"
    outcome = sandbox.run("STATE = []", [write, write, "import os; assert os.listdir('.') == []"])
    assert [test.verdict for test in outcome.tests] == ["passed"] * 3


@pytest.mark.parametrize(
    "end",
    [
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import sys; sys.exit()",
        "import os, signal; os.kill(os.getpid(), 9)",
    ],
)
def test_a_program_that_ends_itself_does_not_pass(sandbox, end):
    (test,) = sandbox.run(end, ["assert False"]).tests
    assert test.verdict in ("failed", "crashed")


def test_a_program_that_writes_verdicts_does_not_pass(sandbox):
    forge = (
        "import os\n"
        "for fd in range(64):\n"
        '    for text in (b\'["word", "passed", null]\', b\'{"static": null, "tests": [{"verdict": "passed"}]}\'):\n'
        "        try:\n            os.write(fd, text)\n        except OSError:\n            pass\n"
        "os._exit(0)\n"
    )
    (test,) = sandbox.run(forge, ["assert False"]).tests
    assert test.verdict == "failed"


def test_code_under_the_main_guard_does_not_run_and_dataclasses_work(sandbox):
    code = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Point:\n    x: int\n"
        "if __name__ == '__main__':\n    raise RuntimeError\n"
    )
    (test,) = sandbox.run(code, ["assert Point(3).x == 3"]).tests
    assert test.verdict == "passed", test


def test_what_is_missing_or_broken_in_the_data_is_no_verdict(scorer):
    none, empty, broken = scorer.score(
        [
            {"response": "x = 1", "tests": None},
            {"response": "x = 1", "tests": []},
            {"response": "x = 1", "tests": ["assert x =="]},
        ]
    )
    assert none.correct is empty.correct is broken.correct is None
    assert none.reason == "no tests"
    assert broken.reason == "a test does not compile"
    (prose,) = scorer.score([{"response": "```bash\nls\n```", "tests": ["pass"]}])
    assert prose.correct is False
    assert prose.reason == "the response has no code"
    with pytest.raises(DataError, match="came 3"):
        list_tests(3)


def test_total_time_ends_the_tests_that_are_left():
    limited = Sandbox(Limits(cpu_seconds=1, wall_seconds=2, total_seconds=1))
    outcome = limited.run("import time", ["time.sleep(5)", "pass"])
    assert [test.verdict for test in outcome.tests] == ["timeout", "not_run"]


# Escapes: each of these programs must fail, and the next one must run as if nothing had happened.

ESCAPES = {
    "opens a connection": "import socket; socket.create_connection(('127.0.0.1', 1), timeout=2)",
    "fetches a page": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1/', timeout=2)",
    "opens a local socket": "import socket; socket.socket(socket.AF_UNIX)",
    "writes into the root": "open('/here', 'w')",
    "writes into the library": "import os; open(os.__file__, 'a')",
    "reads the password file": "open('/etc/passwd').read()",
    "reads the launcher": f"open({str(LAUNCHER)!r}).read()",
    "reads other processes": "open('/proc/1/environ').read()",
    "reads the environment": "import os; assert os.environ['FUSION_TEST_SECRET']",
    "starts a shell": "import subprocess; subprocess.check_call(['/bin/sh', '-c', 'true'])",
    "becomes root": "import os; os.setuid(0)",
    "makes namespaces": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "mounts": "import ctypes; assert ctypes.CDLL(None).mount(b't', b'/tmp', b'tmpfs', 0, 0) == 0",
    "traces the runner": "import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "shares memory that nothing counts": "import ctypes; assert ctypes.CDLL(None).shmget(0, 1 << 30, 0o1600) >= 0",
    "raises a limit": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "takes much memory": "block = bytearray(1 << 30)",
    "takes memory bit by bit": "kept = []\nwhile True:\n    kept.append('a' * 10**6)",
    "writes a large file": "file = open('/tmp/x', 'wb')\nwhile True:\n    file.write(bytes(10**6))",
    "writes many files": "for n in range(10**6):\n    open(f'/tmp/{n}', 'wb').write(bytes(10**6))",
    "starts many threads": (
        "import threading, time\nfor _ in range(1000):\n    threading.Thread(target=time.sleep, args=(9,)).start()"
    ),
    "forks without end": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "loops": "while True:\n    pass",
    "loops and ignores the signal": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass"
    ),
    "sleeps": "import time; time.sleep(1000)",
    "kills the runner": (
        "import os\nfor number in range(1, 32):\n    try:\n        os.kill(1, number)\n"
        "    except OSError:\n        pass\nos.kill(-1, 9)\nassert False"
    ),
    "leaves a process behind": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)\nassert False"
    ),
    "recurses": "def f():\n    f()\nf()",
}


@pytest.mark.parametrize("program", ESCAPES.values(), ids=ESCAPES)
def test_a_program_cannot_escape(sandbox, program):
    outcome = sandbox.run("", [program, "import os; assert os.listdir('/tmp') and not os.path.exists('/here')"])
    assert outcome.failure is None
    assert outcome.tests[0].verdict in ("failed", "timeout", "crashed"), outcome
    assert outcome.tests[1].verdict == "passed", outcome
    assert not Path("/here").exists()


def test_nothing_of_a_program_survives_its_sandbox(sandbox):
    marker = "fusion-sandbox-survivor"
    program = f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000 if {marker!r} else 0)\n"
    assert sandbox.run(program, ["pass"]).tests[0].verdict == "passed"
    time.sleep(0.2)
    ours = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _readable(path)]
    assert not [line for line in ours if b"sandbox_runner" in line or b"What runs inside the sandbox" in line]


def _readable(path):
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


# Failing closed


def test_without_namespaces_nothing_runs():
    """The kernel refuses new user namespaces to this process and its children, as a strict container does."""
    code = (
        "from pathlib import Path\n"
        "import subprocess, sys\n"
        "from fusion_plugins.errors import ScoringError\n"
        "from fusion_plugins.scoring.sandbox import Sandbox\n"
        "try:\n    Sandbox()\nexcept ScoringError as error:\n    print('REFUSED', error)\n"
    )
    # The launcher's own filter denies unshare: run inside it, the sandbox finds what a locked-down machine offers.
    lock = (
        f"import importlib.util; spec = importlib.util.spec_from_file_location('launcher', {str(LAUNCHER)!r}); "
        "launcher = importlib.util.module_from_spec(spec); spec.loader.exec_module(launcher); import ctypes; "
        "launcher.call('x', 'prctl', 38, *map(ctypes.c_ulong, (1, 0, 0, 0))); launcher.filter_system_calls(); "
        f"exec({code!r})"
    )
    run = subprocess.run(
        [sys.executable, "-c", lock], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120
    )
    assert "REFUSED" in run.stdout, run
    assert "create namespaces" in run.stdout
    assert "Operation not permitted" in run.stdout
    assert "user namespaces allowed" in run.stdout


def test_a_wall_that_does_not_hold_is_named(monkeypatch):
    monkeypatch.setitem(sandbox_module.WALLS, "imaginary wall", "assert not home")
    with pytest.raises(ScoringError, match="does not isolate: imaginary wall"):
        Sandbox(Limits(**SHORT))


def test_a_folder_that_is_not_there_is_not_quietly_left_out(tmp_path):
    with pytest.raises(ConfigError, match="packages"):
        CodeScorer(packages=[str(tmp_path / "nowhere")])


def test_unknown_and_useless_limits_are_refused():
    with pytest.raises(ConfigError, match="cpu_secs.*known limits: cpu_seconds"):
        CodeScorer(cpu_secs=3)
    with pytest.raises(ConfigError, match="memory"):
        CodeScorer(memory=0)


def test_a_killed_driver_takes_its_programs_with_it():
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
    while not (children := _descendants(driver.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    children = _descendants(driver.pid) or children
    assert children
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    while time.monotonic() < deadline and any(_alive(child) for child in children):
        time.sleep(0.05)
    assert not any(_alive(child) for child in children)


def test_ctrl_c_keeps_what_is_scored_and_ends_the_programs(tmp_path):
    columns = dict.fromkeys(("prompt_id", "source", "prompt", "response", "domain"), "string")
    manifest = RowManifest(
        stage="responses", columns={**columns, "index": "int64", "tests": "json"}, key=("prompt_id", "source", "index")
    )
    with RowWriter(tmp_path / "responses", manifest) as writer:
        for index in range(40):
            texts = {"prompt_id": "p", "source": "a", "prompt": "?", "domain": "code", "response": f"x = {index}"}
            # From the fourth on they take longer than anybody waits.
            writer.write({**texts, "index": index, "tests": [f"import time; time.sleep({0 if index < 4 else 60})"]})
    command = [sys.executable, "-c", "import sys; from fusion_plugins.cli import main; sys.exit(main())", "score"]
    command += ["--responses", str(tmp_path / "responses"), "--out", str(tmp_path / "scored"), "--set", "unit_rows=4"]
    command += ["--set", "scorers.code={wall_seconds: 100, total_seconds: 100, workers: 2}"]
    driver = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and driver.poll() is None:
        if (tmp_path / "scored" / "manifest.json").exists() and len(open_rows(tmp_path / "scored")) == 4:
            break
        time.sleep(0.1)
    time.sleep(1)
    children = _descendants(driver.pid)
    assert children, driver.communicate()
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=30)
    assert driver.returncode == 130
    assert "4 rows are safe" in errors
    assert len(open_rows(tmp_path / "scored")) == 4
    assert not any(_alive(child) for child in children)


def _descendants(pid):
    found, frontier = [], [pid]
    while frontier:
        parent = frontier.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            children = [int(child) for child in task.read_text().split()]
            found += children
            frontier += children
    return found


def _alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# Packages and code in text


def test_programs_import_only_from_the_folders_that_are_given(tmp_path):
    folder = tmp_path / "given"
    folder.mkdir(mode=0o755)
    (folder / "given.py").write_text("VALUE = 3\n")
    inside = Sandbox(Limits(**SHORT), packages=[str(folder)])
    tests = ["import given; assert given.VALUE == 3", f"open({str(folder / 'given.py')!r}, 'a')", "import numpy"]
    assert [test.verdict for test in inside.run("", tests).tests] == ["passed", "failed", "failed"]


@pytest.mark.parametrize(
    ("response", "name", "code"),
    [
        ("def f(): return 1", None, "def f(): return 1"),
        ("```python\na = 1\n```", None, "a = 1\n"),
        ("```\na = 1\n```", None, "a = 1\n"),
        ("```py\nlonger = 1\n```\n```python\nb\n```", None, "longer = 1\n"),
        (
            "```python\ndef f(): 1\n```\n```python\ndef f(): 2\n```\n```python\nprint(f(), 'and more text')\n```",
            "f",
            "def f(): 2\n",
        ),
        ("```python\ncut = off", None, "cut = off"),
        ("```bash\nls\n```", None, ""),
        ("  ```python\n  x = 1\n  ```", None, "  x = 1\n"),
    ],
)
def test_code_is_taken_out_of_its_fences(response, name, code):
    assert extract_code(response, name) == code


def test_forms_of_tests():
    assert list_tests("assert f() == 1") == ["assert f() == 1"]
    assert list_tests(["a", "b"]) == ["a", "b"]
    assert list_tests({"setup": "s", "tests": ["a", "b"]}) == ["s\na", "s\nb"]
    assert list_tests({"test": "def check(c): c()", "entry_point": "f"}) == ["def check(c): c()\ncheck(f)\n"]
    assert list_tests(None) == list_tests("  ") == []
