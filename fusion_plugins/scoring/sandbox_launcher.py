"""Set up the isolation layers of the sandbox, then serve inside; a script of its own, standard library only.

``python -I -S -B sandbox_launcher.py SPEC`` with SPEC a JSON object of ``visible`` (folders and files that may be
read), ``path`` (folders for imports) and ``limits``. Standard input is the socket of the driver.

The layers, none of them optional: new user, mount, process, network, IPC, host-name and control-group namespaces; a
file system of its own in which ``visible`` is mounted read-only; an unprivileged user. When root starts it, the user
outside is 65534 ("nobody"). The rooms of :mod:`~fusion_plugins.scoring.sandbox_runner` add, for each program, a small
writable ``/tmp``, resource limits, the loss of all capabilities, and a filter of system calls.

The order matters: the namespaces give the capabilities that mounts need, and the filter comes last, because it denies
the steps before it.
"""

import ctypes
import functools
import importlib
import json
import os
import platform
import resource
import signal
import struct
import sys
import types
from pathlib import Path
from typing import Any, NoReturn

FAILED = 70
INSIDE = 1000
NOBODY = 65534
NEW_ROOT = "/tmp"
#: where visible paths below /tmp are kept
BESIDE = "/beside"
_BELOW_TMP: list[str] = []

NAMESPACES = {
    "user": 0x10000000,
    "mount": 0x00020000,
    "process": 0x20000000,
    "network": 0x40000000,
    "IPC": 0x08000000,
    "host name": 0x04000000,
    "control group": 0x02000000,
}
ALL_NAMESPACES = sum(NAMESPACES.values())

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
SYS_MOUNT_SETATTR = 442
CAPABILITY_VERSION = 0x20080522
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38

#: machine -> (audit number, {system call: number}). Denied, because no tested program needs them and they lead out of
#: the sandbox or take memory that no limit counts; of ``clone`` only the flags for new namespaces are denied.
MACHINES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "socket": 41, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "ptrace": 101,
            "process_vm_readv": 310, "process_vm_writev": 311, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323,
            "keyctl": 250, "add_key": 248, "request_key": 249, "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240,
            "memfd_create": 319, "clone": 56,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "socket": 198, "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41, "ptrace": 117,
            "process_vm_readv": 270, "process_vm_writev": 271, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282,
            "keyctl": 219, "add_key": 217, "request_key": 218, "shmget": 194, "msgget": 186, "semget": 190,
            "mq_open": 180, "memfd_create": 279, "clone": 220,
        },
    ),
}  # fmt: skip
#: denied too, with the same number on both machines: io_uring_setup, open_tree, move_mount, fsopen, fsconfig, fsmount,
#: fspick, pidfd_open, pidfd_getfd, mount_setattr, memfd_secret
EVERYWHERE = (425, 428, 429, 430, 431, 432, 433, 434, 438, 442, 447)
SYS_CLONE3 = 435
EPERM, ENOSYS = 1, 38

libc = ctypes.CDLL(None, use_errno=True)


def fail(what: str, error: BaseException | str) -> NoReturn:
    """Write why an isolation layer is missing to stderr and end with :data:`FAILED`."""
    sys.stderr.write(f"{what}: {error}")
    sys.stderr.flush()
    # No clean-up of Python's: in the forked child it would flush what belongs to its parent.
    os._exit(FAILED)


