"""Learning curves of runs side by side, with the signature of over-optimisation marked; win rates by length.

    python lab/plot.py out/toy/ppo out/toy-2/ppo --out=curves.png                # a panel per metric, a line per run
    python lab/plot.py out/toy/sft --keys=loss/sft+eval/loss,lr --smooth=20      # a+b: two metrics in one panel
    python lab/plot.py out/judged/winrate.json --out=lengths.png                 # what sample.py --judge has written

Reads the metrics.jsonl of each directory, also while its run goes on. PPO's panels are shaded from the update at which
`collapse` finds the signature, and a line per run says so. Needs matplotlib. In a notebook:

    plot.draw({"mine": plot.read_metrics("out/toy/ppo")}, keys=["objective/kl"], smooth=5)
"""

import argparse
import contextlib
import difflib
import json
import math
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import explain, require  # noqa: E402
from hub.files import expand  # noqa: E402

# stage, known by the first of its metrics: its panels, in the order in which one looks at them, and their units
PANELS = {
    "ppo": {
        "objective/scores": "reward",
        "objective/kl": "nats per response",
        "val/response_length": "tokens",
        "val/perplexity": "per token",
        "val/ref_perplexity": "per token",
        "val/eos_rate": "share of responses",
        "policy/entropy_avg": "nats per token",
        "policy/approxkl_avg": "nats per token",
        "loss/value_avg": "squared reward",
    },
    "sft": {
        "loss/sft+eval/loss": "nats per token",
        "lr": "",
        "grad_norm": "",
    },
    "rm": {
        "loss/rm": "nats per pair",
        "train/accuracy": "share of pairs",
        "train/margin": "reward",
        "grad_norm": "",
    },
    "dpo": {
        "loss/dpo": "nats per pair",
        "rewards/accuracies": "share of pairs",
        "rewards/margins": "beta x nats",
        "rewards/chosen+rewards/rejected": "beta x nats",
        "logps/chosen+logps/rejected": "nats per response",
        "grad_norm": "",
    },
}
SIGNS = ("objective/scores", "objective/kl", "val/response_length", "val/perplexity")
WINDOW = 10  # rows over which `collapse` takes means
# Okabe and Ito's colours, which the colour-blind tell apart, without their yellow, too pale for a line
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def read_metrics(directory):
    """The rows of a run's metrics.jsonl, a dict per update; raises UserError if there is none yet."""
    path = Path(directory) / "metrics.jsonl"
    rows = read_rows(path)
    require(rows, f"{path}: no rows yet; wait for the first update")
    return rows


def read_rows(path):
    """The rows of a file that a run appends to, each with its `step`; a last line that is not whole yet is left out."""
    with explain(f"{path} cannot be read, give the directory of a training run", OSError):
        lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        # The last line may still be being written.
        is_last = number == len(lines)
        broken = explain(f"{path}: line {number} is damaged, remove it", ValueError)
        with contextlib.suppress(ValueError) if is_last else broken:
            row = json.loads(line)
            is_update = isinstance(row, dict) and "step" in row
            require(is_update, f"{path}: line {number} is no update's; give the directory of a training run")
            rows.append(row)
    return rows


def values(rows, key):
    """A metric as an array; NaN where it is null (it was not finite) or missing."""
    numbers = []
    for row in rows:
        number = row.get(key)
        numbers.append(math.nan if number is None else number)
    with explain(f"'{key}' is not a number in every row; mend the file", TypeError, ValueError):
        return np.array(numbers, dtype=float)


def running_mean(x, window):
    """The mean of each value and the window - 1 before it, fewer at the beginning, leaving out NaN."""
    means = []
    for end in range(1, len(x) + 1):
        part = x[max(0, end - window) : end]
        means.append(np.nanmean(part) if np.isfinite(part).any() else math.nan)
    return np.array(means)


