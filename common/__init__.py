"""What both experiments share: the solver and its adjoint, the training loop, and the results."""
