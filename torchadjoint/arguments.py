"""Checks of what users give, each of which says in one sentence what is wrong: solves and settings use them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

TIMES = "a list of times or a tensor of shape (times,)"
LARGEST_WHOLE = 2**63 - 1
"""The largest whole number that PyTorch takes."""


def shown(value: Any) -> str:
    """`value` as an error shows it: on one line, and not too long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python refuses to print an integer of more than 4,300 digits.
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:197]}..."


def refuse(name: str, value: Any, allowed: str) -> NoReturn:
    """Raise ValueError: the argument `name` is `value`, but must be what `allowed` says."""
    raise ValueError(f"{name} is {shown(value)}, but must be {allowed}")


def number(name: str, value: Any, *, minimum: float | None = None, maximum: float = math.inf) -> float:
    """The finite number `value`, above 0 if there is no `minimum`. ValueError if it is none."""
    try:
        converted = float(value) if _is_real(value) else math.nan
    except OverflowError:
        converted = math.inf
    if converted > maximum:
        refuse(name, value, f"at most {maximum:.2g}")
    if not (math.isfinite(converted) and (converted > 0 if minimum is None else converted >= minimum)):
        refuse(name, value, "a finite number " + ("above 0" if minimum is None else f"of at least {minimum}"))
    return converted


def whole_number(name: str, value: Any, *, minimum: int = 1, maximum: int = LARGEST_WHOLE) -> int:
    """The whole number `value`, at least `minimum`. ValueError if it is none."""
    if _is_real(value) and value > maximum:
        refuse(name, value, f"at most {maximum}")
    if not (_is_real(value) and value >= minimum and value == int(value)):
        refuse(name, value, f"a whole number of at least {minimum}")
    return int(value)


def flag(name: str, value: Any, *others: str) -> bool | str:
    """The bool `value`, or one of the strings `others`. ValueError if it is none."""
    if isinstance(value, str) and value in others:
        return value
    # NumPy is no requirement, but its bools are fine.
    is_numpys = getattr(value, "dtype", None) == "bool" and value.shape == ()
    if not (isinstance(value, bool) or is_numpys):
        refuse(name, value, " or ".join(["True", "False", *map(repr, others)]))
    return bool(value)


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """The string `value`. ValueError if it is not among `choices`."""
    if not (isinstance(value, str) and value in choices):
        refuse(name, value, f"one of {', '.join(map(repr, choices))}")
    return value


def state_shapes(y0: Tensor | tuple[Tensor, ...]) -> list[torch.Size]:
    """The shape of `y0`, or of each of its tensors.

    Raises:
        ValueError: if it is no dense tensor with entries of float32 or float64, nor a tuple of such, all of one dtype
            and on one device.
    """
    tensors = y0 if isinstance(y0, tuple) else (y0,)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        refuse("y0", y0, "a tensor or a tuple of tensors")
    for tensor in tensors:
        if tensor.is_complex():
            raise ValueError("y0 is complex, but must be real: solve for torch.view_as_real(y0), in two real parts")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"y0 is of dtype {tensor.dtype}, but must be float32 or float64")
        if not _is_dense(tensor) or tensor.numel() == 0:
            raise ValueError(f"y0 is {_described(tensor)}, but must be dense and have entries")
        if (tensor.dtype, tensor.device) != (tensors[0].dtype, tensors[0].device):
            raise ValueError(
                f"the tensors of y0 must have one dtype and one device, but are {_described(tensors[0])} and "
                f"{_described(tensor)}"
            )
    return [tensor.shape for tensor in tensors]


def parameters(adjoint_params: Iterable[Tensor] | None, func: nn.Module, device: torch.device) -> tuple[Tensor, ...]:
    """Those of the `adjoint_params`, or else of the parameters of `func`, that want a gradient, each once.

    Raises:
        ValueError: if one is no dense tensor of real numbers on `device`, or retains its gradient though it is no leaf.
    """
    candidates = (*func.parameters(), *of_replicas(func)) if adjoint_params is None else adjoint_params
    try:
        candidates = tuple(candidates)
    except TypeError:
        candidates = None
    # A single tensor would be taken apart into rows that func does not know.
    if candidates is None or isinstance(adjoint_params, Tensor):
        refuse("adjoint_params", adjoint_params, "a sequence of tensors, such as (weight,)")
    found = {}
    for candidate in candidates:
        if not isinstance(candidate, Tensor):
            refuse(
                "adjoint_params", adjoint_params, f"a sequence of tensors, but a {type(candidate).__name__} is in it"
            )
        if not candidate.requires_grad:
            continue
        if candidate.device != device or candidate.is_complex() or not _is_dense(candidate):
            raise ValueError(
                f"a parameter is {_described(candidate)}, but must be dense and real and on {device}, where y0 is"
            )
        if candidate.retains_grad:
            raise ValueError(
                "retain_grad() was called on a parameter that is no leaf: its .grad would hold the products of all "
                "steps too. Look at its gradient by register_hook, or leave retain_grad() out"
            )
        found[id(candidate)] = candidate
    return tuple(found.values())


