"""Asks the server of preloaded.py for a process, and stands in for it.

It imports little: it is started once per job.
"""

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def asked(
    address: str,
    argv: list[str],
    cwd: str,
    env: dict[str, str],
    files: list[int],
    executable: str,
) -> socket.socket:
    """A connection for as long as the process may live: its pid comes in a line, then its status.

    Args:
        files: its standard streams, and further ones by their numbers from 3 on.
        executable: what it takes for its own Python.
    """
    request = json.dumps({"argv": argv, "cwd": cwd, "env": env, "executable": executable}).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [b"%8d" % len(request)], files)
    connection.sendall(request)
    return connection


def main(
    python: str, address: str, part: str, known: dict[str, str], prefixes: tuple[str, ...]
) -> None:
    """Be `python` with this process's command line."""
    argv, env = sys.argv[1:], dict(os.environ)
    asks = {name: value for name, value in env.items() if name.startswith(prefixes)}
    if asks != known or not argv or not argv[0].endswith(".py") or part not in argv[0]:
        os.execv(python, [python, *argv])
    connection = asked(address, argv, os.getcwd(), env, [0, 1, 2], python)
    answers = connection.makefile()
    job = int(answers.readline())
    for number in PASSED_ON:
        signal.signal(number, lambda received, frame: os.kill(job, received))
    status = int(answers.readline())
    if status < 0:  # a signal ended it
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)
