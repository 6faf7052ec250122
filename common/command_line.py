"""The command line of an experiment: its settings are the options, and a user's error is one sentence."""

import sys
from collections.abc import Callable

import tyro

from .config import TrainingConfig
from .errors import Interrupted, TrainingFailed


def run(config_class: type[TrainingConfig], function: Callable[[TrainingConfig], object]) -> None:
    """Calls `function` with the settings given on the command line.

    Exits with 2 for settings, data or files that cannot be used, 1 for a training that failed, 130 for one that the
    user interrupted, and 143 after SIGTERM.
    """
    config = tyro.cli(config_class)
    try:
        function(config)
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