def of_replicas(func: Any) -> Iterator[Tensor]:
    """What nn.DataParallel makes of parameters: plain attributes of its replicas of a module."""
    for module in func.modules() if isinstance(func, nn.Module) else ():
        if getattr(module, "_is_replica", False):
            yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def output_times(t: Tensor, largest: float, *, name: str = "t") -> list[float]:
    """The entries of `t`. ValueError if they are no times to solve from one to the next, none beyond `largest`."""
    if not (isinstance(t, Tensor) and t.dim() == 1 and t.is_floating_point() and _is_dense(t) and len(t) >= 1):
        given = _described(t) if isinstance(t, Tensor) else f"a {type(t).__name__}"
        raise ValueError(f"{name} must be a floating-point tensor of shape (times,) with a time or more, not {given}")
    values = t.detach().double().tolist()
    steps = [after - before for before, after in pairwise(values)]
    if not (all(step > 0 for step in steps) or all(step < 0 for step in steps)) or not _within(values, largest):
        refuse(name, values, f"finite and strictly increasing or decreasing, none beyond {largest:.2g}")
    return values


def step_times(name: str, value: Tensor | Sequence[float] | None, largest: float) -> list[float]:
    """The entries of `value` in order, each once. ValueError if they are no times, none beyond `largest`."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.tensor(list(value), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        refuse(name, value, TIMES)
    if tensor.dim() != 1 or tensor.is_complex() or not _is_dense(tensor):
        refuse(name, value, TIMES)
    values = tensor.detach().double().tolist()
    if not _within(values, largest):
        refuse(name, values, f"finite and at most {largest:.2g}")
    return sorted(set(values))


def jump_times(
    jump_t: Tensor | Sequence[float] | None, largest: float, *, times: Sequence[float], dtypes: Sequence[torch.dtype]
) -> list[float]:
    """The `step_times` of `jump_t`, of which there are none if it is None.

    A jump that equals one of the output `times` in one of the `dtypes` is that time: 0.7 and what float32 makes of it
    are two numbers, between which the field would be asked on the wrong side of its jump.
    """
    if jump_t is None:
        return []
    values = step_times("jump_t", jump_t, largest)
    for dtype in dtypes:
        nearby = dict(zip(_rounded(times, dtype), times, strict=True))
        values = [
            value if value in times else nearby.get(rounded, value)
            for value, rounded in zip(values, _rounded(values, dtype), strict=True)
        ]
    return values


def refuse_transforms(given: Iterable[Any]) -> None:
    """Raise NotImplementedError if a tensor among these is inside a transform of torch.func, or has a tangent."""
    for tensor in filter(torch.is_tensor, given):
        # Func may close over a tensor of a transform that no argument shows.
        if torch._C._are_functorch_transforms_active() or functorch.is_legacy_batchedtensor(tensor):
            what = "torch.func's transforms (grad, vjp, jvp, vmap and their like)"
        elif forward_ad.unpack_dual(tensor).tangent is not None:
            what = "forward-mode differentiation"
        else:
            continue
        raise NotImplementedError(
            f"a solve does not take part in {what}: call it with plain tensors, as a batch if there are many, and "
            "differentiate by .backward() or torch.autograd.grad (without is_grads_batched or vectorize)"
        )


def _rounded(values: Sequence[float], dtype: torch.dtype) -> list[float]:
    return torch.tensor(values, dtype=torch.float64).to(dtype).tolist()


def _within(values: Sequence[float], largest: float) -> bool:
    return all(abs(value) <= largest for value in values)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta


def _described(tensor: Tensor) -> str:
    sparse = "" if tensor.layout is torch.strided else f" of layout {tensor.layout}"
    return f"a tensor of shape {tuple(tensor.shape)}, dtype {tensor.dtype} on {tensor.device}{sparse}"


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
