"""A process that has torch and every room imported, and forks a child for each `twist` command it is asked to run.

A command then costs its own work and not six seconds of imports, its memory is told apart from the imports', and what
happens to it happens to a child. The server is a process of its own, so that a test session with threads never forks.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import pkgutil
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Imported inside functions of the rooms; a child would pay for each of them.
LAZY = (
    "torchvision.io", "safetensors.torch", "PIL.ImageDraw", "PIL.PngImagePlugin", "PIL.JpegImagePlugin",
    "matplotlib.pyplot", "scipy.io", "scipy.stats", "sklearn.cluster", "torch.utils.tensorboard", "torch._dynamo",
    "cityscapesscripts.preparation.json2labelImg", "yaml",
)  # fmt: skip
FRAMEWORKS = ("engines.detectron2", "engines.mmseg")
# Above what the server itself maps: what is left of a machine whatever a file asks for.
ADDRESS_SPACE = 6 * 2**30
LONGEST_OUTPUT = 20_000
POLL_S = 0.002


@dataclass(frozen=True)
class Command:
    """One command and what happens to it.

    `entry` is a function (`module:function`) or a module that is run as `python -m` does; `setup` names a context
    manager around it. `kill_after_s` after the folder holds so many files of every pattern of `kill_when` (after the
    start, where there is none), the process of rank `kill_rank` gets `kill_signal`.
    """

    arguments: tuple[str, ...]
    folder: str
    seconds: float = 60.0
    entry: str = "twist.cli:main"
    setup: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    ranks: int = 1
    kill_after_s: float | None = None
    kill_when: dict[str, int] = field(default_factory=dict)
    kill_rank: int = 0
    kill_signal: int = signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit status (negative: the signal), what it printed, its peak memory above the imports'.

    `cpu_s` is its processor time, which a busy machine does not make longer.
    """

    status: int
    said: str
    seconds: float
    cpu_s: float
    peak_bytes: int
    out_of_time: bool = False


class Server:
    """Use it in a `with`; one command at a time. `frameworks` imports Detectron2 and MMSegmentation too."""

    def __init__(self, *, frameworks: bool = False) -> None:
        self._arguments = [sys.executable, str(Path(__file__).resolve()), *(["frameworks"] if frameworks else [])]

    def __enter__(self) -> Server:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "hostile")))
        # As on a terminal in UTF-8: what cannot be encoded is an error, which in the C locale it would not be.
        others = {"PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8:strict", "MPLBACKEND": "Agg"}
        environment = {**os.environ, **threads, **others}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._arguments, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment, bufsize=1
        )
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, command: Command) -> list[Ended]:
        """How each rank of `command` ended, in rank order."""
        self._process.stdin.write(json.dumps(asdict(command)) + "\n")  # type: ignore[union-attr]
        return [Ended(**values) for values in self._answer()]

    def _answer(self) -> Any:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"the server has died with status {self._process.wait()}")
        return json.loads(line)


# --- in the server ----------------------------------------------------------------------------------------------------


def import_everything(*, frameworks: bool) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for name in settings["packages"]:
        if name == "twist.configs" or (not frameworks and any(part in name for part in FRAMEWORKS)):
            continue
        package = importlib.import_module(name)
        # `twist` itself finds the rooms through the repository's root, where much else lies.
        places = [str(ROOT / "twist")] if name == "twist" else package.__path__
        for module in pkgutil.iter_modules(places, f"{name}."):
            if not module.name.endswith("__main__"):
                with contextlib.suppress(ImportError):
                    importlib.import_module(module.name)
    for name in LAZY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError, AttributeError):  # half a second of every pretraining
        importlib.import_module("twist.pretrain.data.photometric_cpu").compile_it()
    with contextlib.redirect_stdout(io.StringIO()):
        _status(Command(("--version",), "."))  # fills the caches of what reads the commands' annotations
    atexit._clear()  # a child ends what it began itself, not what the imports did


def serve(*, frameworks: bool) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import prints is no answer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_everything(frameworks=frameworks)
    gc.collect()
    gc.freeze()
    own = _peak_of_a_fork()
    print("[]", file=answers, flush=True)
    for line in sys.stdin:
        values = json.loads(line)
        command = Command(**{**values, "arguments": tuple(values["arguments"])})
        print(json.dumps([asdict(ended) for ended in _run(command, own)]), file=answers, flush=True)


def _peak_of_a_fork() -> int:
    if (pid := os.fork()) == 0:
        os._exit(0)
    return os.wait4(pid, 0)[2].ru_maxrss * 1024


def _run(command: Command, own: int) -> list[Ended]:
    outputs = [tempfile.TemporaryFile() for _ in range(command.ranks)]  # noqa: SIM115
    began = time.monotonic()
    running: dict[int, int] = {}
    for rank, output in enumerate(outputs):
        pid = os.fork()
        if pid == 0:
            _child(command, rank, output.fileno())
        running[rank] = pid
    pids = dict(running)
    ended: dict[int, Ended] = {}
    killing, out_of_time = command.kill_after_s is not None or bool(command.kill_when), False
    clock: float | None = None  # when what the kill waits for was there
    while running:
        for rank, pid in list(running.items()):
            found, status, usage = os.wait4(pid, os.WNOHANG)
            if found:
                del running[rank]
                output = outputs[rank]
                output.seek(max(0, output.seek(0, os.SEEK_END) - LONGEST_OUTPUT))
                ended[rank] = Ended(
                    os.waitstatus_to_exitcode(status), output.read().decode("utf-8", "replace"),
                    time.monotonic() - began, usage.ru_utime + usage.ru_stime,
                    max(0, usage.ru_maxrss * 1024 - own), out_of_time,
                )  # fmt: skip
                output.close()
        elapsed = time.monotonic() - began
        if killing and clock is None and _holds(command):
            clock = elapsed
        if killing and clock is not None and elapsed - clock >= (command.kill_after_s or 0.0):
            killing = False
            if command.kill_rank in running:
                os.kill(running[command.kill_rank], command.kill_signal)
        if elapsed > command.seconds and not out_of_time:
            out_of_time = True
            for pid in running.values():
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    for pid in pids.values():  # workers that outlive their process
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    return [ended[rank] for rank in pids]


def _holds(command: Command) -> bool:
    folder = Path(command.folder)
    # Files that begin with a dot are still being written.
    return all(
        sum(not path.name.startswith(".") for path in folder.glob(pattern)) >= count
        for pattern, count in command.kill_when.items()
    )


def _child(command: Command, rank: int, output: int) -> None:
    """The command itself; does not return."""
    status = 1
    try:
        os.setsid()
        for number, name in (
            (resource.RLIMIT_AS, _kilobytes("VmSize") * 1024 + ADDRESS_SPACE),
            (resource.RLIMIT_FSIZE, 2 * 2**30),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(number, (name, name))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(command.folder)
        os.environ.update(command.environment)
        if command.ranks > 1:
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(command.ranks)})
        status = _status(command)
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _status(command: Command) -> int:
    around: Any = contextlib.nullcontext() if command.setup is None else _named(command.setup)()
    sys.argv = [command.entry.partition(":")[0], *command.arguments]
    try:
        with around:
            if ":" in command.entry:
                _named(command.entry)()
            else:
                runpy.run_module(command.entry, run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)  # as Python itself does
        return 1
    return 0


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _kilobytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(name)


if __name__ == "__main__":
    serve(frameworks="frameworks" in sys.argv[1:])