def collapse(rows, window=WINDOW, kl_per_token=50 / 53, margin=0.1):
    """The first step that shows the signature of over-optimisation, "pattern collapse" in arXiv:2307.04964, or None.

    In running means over `window` rows, all at once: scores above their start; KL above kl_per_token nats for each
    token of the response, and above its own value a window ago; responses longer than at their start by the margin, and
    of a perplexity lower than at its start by the margin. The start is the mean of the first window: two are needed.
    Without val/perplexity the other three decide; without one of those it raises UserError.

    A rule of thumb. Of the runs that arXiv:2403.17031 saw over-optimise, the lower KL was 50 nats, in up to 53 tokens;
    the margin keeps noise out. Scores, length and perplexity go that way in healthy runs too: KL tells them apart, and
    late. Of the laboratory's three runs without a KL penalty it marks two, 41 and 24 updates after gold was best, and
    not the third, whose gold falls least.
    """
    missing = [key for key in SIGNS[:3] if not any(key in row for row in rows)]
    require(not missing, f"over-optimisation cannot be judged without {', '.join(missing)}")
    score, kl, length, perplexity = (running_mean(values(rows, key), window) for key in SIGNS)
    start = window - 1
    for i in range(2 * window - 1, len(rows)):
        is_paid_more = score[i] > score[start]
        has_drifted = kl[i] > kl_per_token * length[i]
        drifts_on = kl[i] > kl[i - window]
        is_longer = length[i] > (1 + margin) * length[start]
        is_varied = perplexity[i] >= (1 - margin) * perplexity[start]  # False where there is no perplexity
        if is_paid_more and has_drifted and drifts_on and is_longer and not is_varied:
            return rows[i]["step"]
    return None


def stage_of(runs):
    """The stage of all runs; raises UserError if they are of different ones."""
    stages = {}
    for name, rows in runs.items():
        known = {key for row in rows for key in row}
        found = [stage for stage in PANELS if main_metric(stage) in known]
        require(found, f"{name}: no metrics of {', '.join(PANELS)}; give the directory of a training run")
        stages[name] = found[0]
    apart = ", ".join(f"{name} is {stage}" for name, stage in stages.items())
    require(len(set(stages.values())) == 1, f"{apart}: runs of different stages; draw a figure for each stage")
    return found[0]


def main_metric(stage):
    """The metric by which a stage is known."""
    first_panel = next(iter(PANELS[stage]))
    return first_panel.split("+")[0]


def choose_panels(runs, keys=None):
    """The panels of `draw`: keys, each of which some run must have, or what the runs have of their stage's panels."""
    stage = stage_of(runs)
    known = {key for rows in runs.values() for row in rows for key in row}
    if keys:
        for panel in keys:
            require(panel.count("+") < 3, f"{panel}: a panel takes three metrics; leave some out, or to another panel")
        for panel in keys:
            for key in panel.split("+"):
                require(key in known, f"no run has '{key}'; did you mean {', '.join(sorted(near(key, known)))}?")
        return keys
    panels = []
    for panel in PANELS[stage]:
        there = [key for key in panel.split("+") if key in known]
        if there:
            panels.append("+".join(there))
    return panels


def near(key, known):
    """The known metrics that may have been meant."""
    containing = [name for name in known if key in name]
    return containing or difflib.get_close_matches(key, known, cutoff=0.4) or known


def summary(name, rows):
    """One line: where a run is, and whether it shows the signature of over-optimisation."""
    stage = stage_of({name: rows})
    text = f"{name}: update {rows[-1]['step']}"
    for panel in list(PANELS[stage])[:2]:
        key = panel.split("+")[0]
        measured = [row for row in rows if key in row]
        if measured:
            text += f", {key} {values(measured, key)[-1]:.4g}"
    if stage != "ppo":
        return text

    onset = collapse(rows)
    if onset is not None:
        seen = f"from update {onset}"
    elif len(rows) < 2 * WINDOW:
        seen = "too early to say"
    else:
        seen = "none"
    text += f"; signature of over-optimisation: {seen}"
    if not any(SIGNS[3] in row for row in rows):
        text += f" (judged without {SIGNS[3]})"
    return text


# ---------------------------------------------------------------------------- figures


def new_figure(n_panels):
    """A Figure with so many axes. Without pyplot: needs no display, and keeps no figure for ever."""
    with explain("figures need matplotlib, pip install matplotlib", ImportError):
        from matplotlib.figure import Figure
    n_rows = math.ceil(n_panels / 4)
    n_columns = math.ceil(n_panels / n_rows)
    width = min(10, 4 * n_columns + 2)
    figure = Figure(figsize=(width, 2.2 * n_rows + 0.9), dpi=120, layout="constrained")
    for number in range(n_panels):
        first = figure.axes[0] if number else None
        axes = figure.add_subplot(n_rows, n_columns, number + 1, sharex=first)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
    return figure


