"""The acrobot obeys mechanics and gymnasium, and its data set is the published one."""

import math

import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from datasets import acrobot
from datasets.acrobot import FullyActuatedAcrobot

FORMS = ("published", "consistent")


def lagrangian(q, dq):
    """Kinetic minus potential energy in joules, from the places of the two centres of mass."""

    def centres(q):
        first, second = (torch.stack([torch.sin(angle), -torch.cos(angle)]) for angle in (q[0], q[0] + q[1]))
        return torch.stack([first / 2, first + second / 2])

    positions, velocities = centres(q), torch.func.jacrev(centres)(q) @ dq
    rotation = dq[0] ** 2 + (dq[0] + dq[1]) ** 2
    return (velocities.square().sum() + rotation) / 2 - 9.8 * positions[:, 1].sum()


def energy(state):
    q, dq = torch.from_numpy(state).chunk(2)
    return (lagrangian(q, dq) - 2 * lagrangian(q, 0 * dq)).item()


@pytest.fixture
def environment():
    return FullyActuatedAcrobot(torque="consistent")


@pytest.mark.parametrize("form", FORMS)
def test_derivative_satisfies_the_euler_lagrange_equations(form):
    environment = FullyActuatedAcrobot(torque=form)
    random = np.random.default_rng(0)
    for _ in range(5):
        state, (a0, a1) = random.uniform(-3, 3, 4), random.uniform(-15, 15, 2)
        q, dq = torch.from_numpy(state).chunk(2)
        hessian = torch.func.jacrev(torch.func.grad(lagrangian, 1), (0, 1))(q, dq)
        mass = hessian[1]
        force = torch.tensor([-a1, a0 - (a1 * mass[0, 1] / mass[0, 0] if form == "published" else 0)])
        acceleration = torch.linalg.solve(mass, force + torch.func.grad(lagrangian)(q, dq) - hessian[0] @ dq)
        expected = torch.cat([dq, acceleration])
        torch.testing.assert_close(torch.tensor(environment.derivative(state, (a0, a1))).double(), expected)


@pytest.mark.parametrize("action", [(0, 0), (5, 0), (0, 5), (3, -4)])
def test_steps_change_the_energy_by_the_work_of_the_torques(environment, action):
    environment.reset(seed=1)
    start = environment.state.astype(float)
    for _ in range(20):
        environment.step(np.array(action, np.float32))
    (a0, a1), (angle1, angle2) = action, (environment.state - start)[:2]
    work = a0 * angle2 - a1 * angle1
    assert energy(environment.state) - energy(start) == pytest.approx(work, abs=2e-3)
    assert work == 0 or abs(work) > 1


@pytest.mark.parametrize("form", FORMS)
# It recommends actions within [-1, 1], but ours are torques in N m; any other warning is an error.
@pytest.mark.filterwarnings("ignore:.*recommend using a symmetric and normalized space")
def test_gymnasium_accepts_the_environment(form):
    pytest.importorskip("pygame")
    spec = EnvSpec("FullyActuatedAcrobot-v0", FullyActuatedAcrobot, kwargs={"torque": form})
    environment = spec.make(render_mode="rgb_array", disable_env_checker=True).unwrapped
    check_env(environment)
    assert environment.torque == form
    assert environment.action_space.shape == (2,)
    assert environment.render().shape == (500, 500, 3)
    environment.close()


def test_observation_has_the_channels_of_the_data(environment):
    observation, _ = environment.reset(seed=0)
    q, dq = np.split(environment.state, 2)
    np.testing.assert_allclose(observation, np.concatenate([np.cos(q), np.sin(q), dq]), rtol=1e-6)


def test_reset_takes_bounds_and_otherwise_covers_the_initial_states_of_the_data(environment):
    environment.reset(options={"low": 0, "high": 0})
    np.testing.assert_array_equal(environment.state, 0)
    states = np.array([environment.reset()[0][4:] for _ in range(200)])
    assert 2.9 < abs(states).max() <= 3.14


def test_torques_and_velocities_are_clipped(environment):
    environment.reset(options={"low": 0, "high": 0})
    within, *_ = environment.step((15, -15))
    environment.reset(options={"low": 0, "high": 0})
    beyond, *_ = environment.step((16, -99))
    np.testing.assert_array_equal(within, beyond)
    environment.state = np.array([0, 0, 50, -50])
    observation, *_ = environment.step((0, 0))
    assert environment.observation_space.contains(observation)


def test_swinging_the_tip_up_ends_the_episode(environment):
    environment.reset(options={"low": 0, "high": 0})
    assert environment.step((0, 0))[1:4] == (-1.0, False, False)
    environment.state = np.array([math.pi, 0, 0, 0])
    assert environment.step((0, 0))[1:4] == (0.0, True, False)


def test_bad_use_of_the_environment_is_refused(environment):
    with pytest.raises(ResetNeeded, match="call reset"):
        environment.step((0, 0))
    with pytest.raises(ValueError, match="'published', 'consistent'"):
        FullyActuatedAcrobot(torque="odd")


def load(**kwargs):
    return acrobot.load(batch_size=256, device="cpu", generator=torch.Generator(), **kwargs)


def windows_of_parts(data):
    return [part.tensors[0] for part in (data.train, data.val, data.test)]


