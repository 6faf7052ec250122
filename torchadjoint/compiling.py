"""Functions that torch.compile makes kernels of, kept for all modules of one structure: `compiled` has them.

torch looks at all that it has read in a module before every call, which costs as much as a small step. Here it does so
once a solve: after that the kernels themselves are called, with the tensors of the next step in their places.
"""

import functools
import re
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

Kernels = Callable[..., Sequence[Tensor]]


class Compiled:
    """A function as torch.compile makes one of it, called with a module, a shape, and `num_fixed` arguments that stay.

    torch makes a new form of it whenever something that it has read in the module is another, and keeps a few of them.
    They are released with this object.
    """

    def __init__(self, function: Callable, num_fixed: int):
        # torch keeps the forms with the code, so this has a copy of its own.
        self.code = function.__code__.replace()
        self.latest = _Latest()
        # Not at the import of this module: it takes seconds.
        self.function = torch.compile(
            types.FunctionType(self.code, function.__globals__),
            fullgraph=True,
            dynamic=False,
            backend=functools.partial(_recorded, self.latest),
            options={"guard_filter_fn": functools.partial(_are_asked, self.code.co_varnames[1 : 2 + num_fixed])},
        )
        self.owner: weakref.ref | None = None
        """Whose the oldest form is; None until the first is made."""
        weakref.finalize(self, torch._dynamo.reset_code, self.code).atexit = False

    def prepare(self, func: nn.Module, *arguments: Any) -> None:
        """Call it, unless that was done; twice, to see that it has settled. What comes out is not used."""
        if self.owner is not None:
            return
        # The patch is for this thread's second call, and holds for all threads.
        with PREPARING:
            if self.owner is None:
                try:
                    self(func, *arguments)
                    with torch._dynamo.config.patch(error_on_recompile=True):
                        self(func, *arguments)
                except ValueError:
                    # The form that is of no use would count towards torch's limit.
                    torch._dynamo.reset_code(self.code)
                    raise
                self.owner = _owner(func)

    def __call__(self, func: nn.Module, *arguments: Any) -> tuple[Tensor, ...]:
        """What the function returns.

        Raises:
            ValueError: if it cannot be compiled, or would be compiled over and over again.
        """
        dynamo = torch._dynamo.exc
        try:
            return self.function(func, *arguments)
        except dynamo.FailOnRecompileLimitHit as error:
            if self.owner is not None and self.owner() is not _owner(func)():
                self.owner = _owner(func)
                torch._dynamo.reset_code(self.code)
                return self(func, *arguments)
            reason, cause = "it changes so often that it would be compiled again and again", error
        except dynamo.RecompileError as error:
            reason, cause = "it changes whenever it is called, so it would be compiled again and again", error
        except dynamo.TorchDynamoException as error:
            reason, cause = " ".join(str(error).split("\n\n")[0].split()), error
        advice = "leave compile away, or take compile=True if it is 'solve'"
        raise ValueError(f"func cannot be compiled as a whole ({reason}): {advice}") from cause


PREPARING = threading.RLock()
"""Held by the one thread that may prepare something."""
SETTLED = (
    r"G\['(?!__import_|___unnamed_scope)|G\['__import_(torch|torchadjoint|contextlib)(_dot_|')|__import__\('torch'\)"
)
"""How the names of torch's guards start that ask whether torch, Python and this library are what they were."""


def _are_asked(fixed: Sequence[str], guards: Sequence[Any]) -> list[bool]:
    """Which of torch's guards are asked before a call: none of `SETTLED`, nor about arguments of these names."""
    never = re.compile("|".join([SETTLED, *(rf"{name}\b" for name in fixed)]))
    return [never.match(guard.name) is None for guard in guards]


class _Latest(threading.local):
    """The latest call of some kernels in this thread, if it was to be recorded."""

    is_wanted = False
    kernels: Kernels | None = None
    inputs: tuple[Tensor, ...] = ()
    outputs: Sequence[Tensor] = ()


def _recorded(latest: _Latest, graph: fx.GraphModule, examples: Sequence[Tensor], **_: Any) -> Kernels:
    """The kernels of a graph, whose calls are recorded where that is wanted.

    A torch that knows no filter of guards hands it on to here.
    """
    kernels = make_kernels(graph, examples)

    def call(*inputs: Tensor) -> Sequence[Tensor]:
        outputs = kernels(*inputs)
        if latest.is_wanted:
            latest.kernels, latest.inputs, latest.outputs = kernels, inputs, outputs
        return outputs

    return call


