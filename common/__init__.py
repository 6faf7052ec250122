"""What the experiments share: settings, the training loop, checkpoints and results."""
