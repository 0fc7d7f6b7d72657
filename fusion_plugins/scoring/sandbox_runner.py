"""What runs inside the sandbox: a warm interpreter that forks a room for each program and a room for its checks.

It never reads a program or a test: it passes on the open files that the driver sends, and tells how the processes
ended. So nothing of one test can be found in the memory of another, and nothing of the checks in that of the program.

A room is a process with namespaces of its own (processes, mounts, IPC), an empty ``/tmp``, no capabilities, limits and
a filter of system calls. It is process 1 of its namespace: when it ends, the kernel kills all that it has started.
"""

import ast
import contextlib
import copy
import fcntl
import functools
import gc
import heapq
import itertools
import json
import os
import random
import select
import signal
import socket
import string
import sys
import time
import types
import typing
import unittest
from collections.abc import Callable
from typing import Any

from fusion_plugins.scoring.sandbox_checks import describe, prepare, run_test
from fusion_plugins.scoring.sandbox_launcher import (
    NAMESPACES,
    call,
    drop_capabilities,
    filter_system_calls,
    forbid_new_privileges,
    mount_tmp,
    set_limits,
)
from fusion_plugins.scoring.sandbox_link import Link, ProgramEnded, error_reply, serve
from fusion_plugins.scoring.sandbox_values import NotAValue, write

#: imported here once, because programs import them again and again
WARM = (ast, contextlib, copy, functools, heapq, itertools, random, string, time, typing, unittest)
#: exit status of checks whose program has ended
PROGRAM_ENDED = 3
UNREADABLE = (SyntaxError, ValueError, MemoryError, RecursionError)
#: descriptors below are free for a room
_ABOVE = 100


def run_program(job_file: int, result_file: int, requests: int = -1, replies: int = -1) -> None:
    """Run a program: with its test in the same process, or behind ``requests`` answering what its checks ask."""
    job = _read_job(job_file)
    result = open(result_file, "w", closefd=False)
    try:
        code = compile(job["code"], "<response>", "exec", dont_inherit=True)
    except UNREADABLE as error:
        json.dump({"static": describe(error)}, result)
        result.flush()
        return
    if requests < 0:
        verdict, reason = run_test(
            job["test"], job["setup"], job["counter"], lambda module: exec(code, module.__dict__)
        )
        json.dump({"word": job["word"], "verdict": verdict, "error": reason}, result)
        result.flush()
        return
    with open(requests, "rb") as asked, open(replies, "wb") as answers:
        module = sys.modules["solution"] = types.ModuleType("solution")
        try:
            prepare(job["setup"], module)
            exec(code, module.__dict__)
            exec(compile(job["setup"], "<setup>", "exec", dont_inherit=True), module.__dict__)
        except BaseException as error:
            write(answers, error_reply(error))
        else:
            serve(module, asked, answers)


def run_checks(job_file: int, result_file: int, requests: int, replies: int) -> None:
    """Run a test against the program at the other end of the link."""
    job = _read_job(job_file)
    with open(requests, "wb") as asked, open(replies, "rb") as answers, open(result_file, "w") as result:
        link = Link(asked, answers, may_stop="StopIteration" in str(job["test"].get("source")))

        def define(module: types.ModuleType) -> None:
            names = link.names()
            module.__dict__.update({name: names[name] for name in job["names"] if name in names})

        verdict, reason = run_test(job["test"], job["setup"], job["counter"], define)
        # Where the link has failed, a check may have caught the exception that says so.
        if isinstance(link.failure, NotAValue):
            verdict, reason = "inside", str(link.failure)
        elif link.failure is not None:
            verdict, reason = "failed", str(link.failure)
        json.dump({"verdict": verdict, "error": reason}, result)
    if isinstance(link.failure, ProgramEnded):
        os._exit(PROGRAM_ENDED)


def _read_job(file: int) -> dict[str, Any]:
    with open(file, encoding="utf-8") as text:
        job: dict[str, Any] = json.load(text)
    return job


