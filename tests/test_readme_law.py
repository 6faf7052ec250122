"""What README and docs/ say of the law and of equal errors is what the committed measurements say."""

import itertools
from statistics import geometric_mean, mean

from prose import ROOT, diagnosis, markdown_tables, says

from reproduction import claims_of_law, collapse
from reproduction.fair_saving import compare


def claims():
    """By its sentence, the number, the interval and n of each claim on the generated page."""
    table = next(markdown_tables((ROOT / "results" / "CLAIMS.md").read_text(encoding="utf-8")))
    return {row[1]: row[4:7] for row in table[1:]}


def verdicts():
    table = next(markdown_tables((ROOT / "results" / "CLAIMS.md").read_text(encoding="utf-8")))
    return {row[1]: row[3] for row in table[1:]}


CDE = "the Neural CDE"


def test_the_table_at_equal_error():
    found = claims()
    ways = {
        "`seminorm`": "the seminorm",
        "`discrete`": "`discrete`",
        "`seminorm` with bosh3": "the seminorm with bosh3",
        "`discrete` with bosh3": "`discrete` with bosh3",
    }
    for way, called in ways.items():
        for rtol in ("1e-2", "1e-3", "1e-4"):
            row = [f"{way}, {rtol}"]
            for saved in ("evaluations", "CPU seconds"):
                at = f"At equal error of the gradient {called} at rtol {rtol} saves {saved}: {CDE}"
                middle, ends, number = found[at]
                row.append(shown(middle, ends, number))
            says(f"| {' | '.join(row)} |")

    at = "At equal error of the gradient {} at rtol {} saves {}: {}"
    says(f"the seminorm at 1e-3 needs {shown(*found[at.format('the seminorm', '1e-3', 'evaluations', CDE)])} times the")
    says(f"It takes {shown(*found[at.format('the seminorm', '1e-3', 'CPU seconds', CDE)])} times the CPU seconds")
    bosh3 = shown(*found[at.format("`discrete` with bosh3", "1e-3", "evaluations", CDE)])
    says(f"`discrete` with bosh3 needs {bosh3} times the evaluations")
    less_exact = "At equal tolerances the gradient of {} is less exact: {}, rtol {}"
    (error, ends, _), (other, others_ends, _) = (
        found[less_exact.format("the seminorm", CDE, rtol)] for rtol in ("1e-3", "1e-4")
    )
    assert error == other
    says(f"by {error} times at 1e-3 and at 1e-4, three sets of weights do not settle ({ends}, {others_ends})")
    says(f"it is less exact, by {error} times, which the weights do not settle ([below]")
    loose, tight = (found[less_exact.format("`discrete`", CDE, rtol)] for rtol in ("1e-3", "1e-4"))
    says(f"less exact than that of `default`: {shown(*loose)[:4]} times ({loose[1]}) at 1e-3, {tight[0]} times")
    says(f"gradient errs {loose[0]} times ({loose[1]}) as much as that of `default` at rtol 1e-3, and {tight[0]} times")
    says(f"errs {loose[0]} times as much as that of `default` in the Neural CDE at 1e-3, {tight[0]} times at 1e-4.")

    def on_acrobot(way, rtol):
        middle, ends, _ = found[at.format(way, rtol, "evaluations", "acrobot")]
        assert " to " in ends
        return middle

    loose = [on_acrobot(way, "1e-3") for way in ("the seminorm", "`discrete`")]
    says("the seminorm takes {} times the evaluations, `discrete` {} at 1e-3".format(*loose))
    tight = [on_acrobot(way, "1e-4") for way in ("`as-published`", "the warm start", "`discrete`")]
    says("`as-published` takes {} times, the warm start {}, and `discrete` {}.".format(*tight))
    says(f"it takes {tight[1]} times at 1e-4 at the same error.")

    ways["`seminorm`, integrals unweighed"] = "the seminorm with integrals unweighed"
    in_flow = {
        way: [shown(*found[at.format(called, rtol, "evaluations", "the flow")]) for rtol in ("1e-3", "1e-4", "1e-5")]
        for way, called in ways.items()
    }
    for way, ratios in in_flow.items():
        says(f"| {' | '.join([way, *ratios])} |")
    says(f"they need {in_flow['`seminorm`'][-1]} and {in_flow['`discrete`'][-1]} times the evaluations.")
    for way in ("the seminorm", "`discrete`"):
        errors = [found[less_exact.format(way, "the flow", rtol)] for rtol in ("1e-3", "1e-4", "1e-5")]
        says("errs {}, {} and {} times as much".format(*(error for error, _, _ in errors)))
        if way == "the seminorm":
            (error, ends, _), (largest, others_ends, _) = errors[1:]
            says(f"errs {error} ({ends}) times as much at 1e-4 and {largest} ({others_ends}) at 1e-5")
    says(f"At equal tolerances the gradient of `discrete` errs {errors[-1][0]} times as much as that of `default`.")


