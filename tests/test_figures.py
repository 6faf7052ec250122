"""Figures show what the results hold, cope with results that are incomplete, and come out the same twice."""

import dataclasses
import io
import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from records import made_on

import acrobot
import figures
import speech_commands
from common.records import plain, read_as
from common.results import SCHEMA, Epoch, HistoryEntry, Metrics, Results
from reproduction import diagnostic_figures, run_figures, time_figures
from reproduction.style import LOOKS, NothingToDraw, render

REFERENCE = Path(__file__).parents[1] / "reference"
NUM_BATCHES = 10
BATCH_SIZE = 128
DIRECTIONS = ("forward", "backward")


def run(norm, seed=0, *, nfe=(1300, 2600), experiment=speech_commands, status="completed", split="a", **settings):
    """A run of as many epochs as there are `nfe`, each what a mean gradient step of the epoch took backwards."""
    settings = dict(batch_size=BATCH_SIZE, max_epochs=len(nfe)) | settings
    config = experiment.Config("cpu", norm, seed=seed, **settings)
    accuracy = dict(accuracy=0.5) if experiment is speech_commands else {}
    end = 160.0 if experiment is speech_commands else 0.35

    def counts(number):
        names = ("nfe", "accepted", "rejected")
        return {f"{way}_{name}": number * NUM_BATCHES for way in DIRECTIONS for name in names} | dict(loss=1.5)

    def metrics(number):
        # A list is thinned: it has every second time of the first batch.
        times = np.linspace(0, end, number // 20).tolist()
        lists = {f"{way}_{kind}": times for way in DIRECTIONS for kind in ("ts", "accept_ts", "reject_ts")}
        passed = dict(dataset_size=NUM_BATCHES * BATCH_SIZE, timestamp=0.0, timespan=1.0)
        return read_as(Metrics, counts(number) | lists | passed | accuracy)

    epochs, history = [], []
    for number, count in enumerate(nfe, start=1):
        clocks = dict(epoch=number, seconds=1.0, cpu_seconds=1.0, learning_rate=0.1)
        epochs.append(read_as(Epoch, counts(count) | clocks | accuracy))
        history.append(HistoryEntry(epoch=number, train_metrics=metrics(count), val_metrics=metrics(count)))
    final = metrics(100) if status == "completed" else None
    return Results(
        start_time=0.0,
        timespan=1.0,
        parameters=1,
        history=history,
        train_metrics=final,
        val_metrics=final,
        test_metrics=final,
        experiment=experiment.__name__,
        config=dataclasses.asdict(config),
        provenance=made_on(split),
        epochs=epochs,
        status=status,
    )


def lines(ax):
    return {line.get_label(): line.get_ydata() for line in ax.get_lines()}


def test_the_band_goes_from_the_least_to_the_most_around_the_mean():
    runs = [run("default", 0, nfe=(100, 200)), run("default", 1, nfe=(300, 200)), run("default", 2, nfe=(110, 500))]
    (ax,) = run_figures.backward_nfe([*runs, run("seminorm", nfe=(80, 90))]).axes
    assert lines(ax)["default"] == pytest.approx([170, 300])
    assert lines(ax)["seminorm"] == pytest.approx([80, 90])
    band = ax.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in band} == {(1, 100), (1, 300), (2, 200), (2, 500)}
    assert "1 to 3 seeds" in ax.get_title()


def test_each_pair_of_tolerances_has_its_panel():
    runs = [run("seminorm"), run("seminorm", rtol=1e-4, atol=1e-7, nfe=(50, 60, 70))]
    first, second = run_figures.backward_nfe(runs).axes
    assert lines(first)["seminorm"] == pytest.approx([1300, 2600])
    assert lines(second)["seminorm"] == pytest.approx([50, 60, 70])
    runs[0].history[0].val_metrics.loss = 9.0
    runs[0].history[0].val_metrics.accuracy = 0.875
    accuracies, _, losses, _ = run_figures.learning(runs).axes
    for ax, value in ((accuracies, 0.875), (losses, 9.0)):
        drawn = [line.get_ydata() for line in ax.get_lines() if line.get_marker() != "None"]
        assert [ys[0] for ys in drawn if len(ys)] == [value]
    assert len(run_figures.learning(runs).axes) == 4
    assert len(run_figures.learning([run("seminorm", experiment=acrobot)]).axes) == 1


