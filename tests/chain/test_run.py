"""`fusion run`: order, what is done again and what is not, failures, kills, Ctrl-C, and a second run beside it."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from fusion_plugins.chain import records as records_module
from fusion_plugins.chain.process import by_hand
from fusion_plugins.chain.records import Records, state_of
from fusion_plugins.chain.run import plan_chain, run_chain
from fusion_plugins.chain.settings import load_chain
from fusion_plugins.errors import ChainError, ConfigError

FUSION = Path(sys.executable).parent / "fusion"


def bash(name, script, **keys):
    """A step that also notes down that it ran."""
    return {"name": name, "command": ["bash", "-c", f"echo {name} >> ran; {script}"], **keys}


@pytest.fixture
def write(tmp_path):
    def written(*steps, **keys):
        path = tmp_path / "fusion.yml"
        path.write_text(yaml.safe_dump({"steps": list(steps), **keys}))
        return path

    return written


@pytest.fixture
def ran(tmp_path):
    """The steps that ran since the last call, in order."""

    def names():
        path = tmp_path / "ran"
        found = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    return names


THREE = (
    bash("train", "cat data/a > model", reads=["data"], writes=["model"]),
    bash("sample", "mkdir -p data; cat prompts > data/a", reads=["prompts"], writes=["data"]),
    bash("measure", "wc -c model", needs=["train"], stdout="size"),
)


def test_steps_run_in_order_once_and_again_when_what_they_read_changes(write, ran, tmp_path):
    (tmp_path / "prompts").write_text("one")
    path = write(*THREE)
    run_chain(load_chain(path))
    assert ran() == ["sample", "train", "measure"]
    assert (tmp_path / "size").read_text() == "3 model\n"
    run_chain(load_chain(path))
    assert ran() == []

    # The same content with another time is the same; other content reaches everything after it.
    os.utime(tmp_path / "prompts", (1, 1))
    run_chain(load_chain(path))
    assert ran() == []
    (tmp_path / "prompts").write_text("four")
    run_chain(load_chain(path))
    assert ran() == ["sample", "train", "measure"]
    assert (tmp_path / "size").read_text() == "4 model\n"

    # A result that is the same as before changes nothing after it; a missing one is made again.
    (tmp_path / "model").unlink()
    assert [(p.step.name, p.due) for p in plan_chain(load_chain(path)) if p.due] == [
        ("train", f"{tmp_path}/model is missing"),
        ("measure", f"{tmp_path}/model has changed"),
    ]
    run_chain(load_chain(path))
    assert ran() == ["train"]
    run_chain(load_chain(write(*THREE, variables={"SEED": 1})), names=["sample"])
    assert ran() == ["sample"]


def test_a_step_that_writes_nothing_still_makes_its_followers_run_again(write, ran, tmp_path):
    (tmp_path / "x").write_text("1")
    steps = [bash("first", "true", reads=["x"]), bash("second", "true", needs=["first"])]
    path = write(*steps)
    run_chain(load_chain(path))
    (tmp_path / "x").write_text("2")
    run_chain(load_chain(path))
    run_chain(load_chain(path))
    assert ran() == ["first", "second", "first", "second"]


def test_what_was_made_of_other_inputs_is_moved_away_and_what_a_kill_left_is_not(write, tmp_path):
    """Else a training with another learning rate would resume from the checkpoint of the old one."""
    script = "mkdir -p out; echo $RATE >> out/log; [ -e go ]"
    step = bash("train", script, writes=["out"], variables={"RATE": 1})
    (tmp_path / "out").mkdir()  # an empty folder is no result
    with pytest.raises(ChainError):
        run_chain(load_chain(write(step)))
    (tmp_path / "go").touch()
    run_chain(load_chain(write(step)))
    assert (tmp_path / "out" / "log").read_text() == "1\n1\n"
    for rate in (2, 3):
        run_chain(load_chain(write(step | {"variables": {"RATE": rate}})))
        assert (tmp_path / "out" / "log").read_text() == f"{rate}\n"
    assert [(tmp_path / name / "log").read_text() for name in ("out.old", "out.old1")] == ["1\n1\n", "2\n"]
    run_chain(load_chain(write(step | {"variables": {"RATE": 4}, "on_change": "keep"})))
    assert (tmp_path / "out" / "log").read_text() == "3\n4\n"


def test_a_failure_shows_the_last_lines_and_how_to_repeat_it_and_starts_nothing_new(write, ran, tmp_path):
    slow = bash("slow", "sleep 0.5; touch slow-end", writes=["slow-end"])
    bad = bash(
        "bad", "for i in $(seq 40); do echo line $i; done; echo $'why \\e[2J' >&2; exit 3", variables={"A": "b c"}
    )
    path = write(slow, bad, bash("never", "true", needs=["bad"]), bash("late", "true", needs=["slow"]))
    with pytest.raises(ChainError) as failed:
        run_chain(load_chain(path), jobs=2)
    message = str(failed.value)
    assert "step bad ended with status 3" in message
    assert "line 40\n    why \\x1b[2J" in message
    assert "line 20" not in message
    assert "1 of 4 steps are done" in message
    line = message.splitlines()[message.splitlines().index("It alone again:") + 1]
    assert line.startswith(f"    cd {tmp_path} && A='b c' bash -c ")
    assert subprocess.run(["bash", "-c", line], capture_output=True).returncode == 3
    assert ran() == ["slow", "bad", "bad"]
    assert "line 1\n" in (tmp_path / "logs" / "bad.log").read_text()


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (bash("a", "true", writes=["no"]), "ended well, but there is no"),
        (bash("a", "kill -9 $$"), "ended with status -9"),
        (bash("a", "mkdir -p d; rmdir d", writes=["d"]), "ended well, but there is no"),
    ],
)
def test_a_step_without_its_result_has_failed(step, said, write):
    with pytest.raises(ChainError, match=said):
        run_chain(load_chain(write(step)))
    with pytest.raises(ChainError, match=said):
        run_chain(load_chain(write(step)))


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"name": "a", "command": "no-such-program x"}, "got 'no-such-program'"),
        ({"name": "a", "command": "./no.sh"}, "got './no.sh'"),
        ({"name": "a", "command": "true", "env": ".venv-none"}, "which has no folder bin"),
        ({"name": "a", "command": "true", "reads": ["nothing.jsonl"]}, "no step writes it"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(step, said, write, ran):
    with pytest.raises(ConfigError, match=said):
        run_chain(load_chain(write(bash("first", "true"), step)))
    assert ran() == []


def test_independent_steps_run_side_by_side_and_no_more_than_asked_for(write, tmp_path):
    meet = "touch $0; for i in $(seq 100); do [ -e a ] && [ -e b ] && exit 0; sleep 0.05; done; exit 1"
    steps = [{"name": name, "command": ["bash", "-c", meet, name]} for name in ("a", "b")]
    run_chain(load_chain(write(*steps)), jobs=2)
    alone = "mkdir busy && sleep 0.1 && rmdir busy"
    run_chain(load_chain(write(*(bash(name, alone) for name in "abc"))), jobs=1)


def test_a_step_runs_in_the_environment_that_it_names(write, tmp_path):
    program = tmp_path / "venv" / "bin" / "tool"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/bash\necho $VIRTUAL_ENV $X\n")
    program.chmod(0o755)
    step = {"name": "a", "command": "tool", "env": "mine", "variables": {"X": 7}, "stdout": "said"}
    run_chain(load_chain(write(step, environments={"mine": "venv"})))
    assert (tmp_path / "said").read_text() == f"{tmp_path}/venv 7\n"


def test_a_step_runs_again_in_another_environment(write, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "bin").mkdir(parents=True)
    step = {"name": "a", "command": "true", "env": "mine"}

    def due(step, **keys):
        return plan_chain(load_chain(write(step, **keys)))[0].due

    run_chain(load_chain(write(step, environments={"mine": "one"})))
    assert due(step, environments={"mine": "one"}) is None
    assert due({**step, "env": "one"}) is None  # another name of the same
    for other, environments in [("mine", {"mine": "two"}), ("two", {}), (None, {})]:
        assert due({**step, "env": other}, environments=environments) == "its environment (env) has changed"
    run_chain(load_chain(write({"name": "a", "command": "true"})))
    assert due(step, environments={"mine": "one"}) == "its environment (env) has changed"


def test_a_step_of_an_earlier_version_whose_record_names_no_environment_is_done(write, tmp_path):
    (tmp_path / "one" / "bin").mkdir(parents=True)
    chain = load_chain(write({"name": "a", "command": "true", "env": "one"}))
    run_chain(chain)
    file = Records(chain).folder / "a.json"
    record = json.loads(file.read_text())
    del record["env"]
    file.write_text(json.dumps(record))
    assert plan_chain(chain)[0].due is None


def test_what_a_killed_step_has_started_keeps_a_second_run_out(write, tmp_path):
    """Without the lock, which programs of Python do not hand on."""
    chain = load_chain(write(bash("a", "true")))
    records = Records(chain)
    records.folder.mkdir(parents=True)
    worker = subprocess.Popen(["bash", "-c", "sleep 60 & exit"], start_new_session=True)
    worker.wait()
    records.save("a", replace(records.planned(chain.steps["a"]), pid=worker.pid))
    try:
        with pytest.raises(ChainError, match=rf"step a started .*kill -- -{worker.pid}"):
            run_chain(chain)
        assert not (tmp_path / "ran").exists()
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while records_module._outlives_its_leader(worker.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    run_chain(chain)
    # A number that another program has by now is no reason to wait.
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger:
        records.save("a", replace(records.planned(chain.steps["a"]), pid=stranger.pid))
        run_chain(chain)
        stranger.kill()


def test_a_step_waits_for_no_server_that_does_not_answer(write, ran):
    class Locked(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(401)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Locked) as server:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run_chain(load_chain(write(bash("a", "true", env=url))))
        server.shutdown()
    assert ran() == ["a"]
    with pytest.raises(ChainError, match="expected an answer of the server http://127.0.0.1"):
        run_chain(load_chain(write(bash("b", "true", env=url))))
    with pytest.raises(ChainError, match=r"the server \*\*\*@host/v1, got: no URL") as failed:
        run_chain(load_chain(write(bash("c", "true", env="http://me:secret@host/v1"))))
    assert "secret" not in str(failed.value)
    assert ran() == []


def test_a_secret_is_in_no_message_and_no_record(write, tmp_path):
    step = bash("a", "test $HF_TOKEN = hf_secret && exit 3", variables={"HF_TOKEN": "hf_secret"})
    with pytest.raises(ChainError, match='HF_TOKEN="\\$HF_TOKEN" bash') as failed:
        run_chain(load_chain(write(step)))
    assert "status 3" in str(failed.value)
    # The command of this test names it; nothing else does.
    step["command"][-1] = "true"
    run_chain(load_chain(write(step)))
    for file in (tmp_path / ".fusion_run" / "fusion").glob("*.json"):
        assert "hf_secret" not in file.read_text()
    step["variables"]["HF_TOKEN"] = "hf_other"
    assert "variables have changed" in str(plan_chain(load_chain(write(step)))[0].due)


def test_names_of_secrets_are_those_of_every_record_and_older_records_hold(write, tmp_path):
    """Earlier versions kept the value of WEBHOOK, and a digest of PAD_TOKEN."""
    variables = {"WEBHOOK": "http://hooks/t0p", "DB_PASSWD": "pw", "PAD_TOKEN": "<pad>", "SEED": 3}
    chain = load_chain(write(bash("a", "true", variables=variables)))
    run_chain(chain)
    (file,) = (tmp_path / ".fusion_run" / "fusion").glob("*.json")
    digest = {name: hashlib.sha256(str(value).encode()).hexdigest() for name, value in variables.items()}
    kept = json.loads(file.read_text())
    assert kept["variables"] == digest | {"PAD_TOKEN": "<pad>", "SEED": "3"}
    shown = '&& DB_PASSWD="$DB_PASSWD" PAD_TOKEN=\'<pad>\' SEED=3 WEBHOOK="$WEBHOOK" bash'
    assert shown in by_hand(chain, chain.steps["a"])
    old = {"WEBHOOK": "http://hooks/t0p", "DB_PASSWD": "pw", "PAD_TOKEN": digest["PAD_TOKEN"], "SEED": "3"}
    for recorded, due in (
        (old, None),
        (old | {"DB_PASSWD": "other"}, "changed"),
        (old | {"PAD_TOKEN": "0"}, "changed"),
    ):
        file.write_text(json.dumps(kept | {"variables": recorded}))
        assert (due or "None") in str(plan_chain(chain)[0].due), recorded


# Runs that are killed or interrupted: in processes of their own.

LINES = 12
WRITER = f"""
import sys, time
from pathlib import Path
out = Path(sys.argv[1]); source = Path(sys.argv[2]) if sys.argv[2:] else None
base = int(source.read_text().split()[-1]) if source else 0
have = len(out.read_text().splitlines()) if out.exists() else 0
for number in range(have, {LINES}):  # it resumes where it was killed
    time.sleep(0.03)
    with out.open("a") as file:
        file.write(f"{{base + number + 1}}\\n")
