"""Processes that have imported torch and the rest already: copies of one that waits, one a rank.

What a job needs takes seconds to import, and the tests start hundreds of processes. Each rank has a waiting process of
its own, so that sets have another order in each, as they have in processes that are started by themselves.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO


class Copy:
    """A process that a waiting one has copied itself to.

    Attributes:
        pid: Of the process, which leads a group of its own.
        stdin: Closes when this process dies, however it dies.
    """

    def __init__(self, rank: int, arguments: list[str], environment: dict[str, str], output: BinaryIO) -> None:
        read, write = os.pipe()
        self.stdin = os.fdopen(write, "wb", buffering=0)
        self._waiting = _all.get(rank) or _all.setdefault(rank, _Waiting(environment))
        try:
            self.pid = self._waiting.copy(arguments, environment, [read, output.fileno()])
        finally:
            os.close(read)

    def poll(self) -> int | None:
        """How it ended, as ``subprocess.Popen`` says it; ``None`` if it has not."""
        return self._waiting.ended(self.pid)

    def wait(self) -> None:
        """Wait until it has ended."""
        while self.poll() is None:
            select.select([self._waiting.channel], [], [], 0.05)


class _Waiting:
    """The end of this process of the connection with one that waits."""

    def __init__(self, environment: dict[str, str]) -> None:
        """Start it, with the environment of its first copy: Lightning looks at the rank when it is imported."""
        self.channel, its = socket.socketpair()
        with its:
            command = [sys.executable, "-m", f"{__package__}.processes", str(its.fileno())]
            subprocess.Popen(command, env=environment, pass_fds=[its.fileno()], start_new_session=True)
        self._unread = b""
        self._started: list[int] = []
        self._codes: dict[int, int] = {}

    def copy(self, arguments: list[str], environment: dict[str, str], descriptors: list[int]) -> int:
        wanted = {"arguments": arguments, "environment": environment, "folder": os.getcwd()}
        text = json.dumps(wanted).encode()
        socket.send_fds(self.channel, [len(text).to_bytes(8, "big")], descriptors)
        self.channel.sendall(text)
        while not self._started:
            self._receive()
        return self._started.pop()

    def ended(self, pid: int) -> int | None:
        while pid not in self._codes and select.select([self.channel], [], [], 0)[0]:
            self._receive()
        return self._codes.get(pid)

    def _receive(self) -> None:
        """Take all that it has said: what stayed in a buffer would not be seen until it says more."""
        received = self.channel.recv(1 << 16)
        if not received:
            raise RuntimeError("The process that the ranks are copied from has ended.")
        *lines, self._unread = (self._unread + received).split(b"\n")
        for said in map(json.loads, lines):
            if "started" in said:
                self._started.append(said["started"])
                self._codes.pop(said["started"], None)  # of another before it
            else:
                self._codes[said["ended"]] = said["code"]


_all: dict[int, _Waiting] = {}


def wait(descriptor: int, run: Callable[[list[str]], Any]) -> None:
    """Be the one that waits: copy this process as often as is asked, until the other end closes.

    Args:
        descriptor: Of the connection.
        run: What a copy does with its arguments.
    """
    channel = socket.socket(fileno=descriptor)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)

    def say(**said: int) -> None:
        channel.sendall(json.dumps(said).encode() + b"\n")

    while True:
        ready = select.select([channel, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 1024)
            for pid, code in _ended():
                say(ended=pid, code=code)
        if channel in ready:
            head, descriptors, *_ = socket.recv_fds(channel, 8, 2)
            if not head:
                return
            wanted = json.loads(channel.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                channel.close()
                _become(wanted, descriptors, run)
            for each in descriptors:
                os.close(each)
            say(started=pid)


def _ended() -> list[tuple[int, int]]:
    found = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found.append((pid, os.waitstatus_to_exitcode(status)))


def _become(wanted: dict[str, Any], descriptors: list[int], run: Callable[[list[str]], Any]) -> None:
    """Run in the copy, and end it."""
    code = 1
    try:
        os.setsid()  # a process group, to be killed as one
        for standard, descriptor in zip((0, 1, 2), (*descriptors, descriptors[1])):
            os.dup2(descriptor, standard)
        for each in descriptors:
            os.close(each)
        os.environ.clear()
        os.environ.update(wanted["environment"])
        os.chdir(wanted["folder"])
        sys.argv[1:] = wanted["arguments"]
        run(wanted["arguments"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # as the interpreter does when nothing catches it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
