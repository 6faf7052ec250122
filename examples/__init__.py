"""Models of one's own with torchadjoint, each a program: `python -m examples.neural_ode`."""
