"""What a solve did, counted as it happened: the solvers write it, models hand it on, the trainer adds it up."""

from dataclasses import dataclass, field


@dataclass
class Statistics:
    """The evaluations and steps of one direction of one solve, as plain Python numbers.

    Times are in the units of the solve's own `t`, in the order in which they happened.
    """

    evaluation_times: list[float] = field(default_factory=list)
    """Where the vector field was evaluated, one entry an evaluation."""
    accept_times: list[float] = field(default_factory=list)
    """Where each accepted step started."""
    reject_times: list[float] = field(default_factory=list)
    """Where each rejected step started."""

    def clear(self) -> None:
        """Forget all, before the same is done once more."""
        for times in (self.evaluation_times, self.accept_times, self.reject_times):
            times.clear()

    def __repr__(self) -> str:
        numbers = f"nfe={self.nfe}, num_accepted={self.num_accepted}, num_rejected={self.num_rejected}"
        return f"Statistics({numbers})"

    @property
    def nfe(self) -> int:
        """Number of function evaluations."""
        return len(self.evaluation_times)

    @property
    def num_accepted(self) -> int:
        """Number of accepted steps."""
        return len(self.accept_times)

    @property
    def num_rejected(self) -> int:
        """Number of rejected steps."""
        return len(self.reject_times)


@dataclass
class SolveStatistics:
    """Both directions of one solve; `backward` stays empty until `.backward()` has run."""

    forward: Statistics = field(default_factory=Statistics)
    backward: Statistics = field(default_factory=Statistics)
