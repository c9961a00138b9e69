"""One run of a program that nobody trusts: a script of the standard library, started by `programs.py`.

    python -I -S program_child.py FOLDER        with a request as JSON on stdin

It limits itself, takes its own network away, and runs the program as `__main__` with FOLDER/stdin; what the
program prints goes to FOLDER/stdout. With a function's name it calls that with the request's arguments and
writes the result as JSON to FOLDER/result; with checks it runs them behind the program, and the request's
secret in FOLDER/result says that all of them passed. The exit status is 0 unless the program failed.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000
PR_SET_PDEATHSIG = 1
FILE_BYTES = 16 << 20
# What a program may not do where it shares the network of this host.
REFUSED = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
)


def own_namespaces() -> bool:
    """Leave the host's network, processes and shared memory, where the kernel allows it."""
    flags = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC
    return ctypes.CDLL(None).unshare(flags) == 0


def refuse_network() -> None:
    """For the rest of this process: no sockets, and no other process that could have some. This binds Python
    code, not machine code that it could load.
    """

    def hook(event: str, _arguments: object) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(hook)


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def limit(memory_bytes: int, seconds: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


def run(request: dict, folder: str) -> None:
    source = compile(request["program"], "program.py", "exec")
    space = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(source, space)
    if request["function"]:
        result = _function(space, request["function"])(*request["arguments"])
        written = json.dumps(result)
    elif request["checks"] is not None:
        exec(compile(request["checks"], "checks.py", "exec"), space)
        written = request["secret"]
    else:
        return
    with open(os.path.join(folder, "result"), "w") as file:
        file.write(written)


def _function(space: dict, name: str):
    if name in space:
        return space[name]
    return getattr(space["Solution"](), name)  # as LeetCode has it


def main(folder: str) -> None:
    die_with_parent()
    request = json.loads(sys.stdin.buffer.read())
    if own_namespaces():
        if child := os.fork():  # the first process in a namespace of processes; all in it end with it
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
        die_with_parent()
    else:
        refuse_network()
    os.chdir(folder)
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(name, flags, 0o600), number)
    limit(request["memory_bytes"], request["cpu_seconds"])
    run(request, folder)


if __name__ == "__main__":
    main(sys.argv[1])
