"""The text of the tables: what is missing shown as missing, each format, and the page of results kept in step."""

import io
import shutil
import subprocess

import pandas
import pytest
from records import acrobot, collected, result, speech, three_seeds

import tables
from common.results import load_all
from reproduction.experiments import EXPERIMENTS
from reproduction.published import PUBLISHED
from reproduction.runs import Run, preset_runs
from reproduction.status import Status, begun, on_found_data, statuses
from reproduction.summary import collect, summarise
from reproduction.typesetting import BEGIN, END, build, insert, render, saved


def titled(found, title):
    (table,) = [table for table in found if table.title == title]
    return table


def test_what_is_missing_or_failed_is_shown_as_such():
    kept = [pair for pair in three_seeds() if pair[0].settings["seed"] == 0 or pair[0].settings["norm"] == "default"]
    failed, missing = speech("seminorm", 1), speech("seminorm", 2)
    others = [
        Status(failed, "failed", "the loss\nis nan"),
        Status(missing, "busy"),
        Status(speech("discrete"), "missing"),
    ]
    found = build(collected(kept, *others))
    table = titled(found, "Neural CDE on Speech Commands")
    rows = table.frame.set_index("norm")
    assert rows.loc["`default`", "runs"] == "3"
    assert rows.loc["`seminorm`", "runs"] == "1 of 3, 1 failed"
    assert rows.loc["`seminorm`", "saved against `default`"] == "50 %"
    assert "Failed: `seminorm` at 1e-3, 1e-6 for 200 epochs, seed 1: the loss is nan" in table.notes
    assert "Missing: `seminorm` at 1e-3, 1e-6 for 200 epochs, seed 2." in table.notes
    beyond = titled(found, "Neural CDE on Speech Commands: beyond the paper")
    assert list(beyond.frame.iloc[0, 2:]) == ["0 of 1", "-", "-", "-", "-", "-"]
    assert beyond.notes == ("Missing: `discrete` at 1e-3, 1e-6 for 200 epochs, seed 0.",)


def test_numbers_are_written_as_people_do():
    rows = build(collected(three_seeds()))[0].frame.set_index("norm")
    assert rows.loc["`seminorm`"].to_dict() == {
        "rtol, atol": "1e-3, 1e-6",
        "runs": "3",
        "epochs": "2",
        "test accuracy": "92.0 +- 2.0 %",
        "backward NFE, training": "117 +- 58",
        "saved against `default`": "42 % (6 to 78, n = 3)",
        "saved against `per-tensor`": "75 % (75 to 75, n = 3)",
    }
    run = acrobot("default")
    done = [(run, result(run, 274_464, loss=0.000697, memory_usage=3 * 2**20))]
    found = build(collected(done))
    assert found[0].frame["test loss"].item() == "0.000697"
    assert found[0].frame["backward NFE, training"].item() == "274,464"
    costs = titled(found, "Symplectic ODE-Net on acrobot: costs").frame
    assert costs["peak of GPU memory"].item() == "3 MiB"
    assert costs["seconds of training"].item() == "11 (CPU)"
    on_cpu = [(run, result(run, 274_464))]
    assert "peak of GPU memory" not in titled(build(collected(on_cpu)), "Symplectic ODE-Net on acrobot: costs").frame
    # No run of the list is of this norm, so nothing can be compared with it.
    assert "saved against `per-tensor`" not in found[0].frame


def test_beyond_the_paper_stands_apart_and_is_never_the_baseline():
    costs = [(acrobot("default"), 100), (acrobot("seminorm"), 100), (acrobot("as-published"), 50),
             (acrobot("discrete"), 20), (acrobot("seminorm", warm_start=True), 40)]  # fmt: skip
    found = build(collected([(run, result(run, cost)) for run, cost in costs]))
    paper, beyond = (
        titled(found, f"Symplectic ODE-Net on acrobot{block}").frame.set_index("norm")["saved against `default`"]
        for block in ("", ": beyond the paper")
    )
    assert paper.to_dict() == {"`default`": "-", "`seminorm`": "0 %", "`as-published`": "50 %"}
    assert beyond.to_dict() == {"`discrete`": "80 %", "`seminorm`, warm start": "60 %"}
    assert not any("paper's figures" in table.title for table in found)


def test_the_papers_figures_stand_beside_ours():
    table = titled(build(collected(three_seeds())), "Neural CDE on Speech Commands: the paper's figures beside ours")
    rows = table.frame.set_index("quantity")
    assert list(rows["rtol, atol"].unique()) == ["1e-3, 1e-6"]
    assert rows.loc["backward NFE, training"].to_dict() == {
        "rtol, atol": "1e-3, 1e-6",
        "ours: `default`": "200 +- 100",
        "ours: `seminorm`": "117 +- 58",
        "ours: saved": "42 %",
        "paper: `default`": "14.36 +- 1.09 million",
        "paper: `seminorm`": "8.67 +- 1.60 million",
        "paper: saved": "40 %",
        "paper: status": "from memory",
    }
    assert rows.loc["test accuracy", "paper: `seminorm`"] == "92.5 +- 0.5 %"
    assert rows.loc["backward NFE, test set", "paper: status"] == "authors' draft"
    assert rows.loc["seconds of an epoch", "ours: `default`"] == "5.5 +- 0.0 (CPU)"


