"""Runs commands in forks of one process that has imported everything, so that a kill hits the work and not an import.

``python soak_worker.py MODULE ...`` imports the modules, then answers each line of its input, a JSON object:
``{"run": ARGUMENTS, "log": FILE, "limit": BYTES}`` starts a command and answers with the id of its process;
``{"wait": ID}`` answers with its exit status, or minus the signal that ended it.
"""

import json
import os
import resource
import sys
from importlib import import_module

# Libraries print what they like: answers have a channel of their own.
ANSWERS = os.dup(1)
os.dup2(2, 1)
os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork


def run(arguments: list[str]) -> None:
    """Do what the command of that name does."""
    program, *rest = arguments
    sys.argv = arguments
    if program == "fusion":
        from fusion_plugins.cli import main

        main()
    elif program == "axolotl":
        from axolotl.cli.main import cli

        cli(rest)
    else:
        from mergekit.scripts.run_yaml import main as merge

        merge(rest)


def child(request: dict) -> None:
    """Run a command in a process of its own; its output goes into a file."""
    with open(request["log"], "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request.get("limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    os.chdir(request["folder"])
    status = 0
    try:
        run(request["run"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    """Answer requests until the input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                child(request)
        os.write(ANSWERS, f"{answer}\n".encode())


if __name__ == "__main__":
    for name in sys.argv[1:]:
        import_module(name)
    serve()
