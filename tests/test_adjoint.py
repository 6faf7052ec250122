import pytest
import torch
from problems import (
    F64,
    Growth,
    Integral,
    Linear,
    Network,
    Pair,
    backward,
    differentiate,
    differentiate_exactly,
    distance,
    random,
    solve,
    steps,
)
from torch import nn
from torch.autograd import forward_ad

from torchadjoint import Backsolve, Discrete, odeint_adjoint

BACKWARD_SOLVES = ("default", "seminorm", "per-tensor", "as-published")
ADJOINTS = (*BACKWARD_SOLVES, "discrete")
NOT_AS_PUBLISHED = ("default", "seminorm", "per-tensor", "discrete")  # which needs many parameters
WARM = Backsolve(warm_start=True)
INCREASING = torch.linspace(0, 3, 5, dtype=F64)
DECREASING = torch.tensor([3.0, 2.5, 0.7, -0.2], dtype=F64)
T = torch.tensor([0.0, 1.0, 2.0], dtype=F64)


def compare_with_torchdiffeq(func, y0, t, **options):
    """Solve by torchdiffeq and by us: the same steps, evaluations and solution; return both outcomes.

    In float32 the error estimate of an easy step is mostly rounding, so there steps agree in number only.
    """
    theirs, ours = (differentiate(func, y0, t, solver=solver, **options) for solver in ("torchdiffeq", "torchadjoint"))
    for their_times, our_times in zip(steps(theirs.statistics), steps(ours.statistics), strict=True):
        assert len(our_times) == len(their_times)
        assert ours.y.dtype != F64 or our_times == pytest.approx(their_times, abs=1e-6)
    assert ours.statistics.forward.nfe == theirs.statistics.forward.nfe
    assert ours.statistics.backward.nfe == theirs.statistics.backward.nfe
    assert distance(ours.y, theirs.y) < (1e-12 if ours.y.dtype == F64 else 1e-4)
    return theirs, ours


@pytest.mark.parametrize("adjoint", BACKWARD_SOLVES)
@pytest.mark.parametrize("times", [INCREASING, DECREASING], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("needs_time_gradient", [True, False])
@pytest.mark.parametrize("func", [Network(), Network(autonomous=True)], ids=["of t and y", "of y"])
def test_steps_and_gradients_equal_torchdiffeqs(adjoint, times, needs_time_gradient, func):
    t = times.clone().requires_grad_(needs_time_gradient)
    theirs, ours = compare_with_torchdiffeq(func, random(4, 3), t, rtol=1e-5, atol=1e-7, adjoint=adjoint)
    for our_gradient, their_gradient in zip(ours.gradients, theirs.gradients, strict=True):
        assert (our_gradient is None) == (their_gradient is None)
        if our_gradient is not None:
            assert distance(our_gradient, their_gradient) < 1e-9


@pytest.mark.parametrize("adjoint", BACKWARD_SOLVES)
def test_steps_and_gradients_equal_torchdiffeqs_for_a_tuple_state(adjoint):
    t = INCREASING.clone().requires_grad_()
    theirs, ours = compare_with_torchdiffeq(Pair(), Pair.start(), t, rtol=1e-5, atol=1e-6, adjoint=adjoint)
    for our_gradient, their_gradient in zip(ours.gradients, theirs.gradients, strict=True):
        assert distance(our_gradient, their_gradient) < 1e-9


@pytest.mark.parametrize("adjoint", BACKWARD_SOLVES)
def test_gradients_equal_torchdiffeqs_to_rounding_in_float32(adjoint):
    func, y0 = Network(dtype=torch.float32, autonomous=True), random(4, 3, dtype=torch.float32)
    t = INCREASING.float()
    theirs, ours = compare_with_torchdiffeq(func, y0, t, rtol=1e-3, atol=1e-5, adjoint=adjoint)
    assert ours.y.dtype == torch.float32
    assert distance(ours.gradient, theirs.gradient) < 1e-4


@pytest.mark.parametrize("adjoint", ["seminorm", "per-tensor"])
@pytest.mark.parametrize(
    "options",
    [
        dict(first_step=0.05),
        dict(adjoint_rtol=1e-3),
        dict(adjoint_atol=1e-3),
        dict(adjoint_rtol=1e-8, adjoint_atol=1e-9),
    ],
    ids=str,
)
def test_options_mean_what_they_mean_to_torchdiffeq(adjoint, options):
    options = dict(rtol=1e-5, atol=1e-6, adjoint=adjoint) | options
    func = Network(autonomous=True)
    theirs, ours = compare_with_torchdiffeq(func, random(3), INCREASING, **options)
    assert distance(ours.gradient, theirs.gradient) < 1e-9
    plain = differentiate(func, random(3), INCREASING, rtol=1e-5, atol=1e-6, adjoint=adjoint)
    assert steps(ours.statistics) != steps(plain.statistics)


@pytest.mark.parametrize("adjoint", NOT_AS_PUBLISHED)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 4)], ids=str)
def test_states_may_have_any_shape(adjoint, shape):
    func, y0 = Growth(), 1 + random(*shape).abs()
    ours = differentiate(
        func, y0, T.clone().requires_grad_(adjoint != "discrete"), rtol=1e-8, atol=1e-8, adjoint=adjoint
    )
    exact = differentiate_exactly(func, y0, T.clone().requires_grad_(adjoint != "discrete"))
    assert ours.y.shape == (3, *shape)
    assert distance(ours.y, exact.y) < 1e-6
    assert distance(ours.gradient, exact.gradient) < 1e-6


