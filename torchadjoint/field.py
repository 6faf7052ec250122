"""What the solver needs of a vector field, and the wrapper that makes it of any nn.Module. Solver and adjoint use it.

The reverse products come in three parts, so that none is computed before it is sure to be needed: `linearise` evaluates
the field and keeps what its products need, `pullback` gives the product with the state's Jacobian, and
`add_parameter_product` the one with the parameters', which only an accepted step asks for. What is kept lives in
slots, numbered as the stages of a Runge-Kutta step are.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Field(Protocol):
    """A vector field f(t, y) written for the solver.

    A module offers one by a method `fused_field(y0) -> Field`, which makes one for each solve: what a solve keeps in
    its slots is its own. Any other module goes through `AutogradField`. The state `y` and the derivative `out` have the
    shape of `y0`; where that is a tuple of tensors, they and cotangents are such tuples. `t` is a Python float.
    """

    parameter_sizes: tuple[int, ...]
    """Number of entries of each parameter with a gradient, in the order of the module's `parameters()`, in which they
    lie in a flat gradient."""
    is_static: bool
    """Whether what the other methods do depends on nothing but the contents of tensors that stay where they are for the
    whole solve: not on `t`, and on `enter` by what it writes into these. On a GPU its steps are then recorded once for
    each solve, and replayed."""

    def enter(self, t0: float, t1: float) -> None:
        """What is evaluated from now on lies between `t0` and `t1`, on the inner sides of jumps at either of them.

        Where no jump lies ahead `t1` is the solve's last time, and evaluations may lie beyond.
        """

    def evaluate(self, t: float, y: Tensor, out: Tensor) -> None:
        """Write f(t, y) to `out`."""

    def linearise(self, slot: int, t: float, y: Tensor, out: Tensor) -> None:
        """Write f(t, y) to `out` and keep in `slot` what its products need; of `y`, which is written over, a copy."""

    def pullback(self, slot: int, cotangent: Tensor, out: Tensor) -> None:
        """Write cotangent^T df/dy at the point of `slot` to `out`; also a second time, for another cotangent."""

    def add_parameter_product(self, slot: int, weight: float, gradient: Tensor) -> None:
        """Add weight * cotangent^T df/dparameters to flat `gradient`; at most once for each `pullback` of `slot`."""

    def reuse_slot(self, slot: int) -> None:
        """The stage in `slot` is the next step's first: let slot 0, which was in use, hold what that one holds."""

    def unflatten(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """The flat `gradient` as tensors of the parameters' shapes."""


def checked_derivative(derivative: Tensor, y: Tensor) -> Tensor:
    """`derivative`, which a user's function returned for the state `y`.

    Raises:
        ValueError: if it is not a dense tensor of real numbers of the shape and on the device of `y`.
    """
    if not isinstance(derivative, Tensor):
        found = f"a {type(derivative).__name__}"
    elif derivative.shape != y.shape:
        found = f"shape {tuple(derivative.shape)}"
    elif derivative.device != y.device or derivative.layout is not torch.strided or derivative.is_complex():
        found = f"a tensor of {derivative.dtype} and {derivative.layout} on {derivative.device}"
    else:
        return derivative
    raise ValueError(
        f"the vector field returned {found} for a state of shape {tuple(y.shape)} on {y.device}: "
        "it must return dy/dt, a dense tensor of real numbers of that shape there"
    )


@contextlib.contextmanager
def _without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the tensors' hooks do not act: they are for the gradient of the whole solve, not for its parts."""
    hooks = [(tensor._backward_hooks, dict(tensor._backward_hooks)) for tensor in tensors if tensor._backward_hooks]
    for live, _ in hooks:
        live.clear()
    try:
        yield
    finally:
        for live, kept in hooks:
            live.update(kept)


top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignores_tracing: None)


@contextlib.contextmanager
def _plainly_saved() -> Iterator[None]:
    """Inside, graphs keep their tensors, also within `torch.utils.checkpoint`.

    They are parts of one gradient. Its hooks for saved tensors would compute all anew for every part. Other hooks, such
    as those that move what is saved, act. A torch older than 2.8 does not say which there are.
    """
    hooks = top_hooks(False)
    if hooks is None or getattr(hooks[0], "__module__", None) != "torch.utils.checkpoint":
        yield
    else:
        # An output that is saved as it is would keep its own graph alive in a circle.
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _same):
            yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


