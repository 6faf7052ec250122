"""The fully actuated acrobot: a gymnasium environment, and the data set of windows that acrobot.py learns from."""

import hashlib
from math import cos, sin
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from gymnasium.envs.classic_control import AcrobotEnv
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm import tqdm

from .batches import DataSplit
from .cache import cache_directory, load_or_build

TorqueForm = Literal["published", "consistent"]

TIME_STEP = 0.05  # seconds
NUM_TRAJECTORIES = 128  # for each of the constant torques
NUM_POINTS = 32  # in each trajectory
WINDOW_LENGTH = 8
TORQUES = ((0, 0), (0, 1), (0, -1), (0, 2), (0, -2), (1, 0), (-1, 0), (2, 0), (-2, 0))
SHAPE = (len(TORQUES), NUM_TRAJECTORIES, NUM_POINTS, 8)
"""The shape of all trajectories together."""

TIMES = TIME_STEP * torch.arange(WINDOW_LENGTH)
"""The times in seconds of the points of a window, shape (8,): 0, 0.05, ..., 0.35."""


class FullyActuatedAcrobot(AcrobotEnv):
    """Gymnasium's acrobot ("book" dynamics) with two continuous torques, stepped by 0.05 s.

    An action is (a0, a1), each in [-15, 15] N m and clipped to that. a0 acts on the second joint, as in gymnasium.
    What a1 does depends on `torque`:

    - "published", the default, is what the paper's data has: ddq1 = -(a1 + d2 ddq2 + phi1) / d1, with ddq2 as if a1
      were 0. That is odd: it is no torque on the first joint, but the generalised force (-a1, -a1 d2 / d1).
    - "consistent" adds a1 to phi1 in both equations: the generalised force (-a1, 0), a torque on the first joint.

    An observation is (cos q1, cos q2, sin q1, sin q2, dq1, dq2). Angles are not wrapped; velocities are clipped to
    gymnasium's bounds, 4 pi and 9 pi. `reset` draws all of (q1, q2, dq1, dq2) from uniform(-3.14, 3.14), or between
    options["low"] and options["high"]. Reward and termination are gymnasium's, those of the swing-up.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": round(1 / TIME_STEP)}
    dt = TIME_STEP

    def __init__(self, render_mode: str | None = None, torque: TorqueForm = "published"):
        if torque not in get_args(TorqueForm):
            raise ValueError(f"torque is {torque!r}, but must be one of {', '.join(map(repr, get_args(TorqueForm)))}.")
        super().__init__(render_mode)
        self.action_space = Box(-15, 15, (2,), np.float32)
        self.torque = torque

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[NDArray, dict]:
        return super().reset(seed=seed, options={"low": -3.14, "high": 3.14} | (options or {}))

    def step(self, action: ArrayLike) -> tuple[NDArray, float, bool, bool, dict[str, Any]]:
        from scipy.integrate import solve_ivp  # takes a while, and what is in the cache does without

        if self.state is None:
            raise ResetNeeded("The acrobot has no state yet: call reset() before step().")
        torques = np.clip(action, self.action_space.low, self.action_space.high).tolist()
        state = solve_ivp(lambda t, y: self.derivative(y, torques), (0, self.dt), self.state).y[:, -1]
        bounds = (np.inf, np.inf, self.MAX_VEL_1, self.MAX_VEL_2)
        self.state = np.clip(state, np.negative(bounds), bounds)
        terminated = self._terminal()
        return self._get_ob(), 0.0 if terminated else -1.0, terminated, False, {}

    def derivative(self, state: NDArray, torques: tuple[float, float]) -> tuple[float, float, float, float]:
        """The time derivative (dq1, dq2, ddq1, ddq2) of the state (q1, q2, dq1, dq2) under torques (a0, a1).

        The equations are gymnasium's, with its links of 1 m and 1 kg, centred at 0.5 m, with moment of inertia 1.
        """
        q1, q2, dq1, dq2 = state.tolist()  # plain floats: several times faster than NumPy's scalars
        a0, a1 = torques
        d1 = 3.5 + cos(q2)
        d2 = 1.25 + 0.5 * cos(q2)
        phi2 = 4.9 * sin(q1 + q2)
        phi1 = -0.5 * sin(q2) * dq2 * (dq2 + 2 * dq1) + 14.7 * sin(q1) + phi2
        phi1_of_second_joint = phi1 if self.torque == "published" else phi1 + a1
        ddq2 = (a0 + d2 / d1 * phi1_of_second_joint - 0.5 * sin(q2) * dq1**2 - phi2) / (1.25 - d2**2 / d1)
        ddq1 = -(a1 + d2 * ddq2 + phi1) / d1
        return dq1, dq2, ddq1, ddq2

    def _get_ob(self) -> NDArray:
        q1, q2, dq1, dq2 = self.state
        return np.array([cos(q1), cos(q2), sin(q1), sin(q2), dq1, dq2], np.float32)


def load(
    *,
    batch_size: int,
    device: str | int | torch.device,
    generator: torch.Generator | None,
    num_trajectories: int = NUM_TRAJECTORIES,
    torque: TorqueForm = "published",
) -> DataSplit:
    """The paper's data set: batches of windows, float32 of shape (batch, 8 times, 8 channels), on `device`.

    The channels are cos q1, cos q2, sin q1, sin q2, dq1, dq2 and the constant torques u0, u1. For each of 9 pairs of
    torques, the first `num_trajectories` of its 128 trajectories are split 70 % / 15 % / 15 % in order, and every
    window of 8 successive points is a sample: 20,025 / 4,275 / 4,500 windows of all. Their order is the published one:
    by pair of torques, then by the first point of the window, then by trajectory. `generator` orders the training
    batches; `torque` is that of `FullyActuatedAcrobot`. ValueError if `num_trajectories` is not between 7 and 128, as
    fewer leave a part empty, or if `torque` is unknown.
    """
    environment = FullyActuatedAcrobot(torque=torque)
    num_train, num_val = num_trajectories * 70 // 100, num_trajectories * 15 // 100
    if num_val < 1 or num_trajectories > NUM_TRAJECTORIES:
        raise ValueError(
            f"num_trajectories is {num_trajectories}, but must be between 7 (fewer leave none for validation) and "
            f"{NUM_TRAJECTORIES} (there are no more)."
        )
    path = cache_directory() / f"acrobot-{torque}-torque.npz"
    cached = load_or_build(path, lambda: {"trajectories": _trajectories(environment)}, _fits)
    sizes = (num_train, num_val, num_trajectories - num_train - num_val)
    parts = (
        # From (torques, trajectory, start, channel, time) to (torques, start, trajectory, time, channel).
        part.unfold(2, WINDOW_LENGTH, 1).permute(0, 2, 1, 4, 3).reshape(-1, WINDOW_LENGTH, part.size(3)).to(device)
        for part in cached["trajectories"][:, :num_trajectories].split(sizes, dim=1)
    )
    return DataSplit.of([(part,) for part in parts], batch_size, generator, ("acrobot", torque, sizes))


def _fits(cached: dict[str, Tensor]) -> bool:
    """Whether these are such trajectories as `_trajectories` makes."""
    trajectories = cached["trajectories"]
    return trajectories.dtype == torch.float32 and trajectories.shape == SHAPE


def _trajectories(environment: FullyActuatedAcrobot) -> Tensor:
    """All trajectories, shape (9 torques, 128, 32 points, 8 channels); the first point is that after the first step.

    The published code draws a trajectory anew when a velocity reaches gymnasium's bound. With this much energy none
    can, so that this is left out.
    """
    # This is how gym seeded its generator at the time of the paper; every pair of torques starts from the same states.
    seed = np.frombuffer(hashlib.sha512(b"456789").digest(), "<u4", count=2)
    trajectories = np.empty(SHAPE, np.float32)
    progress = tqdm(TORQUES, "Simulating the acrobot", unit="pair of torques")
    for torques, trajectories_of_torques in zip(progress, trajectories, strict=True):
        random = np.random.RandomState(seed)
        for trajectory in trajectories_of_torques:
            environment.state = random.uniform(-3.14, 3.14, 4)
            for point in trajectory:
                point[:6] = environment.step(torques)[0]
                point[6:] = torques
    return torch.from_numpy(trajectories)