class Ballast(Network):
    """A network with a parameter that is not used, one without gradient, and a buffer."""

    def __init__(self):
        super().__init__(autonomous=True)
        self.unused = nn.Parameter(random(4))
        self.frozen = nn.Parameter(torch.tensor(0.7, dtype=F64), requires_grad=False)
        self.register_buffer("constant", torch.tensor(0.2, dtype=F64))

    def forward(self, t, y):
        return self.frozen * super().forward(t, y) + self.constant


@pytest.mark.parametrize("adjoint", ["default", "seminorm", "per-tensor"])
def test_unused_parameters_get_zeros_and_those_without_gradient_none(adjoint):
    func = Ballast()
    theirs, ours = compare_with_torchdiffeq(func, random(2, 3), INCREASING, rtol=1e-5, atol=1e-6, adjoint=adjoint)
    assert distance(ours.gradient, theirs.gradient) < 1e-9
    assert torch.equal(func.unused.grad, torch.zeros(4, dtype=F64))
    assert func.frozen.grad is None


@pytest.mark.parametrize("adjoint", NOT_AS_PUBLISHED)
@pytest.mark.parametrize(
    ("derivative", "factor"), [(lambda y: y, torch.e**2), (torch.ones_like, 1.0), (torch.zeros_like, 1.0)]
)
def test_fields_without_parameters_and_fields_that_do_not_depend_on_the_state(adjoint, derivative, factor):
    class Field(nn.Module):
        def forward(self, t, y):
            return derivative(y)

    y0 = random(3).requires_grad_()
    solve(Field(), y0, T, rtol=1e-9, atol=1e-9, adjoint=adjoint).y[-1].sum().backward()
    assert y0.grad.tolist() == pytest.approx([factor] * 3, rel=1e-7)


def test_only_the_adjoint_params_are_differentiated():
    func, y0 = Network(autonomous=True), random(3)
    theirs, ours = compare_with_torchdiffeq(
        func, y0, INCREASING, rtol=1e-5, atol=1e-6, adjoint="default", adjoint_params=(func.second.weight,)
    )
    assert [gradient is None for gradient in ours.gradients] == [False, True, True, True, False, True]
    assert distance(ours.gradient, theirs.gradient) < 1e-9


