"""The directions of a divergence, which is a sum over them of e^T J e: the fields of flows use them."""

import torch
from torch import Tensor


def directions_of(points: Tensor, probe: Tensor | None) -> Tensor:
    """Directions (number, batch, ...) for points (batch, ...): all axes for the exact trace, or one probe.

    A probe of random signs, of the shape of the points, gives Hutchinson's estimate.
    """
    if probe is not None:
        return probe.detach().unsqueeze(0)
    axes = torch.eye(points[0].numel(), dtype=points.dtype, device=points.device)
    return axes.view(-1, 1, *points.shape[1:]).expand(-1, *points.shape)
