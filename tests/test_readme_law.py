"""What README and docs/ say of the law and of equal errors is what the committed measurements say."""

from prose import ROOT, diagnosis, markdown_tables, says

from reproduction import claims_of_law, collapse
from reproduction.evidence import interval


def claims():
    """By its sentence, the number, the interval and n of each claim on the generated page."""
    table = next(markdown_tables((ROOT / "results" / "CLAIMS.md").read_text(encoding="utf-8")))
    return {row[1]: row[4:7] for row in table[1:]}


def test_the_table_at_equal_error():
    found = claims()
    ways = {
        "`seminorm`": "the seminorm",
        "`discrete`": "`discrete`",
        "`discrete` with bosh3": "`discrete` with bosh3",
    }
    for way, called in ways.items():
        for rtol in ("1e-2", "1e-3"):
            numbers = [
                "{} ({})".format(*found[sentence][:2])
                for saved in ("evaluations", "CPU seconds")
                if (sentence := f"At equal error of the gradient {called} at rtol {rtol} saves {saved}: the Neural CDE")
                in found
            ]
            few = ", n = 7" if (way, rtol) == ("`discrete` with bosh3", "1e-3") else ""
            says(f"| {way}, {rtol}{few} | {' | '.join(numbers)} |")

    at = "At equal error of the gradient {} at rtol 1e-3 saves evaluations: the Neural CDE"
    says("the seminorm at 1e-3 needs {} ({}) times the evaluations".format(*found[at.format("the seminorm")]))
    says("`discrete` with bosh3 needs {} ({}).".format(*found[at.format("`discrete` with bosh3")]))


def test_how_good_the_reference_at_equal_error_is():
    rows = diagnosis("equal_error", "speech_commands")["rows"]
    errors = [row["reference_error"] for row in rows]
    says(f"good to {100 * min(errors):.1f} to {100 * max(errors):.1f} %, and errors of a third of the gradients")
    assert sum(row["error"] < 2 * row["reference_error"] for row in rows) == len(rows) / 3


def test_the_numbers_of_the_law():
    found = claims()
    curve = "The backward NFE of `{}` fall on one curve against RMS({}) / atol: {}"
    of_default, of_seminorm = (
        curve.format(*norm, "the Neural CDE") for norm in (("default", "a_theta"), ("seminorm", "a_z"))
    )
    says(f"the curve leaves {found[of_default][0]} and {found[of_seminorm][0]} of the spread about a constant")
    says(f"the curve leaves {found[curve.format('default', 'a_theta', 'the small network')][0]} for `default`")
    cases = diagnosis("law", "speech_commands")["cases"]
    shares = {}
    for norm in ("default", "seminorm"):
        spread = collapse.spreads(cases, norm)
        shares[norm] = {name: f"{share / spread['nothing']:.2f}" for name, share in spread.items()}
        left_out = collapse.spread_left_out(cases, norm, collapse.CHOSEN[norm])
        shares[norm]["left out"] = f"{left_out / spread['nothing']:.2f}"
    says(f"the curve of the others, {shares['default']['left out']} and {shares['seminorm']['left out']} are left")
    says(f"adds nothing there to loss scale / atol ({shares['default']['loss scale / atol']} too), that of a_z does")
    says(f"({shares['default']['RMS(a_z) / atol']})")
    ratio = "At one loss scale and atol the ratio of parameters to state sets the cost of `default`: the Neural CDE"
    says(f"five cases of the Neural CDE (it leaves {found[ratio][0]} of their")
    between = "The saving is largest where atol lies between the sizes of a_z and a_theta: the Neural CDE"
    says(f"it is {found[between][0].removeprefix('-')[:-1]}s smaller there, but two cases alone have such")
    assert found[between][2] == "2"
    inside, outside = (sum(map(len, of_cases)) for of_cases in zip(*map(collapse.between, cases), strict=True))
    says(f"settings ({inside} of {inside + outside})")
    margin = claims_of_law.LAW_MARGIN
    for model, called in (("neural_ode", "the small network"), ("speech_commands", "the Neural CDE")):
        for sizes, quantity in (("a_theta and a_z", "default"), ("a_z", "seminorm")):
            distances = [
                abs(setting["predicted_saving"] - setting["measured_saving"])
                for setting in diagnosis("law_predictions", model)["settings"]
                if setting["predicted_from"]["default"] == collapse.CHOSEN[quantity]
            ]
            if not distances:
                continue
            number = interval(distances, "settings", [])
            ends = " to ".join(f"{100 * end:.1f}" for end in (number.low, number.high))
            beyond = sum(distance > margin for distance in distances)
            says(f"| {sizes} | {called} | {100 * number.value:.1f} ({ends}) | {len(distances)} | {beyond} |")


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