def test_a_norm_is_told_apart_by_its_line_marker_and_colour():
    assert len({look.marker for look in LOOKS.values()}) == len(LOOKS)
    assert len({look.linestyle for look in LOOKS.values()}) == len(LOOKS)
    # A warm start is no norm of its own, and the two ways to leave out integrals share a colour.
    assert len({look.color for look in LOOKS.values()}) == len(LOOKS) - 2
    (ax,) = run_figures.backward_nfe([run(norm) for norm in ("default", "seminorm", "per-tensor", "discrete")]).axes
    colors = {line.get_label(): line.get_color() for line in ax.get_lines()}
    assert all(colors[norm] == LOOKS[norm].color for norm in colors if norm in LOOKS)


def test_a_warm_start_is_a_line_of_its_own():
    runs = [run("seminorm", experiment=acrobot), run("seminorm", experiment=acrobot, nfe=(10, 20), warm_start=True)]
    (ax,) = run_figures.backward_nfe(run_figures.comparable(runs, "acrobot")).axes
    assert lines(ax)["seminorm, warm start"] == pytest.approx([10, 20])
    assert lines(ax)["seminorm"] == pytest.approx([1300, 2600])


def test_a_way_without_a_look_of_its_own_is_drawn_too():
    runs = [run("default", experiment=acrobot, **options) for options in ({}, dict(warm_start=True))]
    for draw in (run_figures.backward_nfe, run_figures.learning):
        (ax,) = draw(run_figures.comparable(runs, "acrobot")).axes
        assert {"default", "default, warm start"} <= lines(ax).keys()
    others = [run(norm, experiment=acrobot, rtol=1e-3, warm_start=True) for norm in ("default", "as-published")]
    panels = run_figures.backward_nfe([*runs, *others]).axes
    drawn = [line for ax in panels for line in ax.get_lines() if line.get_label() == "default, warm start"]
    assert len(drawn) == 2
    assert len({line.get_color() for line in drawn}) == 1


def test_a_setting_that_an_older_file_lacks_is_at_its_default():
    old, new, other = run("default", 0), run("default", 1), run("default", 2)
    del old.config["method"]
    other.config["method"] = "bosh3"
    assert run_figures.comparable([old, new, other], "speech_commands") == [old, new]


def test_only_completed_runs_of_one_kind_are_compared_and_the_others_are_told(caplog):
    runs = [run("default"), run("seminorm"), run("seminorm", 1)]
    others = [
        run("default", 1, status="interrupted"),
        run("default", 2, status="failed"),
        run("default", nfe=(1,)),
        run("default", split="b"),
        run("seminorm", batch_size=64),
        run("seminorm", experiment=acrobot),
    ]
    with caplog.at_level(logging.WARNING):
        assert run_figures.comparable([*others, *runs], "speech_commands") == runs
    assert "5 of 8 runs of Neural CDE on Speech Commands" in caplog.text


def test_the_most_samples_count_not_the_most_steps():
    runs, many = [run("default"), run("seminorm")], run("seminorm", batch_size=8)
    assert run_figures.comparable([*runs, many], "speech_commands") == runs


def test_of_several_results_of_a_run_the_latest_is_drawn():
    first, again = run("default"), run("default")
    first.start_time = 2.0
    assert run_figures.comparable([first, again], "speech_commands") == [first]


def test_at_a_pair_of_tolerances_the_length_of_most_runs_with_the_default_is_drawn():
    both = ("default", "seminorm")
    most = [run(norm, seed, nfe=(1, 2)) for norm in both for seed in (0, 1)]
    longer = [run(norm, nfe=(1, 2, 3)) for norm in both]
    without = [run("seminorm", seed, nfe=(1, 2, 3, 4)) for seed in range(5)]
    elsewhere = [run("seminorm", rtol=1e-4, nfe=(1,))]
    drawn = run_figures.comparable([*without, *longer, *most, *elsewhere], "speech_commands")
    assert sorted(map(id, drawn)) == sorted(map(id, [*most, *elsewhere]))
    assert run_figures.comparable([*longer, *most[::2]], "speech_commands") == longer


