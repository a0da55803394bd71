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

# stage, known by the first of its metrics: its panels, in the order in which one looks at them
PANELS = {
    "ppo": ["objective/scores", "objective/kl", "val/response_length", "val/perplexity", "val/ref_perplexity",
            "val/eos_rate", "policy/entropy_avg", "policy/approxkl_avg", "loss/value_avg"],
    "sft": ["loss/sft+eval/loss", "lr", "grad_norm"],
    "rm": ["loss/rm", "train/accuracy", "train/margin", "grad_norm"],
    "dpo": ["loss/dpo", "rewards/accuracies", "rewards/margins", "rewards/chosen+rewards/rejected",
            "logps/chosen+logps/rejected", "grad_norm"],
}  # fmt: skip
UNITS = {
    "reward": ["objective/scores", "objective/rlhf_reward", "objective/non_score_reward", "train/margin"],
    "nats per response": ["objective/kl", "objective/entropy", "logps/chosen", "logps/rejected"],
    "nats per token": ["policy/entropy_avg", "policy/approxkl_avg", "loss/sft"],
    "nats per pair": ["loss/rm", "loss/dpo"],
    "beta x nats": ["rewards/chosen", "rewards/rejected", "rewards/margins"],
    "tokens": ["val/response_length"],
    "per token": ["val/perplexity", "val/ref_perplexity"],
    "share of responses": ["val/eos_rate"],
    "share of pairs": ["train/accuracy", "rewards/accuracies"],
    "share of tokens": ["policy/clipfrac_avg", "val/clipfrac_avg"],
    "squared reward": ["loss/value_avg"],
}
LOG = ("val/ref_perplexity", "loss/value_avg")  # their worst is so far off that nothing else would be seen
SIGNS = ("objective/scores", "objective/kl", "val/response_length", "val/perplexity")
# Okabe and Ito's colours, which the colour-blind tell apart, without their yellow, too pale for a line
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", ":")  # of the metrics that share a panel


def read_metrics(directory):
    """The rows of a run's metrics.jsonl, a dict per update; a last line that is not whole yet is left out."""
    path, rows = Path(directory) / "metrics.jsonl", []
    with explain(f"{path} cannot be read, give the directory of a run", OSError):
        lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        broken = explain(f"{path}: line {number} is damaged, remove it", ValueError)
        with broken if number < len(lines) else contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    require(rows, f"{path}: no rows yet; wait for the first update")
    for number, row in enumerate(rows, 1):
        numbers = isinstance(row, dict) and all(x is None or type(x) in (int, float) for x in row.values())
        right = numbers and row.get("step") is not None
        require(right, f"{path}: line {number} is not a step and its numbers; give the directory of a training run")
    return rows


def values(rows, key):
    """A metric as an array; NaN where it is null (it was not finite) or missing."""
    return np.array([math.nan if row.get(key) is None else row[key] for row in rows], dtype=float)


def running_mean(x, window):
    """The mean of each value and the window - 1 before it, fewer at the beginning, leaving out NaN."""
    parts = [x[max(0, i + 1 - window) : i + 1] for i in range(len(x))]
    return np.array([np.nanmean(part) if np.isfinite(part).any() else math.nan for part in parts])


