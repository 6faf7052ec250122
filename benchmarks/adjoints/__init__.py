"""Which adjoint is the best? Errors, evaluations, time and memory of gradients, by every way: `make adjoints`."""
