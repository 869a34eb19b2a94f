"""The console script: `tl PIPELINE key=value …` runs one of the files beside this one.

It turns command lines into validated configs and errors into exit codes: 0 done, 1 the job failed,
2 the request was wrong, 130 interrupted. Nothing here imports torch, so `--help` and config errors
are instant.
"""

from __future__ import annotations

import ast
import errno
import gc
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from tl import ranks, stopping
from tl.config import NO_YAML, Interrupted, TlError, TrainConfig
from tl.cores import keep_to_share
from tl.pipelines.commandline import (
    BATCH_FLAGS,
    batch_name,
    check_overrides,
    composition_error,
    file_error,
    help_text,
    override_keys,
    plain_folder,
    spelled,
    split_flags,
)

Job = Callable[[Any], Any]
HERE = Path(__file__).parent
_own_process = False  # whether a command line started it
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def pipelines() -> dict[str, str]:
    """Name -> first line of the docstring of every pipeline in this folder."""
    found = {}
    for file in sorted(HERE.glob("*.py")):
        if file.stem not in {
            "__init__",
            "batches",
            "commandline",
            "folds",
            "together",
        }:  # no commands of their own
            found[file.stem] = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0]
    return found


def main(argv: list[str] | None = None) -> None:
    """Entry of the console script `tl`."""
    _claim(argv)
    args = sys.argv[1:] if argv is None else argv
    known = pipelines()
    if not args or args[0] in {"-h", "--help", "help"}:
        width = max(map(len, known))
        lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in known.items())
        _show(f"tl PIPELINE [key=value …]\n\n{lines}\n\ntl PIPELINE --help shows its settings.")
        return
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"tl {version('tl')}")
        return
    if args[0] not in known:
        import difflib

        near = difflib.get_close_matches(args[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        print(f"tl: no pipeline {args[0]}; {hint}", file=sys.stderr)
        raise SystemExit(2)
    importlib.import_module(f"tl.pipelines.{args[0]}").main(args[1:])


def _show(text: str) -> None:
    """Print a help text; `tl --help | head` must not end in a traceback."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(name: str, job: Job, argv: list[str] | None = None) -> None:
    """Compose and validate the config of pipeline `name`, call `job` with it, exit with its code.

    Args:
        name: Pipeline; its primary config and schema have the same name.
        job: Takes the validated dataclass; what it returns is the objective of a sweep.
        argv: Overrides and Hydra's flags; default: those of the process.
    """
    args = spelled(name, [*(sys.argv[1:] if argv is None else argv)])
    if {"-h", "--help"} & set(args):
        _show(help_text(name, pipelines()[name]))
        return
    _claim(argv)
    code = _exit_code(name, job, args)
    ranks.leave()
    if _own_process:
        gc.freeze()  # what is left goes with the process; looking through it takes two seconds
    sys.exit(code)


def _claim(argv: list[str] | None) -> None:
    """Remember that the process is ours, as no caller gave us arguments."""
    global _own_process
    _own_process = _own_process or argv is None


@contextmanager
def loading() -> Iterator[None]:
    """Import without the garbage collector, and keep it off what was imported.

    torch, timm and Lightning bring a million objects that stay to the end; to look through them
    again and again takes a third of the time of their import. In somebody else's process, where tl
    is a library, the objects stay with the collector.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with _without("transformers") if _own_process else nullcontext():
            yield
        keep_to_share()
    finally:
        # Once: a later job of the same process would keep what the one before left behind.
        if _own_process and not gc.get_freeze_count():
            gc.freeze()
        if enabled:
            gc.enable()


@contextmanager
def _without(name: str) -> Iterator[None]:
    """Let an empty module stand in for one that is installed, while others are imported.

    torchmetrics loads transformers wherever it is there (peft needs it): a second of each job, for
    metrics of texts.
    """
    if name in sys.modules:
        yield
        return
    empty: Any = ModuleType(name)
    empty.__spec__, empty.__getattr__ = ModuleSpec(name, None), lambda _: None
    sys.modules[name] = empty
    try:
        yield
    finally:
        del sys.modules[name]


def _exit_code(name: str, job: Job, args: list[str]) -> int:
    try:
        stopping.install()
        check_overrides(name, args)
        return _run_hydra(name, job, args)
    except Interrupted as stop:
        if not ranks.silent():
            print(f"\ninterrupted{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130
    except Exception as error:  # every error of a job ends here, and only here
        return show_error(error)


def _run_hydra(name: str, job: Job, args: list[str]) -> int:
    """Run one job, or all jobs of a multirun; returns the exit code."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from hydra_plugins.tl import launching
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from tl.config import PIPELINES, register_schemas, validate
    from tl.pipelines.batches import Command

    register_schemas()
    failed: list[tuple[int, list[str], Exception]] = []
    single: list[Exception] = []

    def task(config: DictConfig) -> Any:
        info = HydraConfig.get()
        batch = info.mode == RunMode.MULTIRUN
        try:
            validated = validate(config, PIPELINES[name])
            if isinstance(validated, TrainConfig) and validated.resume:
                from tl.runs import refuse_changes

                refuse_changes(override_keys(info.overrides.task), validated)
            if batch and hasattr(validated, "output_dir"):
                validated.output_dir = str(Path(info.sweep.dir, info.sweep.subdir).absolute())
            return job(validated)
        except Exception as error:
            if not batch:
                single.append(error)
                return None
            show_error(error)
            failed.append((info.job.num, list(info.overrides.task), error))
            raise

    # Hydra would print errors itself; with this it hands them on.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    args, folder = _with_batch_folder(name, args)
    command = Command(folder) if name == "train" and folder else None
    sys.argv = [f"tl {name}", *args]
    try:
        with launching(command and command.launch):
            hydra.main(version_base="1.3", config_path="pkg://tl.conf", config_name=name)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        if not failed:
            raise composition_error(name, error) from error
    except NO_YAML as error:
        raise file_error(error) from error
    except Exception:
        if not failed:
            raise
    if single:
        raise single[0]
    if command:
        return command.end()
    for number, overrides, cause in failed:
        first_line = str(cause).split("\n")[0]
        print(f"job {number} failed ({' '.join(overrides)}): {first_line}", file=sys.stderr)
    return 1 if failed else 0


def _with_batch_folder(name: str, args: list[str]) -> tuple[list[str], Path | None]:
    """Arguments for Hydra: overrides, then flags; and the folder of a multirun.

    That is `output_dir=` where it is given, else one that the same command of `tl train` finds
    again, and a dated one for other pipelines.
    """
    flags, overrides = split_flags(args)
    if not set(flags) & BATCH_FLAGS:
        return [*overrides, *flags], None
    given = [a.split("=", 1)[1] for a in overrides if a.startswith("output_dir=")]
    rest = [a for a in overrides if not a.startswith("output_dir=")]
    named = f"runs/{batch_name(rest) if name == 'train' else time.strftime('%Y-%m-%d_%H-%M-%S')}"
    folder = plain_folder(given) if given else f"{named}_batch"
    own = [f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=${hydra.job.num}"]
    return [*rest, *own, *flags], Path(folder).absolute()


def show_error(error: Exception) -> int:
    """Show an error to a person; returns the exit code.

    Errors that are meant for a person (`TlError` and whatever carries an `exit_code`) are one
    message; anything else is a bug of ours and shows its traceback. Of several processes of a job
    one shows it.
    """
    code = getattr(error, "exit_code", None)
    if ranks.silent():
        return 1 if code is None else int(code)
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        print(f"\nerror: {error}. Free some space; resume= continues a run", file=sys.stderr)
        return 1
    if code is None:
        traceback.print_exception(error)
        return 1
    label = type(error).__name__ if isinstance(error, TlError) else "error"
    print(f"\n{label}: {error}".rstrip(), file=sys.stderr)
    return int(code)