def call(what: str, name: str, *arguments: Any) -> int:
    """Call a function of the C library.

    Raises:
        OSError: it returns an error.
    """
    ctypes.set_errno(0)
    result = getattr(libc, name)(*arguments)
    if result < 0:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return int(result)


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Mount, or raise OSError."""
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    call(f"mount {kind or source or 'private'} on {target}", "mount", *encoded, ctypes.c_ulong(flags), options.encode())


def mount_tmp(disk_bytes: int) -> None:
    """Mount an empty and writable /tmp that is small in bytes and in files."""
    options = f"size={disk_bytes},nr_inodes=4k,mode=700"
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    for path in _BELOW_TMP:
        _make_place(path, is_folder=os.path.isdir(BESIDE + path))
        mount(BESIDE + path, path, None, MS_BIND | MS_REC)


def _make_place(place: str, *, is_folder: bool) -> None:
    if is_folder:
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        open(place, "w").close()


def set_attributes(path: str, attributes: int, flags: int = AT_RECURSIVE) -> None:
    """Add mount attributes to a mount, and by default to all below it.

    A remount would do for one mount only: what is mounted below a visible folder would stay writable.
    """
    request = struct.pack("=QQQQ", attributes, 0, 0, 0)
    call(
        f"make {path} read-only",
        "syscall",
        ctypes.c_long(SYS_MOUNT_SETATTR),
        ctypes.c_int(AT_FDCWD),
        ctypes.c_char_p(path.encode()),
        ctypes.c_uint(flags),
        ctypes.c_char_p(request),
        ctypes.c_size_t(len(request)),
    )


def enter_namespaces() -> None:
    """Leave the host's namespaces; map the one user of the new user namespace to an unprivileged user outside."""
    outside = (NOBODY, NOBODY) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    if os.geteuid() == 0:
        # Not possible any more once setgroups is denied below.
        os.setgroups([])
    ready_read, ready_write = os.pipe()
    done_read, done_write = os.pipe()
    launcher = os.getpid()
    helper = os.fork()
    if helper == 0:
        # When root starts the launcher, only a process outside the namespace may map its user to another one. It waits
        # for one byte; the end of the pipe without it means that the launcher has failed.
        os.close(ready_write)
        if not os.read(ready_read, 1):
            os._exit(0)
        try:
            for name, text in (
                # The kernel lets an unprivileged process write gid_map only after this.
                ("setgroups", "deny"),
                ("uid_map", f"{INSIDE} {outside[0]} 1"),
                ("gid_map", f"{INSIDE} {outside[1]} 1"),
            ):
                with open(f"/proc/{launcher}/{name}", "w") as file:
                    file.write(text)
            os.write(done_write, b"ok")
        except OSError as error:
            os.write(done_write, str(error).encode())
        os._exit(0)
    call(
        "create namespaces (user, mount, process, network, IPC, host name, control group)",
        "unshare",
        ctypes.c_int(ALL_NAMESPACES),
    )
    os.write(ready_write, b"x")
    answer = os.read(done_read, 1000)
    os.waitpid(helper, 0)
    if answer != b"ok":
        fail("map the user of the new user namespace", answer.decode())
    for descriptor in (ready_read, ready_write, done_read, done_write):
        os.close(descriptor)


def become_inside_user() -> None:
    """Change to the one user of the namespace; its capabilities inside the namespace stay until exec."""
    try:
        os.setresgid(INSIDE, INSIDE, INSIDE)
        os.setresuid(INSIDE, INSIDE, INSIDE)
    except OSError as error:
        fail("become the unprivileged user", error)


def build_root(visible: list[str]) -> None:
    """Make a root with the visible paths read-only, three devices and a /tmp, and drop the old root."""
    # Opened before the user changes, because a path may lead through folders that only the present user may enter.
    opened = [(path, os.open(path, os.O_PATH)) for path in visible if not os.path.islink(path)]
    links = [(path, os.readlink(path)) for path in visible if os.path.islink(path)]
    devices = [(f"/dev/{name}", os.open(f"/dev/{name}", os.O_PATH)) for name in ("null", "zero", "urandom")]
    become_inside_user()
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=4k,mode=755")
    os.mkdir(NEW_ROOT + "/tmp")
    for path, descriptor in opened + devices:
        # What lies below /tmp is put there in each room, whose own /tmp would hide it.
        below = path.startswith("/tmp/")
        _BELOW_TMP.extend([path] * below)
        place = NEW_ROOT + BESIDE * below + path
        _make_place(place, is_folder=os.path.isdir(f"/proc/self/fd/{descriptor}"))
        # Through the open file and not the path, which the new user may not be able to follow.
        mount(f"/proc/self/fd/{descriptor}", place, None, MS_BIND | MS_REC)
        os.close(descriptor)
        set_attributes(place, ATTR_RDONLY | ATTR_NOSUID | (0 if path.startswith("/dev/") else ATTR_NODEV))
    for path, target in links:
        os.symlink(target, NEW_ROOT + path)
    os.chdir(NEW_ROOT)
    # With "." for both, the old root ends up mounted over the new one at the same place, and one unmount removes it; no
    # folder for the old root is needed.
    call("change the root", "pivot_root", b".", b".")
    call("leave the old root", "umount2", b".", MNT_DETACH)
    set_attributes("/", ATTR_RDONLY, flags=0)


