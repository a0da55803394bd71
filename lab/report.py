"""Figures and tables of the laboratory's results.

    python lab/report.py out/lab/results.jsonl lab        # to lab/figures, and into lab/README.md between its markers

Each figure is a function of the rows of results.jsonl (lab/lab.py) that returns a matplotlib Figure, each table one
that returns its lines: a notebook can call them. A row has experiment, arm, seed, and numbers or curves (a number per
update).
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configurator import explain  # noqa: E402

BETAS = {"0.0": "#d55e00", "0.1": "#0072b2", "0.3": "#009e73"}  # and their colours, which the colour-blind tell apart
GREY, PROXY, GOLD = "#888888", "#cc79a7", "#e69f00"


def select(rows, experiment, arm=None):
    """The rows of an experiment (and arm), by arm and seed."""
    found = [row for row in rows if row["experiment"] == experiment and arm in (None, row["arm"])]
    return sorted(found, key=lambda row: (row["arm"], row["seed"]))


def smooth(curve, width=5):
    """Means of `width` neighbours, fewer at the ends: an array as long as the curve."""
    half = width // 2
    return np.array([np.mean(curve[max(0, i - half) : i + half + 1]) for i in range(len(curve))])


def fit(x, y):
    """Least squares y = a + b x: returns a, b and R squared."""
    b, a = np.polyfit(x, y, 1)
    return float(a), float(b), float(1 - np.sum((y - a - b * x) ** 2) / np.sum((y - np.mean(y)) ** 2))


def end(curve):
    return float(np.mean(curve[-5:]))


def root(row):
    """The square root of KL, smoothed (an estimate of it can be below 0)."""
    return np.sqrt(np.maximum(smooth(row["kl"]), 0))


def mean_and_seeds(values, digits=2):
    """"1.20 (1.10, 1.20, 1.30)": the mean, and each seed's."""
    return f"{np.mean(values):.{digits}f} ({', '.join(f'{x:.{digits}f}' for x in values)})"


# ---------------------------------------------------------------------------- tables: a head and rows of cells


def overoptimisation_table(rows):
    yield "beta", "seed", "KL, end", "proxy, start", "proxy, end", "gold, start", "gold, best", "KL there", "gold, end"
    for row in select(rows, "overoptimisation"):
        kl, proxy, gold = (smooth(row[name]) for name in ("kl", "proxy", "gold"))
        best = gold.argmax()
        numbers = end(row["kl"]), proxy[0], end(row["proxy"]), gold[0], gold[best], kl[best], end(row["gold"])
        yield row["arm"].removeprefix("beta "), row["seed"], *numbers


def sqrt_kl_table(rows):
    yield "beta", "seed", "proxy: slope", "its R2", "gold: slope", "its R2", "gold up to its best: slope", "its R2"
    for row in select(rows, "overoptimisation"):
        proxy, gold, x = smooth(row["proxy"]), smooth(row["gold"]), root(row)
        rise = slice(max(int(gold.argmax()), 2) + 1)
        fits = fit(x, proxy)[1:] + fit(x, gold)[1:] + fit(x[rise], gold[rise])[1:]
        yield row["arm"].removeprefix("beta "), row["seed"], *fits


def best_of_n_table(rows):
    found = select(rows, "best_of_n")
    yield "n", "KL at most", "proxy (by seed)", "gold (by seed)"
    for i, n in enumerate(found[0]["n"]):
        yield n, found[0]["kl"][i], *(mean_and_seeds([row[name][i] for row in found]) for name in ("proxy", "gold"))


def data_table(rows):
    yield "pairs", "reward model (by seed)", "DPO's implicit reward (by seed)"
    for n in sorted({row["pairs"] for row in select(rows, "data")}):
        arms = [[row["accuracy"] for row in select(rows, "data", f"{kind} {n}")] for kind in ("rm", "dpo")]
        yield n, *(mean_and_seeds(values, 3) if values else "" for values in arms)


def whitening_table(rows):
    yield "", "tokens (by seed)", "KL", "proxy", "gold"
    for name, found in (("off", right(rows)), ("on", select(rows, "whitening"))):
        yield name, *(mean_and_seeds([end(row[key]) for row in found]) for key in ("tokens", "kl", "proxy", "gold"))


