"""The Symplectic ODE-Net's field as the published code goes about it: what the benchmark times and tests compare with.

The mass matrix by inversion, dH/dq and every entry of dM^-1/dt by autograd, differentiated again on the way back.
"""

import torch
from torch import Tensor, nn


class PublishedField(nn.Module):
    """The same function of the state (batch, 8) as `acrobot.SymplecticVectorField`, with its networks."""

    def __init__(self, vector_field: nn.Module):
        super().__init__()
        self.vector_field = vector_field

    def _inverse_mass(self, trigonometry: Tensor) -> Tensor:
        l11, l22, l21 = self.vector_field.factor(trigonometry.unsqueeze(0))[0].unbind(-1)
        zero = torch.zeros_like(l11)
        factor = torch.stack([l11, zero, l21, l22], dim=-1).unflatten(-1, (2, 2))
        return factor @ factor.transpose(1, 2) + 0.1 * torch.eye(2, dtype=l11.dtype)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            trigonometry, velocities, torques = y.split([4, 2, 2], dim=-1)
            momenta = torch.inverse(self._inverse_mass(trigonometry)) @ velocities.unsqueeze(-1)
            # From here on angles and momenta are independent variables.
            trigonometry, momenta = torch.cat([trigonometry, momenta.squeeze(-1)], dim=-1).split([4, 2], dim=-1)
            cosines, sines = trigonometry.split(2, dim=-1)
            inverse_mass = self._inverse_mass(trigonometry)
            potential = self.vector_field.potential(trigonometry.unsqueeze(0))[0, :, 0]
            kinetic = torch.einsum("bi,bij,bj->b", momenta, inverse_mass, momenta) / 2
            by_trigonometry, rates = torch.autograd.grad(
                (kinetic + potential).sum(), (trigonometry, momenta), create_graph=True
            )
            by_cosines, by_sines = by_trigonometry.split(2, dim=-1)
            control = self.vector_field.control(trigonometry.unsqueeze(0))[0].unflatten(-1, (2, 2))
            momentum_rates = sines * by_cosines - cosines * by_sines + (control @ torques.unsqueeze(-1)).squeeze(-1)
            trigonometry_rates = torch.cat([-sines * rates, cosines * rates], dim=-1)
            entries = [
                torch.autograd.grad(inverse_mass[:, row, column].sum(), trigonometry, create_graph=True)[0]
                for row in range(2)
                for column in range(2)
            ]
            inverse_mass_rate = torch.stack(
                [(entry * trigonometry_rates).sum(dim=-1) for entry in entries], dim=-1
            ).unflatten(-1, (2, 2))
            accelerations = inverse_mass @ momentum_rates.unsqueeze(-1) + inverse_mass_rate @ momenta.unsqueeze(-1)
            return torch.cat([trigonometry_rates, accelerations.squeeze(-1), torch.zeros_like(torques)], dim=-1)