def test_a_function_is_solved_with_adjoint_params():
    matrix, y0 = random(2, 2).requires_grad_(), random(2)
    y = odeint_adjoint(lambda t, y: y @ matrix.T, y0, T, rtol=1e-8, atol=1e-8, adjoint_params=(matrix,))
    backward(y)
    exact = differentiate_exactly(Linear(matrix.detach()), y0, T)
    assert distance(matrix.grad, exact.gradients[-1]) < 1e-6


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("times", [INCREASING, DECREASING], ids=["increasing", "decreasing"])
def test_gradients_equal_those_of_the_exact_solution(adjoint, times):
    func, y0 = Linear(random(3, 3, seed=2)), random(3)
    if adjoint == "as-published":  # needs parameters enough for its two blocks
        times = times[[0, -1]]
    t = times.clone().requires_grad_(adjoint != "discrete")
    exact = differentiate_exactly(func, y0, t)
    for tolerance in (1e-5, 1e-9):
        ours = differentiate(func, y0, t, rtol=tolerance, atol=tolerance, adjoint=adjoint)
        for gradient, expected in zip(ours.gradients, exact.gradients, strict=True):
            assert gradient is expected is None or distance(gradient, expected) < 100 * tolerance


@pytest.mark.parametrize("adjoint", ["default", "seminorm", "discrete"])
def test_gradients_equal_finite_differences(adjoint):
    func, y0 = Network(2, 3), random(2)
    t = torch.tensor([0.0, 0.7, 1.0], dtype=F64, requires_grad=True)

    def solution(y0, t, *parameters):
        replaced = dict(zip(dict(func.named_parameters()), parameters, strict=True))
        return solve(
            lambda time, y: torch.func.functional_call(func, replaced, (time, y)),
            y0,
            t,
            rtol=1e-12,
            atol=1e-12,
            adjoint=adjoint,
            adjoint_params=parameters,
        ).y

    assert torch.autograd.gradcheck(
        solution, (y0.requires_grad_(), t, *func.parameters()), eps=1e-4, atol=1e-6, rtol=1e-6, fast_mode=True
    )


@pytest.mark.parametrize("rest", [0.02, 0.3, 0.9])
def test_the_last_step_adds_the_quadrature_up_to_the_output_time_only(rest):
    """Steps of a cubic grow tenfold, so the last goes far beyond the output time; the weights are those up to it."""
    func, y0 = Integral(degree=3), random(2)
    t = torch.tensor([0.0, 1.0, 1.0 + rest], dtype=F64, requires_grad=True)
    ours = differentiate(func, y0, t, rtol=1e-3, atol=1e-3, adjoint="seminorm")
    exact = differentiate_exactly(func, y0, t)
    for gradient, expected in zip(ours.gradients, exact.gradients, strict=True):
        assert distance(gradient, expected) < 1e-12
    backward_statistics = ours.statistics.backward
    assert min(backward_statistics.evaluation_times) < 0  # a step did go beyond


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_create_graph_gives_the_first_derivative_and_no_second(adjoint):
    func, y0 = Network(), random(3).requires_grad_()
    for loss in (torch.sum, torch.norm):
        (expected,) = torch.autograd.grad(loss(solve(func, y0, T, adjoint=adjoint).y), y0)
        found = torch.autograd.grad(
            loss(solve(func, y0, T, adjoint=adjoint).y), [y0, *func.parameters()], create_graph=True
        )
        assert torch.equal(found[0], expected)
        for gradient in found:
            with pytest.raises(NotImplementedError, match="cannot be differentiated again: what follows backward"):
                gradient.sum().backward()


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_parameters_that_changed_between_forward_and_backward_are_an_error(adjoint):
    func = Network()
    y = solve(func, random(3), T, adjoint=adjoint).y
    with torch.no_grad():
        func.second.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(y)


