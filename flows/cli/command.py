"""What all commands share: global options, output, and exit codes: 0 success, 2 the user's mistake, 1 all else."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from flows.store.files import REMEDIES
from schemas.addresses import without_user_info
from schemas.errors import DISTRIBUTION, BatonError, ConfigError

if TYPE_CHECKING:
    from flows.runs.run import Run

log = logging.getLogger("baton")
SETTINGS = click.option("--set", "settings", multiple=True, metavar="KEY=VALUE",
                        help="A setting of the config, for example ppo.learning_rate=1e-5; may be repeated.")


@dataclass(frozen=True)
class Answer:
    """What a command found: `data` for --json, a function where it is read only then; `show` for people; exit code."""

    data: Any | Callable[[], Any]
    show: Callable[[Console], None]
    code: int = 0


def global_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The four options that every command takes, before its name or after."""
    for option in (
        click.option("--verbose", is_flag=True, help="Prefect's and the libraries' own log lines too."),
        click.option("--quiet", is_flag=True, help="Nothing but errors."),
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout and nothing else."),
        click.option("--store", "root", envvar="BATON_STORE", help="Where artifacts and runs are kept (BATON_STORE sets "
                     "it too); data/store by default."),
    ):
        function = option(function)
    return function


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name=DISTRIBUTION)
@global_options
@click.pass_context
def baton(context: click.Context, **options: Any) -> None:
    """PPO, for language models and control tasks, as a pipeline of stages that hand each other committed artifacts."""
    context.obj = options


def command(function: Callable[..., Answer], default_store: str | None = "data/store") -> click.Command:
    """A command with the global options, whose `Answer` is printed; it is called with the store as `root`."""

    @functools.wraps(function)
    def wrapped(**arguments: Any) -> int:
        before = click.get_current_context().obj
        as_json, quiet, verbose = (arguments.pop(name) or before[name] for name in ("as_json", "quiet", "verbose"))
        configure_output(as_json, quiet, verbose)
        with redirect_stdout(sys.stderr) if as_json else nullcontext():  # what a user's function prints is no JSON
            answer = function(**arguments | {"root": arguments["root"] or before["root"] or default_store})
        if as_json:
            click.echo(json.dumps(answer.data() if callable(answer.data) else answer.data, indent=1))
        elif not quiet:
            answer.show(Console(width=None if sys.stdout.isatty() else 140))
        return answer.code

    return baton.command(name=function.__name__.removesuffix("_command").replace("_", "-"))(global_options(wrapped))


def configure_output(as_json: bool, quiet: bool, verbose: bool) -> None:
    """What is written to the terminal. Before Prefect is imported, since it reads its settings then."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # it would go to stdout
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # environments are drawn into arrays, on no screen
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "baton")
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")  # for flows/orchestration/automations.py
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "300")  # a busy machine needs more than 20
    if not verbose:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        os.environ.setdefault("PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL", "WARNING")  # not a line for each task
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns of what trainers ask of it
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        warnings.simplefilter("ignore", FutureWarning)
    if quiet or as_json:
        os.environ["TQDM_DISABLE"] = "1"
    handler = logging.StreamHandler(sys.stderr if as_json else sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


def open_existing(root: str, name: str) -> Run:
    """A run of the store. Raises `ConfigError` if there is none."""
    from flows.runs.run import open_run
    from flows.store.store import Store

    return open_run(Store(root), name)


def open_shown(root: str, name: str) -> Run:
    """As `open_existing`, to be looked at: with a warning for what its states name and the store does not have."""
    from flows.views.lacking import lacking

    run = open_existing(root, name)
    for line in lacking(run, run.states()):
        click.echo(f"run {name}: {line}", err=True)  # not among rows that a program reads
    return run


def write_text(file: Path, text: str) -> None:
    """A page for people. Raises `ConfigError` where it cannot be written."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None


# --- exit codes ---

def run_command(arguments: list[str] | None = None) -> int:
    """The exit code of one call. What a user can mend is one line on stderr; a fault of Baton's is a traceback."""
    try:
        return baton.main(arguments, prog_name="baton", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        return _complain(f"{error.format_message()} (baton --help lists what there is)", 2)
    except BatonError as error:
        return _complain(str(error), 2 if isinstance(error, ConfigError) else 1)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        return _complain(f"{error.filename or 'the store'}: {error.strerror}; {REMEDIES[error.errno]}", 1)
    except (click.Abort, KeyboardInterrupt):
        return _complain("interrupted; the same command goes on from here", 130)
    except TerminatedError:
        return _complain("terminated; what was committed is whole, the same command goes on from here", 143)


class TerminatedError(BaseException):
    """SIGTERM: the stage ends where it is, and takes what it has written with it."""


def terminate(*_: object) -> None:
    """As a signal handler: raises `TerminatedError`."""
    raise TerminatedError


def _complain(message: str, code: int) -> int:
    click.echo(f"baton: {without_user_info(' '.join(message.split()))}", err=True)
    return code
