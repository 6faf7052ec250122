"""Command lines, of experiments and others: settings are the options, and a user's error is one sentence."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .errors import Interrupted, RunBusy, TrainingFailed

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Paths:
    """Options of a program, in which a ~ that the shell has left at the front of a path is the home folder."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, str) and value.startswith("~"):
                object.__setattr__(self, name, os.path.expanduser(value))


def guard_imports() -> None:
    """Lets Ctrl-C end the program with one sentence until `call` begins: for before the imports that take seconds."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)


def _end_at_once(*_) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


def run(settings_class: type[Settings], function: Callable[[Settings], object]) -> None:
    """Calls `function` with the settings given on the command line, an instance of the dataclass; exits as `call`."""
    import tyro  # here, as a program calls `guard_imports` before it imports what takes time

    call(lambda: function(tyro.cli(settings_class)))


def call(function: Callable[..., object], *arguments: object) -> None:
    """Calls `function`, whose errors are the user's: each becomes one sentence.

    Exits with 2 for settings, data or files that cannot be used, 1 for a training that failed, 75 (EX_TEMPFAIL) for a
    run that another process trains, 130 for one that the user interrupted, and 143 after SIGTERM.
    """
    if signal.getsignal(signal.SIGINT) == _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A program that is started with a closed stderr has none.
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        function(*arguments)
    except RunBusy as error:
        _exit(75, str(error))
    except (ValueError, OSError) as error:
        _exit(2, str(error))
    except TrainingFailed as error:
        _exit(1, str(error))
    except Interrupted as error:
        _exit(128 + error.signal, str(error))
    except KeyboardInterrupt:
        _exit(130, "interrupted")


def _exit(code: int, message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)
