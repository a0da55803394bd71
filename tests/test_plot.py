"""Learning curves: what is read, when a run is called over-optimised, and what the figures show."""

import json
import sys

import numpy as np
import pytest

from configurator import UserError
from lab import plot

NAN = float("nan")


def ppo_rows(n=40, **changes):
    """Rows of a run that over-optimises; a column is a function of the step, None leaves it out."""
    columns = {
        "objective/scores": lambda i: 0.05 * i,
        "objective/kl": lambda i: 2.0 * i,
        "val/response_length": lambda i: 10 if i < 10 else 20,
        "val/perplexity": lambda i: 2.0 if i < 10 else 1.5,
        "policy/entropy_avg": lambda i: 0.5,
        **changes,
    }
    return [{"step": i, "episode": 64 * i} | {key: f(i) for key, f in columns.items() if f} for i in range(n)]


def run_of(directory, rows):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(directory)


def curves(axes):
    """Label -> (steps, values) of a panel's labelled lines that have data; those of the runs, not the legend's."""
    lines = {line.get_label(): line.get_data() for line in axes.get_lines() if len(line.get_xdata())}
    return {label: data for label, data in lines.items() if not label.startswith("_")}


@pytest.fixture
def figures():
    pytest.importorskip("matplotlib")


# ---------------------------------------------------------------------------- the signature


def test_collapse_is_found_at_the_first_step_that_has_all_signs():
    """The mean length is 20 from row 19 on, the earliest that is judged; so KL must be above 20 x 50 / 53 = 18.87."""
    assert plot.collapse(ppo_rows()) == 19  # the mean KL of rows i - 9 .. i is 2 (i - 4.5)
    slow = ppo_rows(60, **{"objective/kl": lambda i: i})  # i - 4.5 > 18.87 from 24 on
    assert plot.collapse(slow) == 24
    assert plot.collapse([{**row, "step": 100 + row["step"]} for row in slow]) == 124  # a step, not the row's number
    assert plot.collapse(slow, window=5) == 21  # i - 2 > 18.87
    assert plot.collapse(slow, kl_per_token=1.5) == 35  # i - 4.5 > 30


@pytest.mark.parametrize(
    "key, values",
    [
        ("objective/scores", lambda i: 1.0),
        ("objective/scores", lambda i: -0.05 * i),
        ("objective/kl", lambda i: min(0.9 * i, 18)),  # 0.9 nats per token
        ("objective/kl", lambda i: 60 - i),  # far, but on its way back
        ("objective/kl", lambda i: 30),  # far from the first update on: it does not rise
        ("val/response_length", lambda i: 20),
        ("val/response_length", lambda i: 20 if i < 10 else 21.9),  # 9.5 % longer
        ("val/response_length", lambda i: 5 if i < 1 else 20),  # longer than the first row, not than the first window
        ("val/perplexity", lambda i: 2.0),
        ("val/perplexity", lambda i: 2.0 if i < 10 else 1.81),  # 9.5 % lower
        ("val/perplexity", lambda i: 2.0 if i < 10 else 3.0),
    ],
)
def test_collapse_needs_every_sign(key, values):
    assert plot.collapse(ppo_rows(**{key: values})) is None


def test_collapse_takes_means_and_two_windows():
    spike = ppo_rows(**{"objective/kl": lambda i: 150 if i == 25 else 0.1 * i})  # a tenth of it is 15 of 18.87
    assert plot.collapse(spike) is None
    assert plot.collapse(ppo_rows(19)) is None
    assert plot.collapse(ppo_rows(20)) == 19


def test_collapse_copes_with_missing_columns_and_nulls():
    assert plot.collapse(ppo_rows(**{"val/perplexity": None})) == 19
    assert plot.collapse(ppo_rows(**{"val/perplexity": None, "objective/scores": lambda i: -i})) is None
    with pytest.raises(UserError, match="judged without objective/scores, val/response_length"):
        plot.collapse(ppo_rows(**{"val/response_length": None, "objective/scores": None}))
    null = {"objective/kl": None, "val/perplexity": None}
    nulls = [row | (null if row["step"] % 3 == 0 else {}) for row in ppo_rows()]
    assert plot.collapse(nulls) == 19


