"""The command line of an experiment: its settings are the options, and a user's error is one sentence."""

import sys
from collections.abc import Callable

import tyro

from .config import TrainingConfig
from .errors import Interrupted, RunBusy, TrainingFailed


def run(config_class: type[TrainingConfig], function: Callable[[TrainingConfig], object]) -> None:
    """Calls `function` with the settings given on the command line; exits as `call` does."""
    call(function, tyro.cli(config_class))


def call(function: Callable[..., object], *arguments: object) -> None:
    """Calls `function`, whose errors are the user's: each becomes one sentence.

    Exits with 2 for settings, data or files that cannot be used, 1 for a training that failed, 75 (EX_TEMPFAIL) for a
    run that another process trains, 130 for one that the user interrupted, and 143 after SIGTERM.
    """
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
