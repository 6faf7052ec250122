"""What is measured of trained flows, and the pictures of it."""

import io
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import flow
from reproduction import diagnostic_figures, diagnostics, flow_figures, flow_samples, integral_errors
from reproduction.experiments import FLOW
from reproduction.style import NothingToDraw, render


def model(**options):
    config = flow.Config("cpu", "seminorm", rtol=1e-3, atol=1e-3, **options)
    return flow.build(config).eval()


@pytest.fixture(scope="module")
def of_points():
    return flow_samples.measure_points(model(data="checkerboard", width=8), torch.randn(30, 2))


@pytest.fixture(scope="module")
def of_images():
    levels = torch.randint(17, (50, 1, 8, 8), dtype=torch.uint8)
    return flow_samples.measure_images(model(data="digits", width=1), levels)


def test_points_are_measured_where_they_are(of_points):
    """The first path starts from noise, and the samples are the ends of all; the density has its place on the grid."""
    record = of_points
    paths = np.array(record["paths"])
    assert paths.shape == (flow_samples.NUM_FRAMES, flow_samples.NUM_MOVING, 2)
    assert (record["times"][0], record["times"][-1]) == (0.5, 0)
    assert paths[-1].tolist() == record["samples"][: flow_samples.NUM_MOVING]
    assert abs(paths[0].std() - 1) < 0.1
    density, side = np.array(record["density"]), np.linspace(-record["reach"], record["reach"], flow_samples.GRID_SIZE)
    losses, _ = model(data="checkerboard", width=8)(torch.tensor([[side[60], side[30]]], dtype=torch.float32))
    assert density[30, 60] == pytest.approx(losses.neg().exp().item(), abs=2e-4)
    json.dumps(record, allow_nan=False)


def test_images_are_levels(of_images):
    samples = np.array(of_images["samples"])
    assert samples.shape == (flow_samples.NUM_IMAGES, 1, 8, 8)
    assert 0 <= samples.min() <= samples.max() <= 16


def test_a_density_lies_as_its_points_do(of_points):
    of_points["density"][30][60] = 7.0
    [image] = [image for ax in flow_figures.densities({"checkerboard": of_points}).axes for image in ax.get_images()]
    assert image.origin == "lower"
    assert image.get_array()[30, 60] == 7.0


def test_evaluations_grow_with_the_weights():
    config = flow.Config("cpu", "discrete", rtol=1e-3, atol=1e-3, data="checkerboard", width=8, batch_size=20)
    trained = flow.build(config).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter *= 5
    run = SimpleNamespace(card=FLOW, config=config)
    record = diagnostics.measure_growth(run, trained, (torch.randn(60, 2),))
    assert record["batch_size"] == 20
    assert diagnostics.measure_growth(run, trained, (torch.randn(30, 2),))["batch_size"] == 10
    assert record["num_parameters"] == sum(parameter.numel() for parameter in trained.parameters())
    counts = {(row["weights"], row["way"], row["batch"]): row["backward_nfe"] for row in record["rows"]}
    ways = ["default", "per-tensor", "seminorm", "discrete", "seminorm, integrals unweighed"]
    assert set(counts) == set(itertools.product(["initial", "trained"], ways, range(3)))
    assert all(counts["trained", way, 0] > counts["initial", way, 0] for way in ways)
    assert counts["trained", "seminorm, integrals unweighed", 0] <= counts["trained", "default", 0]


def write(tmp_path, group, record):
    path = tmp_path / "diagnostics" / FLOW.file_name("samples", group)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def test_pictures_show_what_is_there(tmp_path, of_points, of_images):
    write(tmp_path, "checkerboard", of_points)
    path = write(tmp_path, "digits, width 16", of_images)
    assert path.name == "samples-flow-digits-16.json"
    points, images = (flow_figures.read(str(tmp_path), of_images=of) for of in (False, True))
    assert (list(points), list(images)) == (["checkerboard"], ["digits, width 16"])
    data, density, samples = flow_figures.densities(points).axes
    assert len(data.get_lines()[0].get_xdata()) == 30
    assert density.get_images()[0].get_array().shape == (flow_samples.GRID_SIZE, flow_samples.GRID_SIZE)
    assert len(samples.get_lines()[0].get_xdata()) == flow_samples.NUM_POINTS
    mosaic = flow_figures.images(images).axes[1].get_images()[0].get_array()
    assert mosaic.shape == (6 * 9 - 1, 8 * 9 - 1)
    assert (16 * mosaic[:8, :8]).tolist() == np.array(of_images["samples"])[0, 0].tolist()
    for figure in (flow_figures.densities(points), flow_figures.images(images)):
        assert render(figure, "png").startswith(b"\x89PNG")


def test_the_animation_has_a_frame_for_each_time(of_points):
    with Image.open(io.BytesIO(flow_figures.animation({"checkerboard": of_points, "moons": of_points}))) as animation:
        assert animation.n_frames == flow_samples.NUM_FRAMES
        assert animation.info["loop"] == 0


def test_what_was_not_measured_is_asked_for_by_its_command(tmp_path):
    with pytest.raises(NothingToDraw, match=r"no samples of toys in .*--experiments flow --measurements samples"):
        flow_figures.read(str(tmp_path), of_images=False)
    path = write(tmp_path, "checkerboard", {})
    path.write_text("{")
    with pytest.raises(NothingToDraw, match="is not strict JSON"):
        flow_figures.read(str(tmp_path), of_images=False)


def test_integrals_are_compared_at_each_tolerance(monkeypatch):
    net, batches = model(data="8gaussians", width=16), [(torch.randn(20, 2),), (torch.randn(20, 2),)]
    for parameter in net.parameters():
        parameter.data *= 2
    tolerances = [(1e-3, 1e-3), (1e-5, 1e-5)]
    solved, gradient_of = [], integral_errors.gradient_of

    def spy(model, *arguments, **options):
        solved.append(model.flow.integrals)
        return gradient_of(model, *arguments, **options)

    monkeypatch.setattr(integral_errors, "gradient_of", spy)
    loss_function = FLOW.gradients.loss_function
    rows = integral_errors.integral_errors(net, batches, loss_function, tolerances=tolerances, reference=(1e-9, 1e-9))
    assert solved == 2 * ["none", *2 * ["none", "backward", "unweighed"]]
    assert len(rows) == 2 * 2 * 3
    by_way = {(row["rtol"], row["integrals"]): row for row in rows if row["batch"] == 0}
    for way in ("none", "backward", "unweighed"):
        loose, tight = by_way[1e-3, way], by_way[1e-5, way]
        assert tight["error"] < loose["error"]
        assert tight["likelihood_error"] < loose["likelihood_error"] < 0.1
    # Backward alone, the forward solve is the same.
    for name in ("forward_nfe", "likelihood_error"):
        assert by_way[1e-5, "none"][name] == by_way[1e-5, "backward"][name]
    axes = diagnostic_figures.integrals({"flow": {"rows": rows}}).axes
    assert [len(ax.get_lines()) for ax in axes] == [3, 3]