def colours_of(names):
    require(len(names) <= len(COLOURS), f"{len(names)} lines, but {len(COLOURS)} colours; draw fewer in one figure")
    return dict(zip(names, COLOURS))


def draw(runs, keys=None, smooth=1):
    """A Figure of learning curves: a panel for each of `keys`, a line for each run, over the updates.

    runs: name -> rows as from read_metrics, all of one stage. keys: metrics, or some joined by "+" that share a panel
    (solid, dashed, dotted); None: the stage's own. smooth: updates in a line's running mean; its raw values stay, pale.
    A null is a gap. From the step that `collapse` finds for a run, marked in its colour, panels are grey.
    """
    stage = stage_of(runs)
    panels = choose_panels(runs, keys)
    onsets = dict.fromkeys(runs)
    if stage == "ppo":
        onsets = {name: collapse(rows) for name, rows in runs.items()}
    figure = new_figure(len(panels))
    for axes, panel in zip(figure.axes, panels):
        draw_panel(axes, runs, panel.split("+"), onsets, smooth)
    draw_legend(figure, runs, onsets)
    figure.supxlabel("update", fontsize=10)
    return figure


def draw_legend(figure, runs, onsets):
    handles = []
    for name, colour in colours_of(runs).items():
        label = name if onsets[name] is None else f"{name} (from update {onsets[name]})"
        handles += figure.axes[0].plot([], [], color=colour, label=label)
    title = None
    if any(onset is not None for onset in onsets.values()):
        title = "grey: the signature of over-optimisation in scores, KL, length and perplexity"
    widest = max(len(handle.get_label()) for handle in handles)
    n_columns = max(1, 120 // (widest + 8))
    place = {"loc": "outside upper left", "alignment": "left", "frameon": False}
    figure.legend(handles=handles, title=title, ncols=n_columns, **place)


def draw_panel(axes, runs, keys, onsets, smooth):
    for name, colour in colours_of(runs).items():
        rows = runs[name]
        for key, style in zip(keys, ("-", "--", ":")):
            raw = values(rows, key)
            mean = np.where(np.isnan(raw), math.nan, running_mean(raw, smooth))
            there = [key in row for row in rows]  # measured now and then: joined up; null: a gap
            steps = values(rows, "step")[there]
            look = {"color": colour, "linestyle": style, "marker": "." if len(steps) < 20 else ""}
            if smooth > 1:
                axes.plot(steps, raw[there], alpha=0.25, linewidth=1, **look)
            axes.plot(steps, mean[there], label=f"{name} {key}", linewidth=1.5, **look)
        if onsets[name] is not None:
            axes.axvspan(onsets[name], rows[-1]["step"], color="0.5", alpha=0.15, linewidth=0, zorder=0)
            axes.axvline(onsets[name], color=colour, linestyle=":", linewidth=1.2)
    if keys[0] == "loss/value_avg":
        # A new critic's loss is so far off that nothing else would be seen.
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(panel_title(keys), loc="left", fontsize=10)
    axes.set_ylabel(unit_of(keys[0]))
    axes.locator_params(axis="x", integer=True)


def draw_phases(rows):
    """A Figure of bars: for each of `rows`, name -> {phase: seconds}, one under the other, the phases side by side."""
    figure = new_figure(1)
    axes = figure.axes[0]
    phases = list(next(iter(rows.values())))
    end = np.zeros(len(rows))
    for phase, colour in colours_of(phases).items():
        seconds = [row[phase] for row in rows.values()]
        axes.barh(list(rows), seconds, left=end, color=colour, label=phase)
        end = end + seconds
    axes.invert_yaxis()
    axes.set_axisbelow(True)
    axes.set_xlabel("seconds of an update")
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


def panel_title(keys):
    """For example "rewards/chosen, dashed: rejected": the part that all share is written once."""
    title = keys[0]
    shared = keys[0].split("/")[0] + "/"
    for style, key in zip(("dashed", "dotted"), keys[1:]):
        title += f", {style}: {key.removeprefix(shared)}"
    return title


def unit_of(key):
    for panels in PANELS.values():
        for panel, unit in panels.items():
            if panel.split("+")[0] == key and unit:
                return unit
    return ""


def draw_lengths(content):
    """A Figure of the win rates in winrate.json by the length of a response relative to the other's, for each judge.

    A judge that likes length shows as a slope, and a policy that wins by length alone as 0.5 at ratio 1. With few pairs
    the bootstrap's interval is too narrow (with one it has no width), so those points are hollow and without.
    """
    judges = {}
    if isinstance(content, dict):
        for name, table in content.items():
            if isinstance(table, dict) and "rate" in table.get("all", {}):
                judges[name] = table
    require(judges, "no judge's verdicts are in it; give the winrate.json of sample.py --judge")
    figure = new_figure(1)
    [axes] = figure.axes
    pairs = {}  # ratio of lengths -> how many pairs
    for number, (judge, colour) in enumerate(colours_of(judges).items()):
        beside = 2 ** (0.06 * (number - (len(judges) - 1) / 2))  # judges stand side by side
        label = f"{judge}: {judges[judge]['all']['rate']:.2f} overall"
        for group, row in judges[judge].items():
            if group == "all" or "rate" not in row:
                continue
            ratio = float(group.split()[-1])  # of "length x 1.4"
            pairs[ratio] = row["n"]
            draw_rate(axes, ratio * beside, row, colour)
            if ratio == 1:
                label += f", {row['rate']:.2f} at equal length"
        axes.plot([], [], "o", color=colour, label=label)
    axes.axhline(0.5, color="0.5", linewidth=1, zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(pairs), [f"{ratio:g}\n({n})" for ratio, n in pairs.items()])
    axes.set_xlabel("words of the response / of the other (pairs; hollow: fewer than 10)")
    axes.set(ylabel="win rate, 95 % interval", ylim=(-0.03, 1.03))
    figure.legend(loc="outside upper left", frameon=False)
    return figure


def draw_rate(axes, x, row, colour):
    """A win rate and its interval; of few pairs a hollow point without one."""
    is_few = row["n"] - row["none"] < 10
    if is_few:
        axes.errorbar(x, row["rate"], None, fmt="o", color=colour, mfc="white", capsize=2)
    else:
        ends = [[row["rate"] - row["low"]], [row["high"] - row["rate"]]]
        axes.errorbar(x, row["rate"], ends, fmt="o", color=colour, mfc=colour, capsize=2)


def lengths_of_file(paths):
    path = paths[0]
    require(len(paths) == 1, f"{path} has a figure of its own; give it alone")
    with explain(f"{path} cannot be read, give the winrate.json of sample.py --judge", OSError, ValueError):
        content = json.loads(Path(path).read_bytes())
    return draw_lengths(content)


def curves_of_runs(paths, keys, smooth):
    """A Figure of the runs in these directories, named by what differs in their paths; prints a line for each."""
    shared = os.path.commonpath([Path(path).resolve().parent for path in paths])
    runs = {}
    for path in paths:
        name = os.path.relpath(Path(path).resolve(), shared)
        runs[name] = read_metrics(path)
    figure = draw(runs, keys, smooth)
    for name, rows in runs.items():
        print(summary(name, rows))
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="+", type=expand, help="directories of runs of one stage, or one winrate.json")
    parser.add_argument("--out", default="curves.png", help="the file to write: .png, .pdf or .svg")
    parser.add_argument("--keys", type=lambda text: text.split(","), help="a,b+c: the panels; default: the stage's")
    parser.add_argument("--smooth", type=int, default=1, help="updates in the running mean")
    args = parser.parse_args(argv)
    require(args.smooth >= 1, f"--smooth={args.smooth}: give a number of updates, 1 for none")
    if args.paths[0].endswith(".json"):
        figure = lengths_of_file(args.paths)
    else:
        figure = curves_of_runs(args.paths, args.keys, args.smooth)
    with explain(f"--out={args.out} cannot be written, give the path of a .png, .pdf or .svg", OSError, ValueError):
        figure.savefig(args.out, format=Path(args.out).suffix[1:])
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
