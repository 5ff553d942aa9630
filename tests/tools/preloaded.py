"""Python processes that start with their imports done: a server that has imported them forks.

    done = run_preloaded(("torch",), "script.py", "--option", cwd=folder, env=variables)

For tests of what a process does and of how it ends, which need not wait each time for torch or
Snakemake to be imported. What a library reads from the environment as it is imported is of the
server's environment.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]

TIMEOUT = 300
"""Seconds that a process may take; then SIGALRM ends it."""


def run_preloaded(
    modules: tuple[str, ...], *arguments: object, cwd: Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS...`, a script or `-m` with a module, where `modules` are imported."""
    server = _server(modules)
    assert server.stdin is not None and server.stdout is not None
    words = [str(word) for word in arguments]
    with TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "errors")]
        request = {"argv": words, "cwd": str(cwd), "env": env, "files": list(map(str, files))}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(words, status, *(file.read_text() for file in files))


@cache
def _server(modules: tuple[str, ...]) -> subprocess.Popen[str]:
    """The server of this process; it ends when this process does."""
    return subprocess.Popen(
        [sys.executable, __file__, *modules],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def serve() -> None:
    """Fork for each request of the standard input, and answer with the status of the process."""
    for name in sys.argv[1:]:
        import_module(name)
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            _become(**json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(argv: list[str], cwd: str, env: dict[str, str], files: list[str]) -> None:
    """Be the process that was asked for."""
    signal.alarm(TIMEOUT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    is_module = argv[0] == "-m"
    here = Path(cwd) if is_module else Path(cwd, argv[0]).parent
    sys.path[0:1] = [str(here), *env.get("PYTHONPATH", "").split(":")]
    sys.argv = argv[1:] if is_module else argv
    if is_module:
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    serve()
