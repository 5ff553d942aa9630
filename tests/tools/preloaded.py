"""Python processes that start with their imports done: a server that has imported them forks.

    done = run_preloaded(("torch",), "script.py", "--option", cwd=folder, env=variables)
    variables["PATH"] = f"{forking_python()}:{variables['PATH']}"   # for the jobs of a workflow

For tests of what a process does and of how it ends, which need not wait each time for torch or
Snakemake to be imported. What a library reads from the environment as it is imported is of the
server's environment. Who asks for a process holds a connection: when that ends, the process does.

All of pytest's workers share the servers. They end with the process that imported this module
first, pytest itself, which alone holds the other end of their standard input.
"""

import atexit
import gc
import hashlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import NoReturn

import fork_client
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]

FOLDER = "FOLDER_OF_FORK_SERVERS"
"""The variable with the folder that those who may share servers have in common."""
if FOLDER not in os.environ:
    os.environ[FOLDER] = mkdtemp(prefix="fork-")
    atexit.register(shutil.rmtree, os.environ[FOLDER], ignore_errors=True)
    os.mkfifo(f"{os.environ[FOLDER]}/alive")
    os.open(f"{os.environ[FOLDER]}/alive", os.O_RDWR)  # until this process ends

TIMEOUT = 300
"""Seconds that a process of `run_preloaded` may take."""

OF_OPTIMIZERS = "torch._dynamo"
"""What torch imports when the first optimizer of a process is made: it takes seconds."""

OF_JOBS = (
    "torch",
    OF_OPTIMIZERS,
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "transformer_lens.model_bridge.sources",
    "huggingface_hub",
    "safetensors.torch",
    "sklearn.linear_model",
    "sklearn.manifold",
    "sklearn.pipeline",
    "scipy.cluster.hierarchy",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_svg",
    "markdown_it",
    "tyro",
    "typeguard",
    "yaml",
)
"""What the workflow's scripts import, apart from the project itself."""

READ_AT_IMPORT = (
    *("HF_", "HUGGING", "TRANSFORMERS_", "TORCH", "TRITON", "MPL"),
    *("PYTHON", "LC_", "LANG"),
)
"""How the names of variables begin that Python or these libraries read as they start."""

SHIM = """#!{python} -IS
import sys
sys.path.insert(0, {folder!r})
import fork_client
fork_client.main({python!r}, {address!r}, {part!r}, {known!r}, {prefixes!r})
"""