def mistakes_table(rows):
    """Of KL and ratio the size: the signs of three seeds may cancel. `ratio` is the mean over a first minibatch."""
    yield ("", "abs(KL) at first", "abs(first ratio - 1), mean", "generation gap, largest", "EOS rate at first",
           "gold at first", "gold, updates 15 to 19", "gold, last five")  # fmt: skip
    arms = dict.fromkeys(row["arm"] for row in rows if row["experiment"] == "mistakes")
    whole = len(right(rows)[0]["gold"])
    for name, found in {"none of them": right(rows), **{arm: select(rows, "mistakes", arm) for arm in arms}}.items():
        off = np.mean([np.abs(np.subtract(row["ratio"], 1)).mean() for row in found])
        kl = np.mean([abs(row["kl"][0]) for row in found])
        gap = np.max([row["gap"] for row in found])
        eos, gold = (np.mean([row[key][0] for row in found]) for key in ("eos", "gold"))
        ends = [[row["gold"][n - 5 : n] for row in found] for n in (20, whole) if len(found[0]["gold"]) >= n]
        later = [mean_and_seeds(np.mean(curves, axis=1)) for curves in ends] + [""] * (2 - len(ends))
        yield name, f"{kl:.4f}", f"{off:.1e}", f"{gap:.1e}", f"{eos:.0%}", gold, *later


def by_beta(rows):
    """Of the runs with various KL penalties {beta: (colour, runs)}, as far as there are any."""
    found = {beta: (colour, select(rows, "overoptimisation", f"beta {beta}")) for beta, colour in BETAS.items()}
    return {beta: (colour, runs) for beta, (colour, runs) in found.items() if runs}


def right(rows):
    """The runs that the other experiments change in one thing."""
    return select(rows, "overoptimisation", "beta 0.1")


def markdown(lines):
    cells = [[f"{x:.2f}" if isinstance(x, float) else str(x) for x in line] for line in lines]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


# ---------------------------------------------------------------------------- figures