def test_a_run_that_was_not_made_is_asked_for_by_its_command():
    with pytest.raises(NothingToDraw, match=r"python acrobot.py --device cpu"):
        run_figures.comparable([run("default"), run("default", experiment=acrobot, status="failed")], "acrobot")
    with pytest.raises(NothingToDraw, match="default and seminorm"):
        time_figures.solver_times([run("default"), run("seminorm", rtol=1e-4)])
    with pytest.raises(NothingToDraw, match="one pair of tolerances"):
        run_figures.nfe_by_tolerance([run("default"), run("seminorm")])


def test_tolerances_are_compared_over_the_epochs_that_all_runs_have():
    runs = [
        run("default", nfe=(100, 300, 1000)),
        run("default", 1, nfe=(200, 400, 1000)),
        run("default", rtol=1e-4, nfe=(700, 900)),
        run("seminorm", nfe=(60, 40, 1)),
        run("seminorm", rtol=1e-4, nfe=(100, 100)),
    ]
    absolute, relative = run_figures.nfe_by_tolerance(runs).axes
    assert lines(absolute)["default"] == pytest.approx([800, 250])  # at 1e-4, 1e-3
    assert relative.get_lines()[0].get_ydata() == pytest.approx([8, 5])
    assert "epochs 1 to 2" in absolute.get_ylabel()
    assert absolute.xaxis_inverted()
    assert relative.xaxis_inverted()
    # Another absolute tolerance beside one of more runs is another condition.
    absolute, _ = run_figures.nfe_by_tolerance([*runs, run("default", atol=1e-8, nfe=(9000, 9000))]).axes
    assert lines(absolute)["default"] == pytest.approx([800, 250])


@pytest.mark.parametrize("kind", time_figures.KINDS)
def test_a_histogram_has_the_shape_of_the_first_batch_and_the_sum_of_all(kind):
    results = [run("default", nfe=(1300, 2600)), run("default", 1, nfe=(900, 1200))]
    histogram = time_figures.time_histogram(results, kind)
    assert histogram.sum() == pytest.approx((1300 + 2600 + 900 + 1200) / 4)
    assert histogram == pytest.approx(np.full(20, histogram.mean()), rel=0.2)


def test_a_time_lies_in_its_bin():
    result = run("default", nfe=(1300,))
    result.history[0].train_metrics.backward_reject_ts = [9.0, 9.5, 15.9, 160.0]
    expected = np.zeros(20)
    expected[[1, 19]] = 0.75 * 1300, 0.25 * 1300
    assert time_figures.time_histogram([result], "backward_reject_ts") == pytest.approx(expected)


def test_nothing_rejected_is_no_histogram_and_still_a_figure():
    runs = [run("default"), run("seminorm")]
    for entry in (entry for result in runs for entry in result.history):
        entry.train_metrics.backward_rejected, entry.train_metrics.backward_reject_ts = 0, []
    assert time_figures.time_histogram(runs, "backward_reject_ts").sum() == 0
    assert "default 0, seminorm 0" in time_figures.solver_times(runs).axes[2].get_title()
    # That the first batches had none does not say that the others had none.
    for entry in runs[0].history:
        entry.train_metrics.backward_rejected = 3 * NUM_BATCHES
    assert "default 3.0, seminorm 0" in time_figures.solver_times(runs).axes[2].get_title()


def test_densities_in_time_are_for_its_unit():
    runs = [run("default"), run("seminorm")]
    drawn = time_figures.solver_times(runs).axes[0].patches[0]
    [width] = set(np.diff(drawn.get_data().edges).round(9))
    whole = (drawn.get_data().values * width).sum()
    assert whole == pytest.approx(time_figures.time_histogram(runs[:1], "backward_ts").sum())


def motion(num_rows=401):
    angle = np.linspace(0, np.pi, num_rows)
    names = ("q1", "q2", "dq1", "dq2", "u0", "u1")
    return {"motion": {name: (number * angle).tolist() for number, name in enumerate(names, start=1)}}