def collapse(rows, window=10, kl_per_token=50 / 53, margin=0.1):
    """The first step that shows the signature of over-optimisation, the "pattern collapse" of arXiv:2307.04964; or None.

    All at once, in running means over `window` rows that are compared with the first of them: scores are higher; KL is
    above kl_per_token nats for each token of the responses, and higher than a window ago; responses are longer by the
    margin, and their perplexity lower by it. Where there is no perplexity the others decide; other columns must be there
    (else UserError). Needs two windows of rows.

    A rule of thumb. Of the runs that arXiv:2403.17031 saw over-optimise, the lower KL was 50 nats, in at most 53 tokens;
    the margin is there to be more than noise. The other signs come in healthy runs too: it is KL that tells them apart.
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


def new_figure(n_panels):
    """A Figure and the axes of its panels. Without pyplot: no display is needed, and no figure is kept for ever."""
    with explain("figures need matplotlib, pip install matplotlib", ImportError):
        from matplotlib.figure import Figure
    n_rows = math.ceil(n_panels / 4)
    n_columns = math.ceil(n_panels / n_rows)
    figure = Figure(figsize=(max(6, min(10, 4 * n_columns)), 2.2 * n_rows + 0.8), dpi=120, layout="constrained")
    grid = figure.subplots(n_rows, n_columns, sharex=True, squeeze=False).flatten()
    for spare in grid[n_panels:]:
        spare.remove()
    for axes in grid[:n_panels]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    for lowest in grid[:n_panels][-n_columns:]:
        lowest.tick_params(labelbottom=True)
    return figure, grid[:n_panels]


def stage_of(runs):
    """The stage of all runs; raises UserError if they are of different ones."""
    stages = {}
    for name, rows in runs.items():
        found = [stage for stage in PANELS if any(PANELS[stage][0].split("+")[0] in row for row in rows)]
        require(found, f"{name}: no metrics of {', '.join(PANELS)}; give the directory of a training run")
        stages[name] = found[0]
    apart = ", ".join(f"{name} is {stage}" for name, stage in stages.items())
    require(len(set(stages.values())) == 1, f"{apart}: runs of different stages; draw a figure for each stage")
    return found[0]


def choose_panels(runs, keys):
    """The panels of draw: `keys`, which must be known, or what the runs have of their stage's."""
    known = {key for rows in runs.values() for row in rows for key in row}
    for key in [key for panel in keys or () for key in panel.split("+")]:
        near = ", ".join(difflib.get_close_matches(key, known, n=3, cutoff=0.3) or sorted(known))
        require(key in known, f"--keys: no run has '{key}'; did you mean {near}?")
    usual = ["+".join(filter(known.__contains__, panel.split("+"))) for panel in PANELS[stage_of(runs)]]
    return keys or [panel for panel in usual if panel]


def draw(runs, keys=None, smooth=1):
    """A Figure of learning curves: a panel for each of `keys`, a line for each run, over the updates.

    runs: name -> rows as from read_metrics, all of one stage. keys: metrics, or some joined by "+" that share a panel
    (solid, dashed, dotted); None: the stage's own. smooth: updates in the running mean; the raw values stay, pale.
    A null is a gap. From the step that `collapse` finds for a run, marked in its colour, panels are grey.
    """
    stage, panels = stage_of(runs), choose_panels(runs, keys)
    require(len(runs) <= len(COLOURS), f"{len(runs)} runs, but {len(COLOURS)} colours; draw fewer in one figure")
    onsets = {name: collapse(rows) if stage == "ppo" else None for name, rows in runs.items()}
    figure, grid = new_figure(len(panels))
    for axes, panel in zip(grid, panels):
        draw_panel(axes, runs, panel.split("+"), onsets, smooth)
    for lowest in [axes for axes in grid if axes.xaxis.get_tick_params()["labelbottom"]]:
        lowest.set_xlabel("update")
    handles = [line for line in grid[0].get_lines() if 0]
    return figure


def draw_panel(axes, runs, keys, onsets, smooth):
    for (name, rows), colour in zip(runs.items(), COLOURS):
        for key, style in zip(keys, STYLES):
            found = [row for row in rows if key in row]  # what is measured now and then is joined up; a null is a gap
            steps, raw = values(found, "step"), values(found, key)
            look = dict(color=colour, linestyle=style, marker="." if len(found) < 20 else "")
            if smooth > 1:
                axes.plot(steps, raw, alpha=0.25, linewidth=1, **look)
            mean = np.where(np.isfinite(raw), running_mean(raw, smooth), math.nan)
            axes.plot(steps, mean, label=f"{name} {key}", linewidth=1.5, **look)
        if onsets[name] is not None:
            axes.axvspan(onsets[name], rows[-1]["step"], color="0.5", alpha=0.15, linewidth=0, zorder=0)
            axes.axvline(onsets[name], color=colour, linestyle=":", linewidth=1.2)
    if keys[0] in LOG:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
