"""A continuous normalising flow on two moons, with the state (x, log p): `python -m examples.flow`, half a minute."""

import math

import torch
from torch import nn

from torchadjoint import solve


class Flow(nn.Module):
    """d(x, log p)/dt = (v(t, x), -div v), with the exact divergence in two dimensions."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        )

    def velocity(self, t, x):
        return self.network(torch.cat([x, t.expand(len(x), 1)], dim=1))

    def forward(self, t, state):
        x, _ = state
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            velocity = self.velocity(t, x)
            divergence = sum(torch.autograd.grad(velocity[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2))
        return velocity, -divergence

    def log_density(self, x, **options):
        """log p(x) of points (number, 2): from the data at t = 1 back to a standard normal at t = 0."""
        times = torch.tensor([1.0, 0.0], dtype=x.dtype)
        # The velocity never reads log p: with `integrals=1` the backward solve leaves it out.
        (paths, changes) = solve(self, (x, x.new_zeros(len(x))), times, integrals=1, **options).y
        normal = -0.5 * paths[-1].pow(2).sum(dim=1) - math.log(2 * math.pi)
        return normal - changes[-1]


def two_moons(number: int) -> torch.Tensor:
    """Points on two half circles, (number, 2)."""
    angle = torch.rand(number) * torch.pi
    lower = (torch.arange(number) % 2).float()
    x = torch.where(lower > 0, 1 - angle.cos(), angle.cos()) - 0.5
    y = torch.where(lower > 0, 0.5 - angle.sin(), angle.sin()) - 0.25
    return 2 * torch.stack([x, y], dim=1) + 0.1 * torch.randn(number, 2)


def main(num_steps: int = 150) -> tuple[float, float]:
    """Train, and return the last loss (nats) and what the density integrates to over the plane."""
    torch.manual_seed(0)
    flow = Flow()
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for step in range(num_steps):
        loss = -flow.log_density(two_moons(256), rtol=1e-3, atol=1e-3, adjoint="seminorm").mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 25 == 0:
            print(f"step {step}: {loss:.3f} nats")
    side = torch.linspace(-6, 6, 121)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        total = flow.log_density(grid, rtol=1e-4, atol=1e-4).exp().sum().item() * (side[1] - side[0]).item() ** 2
    print(f"last loss {loss:.3f} nats; the density integrates to {total:.4f}")
    return loss.item(), total


if __name__ == "__main__":
    main()
