"""The commands that make the evidence of the claims again, for the page of `claims.py`."""

RUNS = "python tables.py run cpu --data-root recordings"
RUNS_OF_FLOWS = "python tables.py run cpu --experiments flow"
_TRAINING = {
    # Two minutes a seed, each.
    "acrobot": "for seed in 0 1 2; do python acrobot.py --device cpu --norm discrete --max-epochs 2 "
    "--metric-interval 1 --seed $seed --results-dir results/weights; done",
    "flow": "for seed in 0 1 2; do python flow.py --device cpu --norm discrete --data checkerboard --batch-size 100 "
    "--max-epochs 30 --seed $seed --results-dir results/weights; done",
}
"""What makes the weights that are not committed."""


def equal_error(experiment: str) -> str:
    """What measures an experiment's ways at equal error of the gradient."""
    return _of_weights(experiment, f"reproduction.equal_error --experiments {experiment}")


def step_errors(experiment: str) -> str:
    """What measures which part of the adjoint's state has the largest error in a step; of weights of its own."""
    program = f"reproduction.diagnostics --measurements step_errors --experiments {experiment}"
    if experiment == "acrobot":
        return _of_weights(experiment, program)
    training = {
        "speech_commands": "python speech_commands.py --device cpu --norm seminorm --rtol 1e-3 --atol 1e-6 "
        "--max-epochs 24 --batch-size 128 --metric-interval 2 --seed 2 --data-root recordings",
        "flow": "python flow.py --device cpu --norm default --data checkerboard --batch-size 100 --max-epochs 30",
    }[experiment]
    weights = "results/weights-of-steps"  # apart: the other measurements would take these
    return f"{training} --results-dir {weights}; python -m {program} --weights-dir {weights}"


def growth() -> str:
    """What measures how evaluations grow in training, for two widths of the flow of digits."""
    training = "python flow.py --device cpu --norm discrete --data digits --batch-size 50 --results-dir results/weights"
    return (
        f"{training} --width 16 --max-epochs 30; {training} --width 64 --max-epochs 10; python -m "
        "reproduction.diagnostics --experiments flow --measurements growth --weights-dir results/weights"
    )


def law(model: str, *steps: str) -> str:
    """These steps of `law.py` for one of its models."""
    programs = [f"reproduction.law {step} --models {model}" for step in steps]
    return _of_weights(model, *programs)


def _of_weights(model: str, *programs: str) -> str:
    """These modules run on the weights of a model: committed, to be made before, or its own."""
    weights = {
        "speech_commands": " --weights-dir reference/weights --data-root recordings",
        "acrobot": " --weights-dir results/weights",
        "flow": " --weights-dir results/weights",
        "neural_ode": "",
    }[model]
    commands = [_TRAINING[model]] if model in _TRAINING else []
    return "; ".join([*commands, *(f"python -m {program}{weights}" for program in programs)])