def run_preloaded(
    modules: tuple[str, ...],
    *arguments: object,
    cwd: Path,
    env: dict[str, str],
    executable: str = sys.executable,
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS...`, a script or `-m` with a module, where `modules` are imported.

    Args:
        executable: the Python that it takes for its own, and starts processes with.
    """
    words = [str(word) for word in arguments]
    with TemporaryDirectory() as folder:
        names = [os.devnull, *(str(Path(folder, name)) for name in ("out", "errors"))]
        files = [os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND) for name in names]
        asked = fork_client.asked(_server(modules, ()), words, str(cwd), env, files, executable)
        with asked as connection:
            for file in files:
                os.close(file)
            connection.settimeout(TIMEOUT)
            answers = connection.makefile()
            _, status = answers.readline(), int(answers.readline())
        return subprocess.CompletedProcess(words, status, *(Path(n).read_text() for n in names[1:]))


def forking_python(env: Mapping[str, str] = os.environ) -> str:
    """A folder with a `python` that has a server fork where that is as good: for a script of the
    workflow, if libraries would read from its environment what they read from `env`. Otherwise it
    is Python itself."""
    known = {name: value for name, value in env.items() if name.startswith(READ_AT_IMPORT)}
    return _shim(OF_JOBS, "/scripts/", READ_AT_IMPORT, tuple(sorted(known.items())))


def forking_tools(modules: tuple[str, ...]) -> str:
    """A `python` that has a server with these imports fork for each script of `tests/tools`."""
    return f"{_shim(modules, 'tests/tools/')}/python"


@cache
def _shim(
    modules: tuple[str, ...],
    part: str,
    prefixes: tuple[str, ...] = (),
    variables: tuple[tuple[str, str], ...] = (),
) -> str:
    """A folder with a `python` that forks for scripts with `part` in their path, if it has the
    `variables` of the server, as far as `prefixes` begin their names."""
    address, known = _server(modules, variables), dict(variables)
    shim = SHIM.format(
        python=sys.executable, folder=str(Path(__file__).parent), address=address, part=part,
        known=known, prefixes=prefixes,
    )  # fmt: skip
    folder = Path(f"{address}-{_digest(shim)}")
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "python").write_text(shim)
            (folder / "python").chmod(0o755)
    return str(folder)


@cache
def _server(modules: tuple[str, ...], variables: tuple[tuple[str, str], ...]) -> str:
    """The address of the server of these modules.

    Args:
        variables: that it has besides, or instead of those of this process.
    """
    address = f"{os.environ[FOLDER]}/{_digest(repr((modules, variables)))}"
    with FileLock(f"{address}.lock"):
        if not Path(address).exists():
            _start_server(address, modules, dict(variables))
    return address


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _start_server(address: str, modules: tuple[str, ...], variables: dict[str, str]) -> None:
    with open(f"{os.environ[FOLDER]}/alive", "rb") as alive:
        started = subprocess.Popen(
            [sys.executable, __file__, address, *modules],
            env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
            stdin=alive,
            stdout=subprocess.PIPE,
            text=True,
        )
    assert started.stdout is not None and started.stdout.readline() == "ready\n"


def serve(address: str, modules: list[str]) -> None:
    """Fork a keeper for each connection, until the standard input ends. The first one waits for the
    imports."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(16)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a keeper ended
    while True:
        readable, _, _ = select.select([listener, 0], [], [])
        if 0 in readable:
            return
        connection, _ = listener.accept()
        while modules:
            import_module(modules.pop())
            gc.freeze()  # a collection writes to what it looks at, and so copies it
        if os.fork() == 0:
            listener.close()
            return _keep(connection)
        connection.close()


def _keep(connection: socket.socket) -> None:
    """Start the process that was asked for, and answer with its pid, then with its status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    header, files, _, _ = socket.recv_fds(connection, 8, 8)
    request = json.loads(connection.makefile("rb").read(int(header)))
    child = os.fork()
    if child == 0:
        connection.close()
        return _become(files=files, **request)
    for file in files:
        os.close(file)
    connection.sendall(f"{child}\n".encode())
    ended = os.pidfd_open(child)
    if connection in select.select([ended, connection], [], [])[0]:
        os.kill(child, signal.SIGKILL)  # nobody waits for it any more
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        connection.sendall(f"{status}\n".encode())
    except OSError:
        pass
    os._exit(0)


def _become(
    argv: list[str], cwd: str, env: dict[str, str], files: list[int], executable: str
) -> None:
    """Be the process that was asked for."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "torch" in sys.modules and env.get("OMP_NUM_THREADS"):
        sys.modules["torch"].set_num_threads(int(env["OMP_NUM_THREADS"]))
    is_module = argv[0] == "-m"
    here = Path(cwd) if is_module else Path(cwd, argv[0]).parent
    sys.path[0:1] = [str(here), *env.get("PYTHONPATH", "").split(":")]
    sys.executable = executable
    sys.orig_argv = [executable, *argv]
    sys.argv = argv[1:] if is_module else argv
    if is_module:
        run = partial(runpy.run_module, argv[1], run_name="__main__", alter_sys=True)
    else:
        run = partial(runpy.run_path, argv[0], run_name="__main__")
    _end(_status(run))


def _status(run: Callable[[], object]) -> int:
    """The status with which Python would end."""
    try:
        run()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _end(status: int) -> NoReturn:
    """End as Python does, but without freeing every object: each page would be copied for that."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[:1:-1])