def panels(n, height=2.8, **options):
    """A figure of n panels side by side, and its axes; needs matplotlib, and no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * n, height), layout="constrained", dpi=120)
    axes = figure.subplots(1, n, squeeze=False, **options)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def overoptimisation_figure(rows):
    """Proxy (dashed) and gold (solid) against updates: a panel per beta, a line per seed, and the mean."""
    arms = by_beta(rows)
    figure, axes = panels(len(arms), 3.4, sharey=True)
    for axis, (beta, (_, found)) in zip(axes, arms.items()):
        for name, style, colour in (("proxy", "--", PROXY), ("gold", "-", GOLD)):
            curves = [smooth(row[name]) for row in found]
            for curve in curves:
                axis.plot(curve, style, color=colour, alpha=0.6, lw=1)
            axis.plot(np.mean(curves, axis=0), style, color=colour, lw=2.5, label=f"{name} (thin: each seed)")
        kl = ", ".join(f"{end(row['kl']):.0f}" for row in found)
        axis.set_title(f"beta {beta}; KL at the end {kl} nats", fontsize=9)
        axis.set_xlabel("update")
    axes[0].set_ylabel("score")
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def signature_figure(rows):
    """What a practitioner sees, who has no gold: the mean of the seeds and their range, by beta."""
    names = {"proxy": "proxy", "kl": "KL to SFT, nats", "tokens": "tokens per response",
             "perplexity": "perplexity of responses"}  # fmt: skip
    figure, axes = panels(len(names), 2.8)
    for axis, (name, title) in zip(axes, names.items()):
        for beta, (colour, found) in by_beta(rows).items():
            curves = np.array([smooth(row[name]) for row in found])
            axis.plot(curves.mean(0), color=colour, label=f"beta {beta}")
            axis.fill_between(range(curves.shape[1]), curves.min(0), curves.max(0), color=colour, alpha=0.15, lw=0)
        axis.set(title=title, xlabel="update")
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def scaling(d, gain, bend):
    """Fit gain = d (a - b bend(d)), d = sqrt(KL): how gold moves from where it began; returns a, b, R squared.

    arXiv:2210.10760 found bend(d) = log d for RL, and d for best-of-n.
    """
    columns = np.stack([d, -d * bend(d)], axis=1)
    found, *_ = np.linalg.lstsq(columns, gain, rcond=None)
    return *found.tolist(), float(1 - np.sum((gain - columns @ found) ** 2) / np.sum((gain - gain.mean()) ** 2))


def sqrt_kl_figure(rows):
    """Proxy and gold against the square root of KL, all runs, with a line for the proxy and `scaling` for gold."""
    figure, axes = panels(2, 3.4, sharex=True, sharey=True)
    runs = select(rows, "overoptimisation")
    for axis, name in zip(axes, ("proxy", "gold")):
        for row in runs:
            colour, label = BETAS[row["arm"].removeprefix("beta ")], row["arm"] if row["seed"] == 1 else None
            axis.plot(root(row), smooth(row[name]), ".", ms=4, color=colour, label=label)
        d = np.concatenate([root(row) for row in runs])
        y = np.concatenate([smooth(row[name]) for row in runs])[d > 0.1]
        d, x = d[d > 0.1], np.linspace(0.1, d.max(), 100)
        if name == "proxy":
            a, b, r2 = fit(d, y)
            axis.plot(x, a + b * x, color="k", lw=1, label=f"{a:.2f} + {b:.2f} d, R2 = {r2:.2f}")
        else:
            c = np.mean([row["gold"][0] for row in runs])  # where KL is 0
            for text, bend, style in (("d", lambda d: d, "-"), ("log d", np.log, ":")):
                a, b, r2 = scaling(d, y - c, bend)
                law = f"{c:.2f} + d ({a:.2f} - {b:.2f} {text}), R2 = {r2:.2f}"
                axis.plot(x, c + x * (a - b * bend(x)), style, color="k", lw=1, label=law)
        axis.set(title=name, xlabel="d, the square root of KL")
        axis.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("score")
    return figure


def best_of_n_figure(rows):
    """Best of n (by proxy) beside PPO, against KL: proxy and gold, means of the seeds."""
    figure, axes = panels(2, 3.2, sharex=True)
    found = select(rows, "best_of_n")
    for axis, name in zip(axes, ("proxy", "gold")):
        best = np.mean([row[name] for row in found], axis=0)
        axis.plot(found[0]["kl"], best, "o-", ms=4, color=GREY, label="best of n")
        for n, x, y in zip(found[0]["n"], found[0]["kl"], best):
            axis.annotate(f"{n}", (x, y), textcoords="offset points", xytext=(0, 5), fontsize=7, color=GREY)
        for beta, (colour, runs) in by_beta(rows).items():
            kl, score = (np.mean([smooth(row[key]) for row in runs], axis=0) for key in ("kl", name))
            axis.plot(kl, score, color=colour, label=f"PPO, beta {beta}")
        axis.set(title=name, xlabel="KL to SFT, nats, up to 8 (best of n: its bound)", xlim=(0, 8))
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def data_figure(rows):
    """Held-out accuracy of reward models, and of DPO's implicit reward, against the number of labels."""
    figure, (axis,) = panels(1, 3.0)
    for kind, title, colour in (("rm", "reward model", "#0072b2"), ("dpo", "DPO, implicit", "#d55e00")):
        found = [row for row in select(rows, "data") if row["arm"].startswith(kind)]
        sizes = sorted({row["pairs"] for row in found})
        means = [np.mean([row["accuracy"] for row in found if row["pairs"] == n]) for n in sizes]
        axis.plot([row["pairs"] for row in found], [row["accuracy"] for row in found], ".", color=colour, alpha=0.6)
        axis.plot(sizes, means, color=colour, label=title)
    axis.set(xscale="log", xlabel="labelled pairs", ylabel="held-out accuracy")
    axis.set_xticks(sorted({row["pairs"] for row in select(rows, "data")}), minor=False)
    axis.get_xaxis().set_major_formatter(lambda x, _: f"{x:g}")
    axis.minorticks_off()
    axis.legend(fontsize=8, frameon=False)
    return figure


def versus(axis, rows, others, name, label, n=None):
    """Curves of `name` with a mistake or an option in colour, and without in grey: a thin line per seed, and means."""
    for found, colour, text in ((right(rows), GREY, "as it should be"), (others, "#d55e00", label)):
        curves = [row[name][:n] for row in found]
        for curve in curves:
            axis.plot(smooth(curve), color=colour, alpha=0.3, lw=0.8)
        axis.plot(np.mean([smooth(curve) for curve in curves], axis=0), color=colour, label=text)
    axis.set(xlabel="update")
    axis.legend(fontsize=7, frameon=False)


