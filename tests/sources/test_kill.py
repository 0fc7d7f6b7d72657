"""Capture and sampling survive kill -9 at any point, and Ctrl-C."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import source_checks
import tiny

from fusion_plugins.store import open_rows, open_store
from fusion_plugins.store.maintain import merge

pytestmark = pytest.mark.slow
KILLS = 20
# Texts and responses of the two largest batches: one is written while the next one is worked on.
BATCHES = {"capture": 6, "sample": 8}


class Jobs:
    """Runs commands in forks of one process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script = Path(__file__).parents[1] / "support" / "source_jobs.py"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(folder / "model")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def run(self, kill_at: int, log: Path, *arguments: str) -> tuple[int, int]:
        self.process.stdin.write(f"{kill_at} {log} {' '.join(arguments)}\n")
        self.process.stdin.flush()
        status, calls = self.process.stdout.readline().split()
        return int(status), int(calls)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    source_checks.checkpoint(folder / "model")
    source_checks.texts(folder / "texts.jsonl")
    source_checks.prompts(folder / "prompts.jsonl", 6)
    (folder / "sample.yml").write_text(
        f"prompts: {folder}/prompts.jsonl\nout: unset\nn: 2\nbatch_requests: 4\n"
        f"sources: [{{name: a, model: {folder}/model, max_tokens: 3}}]\n"
    )
    made = Jobs(folder)
    yield made
    made.process.stdin.close()
    made.process.wait()


def command(jobs, kind, out):
    if kind == "sample":
        return ["sample", "-c", str(jobs.folder / "sample.yml"), "--out", str(out)]
    files = ["--texts", str(jobs.folder / "texts.jsonl"), "--model", str(jobs.folder / "model")]
    return ["capture", *files, "--out", str(out), "--top-k", "8", "--set", "batch_bytes=200"]


def contents(kind, out):
    if kind == "capture":
        return source_checks.contents(open_store(out))
    rows = open_rows(out)
    assert len(set(rows.keys())) == len(rows)
    return {key: rows[key] for key in rows.keys()}


def asked(log):
    return sum(int(line) for line in log.read_text().split()) if log.exists() else 0


@pytest.mark.parametrize("kind", ["capture", "sample"])
def test_after_twenty_kills_nothing_is_lost_doubled_or_done_again_but_two_batches(jobs, kind, tmp_path):
    status, calls = jobs.run(0, tmp_path / "log", *command(jobs, kind, tmp_path / "whole"))
    assert (status, calls > 1000) == (0, True), (tmp_path / "log.err").read_text()
    expected = contents(kind, tmp_path / "whole")
    assert len(expected) == (len(tiny.TEXTS) if kind == "capture" else 12)
    place = random.Random(0)
    kills = 0
    for number in range(100):
        out, log = tmp_path / f"out{number}", tmp_path / f"log{number}"
        status, killed = -signal.SIGKILL, -1
        while status:
            killed += 1
            # The second kill of a folder comes early, so that one also hits a run that resumes.
            last = calls if killed == 0 else calls // 2
            status, _ = jobs.run(place.randrange(1, last) if killed < 2 else 0, log, *command(jobs, kind, out))
            assert status in (0, -signal.SIGKILL), (tmp_path / f"log{number}.err").read_text()
        assert contents(kind, out) == expected
        assert asked(log) <= len(expected) + killed * BATCHES[kind]
        kills += killed
        if kills >= KILLS:
            return
    raise AssertionError(f"only {kills} of {KILLS} kills hit")


@pytest.mark.parametrize("kind", ["capture", "sample"])
def test_ctrl_c_keeps_what_is_done_and_says_how_to_resume(jobs, kind, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    status, _ = jobs.run(-1, log, *command(jobs, kind, out))
    message = Path(f"{log}.err").read_text()
    assert status == 130, message
    assert "run the same command again to" in message
    kept = contents(kind, out)
    assert 0 < len(kept) < (len(tiny.TEXTS) if kind == "capture" else 12)
    assert jobs.run(0, log, *command(jobs, kind, out))[0] == 0
    jobs.run(0, tmp_path / "log2", *command(jobs, kind, tmp_path / "whole"))
    assert contents(kind, out) == contents(kind, tmp_path / "whole")


def test_three_processes_capture_a_part_each_and_one_that_is_killed_goes_on(jobs, tmp_path):
    flags = ["capture", "--model", str(jobs.folder / "model"), "--texts", str(jobs.folder / "texts.jsonl")]
    flags += ["--top-k", "8", "--set", "batch_bytes=200"]

    def run(kill_at, out, *more):
        return jobs.run(kill_at, tmp_path / f"{out}.log", *flags, *more, "--out", str(tmp_path / out))

    assert run(0, "whole")[0] == 0
    status, calls = run(0, "2", "--shard", "2/3")
    assert status == 0
    assert run(calls // 2, "1", "--shard", "1/3")[0] == -signal.SIGKILL
    assert [run(0, part, "--shard", f"{part}/3")[0] for part in ("1", "3")] == [0, 0]
    joined = merge([tmp_path / part for part in ("1", "2", "3")], tmp_path / "joined")
    assert joined.complete
    assert {record.id for record in open_store(tmp_path / "joined")} == {r.id for r in open_store(tmp_path / "whole")}
