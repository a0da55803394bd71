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

# stage, known by the first of its metrics: its panels, in the order in which one looks at them, and their units
PANELS = {
    "ppo": {"objective/scores": "reward", "objective/kl": "nats per response", "val/response_length": "tokens",
            "val/perplexity": "per token", "val/ref_perplexity": "per token", "val/eos_rate": "share of responses",
            "policy/entropy_avg": "nats per token", "policy/approxkl_avg": "nats per token",
            "loss/value_avg": "squared reward"},
    "sft": {"loss/sft+eval/loss": "nats per token", "lr": "", "grad_norm": ""},
    "rm": {"loss/rm": "nats per pair", "train/accuracy": "share of pairs", "train/margin": "reward", "grad_norm": ""},
    "dpo": {"loss/dpo": "nats per pair", "rewards/accuracies": "share of pairs", "rewards/margins": "beta x nats",
            "rewards/chosen+rewards/rejected": "beta x nats", "logps/chosen+logps/rejected": "nats per response",
            "grad_norm": ""},
}  # fmt: skip
SIGNS = ("objective/scores", "objective/kl", "val/response_length", "val/perplexity")
WINDOW = 10  # rows over which `collapse` takes means
# Okabe and Ito's colours, which the colour-blind tell apart, without their yellow, too pale for a line
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def read_metrics(directory):
    """The rows of a run's metrics.jsonl, a dict per update; a last line that is not whole yet is left out."""
    path, rows = Path(directory) / "metrics.jsonl", []
    with explain(f"{path} cannot be read, give the directory of a training run", OSError):
        lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        broken = explain(f"{path}: line {number} is damaged, remove it", ValueError)
        with broken if number < len(lines) else contextlib.suppress(ValueError):
            rows.append(json.loads(line))
            whole = isinstance(rows[-1], dict) and "step" in rows[-1]
            require(whole, f"{path}: line {number} is no update's; give the directory of a training run")
    require(rows, f"{path}: no rows yet; wait for the first update")
    return rows


def values(rows, key):
    """A metric as an array; NaN where it is null (it was not finite) or missing."""
    return np.array([math.nan if row.get(key) is None else row[key] for row in rows], dtype=float)


def running_mean(x, window):
    """The mean of each value and the window - 1 before it, fewer at the beginning, leaving out NaN."""
    parts = [x[max(0, i + 1 - window) : i + 1] for i in range(len(x))]
    return np.array([np.nanmean(part) if np.isfinite(part).any() else math.nan for part in parts])


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
        drifts = kl[i] > kl_per_token * length[i] and kl[i] > kl[i - window]
        longer = length[i] > (1 + margin) * length[start]
        varied = perplexity[i] >= (1 - margin) * perplexity[start]  # False where there is no perplexity
        if score[i] > score[start] and drifts and longer and not varied:
            return rows[i]["step"]
    return None


def stage_of(runs):
    """The stage of all runs; raises UserError if they are of different ones."""
    stages = {}
    for name, rows in runs.items():
        found = [stage for stage in PANELS if any(next(iter(PANELS[stage])).split("+")[0] in row for row in rows)]
        require(found, f"{name}: no metrics of {', '.join(PANELS)}; give the directory of a training run")
        stages[name] = found[0]
    apart = ", ".join(f"{name} is {stage}" for name, stage in stages.items())
    require(len(set(stages.values())) == 1, f"{apart}: runs of different stages; draw a figure for each stage")
    return found[0]


def choose_panels(runs, keys=None):
    """The panels of `draw`: keys, each of which some run must have, or what the runs have of their stage's panels."""
    known = {key for rows in runs.values() for row in rows for key in row}
    for panel in keys or ():
        require(panel.count("+") < 3, f"{panel}: a panel takes three metrics; leave some out, or to another panel")
    for key in [key for panel in keys or () for key in panel.split("+")]:
        near = [name for name in known if key in name] or difflib.get_close_matches(key, known, cutoff=0.4) or known
        require(key in known, f"no run has '{key}'; did you mean {', '.join(sorted(near))}?")
    usual = ["+".join(key for key in panel.split("+") if key in known) for panel in PANELS[stage_of(runs)]]
    return keys or [panel for panel in usual if panel]


def summary(name, rows):
    """One line: where a run is, and whether it shows the signature of over-optimisation."""
    stage, text = stage_of({name: rows}), f"{name}: update {rows[-1]['step']}"
    for key in [panel.split("+")[0] for panel in list(PANELS[stage])[:2]]:
        text += "".join(f", {key} {x:.4g}" for x in values([row for row in rows if key in row][-1:], key))
    if stage == "ppo":
        onset, early = collapse(rows), len(rows) < 2 * WINDOW
        seen = f"from update {onset}" if onset is not None else "too early to say" if early else "none"
        judged = "" if any(SIGNS[3] in row for row in rows) else f" (judged without {SIGNS[3]})"
        text += f"; signature of over-optimisation: {seen}{judged}"
    return text


# ---------------------------------------------------------------------------- figures