class Rooms:
    """Starts rooms and ends them."""

    def __init__(self, limits: dict[str, int]) -> None:
        self._limits = limits
        self._own = os.pidfd_open(os.getpid())

    def start(self, action: Callable[..., None], standard: list[int], files: list[int]) -> int:
        """Fork a room that runs ``action`` with open files; return the process.

        Args:
            action: gets the numbers that the files have inside.
            standard: files for standard input and output; without any, there are none.
            files: all else that is open inside.

        Raises:
            OSError: the room cannot be built.
        """
        told, tell = os.pipe()
        # Children of this process are born into a new namespace of processes until it goes back to its own.
        call("create a namespace of processes", "unshare", NAMESPACES["process"])
        child = os.fork()
        if child == 0:
            self._enter(action, standard, files, tell)
        call("return to the own namespace", "setns", self._own, NAMESPACES["process"])
        os.close(tell)
        with open(told, "rb") as answer:
            problem = answer.read().decode(errors="replace")
        if problem != "ready":
            os.waitpid(child, 0)
            raise OSError(problem or "a room ended before it was built")
        return child

    def _enter(self, action: Callable[..., None], standard: list[int], files: list[int], tell: int) -> typing.NoReturn:
        try:
            os.setsid()
            nothing = os.open("/dev/null", os.O_RDWR)
            high = [fcntl.fcntl(file, fcntl.F_DUPFD, _ABOVE) for file in (*(standard or [nothing] * 2), nothing)]
            kept = [fcntl.fcntl(file, fcntl.F_DUPFD, _ABOVE) for file in (*files, tell)]
            places = range(len(high) + len(kept))
            os.closerange(0, _ABOVE)
            for place, file in zip(places, high + kept, strict=True):
                os.dup2(file, place, inheritable=False)
            os.closerange(_ABOVE, _ABOVE + len(places) + 1)
            tell = places[-1]
            sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
            sys.stderr = open(2, "w", closefd=False)
            build_room(self._limits)
            os.write(tell, b"ready")
            os.close(tell)
        except BaseException as error:
            os.write(tell, str(error).encode())
            os._exit(1)
        try:
            action(*places[len(high) : -1])
            os._exit(0)
        except BaseException:
            os._exit(1)


def build_room(limits: dict[str, int]) -> None:
    """Close the present process in; what it gives up it cannot get back."""
    call("create namespaces of mounts and IPC", "unshare", NAMESPACES["mount"] | NAMESPACES["IPC"])
    mount_tmp(limits["disk"])
    os.chdir("/tmp")
    set_limits(limits)
    drop_capabilities()
    filter_system_calls()


def run_one(rooms: Rooms, control: socket.socket, mode: str, files: list[int]) -> dict[str, Any]:
    """Run one test; return how its processes ended.

    Args:
        rooms: where.
        control: a message from the driver ends the test early.
        mode: ``outside`` (a program and its checks apart), ``inside`` or ``stdio``.
        files: of the program's job and result, then those of the checks (outside) or standard input and output (stdio).
    """
    checks = None
    links: list[int] = []
    try:
        if mode == "outside":
            links = [*os.pipe(), *os.pipe()]
            asked, ask, answers, answer = links
            program = rooms.start(run_program, [], [*files[:2], asked, answer])
            checks = rooms.start(run_checks, [], [*files[2:], ask, answers])
        else:
            program = rooms.start(run_program, files[2:], files[:2])
    finally:
        for file in (*links, *files):
            os.close(file)
    decides = program if checks is None else checks
    if _wait(decides, control) and checks is not None:
        ended = os.waitid(os.P_PID, checks, os.WEXITED | os.WNOWAIT)
        # Where the program's end is why, it is about to be seen here, too.
        _wait(program, None, 200 if ended is not None and ended.si_status == PROGRAM_ENDED else 0)
    reply: dict[str, Any] = {"checks": _end(checks) if checks is not None else None, "program": _end(program)}
    return reply


def _wait(process: int, control: socket.socket | None, milliseconds: int | None = None) -> bool:
    """Wait until a process ends; return False when the driver says something, or the time is over, before."""
    watched = os.pidfd_open(process)
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    if control is not None:
        poll.register(control, select.POLLIN)
    try:
        ready = [file for file, _ in poll.poll(milliseconds)]
    finally:
        os.close(watched)
    return watched in ready


def _end(process: int) -> tuple[int, float]:
    """Kill a room; return its exit status, negative for a signal, and its CPU seconds."""
    os.kill(process, signal.SIGKILL)
    _, status, usage = os.wait4(process, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def main(control_file: int, limits: dict[str, int]) -> None:
    """Serve the driver until it closes its end."""
    forbid_new_privileges()
    # The kernel delivers a signal from inside to process 1 only if that has a handler; Python installs one for SIGINT.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    rooms = Rooms(limits)
    control = socket.socket(fileno=control_file)
    # What is there now is never freed, so that collecting garbage in a room does not copy it.
    gc.freeze()
    control.send(b"ready")
    while True:
        message, files, _, _ = socket.recv_fds(control, 1 << 10, 8)
        if not message:
            return
        # A late word about a test that has ended by itself.
        if message == b"end":
            continue
        try:
            reply = run_one(rooms, control, message.decode(), files)
        except OSError as error:
            reply = {"broken": str(error)}
        control.send(json.dumps(reply).encode())