@pytest.mark.parametrize("adjoint", NOT_AS_PUBLISHED)
def test_a_retained_graph_gives_the_same_gradient_twice(adjoint):
    func, y0 = Network(), random(2, 3)
    once = differentiate(func, y0, INCREASING, rtol=1e-5, atol=1e-6, adjoint=adjoint)
    start = y0.clone().requires_grad_()
    y = solve(func, start, INCREASING, rtol=1e-5, atol=1e-6, adjoint=adjoint).y
    for _ in range(2):
        gradients = torch.autograd.grad(
            (y * random(*y.shape, seed=100)).sum(), (start, *func.parameters()), retain_graph=True
        )
        assert torch.equal(torch.cat([gradient.reshape(-1) for gradient in gradients]), once.gradient)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_each_backward_of_a_retained_graph_is_counted_alone(adjoint):
    solution = solve(Network(), random(4, 3), T, rtol=1e-5, atol=1e-7, adjoint=adjoint)
    counts = []
    for _ in range(3):
        solution.y.sum().backward(retain_graph=True)
        backward_statistics = solution.statistics.backward
        counts.append((backward_statistics.nfe, backward_statistics.num_accepted, backward_statistics.num_rejected))
    # At first `discrete` finds the last step as the forward solve left it.
    assert counts[1] == counts[2]
    assert adjoint == "discrete" or counts[0] == counts[1]


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_hooks_act_once_on_the_whole_gradient(adjoint):
    plain, hooked, factor = Network(), Network(), random(16)
    hooked.first.bias.register_hook(lambda gradient: gradient * factor)
    seen = []
    hooked.second.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    differentiate(plain, random(4, 3), T, rtol=1e-5, atol=1e-7, adjoint=adjoint)
    differentiate(hooked, random(4, 3), T, rtol=1e-5, atol=1e-7, adjoint=adjoint)
    assert distance(hooked.first.bias.grad, plain.first.bias.grad * factor) < 1e-12
    assert len(seen) == 1
    assert distance(seen[0], plain.second.weight.grad) < 1e-12
    assert torch.equal(hooked.first.weight.grad, plain.first.weight.grad)


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_hooks_of_adjoint_params_that_are_no_leaves_act_once(adjoint):
    raw = random(3, 3).requires_grad_()
    weight = 2 * raw
    weight.register_hook(lambda gradient: 0.5 * gradient)
    solution = solve(
        lambda t, y: torch.tanh(y @ weight), random(4, 3), T, adjoint=adjoint, adjoint_params=(weight,), rtol=1e-5
    )
    hooked, expected = raw.detach().clone().requires_grad_(), raw
    solution.y.sum().backward()
    reference = solve(
        lambda t, y: torch.tanh(y @ (2 * hooked)), random(4, 3), T, adjoint=adjoint, adjoint_params=(hooked,), rtol=1e-5
    )
    reference.y.sum().backward()
    assert distance(expected.grad, 0.5 * hooked.grad) < 1e-12


