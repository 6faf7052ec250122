"""A neural ODE that learns a spiral from points on it: `python -m examples.neural_ode`, a quarter of a minute."""

import torch
from torch import nn

from torchadjoint import solve


class Field(nn.Module):
    """dy/dt = W2 tanh(W1 y^3)."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))

    def forward(self, t, y):
        return self.network(y**3)


class Spiral(nn.Module):
    """The equation that made the points."""

    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.tensor([[-0.1, 2.0], [-2.0, -0.1]]))

    def forward(self, t, y):
        return y**3 @ self.matrix


def main(num_steps: int = 300) -> float:
    """Train, and return the mean distance from the spiral."""
    torch.manual_seed(0)
    start, times = torch.tensor([[2.0, 0.0]]), torch.linspace(0, 25, 1000)
    with torch.no_grad():
        points = solve(Spiral(), start, times, rtol=1e-5, atol=1e-7).y
    func = Field()
    optimiser = torch.optim.Adam(func.parameters(), lr=5e-3)
    for step in range(num_steps):
        begins = torch.randint(len(times) - 10, (32,))
        solution = solve(func, points[begins], times[:10], rtol=1e-4, atol=1e-6, adjoint="discrete")
        targets = torch.stack([points[begins + i] for i in range(10)])
        loss = (solution.y - targets).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0:
            counted = solution.statistics
            print(f"step {step}: loss {loss:.4f}, NFE {counted.forward.nfe} forward, {counted.backward.nfe} backward")
    print(f"last loss {loss:.4f}")
    return loss.item()


if __name__ == "__main__":
    main()