def test_the_trainings_that_most_seeds_of_both_have_stand_beside_the_papers():
    pairs = [
        (speech(norm, seed=seed, max_epochs=epochs), cost + epochs)
        for norm, cost in (("default", 300), ("seminorm", 200))
        for epochs, num_seeds in ((24, 2), (60, 1))
        for seed in range(num_seeds)
    ]
    tables = build(collected([(run, result(run, cost)) for run, cost in pairs]))
    found = titled(tables, "Neural CDE on Speech Commands: the paper's figures beside ours").frame
    assert found.set_index("quantity").loc["backward NFE, training", "ours: `default`"] == "324 +- 0"


def test_the_longest_trainings_of_both_stand_beside_the_papers():
    lengths = {
        ("default", 8): 100,
        ("seminorm", 8): 50,
        ("default", 24): 300,
        ("seminorm", 24): 200,
        ("seminorm", 60): 999,
    }
    pairs = [(speech(norm, max_epochs=epochs), cost) for (norm, epochs), cost in lengths.items()]
    tables = build(collected([(run, result(run, cost)) for run, cost in pairs]))
    [row] = (
        row
        for _, row in titled(tables, "Neural CDE on Speech Commands: the paper's figures beside ours").frame.iterrows()
        if row["quantity"] == "backward NFE, training"
    )
    assert list(row[["ours: `default`", "ours: `seminorm`", "ours: saved"]]) == ["300", "200", "33 %"]


def test_synthetic_sounds_are_named_and_not_compared_with_the_paper():
    runs = [speech(norm, data_root="synthetic") for norm in ("default", "seminorm")]
    found = build(collected([(run, result(run, 100)) for run in runs]))
    assert not any("paper's figures" in table.title for table in found)
    assert "1,249 samples of synthetic sounds, which are not speech," in found[0].notes[0]


def test_every_seed_on_demand():
    (table, *_) = build(collected(three_seeds(), Status(speech("seminorm", 3), "missing")), all_seeds=True)
    assert list(table.frame["seed"]) == list("0120120123")
    rows = table.frame[table.frame["norm"] == "`seminorm`"]
    assert list(rows["saved against `default`"]) == ["50 %", "25 %", "50 %", "-"]
    assert list(rows["runs"]) == ["1", "1", "1", "0 of 1"]
    assert list(rows["test accuracy"]) == ["90.0 %", "92.0 %", "94.0 %", "-"]


@pytest.mark.parametrize("all_seeds", [False, True])
def test_csv_round_trips(all_seeds):
    standing, results = [Status(run, "done") for run, _ in three_seeds()], [each for _, each in three_seeds()]
    text = render(standing, results, format="csv", all_seeds=all_seeds)
    summary = summarise(collect(standing, results), all_seeds=all_seeds)
    assert len(summary) == (9 if all_seeds else 3)
    found = pandas.read_csv(io.StringIO(text), dtype={"group": str})
    found["group"] = found["group"].fillna("")
    pandas.testing.assert_frame_equal(found, summary, check_dtype=False, rtol=1e-14)


def test_markup_of_each_format():
    standing, results = [Status(run, "done") for run, _ in three_seeds()], [each for _, each in three_seeds()]
    markdown, terminal, latex = (render(standing, results, format=form) for form in ("markdown", "terminal", "latex"))
    assert "**Neural CDE on Speech Commands**\n\n| rtol, atol " in markdown
    assert "| `seminorm` " in markdown
    assert "`" not in terminal
    assert "**" not in terminal
    assert latex.count(r"\toprule") == latex.count(r"\end{table}") == 3
    assert (
        r"1e-3, 1e-6 & \texttt{seminorm} & 3 & 2 & 92.0 $\pm$ 2.0 \% & 117 $\pm$ 58 & 42 \% (6 to 78, n = 3)" in latex
    )


def has_latex():
    finder = shutil.which("kpsewhich")
    return finder is not None and subprocess.run([finder, "booktabs.sty"], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.skipif(not has_latex(), reason="no LaTeX with booktabs here")
def test_latex_compiles_to_tables_that_fit_the_page(tmp_path):
    standing = [Status(run, "done") for run, _ in three_seeds()]
    standing.append(Status(speech("seminorm", 5), "failed", r"#1 {odd} & 50% of_it ~ ^ < > | \ $ `code` 'x'"))
    text = render(standing, [each for _, each in three_seeds()], format="latex")
    packages = r"\usepackage{booktabs}\usepackage{graphicx}"
    document = f"\\documentclass{{article}}{packages}\n\\begin{{document}}\n{text}\\end{{document}}\n"
    (tmp_path / "tables.tex").write_text(document)
    command = ["pdflatex", "-halt-on-error", "-interaction=batchmode", "tables.tex"]
    assert subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL, timeout=60).returncode == 0
    assert "Overfull" not in (tmp_path / "tables.log").read_text()