def whitening_figure(rows):
    figure, axes = panels(2)
    for axis, name, title in zip(axes, ("tokens", "gold"), ("tokens per response", "gold")):
        versus(axis, rows, select(rows, "whitening"), name, "rewards whitened")
        axis.set_title(title)
    return figure


def mistakes_figure(rows):
    figure, axes = panels(4, 2.8)
    show = [("EOS is padding", "eos", "responses that end", 20), ("dropout", "gold", "gold", None),
            ("new critic", "value_loss", "value loss", None)]  # fmt: skip
    for axis, (arm, name, title, n) in zip(axes, show):
        versus(axis, rows, select(rows, "mistakes", arm), name, arm, n)
        axis.set_title(title)
    arms = {"as it should be": right(rows)} | {arm: select(rows, "mistakes", arm) for arm in
                                               ("dropout", "bfloat16", "bfloat16, generation")}  # fmt: skip
    for (arm, found), colour in zip(arms.items(), (GREY, "#d55e00", "#0072b2", "#009e73")):
        off = [np.mean(np.abs(np.subtract(row["ratio"], 1))) for row in found]
        axes[3].plot([arm.replace(", ", ",\n").replace(" it ", " it\n")] * len(off), off, "o", color=colour)
    axes[3].set(yscale="log", title="abs(first ratio - 1), mean")
    axes[3].tick_params("x", labelsize=7)
    return figure


# ---------------------------------------------------------------------------- files

MISTAKES = ("EOS is padding", "dropout", "new critic", "bfloat16", "bfloat16, generation")
# name: figure, table, and what they need: experiments, or arms of them
ALL = {
    "overoptimisation": (overoptimisation_figure, overoptimisation_table, ["overoptimisation"]),
    "signature": (signature_figure, None, ["overoptimisation"]),
    "sqrt_kl": (sqrt_kl_figure, sqrt_kl_table, ["overoptimisation"]),
    "best_of_n": (best_of_n_figure, best_of_n_table, ["overoptimisation", "best_of_n"]),
    "data": (data_figure, data_table, ["data"]),
    "whitening": (whitening_figure, whitening_table, ["overoptimisation: beta 0.1", "whitening"]),
    "mistakes": (mistakes_figure, mistakes_table,
                 ["overoptimisation: beta 0.1", *(f"mistakes: {arm}" for arm in MISTAKES)]),
}


def read(path=ROOT / "lab" / "results.jsonl"):
    unreadable = f"{path} cannot be read; `make lab` writes out/lab/results.jsonl"
    with explain(unreadable, OSError, ValueError), open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def missing(rows, name):
    """What the figure and table of that name need, and the results do not have."""
    there = {key for row in rows for key in (row["experiment"], f"{row['experiment']}: {row['arm']}")}
    return [need for need in ALL[name][2] if need not in there]


def write(results, directory):
    """Write all figures that the results allow to directory/figures, and the tables into directory/README.md."""
    rows, directory = read(results), Path(directory)
    path, names = directory / "README.md", [name for name in ALL if not missing(rows, name)]
    (directory / "figures").mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for name in names:
        figure, table, _ = ALL[name]
        figure(rows).savefig(directory / "figures" / f"{name}.png")
        parts = [f"<!-- {name} -->", f"![{name}](figures/{name}.png)", *([markdown(table(rows))] if table else [])]
        block = "\n\n".join(parts) + "\n<!-- end -->"
        old = re.compile(f"<!-- {name} -->.*?<!-- end -->", re.DOTALL)
        text = old.sub(lambda match, block=block: block, text) if old.search(text) else f"{text}\n{block}\n"
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path} and {directory}/figures: {', '.join(names) or 'none'}")
    for name in ALL:
        if name not in names and any(row["experiment"] == name for row in rows):
            print(f"{name} also needs {', '.join(missing(rows, name))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="a results.jsonl")
    parser.add_argument("directory", help="where README.md and figures/ go, or are replaced")
    write(**vars(parser.parse_args()))
