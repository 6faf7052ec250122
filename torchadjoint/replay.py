"""Work that always goes from the same buffers to the same buffers: on a GPU it is recorded once and then replayed.

A step of a small system is bound by the launches of its kernels. A CUDA graph launches all of them at once. The solver
replays its attempts, and the backward pass the products of an accepted step.
"""

import functools
import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

NUM_EAGER_CALLS = 4
"""So many calls of a function are made before it is recorded, as recording costs about as much as they do."""


class Replay:
    """Calls one function again and again; on a GPU its fifth call records it, and then the record is replayed.

    Args:
        device: where the function works.
        is_static: whether the function reads and writes tensors that stay where they are, does the same work in every
            call, and does no harm if it is called once more than asked for. If not, it is never recorded.
    """

    def __init__(self, *, device: torch.device, is_static: bool):
        self.device = device
        self.is_recordable = is_static and can_record(device)
        if can_record(device) and not is_static:
            _say_once(
                logging.INFO,
                "A field that is not static (`Field.is_static`) runs kernel by kernel, without CUDA graphs",
            )
        self.num_calls = 0
        self.graph = None
        self.output: Tensor | None = None

    # The function is no attribute: a method of the object that holds this would keep both alive in a circle.
    def __call__(self, function: Callable[[], Tensor | None]) -> Tensor | None:
        """What `function` returns; a recorded one writes it to the same tensor in every call."""
        if self.graph is not None:
            self.graph.replay()
            return self.output
        self.num_calls += 1
        if not self.is_recordable or self.num_calls <= NUM_EAGER_CALLS:
            return function()
        try:
            self.graph, self.output = record(function, self.device)
        except RuntimeError as error:
            self.is_recordable = False
            _say_once(
                logging.WARNING, f"A step cannot be recorded as a CUDA graph, so it runs kernel by kernel: {error}"
            )
            return function()
        self.graph.replay()
        return self.output


def can_record(device: torch.device) -> bool:
    """Whether work on `device` can be recorded."""
    return device.type == "cuda"


def record(function: Callable[[], Tensor | None], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor | None]:
    """The CUDA graph of a call of `function`, which works on `device`, and where it will put its output.

    Raises:
        RuntimeError: if the function does what a graph cannot hold, such as waiting for the device.
    """
    current = torch.cuda.current_stream(device)
    graph = torch.cuda.CUDAGraph()
    # All threads record on one stream, one after the other: what another did on it meanwhile would be in the graph.
    with RECORDING:
        stream = _recording_stream(current.device)
        stream.wait_stream(current)
        try:
            # The device becomes the current one: a graph of another would hold nothing, and say so in a warning alone.
            with torch.cuda.device(device), torch.cuda.stream(stream):
                # Libraries allocate workspaces when they first work on a stream, which must not happen in the graph.
                function()
                # Only what this thread does must be recordable: others may go on, such as one that loads data.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    output = function()
                finally:
                    graph.capture_end()
        finally:
            # Also if it failed: the first call may still be writing to the buffers of the next.
            current.wait_stream(stream)
    return graph, output


RECORDING = threading.Lock()
"""Held by the one thread that may record."""


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@functools.cache
def _say_once(level: int, message: str) -> None:
    logger.log(level, message)
