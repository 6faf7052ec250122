"""Functions that compute under the `torch.autocast` of the forward pass, also in the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CACHES_GRAPHS_ALONE = torch.__version__ >= "2.14"
"""Whether autocast keeps only what it has cast with a graph, as 2.14 does and 2.6 does not. Of an older torch the graph
of an evaluation may end in what one without a graph has cast; there everything is cast anew."""


def uncast(device_type: str) -> torch.autocast:
    """Inside, the solver computes in the dtype of the state; what func computes in is the matter of `Cast`."""
    return torch.autocast(device_type, enabled=False)


class Cast(nn.Module):
    """`func` under `torch.autocast` of these arguments."""

    def __init__(self, func: Callable[..., Any], arguments: dict[str, Any]):
        super().__init__()
        self.func = func
        self.arguments = arguments
        self.context = torch.autocast(**arguments)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        # To make one takes long; but torch.compile would compile anew for each one that is there.
        with torch.autocast(**self.arguments) if torch.compiler.is_compiling() else self.context:
            return self.func(t, y)


def cast_as_now(func: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """`func` under the autocast that is on now for this kind of device; itself if none is."""
    if not torch.is_autocast_enabled(device_type):
        return func
    arguments = {
        "device_type": device_type,
        "dtype": torch.get_autocast_dtype(device_type),
        "cache_enabled": CACHES_GRAPHS_ALONE and torch.is_autocast_cache_enabled(),
    }
    return Cast(func, arguments)
