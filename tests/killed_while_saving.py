"""Trains the toy and kills itself at a point of its end: `python killed_while_saving.py POINT FOLDER`, run by tests."""

import os
import signal
import sys
from pathlib import Path

from test_checkpoint import model_of
from test_training import make_config, run

from common import files
from common.checkpoint import Checkpoint


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before(suffix):
    """Kills in place of the write of the file with this suffix."""
    replace = files.replace

    def replace_or_die(path, *parts):
        if path.suffix == suffix:
            kill()
        replace(path, *parts)

    files.replace = replace_or_die


def main(point, folder):
    if point == "before the checkpoint is removed":
        Checkpoint.delete = lambda self: kill()
    else:
        kill_before({"before the weights": ".pt", "before the results": ".json"}[point])
    run(make_config(folder), model=model_of())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