def make_kernels(graph: fx.GraphModule, examples: Sequence[Tensor]) -> Kernels:
    """Kernels that do what `graph` says."""
    # Not at the import of this module: it takes a second.
    from .quick_tanh import QuickTanh

    # What calls the kernels one after the other is C++ too.
    options = {"cpp_wrapper": True, "post_grad_custom_pre_pass": QuickTanh()}
    if hasattr(torch._inductor.config, "cpp_wrapper_build_separate"):
        # That is compiled apart, with less effort: with as much as for the kernels g++ may take over half an hour.
        options["cpp_wrapper_build_separate"] = True
    # Buffers cost more than numbers where these are few.
    options["force_pointwise_cat"] = all(size <= SMALL for size in _sizes_of_cats(graph))
    if hasattr(torch._inductor.config, "unsafe_marked_cacheable_functions"):
        # Else torch does not keep loops on disk. All that is in them is in the keys by which it finds them.
        options["unsafe_marked_cacheable_functions"] = {"torch.ops.higher_order.while_loop": torch.__version__}
    return torch._inductor.compile(graph, examples, options=options)


SMALL = 256
"""How many numbers are joined at most by computing them where they are used."""


def _sizes_of_cats(graph: fx.GraphModule) -> Iterator[int]:
    """The sizes of all joined tensors in a graph and in the loops in it."""
    for part in graph.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                if node.target in (torch.cat, torch.stack):
                    yield node.meta["example_value"].numel()


class Bound:
    """A `Compiled` for one solve: called with the tensors that change from step to step.

    Args:
        compiled: is called with `func`, `fixed` and those tensors.
        func: the module. What the function reads in it is looked at in the first call alone.
        fixed: arguments that stay.
    """

    def __init__(self, compiled: Compiled, func: nn.Module, fixed: Sequence[Any]):
        self.compiled, self.func, self.fixed = compiled, func, fixed
        self.was_called = False
        self.straight: Callable[..., tuple[Tensor, ...]] | None = None

    @property
    def is_prepared(self) -> bool:
        """Whether it was compiled before."""
        return self.compiled.owner is not None

    def prepare(self, *tensors: Tensor) -> None:
        """Compile it for such tensors, unless that was done. ValueError if that cannot be done."""
        self.compiled.prepare(self.func, *self.fixed, *tensors)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the function returns; the tensors must be of the same shapes and strides in every call.

        Raises:
            ValueError: if it cannot be compiled, or would be compiled over and over again.
        """
        if self.straight is not None:
            return self.straight(*tensors)
        latest = self.compiled.latest
        latest.is_wanted = not self.was_called
        try:
            returned = self.compiled(self.func, *self.fixed, *tensors)
            self.straight = _straight_to_kernels(latest, tensors, returned)
        finally:
            latest.__dict__.clear()
        self.was_called = True
        return returned


def _straight_to_kernels(
    latest: _Latest, tensors: Sequence[Tensor], returned: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, ...]] | None:
    """What calls the kernels of the latest call with other tensors in the places of `tensors`.

    None if there were no kernels, or if they are not all that a call does: if they return something that the function
    does not, which some attribute of the module becomes. Nor if one tensor had the places of two, which others may not.
    """
    kernels, inputs = latest.kernels, list(latest.inputs)
    numbers = {id(output): number for number, output in enumerate(latest.outputs)}
    if kernels is None or numbers.keys() != {id(tensor) for tensor in returned}:
        return None
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        return None
    order = [numbers[id(tensor)] for tensor in returned]
    places = [[place for place, given in enumerate(inputs) if given is tensor] for tensor in tensors]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        for tensor, found in zip(tensors, places, strict=True):
            for place in found:
                inputs[place] = tensor
        outputs = kernels(*inputs)
        return tuple([outputs[number] for number in order])

    return call


@functools.lru_cache(maxsize=64)
def compiled(function: Callable, fixed: tuple, shape: torch.Size, structure: tuple) -> Compiled:
    """The compiled `function` for some fixed arguments, all modules of one `structure` and states of one shape."""
    return Compiled(function, len(fixed))


def structure(func: nn.Module, tensors: Sequence[tuple[str, Tensor, int]]) -> tuple:
    """In what modules must agree to share what is compiled: their classes, and all about their tensors but the values.

    Other attributes are left to torch, which compiles anew only for those that it has read.

    Args:
        func: the module.
        tensors: the parameters and buffers in it, by name, each with a number that tells which of them are one.
    """
    numbers: dict[int, int] = {}
    return (
        *(
            (name, type(module), numbers.setdefault(id(module), len(numbers)))
            for name, module in func.named_modules(remove_duplicate=False)
        ),
        *(
            (name, number, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
            for name, tensor, number in tensors
        ),
    )


def _owner(func: nn.Module) -> weakref.ref:
    """Something that stays when `func` is wrapped anew for another solve: its first parameter, if it has one."""
    return weakref.ref(next(func.parameters(), func))