def new_figure(n_panels):
    """A Figure with so many axes. Without pyplot: needs no display, and keeps no figure for ever."""
    with explain("figures need matplotlib, pip install matplotlib", ImportError):
        from matplotlib.figure import Figure
    n_rows = math.ceil(n_panels / 4)
    n_columns = math.ceil(n_panels / n_rows)
    figure = Figure(figsize=(min(10, 4 * n_columns + 2), 2.2 * n_rows + 0.9), dpi=120, layout="constrained")
    for i in range(n_panels):
        axes = figure.add_subplot(n_rows, n_columns, i + 1, sharex=figure.axes[0] if i else None)
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
    stage, panels, handles = stage_of(runs), choose_panels(runs, keys), []
    onsets = {name: collapse(rows) if stage == "ppo" else None for name, rows in runs.items()}
    figure = new_figure(len(panels))
    for axes, panel in zip(figure.axes, panels):
        draw_panel(axes, runs, panel.split("+"), onsets, smooth)
    for name, colour in colours_of(runs).items():
        label = name if onsets[name] is None else f"{name} (from update {onsets[name]})"
        handles += figure.axes[0].plot([], [], color=colour, label=label)
    found = any(onset is not None for onset in onsets.values())
    title = "grey: the signature of over-optimisation in scores, KL, length and perplexity" if found else None
    n_columns = max(1, 120 // max(len(handle.get_label()) + 8 for handle in handles))
    place = dict(loc="outside upper left", alignment="left", frameon=False)
    figure.legend(handles=handles, title=title, ncols=n_columns, **place)
    figure.supxlabel("update", fontsize=10)
    return figure


def draw_panel(axes, runs, keys, onsets, smooth):
    for name, colour in colours_of(runs).items():
        for key, style in zip(keys, ("-", "--", ":")):
            raw = values(runs[name], key)
            mean = np.where(np.isnan(raw), math.nan, running_mean(raw, smooth))
            there = [key in row for row in runs[name]]  # measured now and then: joined up; null: a gap
            steps = values(runs[name], "step")[there]
            look = dict(color=colour, linestyle=style, marker="." if len(steps) < 20 else "")
            if smooth > 1:
                axes.plot(steps, raw[there], alpha=0.25, linewidth=1, **look)
            axes.plot(steps, mean[there], label=f"{name} {key}", linewidth=1.5, **look)
        if onsets[name] is not None:
            axes.axvspan(onsets[name], runs[name][-1]["step"], color="0.5", alpha=0.15, linewidth=0, zorder=0)
            axes.axvline(onsets[name], color=colour, linestyle=":", linewidth=1.2)
    if keys[0] == "loss/value_avg":  # a new critic's is so far off that nothing else would be seen
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    others = zip((", dashed: ", ", dotted: "), (key.removeprefix(keys[0].split("/")[0] + "/") for key in keys[1:]))
    axes.set_title(keys[0] + "".join(map("".join, others)), loc="left", fontsize=10)
    units = {panel.split("+")[0]: unit for panels in PANELS.values() for panel, unit in panels.items()}
    axes.set_ylabel(units.get(keys[0], ""))
    axes.locator_params(axis="x", integer=True)


def draw_lengths(content):
    """A Figure of the win rates in winrate.json by the length of a response relative to the other's, for each judge.

    A judge that likes length shows as a slope, and a policy that wins by length alone as 0.5 at ratio 1. With few pairs
    the bootstrap's interval is too narrow (with one it has no width), so those points are hollow and without.
    """
    tables = content.items() if isinstance(content, dict) else ()
    judges = {judge: table for judge, table in tables if isinstance(table, dict) and "rate" in table.get("all", {})}
    require(judges, "no judge's verdicts are in it; give the winrate.json of sample.py --judge")
    figure, pairs = new_figure(1), {}
    [axes] = figure.axes
    for i, (judge, colour) in enumerate(colours_of(judges).items()):
        everything, *groups = [(name, row) for name, row in judges[judge].items() if "rate" in row]
        label = f"{judge}: {everything[1]['rate']:.2f} overall"
        for name, row in groups:  # "length x 1.4"
            ratio, few = float(name.split()[-1]), row["n"] - row["none"] < 10
            pairs[ratio] = row["n"]
            label += f", {row['rate']:.2f} at equal length" * (ratio == 1)
            ends = None if few else [[row["rate"] - row["low"]], [row["high"] - row["rate"]]]
            x = ratio * 2 ** (0.06 * (i - (len(judges) - 1) / 2))  # judges side by side
            axes.errorbar(x, row["rate"], ends, fmt="o", color=colour, mfc="white" if few else colour, capsize=2)
        axes.plot([], [], "o", color=colour, label=label)
    axes.axhline(0.5, color="0.5", linewidth=1, zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(pairs), [f"{ratio:g}\n({n})" for ratio, n in pairs.items()])
    axes.set_xlabel("words of the response / of the other (pairs; hollow: fewer than 10)")
    axes.set(ylabel="win rate, 95 % interval", ylim=(-0.03, 1.03))
    figure.legend(loc="outside upper left", frameon=False)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="+", help="directories of runs of one stage, or one winrate.json")
    parser.add_argument("--out", default="curves.png", help="the file to write: .png, .pdf or .svg")
    parser.add_argument("--keys", type=lambda text: text.split(","), help="a,b+c: the panels; default: the stage's")
    parser.add_argument("--smooth", type=int, default=1, help="updates in the running mean")
    args = parser.parse_args(argv)
    require(args.smooth >= 1, f"--smooth={args.smooth}: give a number of updates, 1 for none")
    first = args.paths[0]
    if first.endswith(".json"):
        require(len(args.paths) == 1, f"{first} has a figure of its own; give it alone")
        with explain(f"{first} cannot be read, give the winrate.json of sample.py --judge", OSError, ValueError):
            content = json.loads(Path(first).read_bytes())
        figure = draw_lengths(content)
    else:
        base = os.path.commonpath([Path(path).resolve().parent for path in args.paths])  # names: what differs
        runs = {os.path.relpath(Path(path).resolve(), base): read_metrics(path) for path in args.paths}
        figure = draw(runs, args.keys, args.smooth)
        print(*(summary(name, rows) for name, rows in runs.items()), sep="\n")
    with explain(f"--out={args.out} cannot be written, give the path of a .png, .pdf or .svg", OSError, ValueError):
        figure.savefig(args.out, format=Path(args.out).suffix[1:])
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
