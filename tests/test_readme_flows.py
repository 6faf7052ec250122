"""The figures of flows in the prose and tables of README and docs/ are those of the committed runs and measurements."""

import math
import statistics

from prose import RESULTS, diagnosis, says

from reproduction.evidence import Evidence, Way, backward_nfe, nll


def test_the_table_of_flows():
    gradients, integrals = (diagnosis(name, "flow")["rows"] for name in ("gradient_errors", "integrals"))

    def cell(rows, rtol, **wanted):
        rows = [
            row for row in rows if row["rtol"] == rtol and all(row[name] == value for name, value in wanted.items())
        ]
        forward, backward, error = (
            statistics.median(row[name] for row in rows) for name in ("forward_nfe", "backward_nfe", "error")
        )
        return f"{forward:.0f} + {backward:.0f}: {error:.1e}"

    for rtol in sorted({row["rtol"] for row in gradients}):
        row = [cell(gradients, rtol, adjoint=adjoint) for adjoint in ("default", "seminorm", "discrete")]
        row.append(cell(integrals, rtol, integrals="unweighed"))
        says(f"| 1e{round(math.log10(rtol))} | {' | '.join(row)} |")
    shares = [share["a_t"] for share in diagnosis("step_errors", "flow")["shares"]]
    says(f"sets the steps, in {100 * min(shares):.0f} to {100 * max(shares):.0f} % of the attempted ones")
    assert all(share["a_theta"] == 0 for share in diagnosis("step_errors", "flow")["shares"])


def test_the_trained_flows():
    evidence = Evidence.of(str(RESULTS))

    def way(norm, integrals="none", data="checkerboard"):
        return Way("flow", 1e-5, 1e-5, norm, integrals=integrals, data=data)

    def share(mine):
        return evidence.compared(mine, way("default", data=mine.data), backward_nfe, is_share=True)

    def saved(mine):
        found = share(mine)
        assert found.num == 3
        return f"{100 * found.value:.0f} % ({100 * found.low:.0f} to {100 * found.high:.0f})"

    apart = []
    for data in ("checkerboard", "8gaussians", "2spirals"):
        norms = [("seminorm",), ("seminorm", "unweighed"), ("discrete",)]
        says(f"| {data} | {' | '.join(saved(way(*norm, data=data)) for norm in norms)} |")
        for norm in (*norms, ("per-tensor",)):
            found = evidence.compared(way(*norm, data=data), way("default", data=data), nll, is_share=False)
            apart.append(abs(found.value))
        assert abs(share(way("per-tensor", data=data)).value) < 0.01, "the page says that it costs as much as `default`"
    says(f"The mean likelihoods agree to {max(apart):.3f} nats")
    says(f"In a flow of the checkerboard the seminorm saves {saved(way('seminorm'))[:-1]}, n = 3) at equal tolerances")
    of_digits = {norm: share(way(norm, data="digits")) for norm in ("seminorm", "discrete")}
    assert of_digits["seminorm"].num == 2
    assert abs(of_digits["seminorm"].value) < 0.005
    spirals, gaussians = (saved(way("seminorm", data=data)) for data in ("2spirals", "8gaussians"))
    says(f"on 2spirals {spirals}, on 8gaussians {gaussians}, on digits nothing (two seeds).")
    shares = {data: share(way("discrete", data=data)) for data in ("checkerboard", "2spirals", "8gaussians")}
    shares["digits"] = of_digits["discrete"]
    *first, last = (f"{100 * found.value:.0f} % on {data}" for data, found in shares.items())
    says(f"`discrete` saves {', '.join(first)} and {last}.")