class Buffered(Network):
    """A network that also reads a buffer and a frozen parameter, and counts its evaluations in another buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(3, dtype=F64))
        self.register_buffer("count", torch.zeros(()))
        self.frozen = nn.Parameter(torch.ones(3, dtype=F64), requires_grad=False)

    def forward(self, t, y):
        self.count += 1
        return super().forward(t, y) * self.scale * self.frozen


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("name", ["scale", "frozen"])
def test_buffers_and_frozen_parameters_that_changed_between_forward_and_backward_are_an_error(adjoint, name):
    func = Buffered()
    solution = solve(func, random(4, 3), T, rtol=1e-3, atol=1e-3, adjoint=adjoint)
    getattr(func, name).mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        solution.y.sum().backward()


def test_what_the_field_itself_changes_may_change():
    func = Buffered()
    first, second = (solve(func, random(4, 3), T, rtol=1e-3, atol=1e-3) for _ in range(2))
    (first.y + second.y).sum().backward()
    assert func.count > 0


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_callbacks_hear_of_every_step(adjoint):
    func, heard = Pair(), {}
    for name in ("step", "accept_step", "reject_step", "step_adjoint", "accept_step_adjoint", "reject_step_adjoint"):
        heard[name] = []
        setattr(func, f"callback_{name}", lambda *step, name=name: heard[name].append(step))
    options = dict(rtol=1e-5, atol=1e-6, adjoint=adjoint, first_step=3.0)
    y0 = Pair.start()
    statistics = differentiate(func, y0, INCREASING, **options).statistics
    for suffix, counted in (("", statistics.forward), ("_adjoint", statistics.backward)):
        for name, times in (("accept_step", counted.accept_times), ("reject_step", counted.reject_times)):
            assert [step[0].item() for step in heard[name + suffix]] == times
        assert len(heard[f"step{suffix}"]) == counted.num_accepted + counted.num_rejected
        assert all(dt > 0 for _, _, dt in heard[f"step{suffix}"])
    assert statistics.forward.num_rejected > 0
    assert bool(heard["step_adjoint"]) == (adjoint != "discrete")
    (t0, state, _), *_, (_, later, _) = heard["accept_step"]
    assert t0 == INCREASING[0]
    assert all(torch.equal(*pair) for pair in zip(state, y0, strict=True))
    assert later[0].shape == y0[0].shape
    assert not torch.equal(later[0], y0[0])
    for _, (state, adjoint_state), _ in heard["step_adjoint"]:
        assert [piece.shape for piece in (*state, *adjoint_state)] == [piece.shape for piece in (*y0, *y0)]
    if adjoint != "discrete":
        t0, (_, adjoint_state), _ = heard["step_adjoint"][0]
        assert t0 == INCREASING[-1]
        assert distance(adjoint_state[0], random(5, 4, 3, seed=100)[-1]) < 1e-12
    plain = differentiate(Pair(), y0, INCREASING, **options)
    assert steps(plain.statistics) == steps(statistics)


def test_callbacks_need_our_solver():
    func = Network()
    func.callback_step = print
    with pytest.raises(ValueError, match=r"no callbacks: use solver='torchadjoint'"):
        solve(func, random(4, 3), T, solver="torchdiffeq")


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(lambda y0: f(y0).sum())(random(4, 3)),
        lambda f: torch.func.vmap(f)(random(2, 4, 3)),
        lambda f: torch.func.jvp(f, (random(4, 3),), (random(4, 3),)),
        lambda f: forward_mode(f, random(4, 3)),
    ],
    ids=["grad", "vmap", "jvp", "forward mode"],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward mode imports it
def test_transforms_are_refused_in_a_sentence(transform):
    func = Network()
    with pytest.raises(NotImplementedError, match=r"a solve does not take part in .* \.backward\(\)"):
        transform(lambda y0: solve(func, y0, T).y)


def forward_mode(function, y0):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(y0, y0))


def test_solves_without_gradients():
    func = Network()
    with torch.no_grad():
        assert not odeint_adjoint(func, random(3), T).requires_grad
    func.requires_grad_(False)
    assert not odeint_adjoint(func, random(3), T).requires_grad
    assert odeint_adjoint(func, random(3).requires_grad_(), T).requires_grad


def test_times_of_another_dtype_than_the_state():
    ours, exact = (
        by(Growth(), random(3), T.clone().to(dtype).requires_grad_())
        for by, dtype in ((differentiate, torch.float32), (differentiate_exactly, F64))
    )
    assert ours.gradients[1].dtype == torch.float32
    assert distance(ours.gradients[1].double(), exact.gradients[1]) < 1e-5


def bad(*arguments, match, **options):
    return pytest.param(arguments, options, match, id=match)


class OfAnotherShape(nn.Module):
    def forward(self, t, y):
        return torch.zeros(4, 3) if isinstance(y, torch.Tensor) else (y[0],)


NET, Y0 = Network(), random(2, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        bad(NET, Y0, torch.zeros(2, 2), match=r"t must be a floating-point tensor of shape \(times,\).*\(2, 2\)"),
        bad(NET, Y0, torch.tensor(1.0), match=r"a time or more.*\(\)"),
        bad(NET, Y0, torch.tensor([0, 1]), match=r"floating-point tensor.*int64"),
        bad(NET, Y0, [0.0, 1.0], match=r"floating-point tensor.*list"),
        bad(NET, Y0, T[[0, 2, 1]], match=r"t is \[0.0, 2.0, 1.0\], but must be finite and strictly increasing"),
        bad(NET, Y0, T[[0, 1, 1]], match=r"t is \[0.0, 1.0, 1.0\], but must be finite and strictly increasing"),
        bad(NET, Y0, T / 0, match="must be finite and strictly increasing"),
        bad(NET, Y0, torch.tensor([0.0, torch.inf]), match=r"t is \[0.0, inf\], but must be finite and strictly"),
        bad(NET, Y0, T, rtol=0.0, match="rtol is 0.0, but must be a finite number above 0"),
        bad(NET, Y0, T, atol=-1e-3, match="atol is -0.001"),
        bad(NET, Y0, T, atol=torch.inf, match="atol is inf"),
        bad(NET, Y0, T, rtol=torch.nan, match="rtol is nan"),
        bad(NET, Y0, T, rtol="1e-3", match="rtol is '1e-3'"),
        bad(NET, Y0, T, adjoint_rtol=0, match="adjoint_rtol is 0"),
        bad(NET, Y0, T, adjoint_atol=-1, match="adjoint_atol is -1"),
        bad(NET, Y0, T, first_step=0.0, match="first_step is 0.0"),
        bad(NET, Y0, T, max_num_steps=0, match="max_num_steps is 0"),
        bad(NET, Y0, T, max_step=torch.ones(3), match=r"max_step is tensor\(\[1., 1., 1.\]\), but must be"),
        bad(NET, Y0, T, adjoint_atol=torch.ones(3), solver="torchdiffeq", match="no tensors as tolerances"),
        bad(NET, Y0, T, warm_start=True, match="unknown option 'warm_start': use one of 'first_step'"),
        bad(NET, Y0, T, adjoint="l2", match="adjoint is 'l2', but must be one of 'default'"),
        bad(
            NET,
            Y0,
            T,
            solver="torchdiffeq",
            adjoint=Backsolve(warm_start=True),
            match="no warm_start.*: use solver='torchadjoint'",
        ),
        bad(NET, Y0, T, compile="yes", match="compile is 'yes', but must be True or False"),
        bad(NET, Y0, T, compile=True, adjoint="default", match="compile=True needs adjoint='seminorm' or .*'discrete'"),
        bad(NET, Y0, T, compile=True, adjoint=Discrete(2), match="checkpoint_interval=2.*, but compile=True keeps"),
        bad(NET, Y0, T, compile=True, adjoint=Discrete(linearised="solve"), match="linearised='solve'.*, but compile="),
        bad(NET, Y0, T, compile=True, solver="torchdiffeq", match="no compile.*: use solver='torchadjoint'"),
        bad(NET, Y0, T, compile=True, adjoint_params=(), match="compile=True needs no adjoint_params"),
        bad(NET, Y0.long(), T, match="y0 is of dtype torch.int64, but must be float32 or float64"),
        bad(NET, Y0.half(), T, match="y0 is of dtype torch.float16"),
        bad(NET, [Y0], T, match=r"y0 is \[tensor.*, but must be a tensor or a tuple"),
        bad(lambda t, y: y, Y0, T, match="func is no nn.Module.*adjoint_params"),
        bad(OfAnotherShape(), Y0, T, match=r"returned shape \(4, 3\) for a state of shape \(2, 3\)"),
        bad(
            OfAnotherShape(),
            (Y0, Y0),
            T,
            match=r"returned \(tensor.* for a state of 2 tensors: it must return a tuple of as many",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        solve(*arguments, **options)


def test_what_only_a_backward_solve_needs_is_asked_for_by_none_without_gradient():
    with torch.no_grad():
        forward = [
            solve(Network(), random(100, 3), INCREASING, **options).y
            for options in (dict(adjoint="as-published"), dict(rtol=torch.full((3,), 1e-7)), {})
        ]
    assert torch.equal(forward[0], forward[2])
    assert distance(forward[1], forward[2]) < 1e-9


def test_as_published_is_refused_where_its_blocks_do_not_fit():
    with pytest.raises(ValueError, match="as-published"):
        differentiate(Network(), random(100, 3), INCREASING, rtol=1e-3, atol=1e-3, adjoint="as-published")
