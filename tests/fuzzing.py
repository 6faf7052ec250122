"""What the fuzz tests share: odd values, damaged bytes, and the one demand that they all make, `survive`.

CI tries the same cases each time, `FUZZ_CASES` of them. To look for new ones raise that and choose a seed:
`FUZZ_CASES=100000 pytest tests/test_fuzz.py tests/test_fuzz_solve.py --hypothesis-seed=1`.
"""

import contextlib
import os
import signal
import traceback
from pathlib import Path

import numpy
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from common.errors import TrainingFailed
from torchadjoint import SolverError

PROJECT = Path(__file__).parent.parent
NUM_CASES = int(os.environ.get("FUZZ_CASES", 1_500))
SECONDS_PER_CASE = 30


def cases(share):
    """Settings for a test that has this share of all cases."""
    return settings(
        max_examples=max(1, round(share * NUM_CASES)),
        deadline=None,
        derandomize="FUZZ_CASES" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Hang(BaseException):
    """No `except Exception` stops it."""


@contextlib.contextmanager
def time_limit():
    """Raises Hang after too much work, and after much more time, which a busy machine may need."""

    def stop(number, frame):
        raise Hang

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, 1), (signal.ITIMER_REAL, signal.SIGALRM, 20))
    previous = [signal.signal(number, stop) for _, number, _ in timers]
    # Whoever waits for one, as the time limit of a test does, waits on.
    left = [signal.setitimer(timer, patience * SECONDS_PER_CASE)[0] for timer, _, patience in timers]
    try:
        yield
    finally:
        for (timer, number, _), handler, seconds in zip(timers, previous, left, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
            signal.setitimer(timer, seconds)


def survive(call):
    """The result of `call()`, or None after one of our errors: one sentence, raised on purpose. All else fails."""
    try:
        with time_limit():
            return call()
    except (ValueError, FileNotFoundError, SolverError, TrainingFailed) as error:
        origin = traceback.extract_tb(error.__traceback__)[-1]
        is_ours = Path(origin.filename).is_relative_to(PROJECT) and "site-packages" not in origin.filename
        is_on_purpose = origin.line.startswith(("raise ", "refuse("))
        sentence = str(error)
        if not (is_ours and is_on_purpose) or "\n" in sentence or not 10 < len(sentence) < 2_000:
            raise AssertionError(f"no error of ours: {sentence!r}") from error


def some_of(strategies, at_most):
    """Dictionaries with some of these names, and values of their strategies."""
    names = st.lists(st.sampled_from(sorted(strategies)), unique=True, max_size=at_most)
    return names.flatmap(lambda names: st.fixed_dictionaries({name: strategies[name] for name in names}))


NUMBERS = (0, -0.0, 5e-324, 1e-300, 1e-45, 1e-39, 1e-7, 1e30, 1e39, 1.7e308, 2**31, 2**63, 10**25, 10**400)
TEXTS = (
    "",
    "nan",
    "1e-3",
    "True",
    "a\nb",
    "x" * 5000,
    "\0",
    "\ud800",
    "\udc80",
    "~nobody-at-all",
    "..",
    "cuda",
    "cpu:0",
)
odd = st.one_of(
    *[st.sampled_from(NUMBERS), st.sampled_from(TEXTS)] * 3,
    st.floats(),
    st.integers(),
    st.none(),
    st.booleans(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.floats().map(numpy.float64),
    st.floats(width=32).map(numpy.float32),
    st.booleans().map(numpy.bool_),
    st.fractions(),
    st.decimals(),
    st.complex_numbers(),
    st.builds(object),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([(), (3,), (4, 4), (0,)]).map(torch.ones),
    st.sampled_from([(), (3,), (0,)]).map(numpy.ones),
)


@st.composite
def damaged(draw, original):
    """Bytes made from `original` by some accidents, most of them near its start."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, min(100, len(content))) | st.integers(0, len(content)))
        accident = draw(st.sampled_from(["cut", "flip", "number", "insert", "drop", "repeat", "replace"]))
        if accident == "cut":
            del content[place:]
        elif accident == "flip" and place < len(content):
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif accident == "number":
            number = draw(st.sampled_from([0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1]))
            content[place : place + 4] = number.to_bytes(4, "little")
        elif accident == "insert":
            content[place:place] = draw(st.binary(max_size=8))
        elif accident == "drop":
            del content[place : place + draw(st.integers(1, 100))]
        elif accident == "repeat":
            content[place:place] = content[place : place + 100]
        elif accident == "replace":
            content = bytearray(draw(st.binary(max_size=100)))
    return bytes(content)