def test_each_quantity_of_the_motion_is_in_its_panel():
    figure = diagnostic_figures.control_curves({"acrobot": motion(41)})
    ends = {ax.get_ylabel(): [line.get_ydata()[-1] / np.pi for line in ax.get_lines()[:2]] for ax in figure.axes}
    assert ends == {
        "angle (rad)": pytest.approx([1, 2]),
        "velocity (rad/s)": pytest.approx([3, 4]),
        "torque (N m)": pytest.approx([5, 6]),
    }


def test_each_part_of_the_error_is_drawn_as_what_it_is():
    values = {"t0": [1.0, 0.5], "t1": [0.5, 0.0], "error_ratio": [0.4, 0.5], "z": [0.1, 0.2], "a_z": [0.3, 0.35]}
    steps = {"default": {**values, "a_theta": [0.4, 0.5]}, "seminorm": {**values, "t1": [0.25, 0.0]}}
    shares = [{"rtol": 1e-3, "z": 0.0, "a_z": 0.0, "a_theta": 1.0, "a_t": 0.0}]
    record = {"rtol": 1e-3, "atol": 1e-6, "steps": steps, "shares": shares}
    errors, sizes, _ = diagnostic_figures.step_errors({"acrobot": record}).axes
    assert {label: list(ys) for label, ys in lines(errors).items() if label.startswith("$")} == {
        "$z$": [0.1, 0.2], "$a_z$": [0.3, 0.35], r"$a_\theta$": [0.4, 0.5],
    }  # fmt: skip
    assert lines(sizes)["default"] == pytest.approx([0.5, 0.5])
    assert lines(sizes)["seminorm"] == pytest.approx([0.75, 0.5])


def test_each_figure_is_what_its_name_says():
    found = figures.figures(str(REFERENCE))
    labels = {
        "speech_commands-backward-nfe": "backward NFE per gradient step",
        "speech_commands-learning": "accuracy",
        "acrobot-learning": "loss",
        "gradient-errors": "relative error of the gradient",
        "step-errors": "error over tolerance\n(norm default)",
    }
    assert {name: found[name]().axes[0].get_ylabel() for name in labels} == labels


def test_the_links_hang_and_stand_where_they_should():
    angles = {"q1": [0.0, np.pi / 2, np.pi], "q2": [0.0, np.pi / 2, 0.0]}
    elbow, tip = diagnostic_figures.tip_positions(angles)
    assert elbow == pytest.approx(np.array([[0, -1], [1, 0], [0, 1]]), abs=1e-12)
    assert tip == pytest.approx(np.array([[0, -2], [1, 1], [0, 2]]), abs=1e-12)


def test_the_animation_plays_at_the_speed_of_the_motion():
    with Image.open(io.BytesIO(diagnostic_figures.control_animation({"acrobot": motion(41)}))) as animation:
        assert animation.n_frames == 21
        assert animation.info["duration"] * 20 == 1000 * 0.05 * 40


def test_the_error_of_a_gradient_is_its_median_over_the_batches():
    rows = [
        dict(batch=batch, adjoint="default", rtol=rtol, atol=rtol, forward_nfe=10, backward_nfe=nfe, error=error)
        for batch, (nfe, error) in enumerate([(30, 0.1), (10, 0.3), (20, 0.7)])
        for rtol in (1e-3, 1e-2)
    ]
    records = {"acrobot": {"rows": rows, "reference": [1e-5, 1e-5]}}
    errors, evaluations = diagnostic_figures.gradient_errors(records).axes
    assert errors.get_lines()[0].get_xydata() == pytest.approx(np.array([[30, 0.3], [30, 0.3]]))
    assert evaluations.get_lines()[0].get_xydata() == pytest.approx(np.array([[1e-3, 20], [1e-2, 20]]))
    # Errors near the reference's own are not drawn.
    records["acrobot"]["reference"] = [1e-4, 1e-4]
    errors, evaluations = diagnostic_figures.gradient_errors(records).axes
    assert errors.get_lines()[0].get_xydata() == pytest.approx(np.array([[30, 0.3]]))
    assert len(evaluations.get_lines()[0].get_xydata()) == 2