class AutogradField:
    """Any `func(t, y)` as a `Field`: products by autograd, on the graph kept since the evaluation.

    Args:
        func: called with `t`, a tensor without dimensions, and `y` of shape `shape`.
        parameters: the tensors whose gradients are wanted.
        shape: shape of the state.
        time_gradient: whether the gradient is to have one more entry at its end, the product with df/dt.
    """

    is_static = False

    def __init__(self, func: nn.Module, parameters: tuple[Tensor, ...], shape: torch.Size, *, time_gradient: bool):
        self.func = func
        self.parameters = parameters
        self.shape = shape
        self.time_gradient = time_gradient
        self.parameter_sizes = tuple(parameter.numel() for parameter in parameters)
        self.after_first: Callable[[], None] | None = None
        """Called after the next evaluation, if that is the first of a solve that is differentiated. What func makes of
        parameters then, and keeps, is differentiated too."""
        self.points: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.cotangents: dict[int, Tensor] = {}

    def enter(self, t0: float, t1: float) -> None:
        """A field of `t` alone needs no telling."""

    def evaluate(self, t: float, y: Tensor, out: Tensor) -> None:
        with torch.set_grad_enabled(self.after_first is not None):
            derivative = checked_derivative(self.func(y.new_full((), t), y), y)
        self._call_after_first()
        out.copy_(derivative.detach())

    def linearise(self, slot: int, t: float, y: Tensor, out: Tensor) -> None:
        with torch.enable_grad(), _plainly_saved():
            # Leaves of their own: the solver writes the next stages over `y`, the graph must keep its value.
            time = y.new_full((), t, requires_grad=self.time_gradient)
            state = y.detach().clone().requires_grad_(True)
            derivative = checked_derivative(self.func(time, state), state)
        self._call_after_first()
        self.points[slot] = (time, state, derivative)
        out.copy_(derivative.detach())

    def _call_after_first(self) -> None:
        after, self.after_first = self.after_first, None
        if after is not None:
            after()

    def pullback(self, slot: int, cotangent: Tensor, out: Tensor) -> None:
        _, state, derivative = self.points[slot]
        self.cotangents[slot] = cotangent.clone()
        if not derivative.requires_grad:
            out.zero_()
            return
        (product,) = torch.autograd.grad(derivative, state, cotangent, retain_graph=True, allow_unused=True)
        out.zero_() if product is None else out.copy_(product)

    def add_parameter_product(self, slot: int, weight: float, gradient: Tensor) -> None:
        time, _, derivative = self.points[slot]
        targets = (*self.parameters, time) if self.time_gradient else self.parameters
        # Some may have been frozen since the solve began.
        wanted = [target for target in targets if target.requires_grad]
        if not wanted or not derivative.requires_grad:
            return
        with _without_hooks(self.parameters):
            products = torch.autograd.grad(
                derivative, wanted, self.cotangents[slot], retain_graph=True, allow_unused=True
            )
        products, position = iter(products), 0
        for target in targets:
            product = next(products) if target.requires_grad else None
            if product is not None:
                flat = product.to_dense().reshape(-1)  # that of a sparse embedding is not dense
                gradient[position : position + target.numel()].add_(flat, alpha=weight)
            position += target.numel()

    def reuse_slot(self, slot: int) -> None:
        self.points[0] = self.points[slot]
        self.cotangents[0] = self.cotangents[slot]

    def unflatten(self, gradient: Tensor) -> tuple[Tensor, ...]:
        pieces = gradient.split(self.parameter_sizes)
        return tuple(piece.view_as(target) for piece, target in zip(pieces, self.parameters, strict=True))


class _Around:
    """A field around another one: what does not read or write a state is the other's."""

    def __init__(self, field: Field):
        self.field = field
        self.parameter_sizes = field.parameter_sizes
        self.is_static = field.is_static
        self.enter = field.enter
        self.add_parameter_product = field.add_parameter_product
        self.reuse_slot = field.reuse_slot
        self.unflatten = field.unflatten


class CoupledField(_Around):
    """A field of a flat state as one of its front part, for a backward solve that leaves out the integrals behind it.

    Such a solve linearises all that it evaluates.

    Args:
        field: of the whole state; it never reads the integrals.
        num_coupled: how many entries the front part has.
        like: a whole state.
    """

    def __init__(self, field: Field, num_coupled: int, like: Tensor):
        super().__init__(field)
        # A field that does read integrals gets NaN. Where it reads them linearly, its products have none: they tell.
        self.state = torch.full_like(like, torch.nan)
        self.cotangent, self.out = torch.zeros_like(like), torch.zeros_like(like)
        self.front_state, self.front_cotangent, self.front_out = (
            whole[:num_coupled] for whole in (self.state, self.cotangent, self.out)
        )
        self.integral_adjoint = self.cotangent[num_coupled:]
        """Constant from one output time to the next; the adjoint sets it there."""
        # Apart from `out`, as a field may leave the integrals' part of its products as it is.
        product = torch.zeros_like(like)
        self.product, self.front_product, self.integral_product = product, product[:num_coupled], product[num_coupled:]
        self.reads = torch.zeros_like(self.integral_product, dtype=torch.bool)
        """Which entries of the integrals a product has shown to be read: none should be."""

    def linearise(self, slot: int, t: float, y: Tensor, out: Tensor) -> None:
        self.front_state.copy_(y)
        self.field.linearise(slot, t, self.state, self.out)
        out.copy_(self.front_out)

    def pullback(self, slot: int, cotangent: Tensor, out: Tensor) -> None:
        self.front_cotangent.copy_(cotangent)
        self.field.pullback(slot, self.cotangent, self.product)
        torch.logical_or(self.reads, self.integral_product, out=self.reads)
        out.copy_(self.front_product)


class TupleField(_Around):
    """A field of a tuple of tensors, as the one of a flat vector that the solver has.

    Args:
        field: written for tuples.
        shapes: of the tensors.
    """

    def __init__(self, field: Field, shapes: Sequence[torch.Size]):
        super().__init__(field)
        self.shapes = shapes
        self.sizes = [shape.numel() for shape in shapes]

    def evaluate(self, t: float, y: Tensor, out: Tensor) -> None:
        self.field.evaluate(t, self._split(y), self._split(out))

    def linearise(self, slot: int, t: float, y: Tensor, out: Tensor) -> None:
        self.field.linearise(slot, t, self._split(y), self._split(out))

    def pullback(self, slot: int, cotangent: Tensor, out: Tensor) -> None:
        self.field.pullback(slot, self._split(cotangent), self._split(out))

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(Tensor.view, flat.split_with_sizes(self.sizes), self.shapes))
