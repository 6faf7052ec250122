"""What the paper reports, as data: each figure with its status, for the tables that show it beside ours."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Published:
    """One quantity at one pair of tolerances, with and without the trick: mean and standard deviation over its runs.

    `quantity` is a column of `summary.collect`: `accuracy` (a share), `backward_nfe` (of a training: measured in every
    10th epoch, times 10), `test_backward_nfe` (of one pass over the test set) or `epoch_seconds` (of training).
    """

    experiment: str
    rtol: float
    atol: float
    quantity: Literal["accuracy", "backward_nfe", "test_backward_nfe", "epoch_seconds"]
    default: tuple[float, float]
    seminorm: tuple[float, float]
    status: Literal["authors' draft", "from memory"]
    """What is from memory was not checked against the paper."""


_DRAFT, _MEMORY = "authors' draft", "from memory"

PUBLISHED = (
    Published("speech_commands", 1e-3, 1e-6, "accuracy", (0.926, 0.004), (0.925, 0.005), _DRAFT),
    Published("speech_commands", 1e-3, 1e-6, "test_backward_nfe", (21.5e3, 1.6e3), (12.5e3, 1.0e3), _DRAFT),
    Published("speech_commands", 1e-3, 1e-6, "epoch_seconds", (275.4, 15.5), (212.2, 11.4), _DRAFT),
    Published("speech_commands", 1e-3, 1e-6, "backward_nfe", (14.36e6, 1.09e6), (8.67e6, 1.60e6), _MEMORY),
    Published("speech_commands", 1e-4, 1e-7, "accuracy", (0.928, 0.004), (0.925, 0.005), _MEMORY),
    Published("speech_commands", 1e-4, 1e-7, "backward_nfe", (30.67e6, 2.48e6), (12.75e6, 2.00e6), _MEMORY),
    Published("speech_commands", 1e-5, 1e-8, "accuracy", (0.924, 0.007), (0.925, 0.005), _MEMORY),
    Published("speech_commands", 1e-5, 1e-8, "backward_nfe", (77.95e6, 4.47e6), (29.39e6, 0.80e6), _MEMORY),
)
"""No figure of acrobot is among the facts that this project was written from."""