"""


def _start(path, *arguments):
    return subprocess.Popen(
        [FUSION, "run", path, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def _groups(path):
    """Process groups of the steps that are at work."""
    records = [json.loads(file.read_text()) for file in (path.parent / ".fusion_run" / "fusion").glob("*.json")]
    return [record["pid"] for record in records if not record["done"] and record["pid"]]


@pytest.mark.slow
def test_kills_at_any_point_of_the_runner_or_of_a_step_change_nothing(write, tmp_path):
    (tmp_path / "writer.py").write_text(WRITER)
    python = sys.executable
    path = write(
        {"name": "a", "command": [python, "writer.py", "a.txt"], "writes": ["a.txt"]},
        {"name": "b", "command": [python, "writer.py", "b.txt", "a.txt"], "writes": ["b.txt"]},
        {"name": "c", "command": [python, "writer.py", "c.txt", "a.txt"], "writes": ["c.txt"]},
        {"name": "d", "command": [python, "writer.py", "d.txt", "b.txt"], "writes": ["d.txt"], "needs": ["c"]},
    )
    place, kills = random.Random(3), 0
    for number in range(40):
        process = _start(path, "--jobs", "2")
        try:
            process.wait(0.35 + place.random() * (0.3 if kills < 3 else 0.8) if number < 12 else 30)
        except subprocess.TimeoutExpired:
            kills += 1
            groups = _groups(path)
            # The runner says that a step failed, unless the step had ended, or was one of a run before.
            if not (groups and place.random() < 0.5 and _kill(place.choice(groups))):
                os.killpg(process.pid, signal.SIGKILL)
                for group in groups:  # half of the time the steps outlive the runner for a while
                    if place.random() < 0.5:
                        _kill(group)
        output = process.communicate()[0].decode()
        if process.returncode == 0:
            break
        assert process.returncode in (1, -signal.SIGKILL), output
        assert not process.returncode == 1 or "status -9" in output or "is being run" in output, output
    assert process.returncode == 0, output
    assert kills >= 3
    expected = {
        name: [str(base + i + 1) for i in range(LINES)] for name, base in zip("abcd", (0, 12, 12, 24), strict=True)
    }
    assert {name: (tmp_path / f"{name}.txt").read_text().split() for name in "abcd"} == expected


def test_a_step_that_was_killed_before_its_process_began_keeps_nobody_out(write):
    """Its record names no process, and group 0 is that of the kernel's threads, which root may see."""
    path = write(bash("a", "touch a.txt", writes=["a.txt"]))
    assert subprocess.run([FUSION, "run", path], capture_output=True, check=False).returncode == 0
    record = path.parent / ".fusion_run" / "fusion" / "a.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"done": False, "pid": 0}))
    found = subprocess.run([FUSION, "run", path], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def _kill(group):
    """Kill a process group, if it still is there; return whether it was."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _wait_for(path, seconds=20.0):
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_steps_and_their_children(number, write, tmp_path):
    # A grandchild that would outlive its parent, as those of launchers do.
    path = write(bash("a", "(sleep 60; touch survived) & echo $! > child; touch started; wait", writes=["never"]))
    process = _start(path)
    _wait_for(tmp_path / "started")
    os.kill(process.pid, number)
    process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else 128 + number)
    child = int((tmp_path / "child").read_text())
    until = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_run_under_nohup_survives_a_hangup(write, tmp_path):
    path = write(bash("a", "touch started; while [ ! -e go ]; do sleep 0.05; done"))
    process = subprocess.Popen(["nohup", FUSION, "run", path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait_for(tmp_path / "started")
    os.kill(process.pid, signal.SIGHUP)
    time.sleep(0.3)
    (tmp_path / "go").touch()
    assert process.wait(30) == 0


def test_a_second_run_is_kept_out_also_by_a_step_that_outlives_the_first(write, ran, tmp_path):
    path = write(bash("a", "touch started; while [ ! -e go ]; do sleep 0.05; done; echo 1 >> out", writes=["out"]))
    first = _start(path)
    _wait_for(tmp_path / "started")
    with pytest.raises(ChainError, match=r"is being run, or steps of a run that was killed still are: a \(process \d+"):
        run_chain(load_chain(path))
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    with pytest.raises(ChainError, match="is being run"):
        run_chain(load_chain(path))
    (tmp_path / "go").touch()
    _wait_for(tmp_path / "out")
    until = time.monotonic() + 10
    while True:
        try:
            run_chain(load_chain(path))
            break
        except ChainError:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert ran() == ["a", "a"]


def test_a_damaged_record_is_named(write, tmp_path):
    path = write(bash("a", "true"))
    run_chain(load_chain(path))
    (tmp_path / ".fusion_run" / "fusion" / "a.json").write_text("{")
    with pytest.raises(ChainError, match=r"a\.json: expected the record of a step"):
        plan_chain(load_chain(path))


def test_two_chains_of_a_folder_have_records_of_their_own(write, tmp_path, ran):
    path = write(bash("a", "true"))
    other = tmp_path / "other.yml"
    other.write_text(path.read_text())
    for each in (path, other):
        run_chain(load_chain(each))
    assert ran() == ["a", "a"]
    assert Records(load_chain(path)).folder != Records(load_chain(other)).folder


def test_the_state_of_a_folder_is_that_of_its_contents(tmp_path, monkeypatch):
    folder = tmp_path / "d"
    assert state_of(folder) is None
    (folder / "in").mkdir(parents=True)
    empty = state_of(folder)
    (folder / "in" / "x").write_text("1")
    before = state_of(folder)
    (folder / ".lock").write_text("process 1")
    (folder / "fusion_report.html").write_text("a page about the folder")
    for name in (".cache", "__pycache__"):
        (folder / name).mkdir()
        (folder / name / "y").write_text("1")
    os.utime(folder / "in" / "x", (5, 5))
    assert state_of(folder) == before != empty
    (folder / "link").symlink_to("nowhere")
    assert state_of(folder) == before
    (folder / "in" / "x").write_text("2")
    assert state_of(folder) != before
    # Folders behind links count, a circle of them too.
    other = tmp_path / "other"
    other.mkdir()
    (other / "up").symlink_to(folder)
    (folder / "there").symlink_to(other)
    before = state_of(folder)
    (other / "y").write_text("1")
    assert state_of(folder) != before
    # Of what is too large to be read, sizes and times count.
    monkeypatch.setattr("fusion_plugins.chain.records.READ_BYTES", 0)
    os.utime(folder / "in" / "x", (5, 5))
    large = state_of(folder)
    os.utime(folder / "in" / "x", (6, 6))
    assert state_of(folder) != large
    os.utime(folder / "in" / "x", (5, 5))
    assert state_of(folder) == large