def test_summary_says_where_a_run_is():
    line = plot.summary("a", ppo_rows(**{"val/perplexity": None}))
    assert line == ("a: update 39, objective/scores 1.95, objective/kl 78; "
                    "signature of over-optimisation: from update 19 (judged without val/perplexity)")  # fmt: skip
    assert plot.summary("a", ppo_rows(**{"objective/kl": lambda i: 1})).endswith("over-optimisation: none")
    assert plot.summary("a", ppo_rows(19)).endswith("over-optimisation: too early to say")
    sft = [{"step": 0, "loss/sft": 2.5, "lr": 1e-3}, {"step": 1, "loss/sft": None, "lr": 5e-4}]
    sft.append({"step": 2, "eval/loss": 2.0})
    assert plot.summary("b", sft) == "b: update 2, loss/sft nan, lr 0.0005"


# ---------------------------------------------------------------------------- reading


def test_partial_last_line_is_left_out(tmp_path):
    rows = ppo_rows(3)
    path = tmp_path / "metrics.jsonl"
    run_of(tmp_path, rows)
    whole = path.read_bytes()
    third = whole.rindex(b"\n", 0, -1) + 1
    for end in range(third, len(whole) + 1):  # a row that is being written, at each of its bytes
        path.write_bytes(whole[:end])
        assert plot.read_metrics(tmp_path) == (rows if end >= len(whole) - 1 else rows[:2])
    path.write_bytes(whole + b'{"step": 3, "note": "\xc3')  # half a character
    assert plot.read_metrics(tmp_path) == rows


@pytest.mark.parametrize(
    "text, line",
    [
        (None, "metrics.jsonl cannot be read, give the directory of a training run: FileNotFoundError"),
        ("", "metrics.jsonl: no rows yet; wait for the first update"),
        ('{"step": 0, "lo', "metrics.jsonl: no rows yet"),
        ('{"step": 0}\n{"ste\n{"step": 2}\n', "metrics.jsonl: line 2 is damaged, remove it: JSONDecodeError"),
        ('{"step": 0}\n[1]\n', "metrics.jsonl: line 2 is no update's; give the directory"),
        ('{"query": "a"}\n', "metrics.jsonl: line 1 is no update's; give the directory"),
    ],
)
def test_bad_metrics_are_one_line(tmp_path, text, line):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        plot.read_metrics(tmp_path)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_running_mean_against_numpy():
    x = np.random.default_rng(0).normal(size=50)
    np.testing.assert_allclose(plot.running_mean(x, 7)[6:], np.convolve(x, np.ones(7) / 7, "valid"))
    np.testing.assert_allclose(plot.running_mean(x, 7)[:6], np.cumsum(x[:6]) / np.arange(1, 7))
    np.testing.assert_array_equal(plot.running_mean(x, 1), x)
    np.testing.assert_array_equal(plot.running_mean(np.array([NAN, 1, NAN, 4, NAN, NAN]), 2), [NAN, 1, 1, 4, 4, NAN])


# ---------------------------------------------------------------------------- figures


def test_panels_hold_the_lines_of_the_runs(figures):
    runs = {"a": ppo_rows(30), "b": ppo_rows(25, **{"objective/kl": lambda i: 1.0, "val/perplexity": None})}
    figure = plot.draw(runs)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["objective/scores", "objective/kl", "val/response_length", "val/perplexity", "policy/entropy_avg"]
    panels = {axes.get_title("left"): curves(axes) for axes in figure.axes}
    steps, kl = panels["objective/kl"]["a objective/kl"]
    np.testing.assert_array_equal(steps, range(30))
    np.testing.assert_array_equal(kl, 2.0 * np.arange(30))
    np.testing.assert_array_equal(panels["objective/kl"]["b objective/kl"][1], np.ones(25))
    assert "b val/perplexity" not in panels["val/perplexity"] and "a val/perplexity" in panels["val/perplexity"]
    assert figure.axes[1].get_ylabel() == "nats per response"
    for axes in figure.axes:
        colours = {line.get_color() for line in axes.get_lines() if line.get_label().startswith("a ")}
        assert colours == {plot.COLOURS[0]}