def shown(middle, ends, number):
    """A ratio over the batches and weights."""
    assert number == "8 x 3"
    return f"{middle} ({ends})"


def test_the_seminorm_at_equal_error_by_each_set_of_weights():
    rows = diagnosis("equal_error", "speech_commands")["rows"]
    seeds = {row["seed"] for row in rows}
    assert len(seeds) == 3
    of_each = {
        way: sorted(
            found.at_equal_error.middle
            for seed in seeds
            for found in compare([row for row in rows if row["seed"] == seed], "nfe")
            if (found.way, found.rtol) == (way, 1e-3)
        )
        for way in ("seminorm", "discrete, bosh3")
    }
    says("By each set of weights alone it takes {:.2f}, {:.2f} and {:.2f} times".format(*of_each["seminorm"]))
    bosh3 = of_each["discrete, bosh3"]
    says("({:.2f}, {:.2f} and {:.2f} times at 1e-3, by each set of weights)".format(*bosh3))


def test_what_the_seminorm_saves_backward_in_the_batches_at_equal_error():
    rows = diagnosis("equal_error", "speech_commands")["rows"]
    nfe = {
        adjoint: geometric_mean(
            row["backward_nfe"]
            for row in rows
            if (row["adjoint"], row["method"], row["rtol"]) == (adjoint, "dopri5", 1e-3)
        )
        for adjoint in ("default", "seminorm")
    }
    says(f"saves {100 * (1 - nfe['seminorm'] / nfe['default']):.0f} % of the backward NFE here, at batch 16.")


def test_how_good_the_reference_at_equal_error_is():
    rows = diagnosis("equal_error", "speech_commands")["rows"]
    errors = [row["reference_error"] for row in rows]
    share = sum(row["error"] < 5 * row["reference_error"] for row in rows) / len(rows)
    says(f"good to {100 * min(errors):.1f} to {100 * max(errors):.1f} %;")
    says(f"{100 * share:.0f} % of the errors are less than five times its own")


