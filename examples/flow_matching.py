"""Flow matching, and the gradient of a log-likelihood through the solve: `python -m examples.flow_matching`.

A velocity network is trained without any solve. Its likelihood needs one, with the divergence; the adjoint gives the
gradient of the likelihood with respect to points and parameters, as for fine-tuning or guidance.
"""

import torch

from .flow import Flow, two_moons


def train(flow: Flow, num_steps: int) -> float:
    """Match the velocities of straight lines from normal noise to data; return the mean of the last losses."""
    optimiser = torch.optim.Adam(flow.parameters(), lr=3e-3)
    losses = []
    for step in range(num_steps):
        data = two_moons(512)
        noise, t = torch.randn_like(data), torch.rand(len(data), 1)
        between = (1 - t) * noise + t * data
        velocity = flow.network(torch.cat([between, t], dim=1))
        loss = (velocity - (data - noise)).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if step % 200 == 0:
            print(f"step {step}: loss {loss:.3f}")
    return sum(losses[-20:]) / len(losses[-20:])


def likelihood_gradient(flow: Flow, x: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean log-likelihood of points (number, 2), and its gradient with respect to them."""
    x = x.clone().requires_grad_()
    likelihood = flow.log_density(x, **options).mean()
    (gradient,) = torch.autograd.grad(likelihood, x)
    return likelihood.detach(), gradient


def main(num_steps: int = 1000) -> tuple[float, float]:
    """Train, and return the mean log-likelihood of new points before and after a step along its gradient."""
    torch.manual_seed(0)
    flow = Flow(width=64)
    train(flow, num_steps)
    x = two_moons(256)
    before, gradient = likelihood_gradient(flow, x, rtol=1e-4, atol=1e-4, adjoint="seminorm")
    moved = x + 0.05 * gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)
    after, _ = likelihood_gradient(flow, moved, rtol=1e-4, atol=1e-4, adjoint="seminorm")
    print(f"log-likelihood {before:.3f}; after a step along its gradient {after:.3f}")
    return before.item(), after.item()


if __name__ == "__main__":
    main()