@functools.cache
def _filter() -> tuple[Any, Any]:
    """Return the filter that denies the system calls of :data:`MACHINES`, as the kernel wants it.

    The filter is a program of the kernel's classic BPF machine. An instruction is (code, steps to skip if true, steps
    to skip if false, operand). It loads from ``struct seccomp_data``: at byte 0 is the number of the system call, at 4
    the machine, at 16 the low half of the first argument.
    """
    machine = platform.machine()
    if machine not in MACHINES or struct.calcsize("P") != 8:
        fail("filter system calls", f"expected a machine out of {', '.join(MACHINES)}, this is {machine}")
    audit, numbers = MACHINES[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    deny, absent, allow, kill = 0x00050000 | EPERM, 0x00050000 | ENOSYS, 0x7FFF0000, 0x80000000
    # A call of another machine (32-bit code on x86-64) has other numbers, so it is killed before any is compared.
    program = [(load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":
        # x32, a second numbering of the same calls, starts here; without this line it would pass by all others.
        program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, deny)]
    for number in [number for name, number in numbers.items() if name != "clone"] + list(EVERYWHERE):
        program += [(equal, 0, 1, number), (give, 0, 0, deny)]
    # clone3 has its flags in memory, which a filter cannot read. "Not implemented" makes the C library use clone, whose
    # flags are its first argument.
    program += [(equal, 0, 1, SYS_CLONE3), (give, 0, 0, absent)]
    program += [(equal, 0, 3, numbers["clone"]), (load, 0, 0, 16), (any_bit, 0, 1, ALL_NAMESPACES), (give, 0, 0, deny)]
    program += [(give, 0, 0, allow)]
    # struct sock_fprog: the number of instructions and where they are. `code` must live until the call.
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    return code, header


def filter_system_calls() -> None:
    """Deny the system calls of :data:`MACHINES`; irrevocable, and inherited by every child."""
    _, header = _filter()
    call(
        "filter system calls", "prctl", PR_SET_SECCOMP, ctypes.c_ulong(2), header, ctypes.c_ulong(0), ctypes.c_ulong(0)
    )


def forbid_new_privileges() -> None:
    """Let no program gain privileges when it is executed, as setuid programs do."""
    call("give up new privileges", "prctl", PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), ctypes.c_ulong(0), 0, 0)


def drop_capabilities() -> None:
    """Give up the capabilities in the user namespace."""
    header, nothing = struct.pack("=Ii", CAPABILITY_VERSION, 0), bytes(24)
    call("drop capabilities", "capset", ctypes.create_string_buffer(header), ctypes.create_string_buffer(nothing))


def set_limits(limits: dict[str, int]) -> None:
    """Set soft and hard limits; no child can raise them."""
    for name in ("CORE", "MEMLOCK", "MSGQUEUE", "NICE", "RTPRIO"):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (0, 0))
    for name, key in (("AS", "memory"), ("NPROC", "processes"), ("FSIZE", "file_size"), ("NOFILE", "open_files")):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limits[key], limits[key]))
    # SIGXCPU at the first limit; SIGKILL at the second for a program that ignores it.
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_seconds"], limits["cpu_seconds"] + 1))


def load_modules() -> types.ModuleType:
    """Import what runs inside from beside this file, before that is out of sight; return the runner.

    Not by a path for imports, on which programs would find all that lies beside it.
    """
    package = types.ModuleType("fusion_plugins")
    package.__path__ = []
    inner = types.ModuleType("fusion_plugins.scoring")
    inner.__path__ = [str(Path(__file__).parent)]
    sys.modules |= {
        "fusion_plugins": package,
        inner.__name__: inner,
        f"{inner.__name__}.{Path(__file__).stem}": sys.modules[__name__],
    }
    runner = importlib.import_module(f"{inner.__name__}.sandbox_runner")
    inner.__path__ = []
    return runner


def main() -> NoReturn:
    """Set up the isolation layers and serve."""
    spec = json.loads(sys.argv[1])
    runner = load_modules()
    enter_namespaces()
    build_root(spec["visible"])
    # The first child after unshare is process 1 of the new process namespace; the launcher itself stays outside of it.
    child = os.fork()
    if child == 0:
        try:
            call("die with the parent", "prctl", PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
            sys.path[:0] = spec["path"]
            runner.main(0, spec["limits"])
        except BaseException as error:
            fail("serve", error)
        os._exit(0)
    # Only the runner may hold the socket of the driver, so that it closes when one of them ends.
    os.closerange(0, 2)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail("an isolation layer is missing", error)
    except Exception as error:  # an error that nobody foresaw is a missing layer too
        fail(type(error).__name__, error)
