"""Programs that try to leave the sandbox, and a kernel that refuses its isolation layers. Nothing here is simulated."""

import subprocess
import sys
from pathlib import Path

import pytest

from fusion_plugins.scoring.sandbox import Limits, Sandbox
from fusion_plugins.scoring.sandbox_worker import LAUNCHER


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("FUSION_TEST_SECRET", "do not tell")


# Each of these programs must fail, and the next one must run as if nothing had happened.

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
@pytest.mark.usefixtures("secret")
def test_a_program_cannot_escape(sandbox, program):
    outcome = sandbox.run("", [program, "import os; assert not os.listdir('/tmp') and not os.path.exists('/here')"])
    assert outcome.failure is None
    assert outcome.tests[0].verdict in ("failed", "timeout", "crashed"), outcome
    assert outcome.tests[1].verdict == "passed", outcome
    assert not Path("/here").exists()


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


def test_programs_import_only_from_the_folders_that_are_given(tmp_path, short_limits):
    folder = tmp_path / "given"
    folder.mkdir(mode=0o755)
    (folder / "given.py").write_text("VALUE = 3\n")
    inside = Sandbox(Limits(**short_limits), packages=[str(folder)])
    tests = ["import given; assert given.VALUE == 3", f"open({str(folder / 'given.py')!r}, 'a')", "import numpy"]
    assert [test.verdict for test in inside.run("", tests).tests] == ["passed", "failed", "failed"]