def test_tables_go_between_the_markers_and_nowhere_else():
    document = f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter  \n"
    once = insert(document, "new\n\ntable\n")
    assert once == f"# Title\n\n{BEGIN}\nnew\n\ntable\n{END}\n\nafter  \n"
    assert insert(once, "new\n\ntable\n") == once


@pytest.mark.parametrize(
    "document", ["none", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}", f"x {BEGIN}\n{END}"]
)
def test_unclear_markers_are_refused(document):
    with pytest.raises(ValueError, match="tables: begin"):
        insert(document, "text")


def test_check_says_whether_the_page_is_up_to_date_and_writing_makes_it_so(monkeypatch, tmp_path, capsys):
    page = tmp_path / "results.md"
    monkeypatch.setattr(tables, "PAGE", page)
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    options = dict(preset="cpu", results_dir=str(tmp_path))
    with pytest.raises(SystemExit, match="are not those of the results"):
        tables.main(tables.Page(**options, check=True))
    assert page.read_text() == f"before\n{BEGIN}\n{END}\nafter\n"
    tables.main(tables.Page(**options))
    assert page.read_text().startswith(f"before\n{BEGIN}\nMean +- ")
    assert page.read_text().endswith(f"\n{END}\nafter\n")
    tables.main(tables.Page(**options, check=True))


def test_a_page_that_cannot_be_written_keeps_what_it_has(monkeypatch, tmp_path):
    page = tmp_path / "results.md"
    monkeypatch.setattr(tables, "PAGE", page)
    page.write_text(old := f"{BEGIN}\n{END}\n")

    def fail(descriptor):
        raise OSError("no room")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no room"):
        tables.main(tables.Page(results_dir=str(tmp_path)))
    assert page.read_text() == old


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.43,), "43 %"),
        ((0.43, 0.31, 0.54, 3.0), "43 % (31 to 54, n = 3)"),
        ((0.1, -0.05, 0.25, 3.0), "10 % (-5 to 25, n = 3)"),
        ((-0.18, -0.3, -0.05, 4.0), "18 % more (5 to 30, n = 4)"),
        ((-1.18, -1.4, -1.0, 3.0), "2.2 times as many (2.0 to 2.4, n = 3)"),
        ((-2.47,), "3.5 times as many"),
        ((-0.001, -0.002, 0.0, 3.0), "0 % (0 to 0, n = 3)"),
        ((float("nan"),) * 4, "-"),
    ],
)
def test_what_costs_more_is_called_that(numbers, text):
    assert saved(*numbers) == text


def test_single_seeds_beyond_the_paper_stand_beside_the_same_seed_of_the_others():
    runs = [(acrobot("default", seed), 0.001 * (seed + 1)) for seed in range(3)]
    runs += [(acrobot("seminorm", seed), 0.004) for seed in range(3)]
    runs.append((acrobot("discrete", 1), 0.003))
    pairs = [(run, result(run, 100, loss=loss)) for run, loss in runs]
    table = titled(build(collected(pairs)), "Symplectic ODE-Net on acrobot: beyond the paper")
    sentence = (
        "At 1e-4, 1e-4 these are of seed 1 alone. "
        "The test loss of the others with seed 1: `default` 0.00200, `seminorm` 0.00400."
    )
    assert table.notes == (sentence,)
    alike = [pairs[1], pairs[-1]]
    assert titled(build(collected(alike)), "Symplectic ODE-Net on acrobot: beyond the paper").notes == ()


def test_the_papers_sizes_are_the_defaults_of_our_settings():
    for experiment, card in EXPERIMENTS.items():
        config, scale = Run(experiment, {"norm": "default"}).config, card.paper
        assert (config.batch_size, config.max_epochs) == (scale.batch_size, scale.max_epochs)
        seeds = {run.config.seed for run in preset_runs("paper", experiments=[experiment])}
        assert len(seeds) == scale.num_seeds


def test_every_figure_of_the_paper_has_runs_to_stand_beside():
    conditions = {(run.experiment, run.config.rtol, run.config.atol, run.config.norm) for run in preset_runs("paper")}
    for figure in PUBLISHED:
        for norm in ("default", "seminorm"):
            assert (figure.experiment, figure.rtol, figure.atol, norm) in conditions


def test_the_papers_figures_agree_with_what_it_claims_to_save():
    saved = [1 - each.seminorm[0] / each.default[0] for each in PUBLISHED if each.quantity == "backward_nfe"]
    assert [f"{share:.0%}" for share in saved] == ["40%", "58%", "62%"]


def test_the_tables_of_the_page_are_those_of_the_results():
    document = tables.PAGE.read_text(encoding="utf-8")
    results = load_all(tables.REFERENCE).values()
    standing = begun(statuses(on_found_data(preset_runs("cpu"), results), tables.REFERENCE))
    text = render(standing, results, format="markdown")
    assert insert(document, text) == document, "run: python tables.py page"
