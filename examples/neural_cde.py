"""A neural CDE that tells spirals by their direction, with torchcde's paths: `python -m examples.neural_cde`."""

import torch
import torchcde
from torch import nn
from torch.nn import functional

from torchadjoint import solve


class Field(nn.Module):
    """dz/dt = f(z) dX/dt, for a path X that is linear between its knots; one for each path."""

    def __init__(self, network: nn.Module, path: torchcde.LinearInterpolation):
        super().__init__()
        self.network, self.path = network, path

    def forward(self, t, z):
        slope = self.path.derivative(t)
        matrix = torch.tanh(self.network(z)).view(*z.shape, slope.shape[-1])
        return (matrix @ slope.unsqueeze(-1)).squeeze(-1)


class Classifier(nn.Module):
    """From a path's coefficients to a logit."""

    def __init__(self, num_channels: int = 3, num_hidden: int = 8):
        super().__init__()
        self.first, self.last = nn.Linear(num_channels, num_hidden), nn.Linear(num_hidden, 1)
        self.network = nn.Sequential(nn.Linear(num_hidden, 32), nn.ReLU(), nn.Linear(32, num_hidden * num_channels))

    def forward(self, coefficients):
        path = torchcde.LinearInterpolation(coefficients)
        start = self.first(path.evaluate(path.interval[0]))
        # Between two knots the field is smooth; at a knot it jumps.
        solution = solve(
            Field(self.network, path), start, path.interval, rtol=1e-2, atol=1e-4, jump_t=path.grid_points,
            method="bosh3", adjoint="discrete",
        )  # fmt: skip
        return self.last(solution.y[-1]).squeeze(-1)


def spirals(number: int, num_times: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients of paths (number, ...) and which of them turn left (number,)."""
    t = torch.linspace(0, 4 * torch.pi, num_times).expand(number, -1)
    turns_left = (torch.arange(number) % 2).float()
    phase = torch.rand(number, 1) * 2 * torch.pi
    angle = phase + t * (2 * turns_left[:, None] - 1)
    radius = 1 / (1 + 0.5 * t)
    points = torch.stack([t / 4, radius * angle.cos(), radius * angle.sin()], dim=-1)
    points[..., 1:] += 0.01 * torch.randn(number, num_times, 2)
    return torchcde.linear_interpolation_coeffs(points), turns_left


def main(num_steps: int = 60) -> float:
    """Train, and return the accuracy on paths that were not trained on."""
    torch.manual_seed(0)
    (coefficients, labels), (unseen, their_labels) = spirals(128), spirals(128)
    model = Classifier()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(num_steps):
        loss = functional.binary_cross_entropy_with_logits(model(coefficients), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss:.4f}")
    with torch.no_grad():
        accuracy = ((model(unseen) > 0) == (their_labels > 0)).float().mean().item()
    print(f"accuracy on unseen paths {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