def test_the_numbers_of_the_law():
    found = claims()
    curve = "The backward NFE of `{}` fall on one curve against RMS({}) / atol: {}"
    of_default, of_seminorm = (
        curve.format(*norm, "the Neural CDE") for norm in (("default", "a_theta"), ("seminorm", "a_z"))
    )
    says(f"scatter {found[of_default][0]} and {found[of_seminorm][0]} times as much as around a constant")
    alone = "Of one batch the backward NFE of `{}` depend on loss scale / atol alone: {}"
    differ = [
        found[alone.format(*of)][0]
        for of in (
            ("default", "the Neural CDE"),
            ("seminorm", "the Neural CDE"),
            ("default", "acrobot"),
            ("seminorm", "acrobot"),
            ("default", "the small network"),
        )
    ]
    says(f"With `default` they differ by at most {differ[0]} in the Neural CDE, by {differ[4]} in the small network")
    assert differ[2] == differ[3]
    says(
        f"and by {differ[2]} on acrobot. "
        f"With the seminorm they differ by {differ[1]} in the Neural CDE and by {differ[3]} on acrobot"
    )
    small = found[curve.format("default", "a_theta", "the small network")][0]
    says(f"In the small network `default` scatters {small} times as much around its curve")
    cases = diagnosis("law", "speech_commands")["cases"]
    shares = {}
    for norm in ("default", "seminorm"):
        spread = collapse.spreads(cases, norm)
        shares[norm] = {name: f"{share / spread['nothing']:.2f}" for name, share in spread.items()}
        left_out = collapse.spread_left_out(cases, norm, collapse.CHOSEN[norm])
        shares[norm]["left out"] = f"{left_out / spread['nothing']:.2f}"
    left_out = [shares[norm]["left out"] for norm in ("default", "seminorm")]
    says("with one case left out of the curve at a time, {} and {} times".format(*left_out))
    says(f"against loss scale / atol, `default` scatters {shares['default']['loss scale / atol']} times as much too")
    says(f"and against RMS(a_z) / atol only {shares['default']['RMS(a_z) / atol']} times")
    assert len(cases) == 5
    says(
        f"of all orders of five, {100 * share_of_orders_that_pass(cases):.0f} % fit as well as one that counts as a fit"
    )
    inside, outside = (sum(map(len, of_cases)) for of_cases in zip(*map(collapse.between, cases), strict=True))
    says(f"In the Neural CDE these are {inside} of {inside + outside}, all of untrained weights, and less was saved")
    assert {case["weights"] for case in cases if collapse.between(case)[0]} == {"untrained"}
    assert all(mean(here) < mean(elsewhere) for here, elsewhere in map(collapse.between, cases) if here)
    between = "The saving is largest where atol lies between the sizes of a_z and a_theta: {}"
    assert {verdicts()[between.format(model)] for model in (CDE, "the small network")} == {"**not testable here**"}
    says("Whether the saving is the largest where atol lies between a_z and a_theta cannot be judged")
    margin, means = claims_of_law.LAW_MARGIN, []
    for model, called in (("neural_ode", "the small network"), ("speech_commands", "the Neural CDE")):
        for sizes, quantity in (("a_theta and a_z", "default"), ("a_z", "seminorm")):
            distances = [
                abs(setting["predicted_saving"] - setting["measured_saving"])
                for setting in diagnosis("law_predictions", model)["settings"]
                if setting["predicted_from"]["default"] == collapse.CHOSEN[quantity]
            ]
            if not distances:
                continue
            means.append(100 * mean(distances))
            beyond = sum(distance > margin for distance in distances)
            numbers = f"{means[-1]:.1f} | {100 * max(distances):.1f} | {len(distances)} | {beyond}"
            says(f"| {sizes} | {called} | {numbers} |")
    says(f"Predictions from the adjoint's size were {min(means):.0f} to {max(means):.0f} points off in the mean")


def share_of_orders_that_pass(cases):
    """Of all ways to give the cases each other's ratios: in how many less than half of the spread is left."""
    sizes = [{name: case[name] for name in ("num_parameters", "batch_size")} for case in cases]
    spreads = []
    for order in itertools.permutations(range(len(cases))):
        mixed = [case | sizes[number] for case, number in zip(cases, order, strict=True)]
        _, nothing, about = collapse.spreads_within_settings(mixed, "default", "parameters / state", least=0.1)
        spreads.append(about / nothing)
    return sum(spread <= claims_of_law.MOST_LEFT for spread in spreads) / len(spreads)


def test_how_the_saving_grows_with_the_batch():
    found = {}
    for case in diagnosis("law", "speech_commands")["cases"]:
        if case["weights"] == "trained":
            found[case["batch_size"]] = collapse.measured_savings(case)[1.0, 1e-6]
    for setting in diagnosis("law_predictions", "speech_commands")["settings"]:
        if (setting["weights"], setting["loss_scale"], setting["atol"]) == ("trained", 1.0, 1e-6):
            found[setting["batch_size"]] = setting["measured_saving"]
    (smallest, least), *_, (largest, most) = sorted(found.items())
    assert sorted(found.values()) == [found[batch] for batch in sorted(found)]
    says(f"from {100 * least:.0f} % at {smallest} to {100 * most:.0f} % at {largest}")