def test_keys_choose_the_panels_and_share_them(figures):
    rows = [{"step": i, "loss/sft": 3.0 - i, "lr": 0.1} for i in range(5)]
    rows[1::2] = [row | {"eval/loss": 2.0 + row["step"]} for row in rows[1::2]]
    figure = plot.draw({"a": rows}, keys=["lr", "loss/sft+eval/loss"])
    assert [axes.get_title("left") for axes in figure.axes] == ["lr", "loss/sft, dashed: eval/loss"]
    lines = curves(figure.axes[1])
    np.testing.assert_array_equal(lines["a eval/loss"], [[1, 3], [3, 5]])  # joined up, though not at every update
    np.testing.assert_array_equal(lines["a loss/sft"], [range(5), [3, 2, 1, 0, -1]])
    without = [{key: x for key, x in row.items() if key != "eval/loss"} for row in rows]
    assert [axes.get_title("left") for axes in plot.draw({"a": without}).axes] == ["loss/sft", "lr"]


def test_null_is_a_gap_smoothed_or_not(figures):
    kl = [1.0, 2.0, None, 4.0, 6.0]
    rows = ppo_rows(5, **{"objective/kl": lambda i: kl[i]})
    for smooth, expected in ((1, [1, 2, NAN, 4, 6]), (2, [1, 1.5, NAN, 4, 5])):
        [axes] = plot.draw({"a": rows}, keys=["objective/kl"], smooth=smooth).axes
        np.testing.assert_array_equal(curves(axes)["a objective/kl"][1], expected)
        pale = [line for line in axes.get_lines() if line.get_alpha()]
        assert len(pale) == (smooth > 1)
        for line in pale:
            np.testing.assert_array_equal(line.get_ydata(), [1, 2, NAN, 4, 6])


def test_smoothing_counts_updates_not_measurements(figures):
    rows = [{"step": i, "loss/sft": 1.0} for i in range(31)]
    rows[::10] = [row | {"eval/loss": row["step"]} for row in rows[::10]]
    [axes] = plot.draw({"a": rows}, keys=["eval/loss"], smooth=5).axes
    np.testing.assert_array_equal(curves(axes)["a eval/loss"], [[0, 10, 20, 30], [0, 10, 20, 30]])


def test_grey_begins_where_the_signature_does(figures):
    healthy = ppo_rows(**{"objective/kl": lambda i: 3.0})
    for runs, spans in (({"sick": ppo_rows(), "well": healthy}, [(19, 39)]), ({"well": healthy}, [])):
        figure = plot.draw(runs)
        for axes in figure.axes:
            boxes = [patch.get_extents().transformed(axes.transData.inverted()) for patch in axes.patches]
            assert [(round(box.x0), round(box.x1)) for box in boxes] == spans
        [legend] = figure.legends
        labels = [text.get_text() for text in legend.get_texts()]
        assert labels == ["sick (from update 19)"] * len(spans) + ["well"]
        assert ("signature" in legend.get_title().get_text()) == bool(spans)


def row(n, rate, low, high):
    return dict(n=n, win=0, tie=0, lose=0, none=0, rate=rate, low=low, high=high)


def test_phases_stand_side_by_side(figures):
    rows = {
        "measured": {"policy": 2.0, "critic": 1.5, "rest": 0.25},
        "at the least": {"policy": 1.0, "critic": 0.5, "rest": 0.0},
    }
    (axes,) = plot.draw_phases(rows).axes
    bars = {bars.get_label(): [(bar.get_x(), bar.get_width()) for bar in bars] for bars in axes.containers}
    assert bars == {"policy": [(0, 2.0), (0, 1.0)], "critic": [(2.0, 1.5), (1.0, 0.5)], "rest": [(3.5, 0.25), (1.5, 0)]}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["measured", "at the least"]
    assert axes.yaxis_inverted()  # the first is above