def test_shares_of_steps_are_stacked():
    records = {"acrobot": json.loads((REFERENCE / "diagnostics" / "step_errors-speech_commands.json").read_bytes())}
    [*_, shares] = diagnostic_figures.step_errors(records).axes
    bars = sorted((round(patch.get_y(), 6), patch.get_x(), patch.get_width()) for patch in shares.patches)
    for _, row in itertools.groupby(bars, key=lambda bar: bar[0]):
        ends = [(left, left + width) for _, left, width in row if width]
        assert ends[0][0] == 0
        assert ends[-1][1] == pytest.approx(100)
        assert all(before[1] == pytest.approx(after[0]) for before, after in itertools.pairwise(ends))


def test_a_likelihoods_error_is_not_the_gradients():
    rows = [
        dict(integrals=way, rtol=rtol, forward_nfe=10, backward_nfe=20, error=1.0, likelihood_error=2.0)
        for way in ("none", "backward", "unweighed")
        for rtol in (1e-3, 1e-4)
    ]
    likelihood, gradient = diagnostic_figures.integrals({"flow": {"rows": rows}}).axes
    assert {*likelihood.get_lines()[0].get_ydata()} == {2.0}
    assert {*gradient.get_lines()[0].get_ydata()} == {1.0}
    assert gradient.get_lines()[0].get_xdata()[0] == 30


def test_a_foreign_file_among_the_measurements_is_a_sentence(tmp_path):
    path = tmp_path / "diagnostics" / "gradient_errors-acrobot.json"
    path.parent.mkdir()
    for content, sentence in (("{}", "has no 'rows': move it away"), ("[", "is not strict JSON")):
        path.write_text(content)
        with pytest.raises(NothingToDraw, match=sentence):
            diagnostic_figures.read(str(tmp_path), "gradient_errors")


def write(results_dir, name, run):
    path = results_dir / run.experiment / name / "0.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schema": SCHEMA, **plain(run)}, allow_nan=False))


def test_the_command_draws_what_it_can_and_says_what_the_rest_lacks(tmp_path, capsys):
    write(tmp_path, "a", run("default"))
    write(tmp_path, "b", run("seminorm"))
    write(tmp_path, "c", run("seminorm", experiment=acrobot))
    (tmp_path / "diagnostics").mkdir()
    (tmp_path / "diagnostics" / "control-acrobot.json").write_text(json.dumps(motion(181)))
    with pytest.raises(SystemExit) as caught:
        figures.main(figures.Options(str(tmp_path)))
    assert caught.value.code == 1
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert len(drawn) == 2 * 7 + 1
    assert all(content.startswith((b"\x89PNG", b"%PDF", b"GIF8")) for content in drawn.values())
    lacking = [line.split(":")[1].strip() for line in capsys.readouterr().err.splitlines()]
    flows = [name for name in lacking if name.startswith("flow-")]
    assert len(flows) == 3 * 3 + 3  # of runs, and what is drawn of measurements
    others = [
        "speech_commands-nfe-by-tolerance",
        "acrobot-solver-times",
        "gradient-errors",
        "step-errors",
        "law",
        "equal-error",
        "flow.gif",
    ]
    assert [name for name in lacking if name not in flows] == others


def test_figures_may_lie_elsewhere(tmp_path):
    write(tmp_path, "a", run("default"))
    with pytest.raises(SystemExit):
        figures.main(figures.Options(str(tmp_path), output=str(tmp_path / "drawn")))
    assert (tmp_path / "drawn" / "speech_commands-learning.png").exists()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        figures.main(figures.Options(str(tmp_path / "mistyped")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_the_same_results_make_the_same_bytes(kind):
    first, second = (render(run_figures.backward_nfe([run("default")]), kind) for _ in range(2))
    assert first == second


def test_a_vector_figure_embeds_its_fonts_and_tells_no_date():
    figure = run_figures.backward_nfe([run("default")])
    document = render(figure, "pdf")
    assert b"/FontFile2" in document
    assert b"/Type3" not in document
    assert b"CreationDate" not in document
    assert render(figure, "svg").count(b"<svg") == 1
