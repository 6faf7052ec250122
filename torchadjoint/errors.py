"""What the library raises besides ValueError, which is for arguments that are not as described."""


class SolverError(RuntimeError):
    """A solve could not go on, for example because its step became too small for the tolerances."""