def test_lengths_show_rates_and_intervals(figures):
    table = {"all": row(300, 0.6, 0.5, 0.7), "length x 0.5": dict(n=1, none=1), "length x 1": row(200, 0.5, 0.4, 0.7),
             "length x 2": row(100, 0.8, 0.7, 0.85), "length x 4": row(3, 1.0, 1.0, 1.0)}  # fmt: skip
    figure = plot.draw_lengths({"judge": table, "agreement of judge and b": dict(n=3, rate=1.0, low=1.0, high=1.0)})
    [axes] = figure.axes
    bars = [(bar.lines[0].get_data(), bar.lines[0].get_markerfacecolor(), bar.lines[2]) for bar in axes.containers]
    assert [(x[0], y[0]) for (x, y), _, _ in bars] == [(1, 0.5), (2, 0.8), (4, 1.0)]
    np.testing.assert_allclose(bars[0][2][0].get_segments()[0], [[1, 0.4], [1, 0.7]])
    np.testing.assert_allclose(bars[1][2][0].get_segments()[0], [[2, 0.7], [2, 0.85]])
    assert bars[2][1] == "white" and not bars[2][2]  # three pairs: no interval
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1\n(200)", "2\n(100)", "4\n(3)"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["judge: 0.60 overall, 0.50 at equal length"]


# ---------------------------------------------------------------------------- the command


def test_command_writes_a_figure_and_a_line_per_run(figures, tmp_path, capsys):
    runs = [run_of(tmp_path / "out" / name / "ppo", ppo_rows()) for name in ("toy", "toy-2")]
    for name, head in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")):
        plot.main([*runs, f"--out={tmp_path / name}", "--smooth=5", "--keys=objective/kl,val/perplexity"])
        assert (tmp_path / name).read_bytes().startswith(head)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(":")[0] for line in lines[:2]] == ["toy/ppo", "toy-2/ppo"]
    assert lines[2] == f"wrote {tmp_path}/a.pdf"
    judged = tmp_path / "winrate.json"
    judged.write_text(json.dumps({"choice": {"all": row(9, 0.5, 0.4, 0.6), "length x 1": row(9, 0.5, 0.4, 0.6)}}))
    plot.main([str(judged), f"--out={tmp_path}/lengths.png"])
    assert (tmp_path / "lengths.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["ppo", "sft"], "ppo is ppo, sft is sft: runs of different stages; draw a figure for each stage"),
        (["ppo", "--keys=objective/klx"], "no run has 'objective/klx'; did you mean objective/kl"),
        (["ppo", "--keys=a,b+c+d+e"], "b+c+d+e: a panel takes three metrics"),
        (["ppo", "--keys=kl"], "no run has 'kl'; did you mean objective/kl?"),
        (["ppo", "--keys=objective/kl+lr"], "no run has 'lr'"),
        (["other"], "other: no metrics of ppo, sft, rm, dpo; give the directory of a training run"),
        (["nowhere"], "nowhere/metrics.jsonl cannot be read, give the directory of a training run"),
        (["ppo", "--smooth=0"], "--smooth=0: give a number of updates, 1 for none"),
        (["ppo", "--out=a.tiff.nope"], "--out=a.tiff.nope cannot be written, give the path of a .png"),
        (["ppo", "--out=a"], "--out=a cannot be written, give the path of a .png"),
        (["ppo", "--out=no/where.png"], "--out=no/where.png cannot be written, give the path of a .png"),
        (["ppo", *(f"ppo-{i}" for i in range(7))], "8 lines, but 7 colours; draw fewer in one figure"),
        (["a.json", "ppo"], "a.json has a figure of its own; give it alone"),
        (["missing.json"], "missing.json cannot be read, give the winrate.json of sample.py --judge: File"),
        (["broken.json"], "broken.json cannot be read, give the winrate.json of sample.py --judge: JSON"),
        (["list.json"], "no judge's verdicts are in it; give the winrate.json of sample.py --judge"),
        (["eval.json"], "no judge's verdicts are in it; give the winrate.json of sample.py --judge"),
    ],
)
def test_bad_arguments_are_one_line(figures, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    for name in ("ppo", *(f"ppo-{i}" for i in range(7))):
        run_of(tmp_path / name, ppo_rows(3))
    run_of(tmp_path / "sft", [{"step": 0, "loss/sft": 1.0}])
    run_of(tmp_path / "other", [{"step": 0, "x": 1.0}])
    for name, text in (("broken", "{"), ("list", "[]"), ("eval", '{"all": {"accuracy": 0.6}, "n": 3}')):
        (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(UserError) as error:
        plot.main(arguments)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_missing_matplotlib_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="figures need matplotlib, pip install matplotlib"):
        plot.draw({"a": ppo_rows(3)})