def test_data_set_is_the_published_one():
    data = load()
    parts = windows_of_parts(data)
    assert [part.shape for part in parts] == [(20025, 8, 8), (4275, 8, 8), (4500, 8, 8)]
    assert {part.dtype for part in parts} == {torch.float32}
    sums = [part.sum(dtype=torch.float64).item() for part in parts]
    assert sums == pytest.approx([69933.061390, -19220.800257, 29319.220309], rel=0, abs=1e-2)
    first_row = torch.tensor([0.263189, 0.763390, 0.964744, -0.645938, 1.754933, 0.636619, 0, 0])
    torch.testing.assert_close(parts[0][0, 0], first_row, rtol=0, atol=1e-6)
    assert len(data.train) == 79


def test_only_training_is_shuffled():
    data = load()
    _, val, test = windows_of_parts(data)
    assert torch.equal(torch.cat([window for (window,) in data.val]), val)
    assert torch.equal(torch.cat([window for (window,) in data.test]), test)
    (first_batch,) = next(iter(data.train))
    assert not torch.equal(first_batch, data.train.tensors[0][:256])


@pytest.mark.parametrize("form", FORMS)
def test_velocities_are_below_the_bounds_at_which_the_published_code_draws_anew(form):
    velocities = torch.cat(windows_of_parts(load(torque=form)))[..., 4:6]
    assert (velocities.abs() < torch.tensor([4 * math.pi, 9 * math.pi]) - 0.001).all()


def test_windows_go_by_torques_then_by_first_point_then_by_trajectory(tmp_path, monkeypatch):
    def numbered(environment):
        """Trajectories whose channels say where each point comes from: which torques, trajectory and point."""
        places = torch.cartesian_prod(torch.arange(9.0), torch.arange(128.0), torch.arange(32.0)).view(9, 128, 32, 3)
        return torch.nn.functional.pad(places, (0, 5))

    monkeypatch.setattr(acrobot, "_trajectories", numbered)
    monkeypatch.setenv("SEMINORM_CACHE", str(tmp_path))
    first = 0
    for part, num_trajectories in zip(windows_of_parts(load()), (89, 19, 20), strict=True):
        expected = [
            [[torques, trajectory, start + place] for place in range(8)]
            for torques in range(9)
            for start in range(32 - 8 + 1)
            for trajectory in range(first, first + num_trajectories)
        ]
        assert part[..., :3].tolist() == expected
        first += num_trajectories


def test_windows_of_a_pair_of_torques_have_those_torques():
    windows = windows_of_parts(load())[0].unflatten(0, (9, -1))
    assert (windows[..., 6:] == torch.tensor(acrobot.TORQUES)[:, None, None]).all()


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"trajectory": np.zeros((9, 128, 32, 8), np.float32)},
        {"trajectories": np.zeros((9, 128, 32, 8))},
        {"trajectories": np.zeros((9, 128, 31, 8), np.float32)},
        {"trajectories": np.zeros((), np.float32)},
    ],
    ids=["nothing", "another name", "float64", "shorter", "a number"],
)
def test_a_cache_with_other_content_is_built_anew(tmp_path, monkeypatch, caplog, other):
    monkeypatch.setattr(acrobot, "_trajectories", lambda environment: torch.ones(acrobot.SHAPE))
    monkeypatch.setenv("SEMINORM_CACHE", str(tmp_path))
    load()
    (path,) = tmp_path.glob("*.npz")
    intact = path.read_bytes()
    np.savez(path, **other)
    assert (load().test.tensors[0] == 1).all()
    assert path.read_bytes() == intact
    assert "cannot be used: it is built anew" in caplog.text


def test_every_point_is_one_step_after_the_one_before():
    environment = FullyActuatedAcrobot()
    windows = windows_of_parts(load())[2].double()
    for window in windows[::500]:
        cos_sin, velocity = window[0, :4].view(2, 2), window[0, 4:6]
        environment.state = torch.cat([torch.atan2(cos_sin[1], cos_sin[0]), velocity]).numpy()
        for point in window[1:]:
            observation, *_ = environment.step(window[0, 6:].numpy())
            torch.testing.assert_close(torch.from_numpy(observation).double(), point[:6], rtol=1e-4, atol=1e-4)


def test_times_are_those_of_a_window():
    torch.testing.assert_close(acrobot.TIMES, torch.tensor([0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35]))


def test_fewer_trajectories_are_the_first_ones_split_alike():
    few, every = (
        [part.unflatten(0, (9, 25, -1)) for part in windows_of_parts(load(num_trajectories=num_trajectories))]
        for num_trajectories in (10, 128)
    )
    assert [part.size(2) for part in few] == [7, 1, 2]
    assert torch.equal(torch.cat(few, dim=2), torch.cat(every, dim=2)[:, :, :10])


def test_forms_of_the_torque_share_nothing_in_the_cache():
    published, consistent = (load(torque=form, num_trajectories=7) for form in FORMS)
    same = [
        torch.equal(*pair)
        for pair in zip(*(data.train.tensors[0].unflatten(0, (9, -1)) for data in (published, consistent)), strict=True)
    ]
    assert same == [a1 == 0 for _, a1 in acrobot.TORQUES]


def test_digest_names_the_split():
    digests = [
        load(num_trajectories=num_trajectories, torque=form).digest
        for num_trajectories, form in [(10, "published"), (10, "published"), (11, "published"), (10, "consistent")]
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("num_trajectories", [-1, 0, 6, 129])
def test_other_numbers_of_trajectories_are_refused(num_trajectories):
    with pytest.raises(ValueError, match=rf"num_trajectories is {num_trajectories}, but must be between 7 .* and 128"):
        load(num_trajectories=num_trajectories)
