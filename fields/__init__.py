"""Vector fields written for the solver, with their products by hand: each is what its experiment's model evaluates."""
