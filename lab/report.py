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

# Colours that the colour-blind tell apart.
RED = "#d55e00"
BLUE = "#0072b2"
GREEN = "#009e73"
GREY = "#888888"
PROXY = "#cc79a7"
GOLD = "#e69f00"
BETAS = {"0.0": RED, "0.1": BLUE, "0.3": GREEN}


def select(rows, experiment, arm=None):
    """The rows of an experiment (and arm), by arm and seed."""
    found = [row for row in rows if row["experiment"] == experiment and arm in (None, row["arm"])]
    return sorted(found, key=lambda row: (row["arm"], row["seed"]))


def smooth(curve, width=5):
    """Means of `width` neighbours, fewer at the ends: an array as long as the curve."""
    half = width // 2
    means = []
    for i in range(len(curve)):
        first = max(0, i - half)
        means.append(np.mean(curve[first : i + half + 1]))
    return np.array(means)


def fit(x, y):
    """Least squares y = a + b x: returns a, b and R squared."""
    slope, start = np.polyfit(x, y, 1)
    return float(start), float(slope), r_squared(y, start + slope * x)


def r_squared(y, fitted):
    """The share of the variance of y that is explained."""
    return float(1 - np.sum((y - fitted) ** 2) / np.sum((y - np.mean(y)) ** 2))


def end(curve):
    return float(np.mean(curve[-5:]))


def root(row):
    """The square root of KL, smoothed (an estimate of it can be below 0)."""
    return np.sqrt(np.maximum(smooth(row["kl"]), 0))


def mean_and_seeds(values, digits=2):
    """For example "1.20 (1.10, 1.20, 1.30)": the mean, and each seed's."""
    seeds = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{np.mean(values):.{digits}f} ({seeds})"


# ---------------------------------------------------------------------------- tables: a head and rows of cells


def overoptimisation_table(rows):
    yield "beta", "seed", "KL, end", "proxy, start", "proxy, end", "gold, start", "gold, best", "KL there", "gold, end"
    for row in select(rows, "overoptimisation"):
        proxy = smooth(row["proxy"])
        gold = smooth(row["gold"])
        best = gold.argmax()
        yield (
            beta_of(row),
            row["seed"],
            end(row["kl"]),
            proxy[0],
            end(row["proxy"]),
            gold[0],
            gold[best],
            smooth(row["kl"])[best],
            end(row["gold"]),
        )


def beta_of(row):
    return row["arm"].removeprefix("beta ")


def sqrt_kl_table(rows):
    yield "beta", "seed", "proxy: slope", "its R2", "gold: slope", "its R2", "gold up to its best: slope", "its R2"
    for row in select(rows, "overoptimisation"):
        d = root(row)
        gold = smooth(row["gold"])
        rise = slice(max(int(gold.argmax()), 2) + 1)
        cells = [beta_of(row), row["seed"]]
        for x, y in ((d, smooth(row["proxy"])), (d, gold), (d[rise], gold[rise])):
            _, slope, r2 = fit(x, y)
            cells += [slope, r2]
        yield cells


def best_of_n_table(rows):
    found = select(rows, "best_of_n")
    yield "n", "KL at most", "proxy (by seed)", "gold (by seed)"
    for i, n in enumerate(found[0]["n"]):
        proxy = mean_and_seeds([row["proxy"][i] for row in found])
        gold = mean_and_seeds([row["gold"][i] for row in found])
        yield n, found[0]["kl"][i], proxy, gold


def data_table(rows):
    yield "pairs", "reward model (by seed)", "DPO's implicit reward (by seed)"
    for pairs in sorted({row["pairs"] for row in select(rows, "data")}):
        cells = [pairs]
        for kind in ("rm", "dpo"):
            accuracies = [row["accuracy"] for row in select(rows, "data", f"{kind} {pairs}")]
            cells.append(mean_and_seeds(accuracies, 3) if accuracies else "")
        yield cells


def whitening_table(rows):
    yield "", "tokens (by seed)", "KL", "proxy", "gold"
    for name, found in (("off", right(rows)), ("on", select(rows, "whitening"))):
        cells = [name]
        for key in ("tokens", "kl", "proxy", "gold"):
            cells.append(mean_and_seeds([end(row[key]) for row in found]))
        yield cells


def mistakes_table(rows):
    """Of KL and ratio the size: the signs of three seeds may cancel. `ratio` is the mean over a first minibatch."""
    yield ("", "abs(KL) at first", "abs(first ratio - 1), mean", "generation gap, largest", "EOS rate at first",
           "gold at first", "gold, updates 15 to 19", "gold, last five")  # fmt: skip
    arms = {"none of them": right(rows)}
    for row in rows:
        if row["experiment"] == "mistakes":
            arms[row["arm"]] = select(rows, "mistakes", row["arm"])
    n_updates = len(right(rows)[0]["gold"])
    for name, found in arms.items():
        kl = np.mean([abs(row["kl"][0]) for row in found])
        gap = np.max([row["gap"] for row in found])
        eos = np.mean([row["eos"][0] for row in found])
        gold = np.mean([row["gold"][0] for row in found])
        later = [gold_before(found, 20), gold_before(found, n_updates)]
        yield name, f"{kl:.4f}", f"{np.mean(ratios_off(found)):.1e}", f"{gap:.1e}", f"{eos:.0%}", gold, *later


def ratios_off(found):
    """For each run, how far the ratio of an update's first minibatch is from 1, in the mean over updates."""
    return [np.abs(np.subtract(row["ratio"], 1)).mean() for row in found]


def gold_before(found, update):
    """Gold in the five updates before this one; "" if the runs are shorter."""
    if len(found[0]["gold"]) < update:
        return ""
    return mean_and_seeds([np.mean(row["gold"][update - 5 : update]) for row in found])


def by_beta(rows):
    """Of the runs with various KL penalties {beta: (colour, runs)}, as far as there are any."""
    arms = {}
    for beta, colour in BETAS.items():
        found = select(rows, "overoptimisation", f"beta {beta}")
        if found:
            arms[beta] = (colour, found)
    return arms


def right(rows):
    """The runs that the other experiments change in one thing."""
    return select(rows, "overoptimisation", "beta 0.1")


def markdown(lines):
    head, *rows = [list(map(cell, line)) for line in lines]
    table = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def cell(value):
    return f"{value:.2f}" if isinstance(value, float) else str(value)


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
    titles = {
        "proxy": "proxy",
        "kl": "KL to SFT, nats",
        "tokens": "tokens per response",
        "perplexity": "perplexity of responses",
    }
    figure, axes = panels(len(titles), 2.8)
    for axis, (name, title) in zip(axes, titles.items()):
        for beta, (colour, found) in by_beta(rows).items():
            curves = np.array([smooth(row[name]) for row in found])
            updates = range(curves.shape[1])
            axis.plot(curves.mean(0), color=colour, label=f"beta {beta}")
            axis.fill_between(updates, curves.min(0), curves.max(0), color=colour, alpha=0.15, lw=0)
        axis.set(title=title, xlabel="update")
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def scaling(d, gain, bend):
    """Fit gain = d (a - b bend(d)), d = sqrt(KL): how gold moves from where it began; returns a, b, R squared.

    arXiv:2210.10760 found bend(d) = log d for RL, and d for best-of-n.
    """
    columns = np.stack([d, -d * bend(d)], axis=1)
    found, *_ = np.linalg.lstsq(columns, gain, rcond=None)
    a, b = found.tolist()
    return a, b, r_squared(gain, columns @ found)


def sqrt_kl_figure(rows):
    """Proxy and gold against the square root of KL, all runs, with a line for the proxy and `scaling` for gold."""
    figure, axes = panels(2, 3.4, sharex=True, sharey=True)
    runs = select(rows, "overoptimisation")
    d = np.concatenate([root(row) for row in runs])
    far = d > 0.1
    x = np.linspace(0.1, d.max(), 100)
    for axis, name in zip(axes, ("proxy", "gold")):
        for row in runs:
            label = row["arm"] if row["seed"] == 1 else None
            axis.plot(root(row), smooth(row[name]), ".", ms=4, color=BETAS[beta_of(row)], label=label)
        score = np.concatenate([smooth(row[name]) for row in runs])
        if name == "proxy":
            draw_line(axis, x, d[far], score[far])
        else:
            start = np.mean([row["gold"][0] for row in runs])  # where KL is 0
            draw_laws(axis, x, d[far], score[far], start)
        axis.set(title=name, xlabel="d, the square root of KL")
        axis.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("score")
    return figure


def draw_line(axis, x, d, score):
    a, b, r2 = fit(d, score)
    axis.plot(x, a + b * x, color="k", lw=1, label=f"{a:.2f} + {b:.2f} d, R2 = {r2:.2f}")


def draw_laws(axis, x, d, score, start):
    """Both forms of `scaling`: that of best-of-n, and that of RL (dotted)."""
    for text, bend, style in (("d", lambda d: d, "-"), ("log d", np.log, ":")):
        a, b, r2 = scaling(d, score - start, bend)
        law = f"{start:.2f} + d ({a:.2f} - {b:.2f} {text}), R2 = {r2:.2f}"
        axis.plot(x, start + x * (a - b * bend(x)), style, color="k", lw=1, label=law)


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
            kl = np.mean([smooth(row["kl"]) for row in runs], axis=0)
            score = np.mean([smooth(row[name]) for row in runs], axis=0)
            axis.plot(kl, score, color=colour, label=f"PPO, beta {beta}")
        axis.set(title=name, xlabel="KL to SFT, nats, up to 8 (best of n: its bound)", xlim=(0, 8))
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def data_figure(rows):
    """Held-out accuracy of reward models, and of DPO's implicit reward, against the number of labels."""
    figure, (axis,) = panels(1, 3.0)
    for kind, title, colour in (("rm", "reward model", BLUE), ("dpo", "DPO, implicit", RED)):
        found = [row for row in select(rows, "data") if row["arm"].startswith(kind)]
        sizes = sorted({row["pairs"] for row in found})
        means = [np.mean([row["accuracy"] for row in found if row["pairs"] == size]) for size in sizes]
        pairs = [row["pairs"] for row in found]
        accuracies = [row["accuracy"] for row in found]
        axis.plot(pairs, accuracies, ".", color=colour, alpha=0.6)
        axis.plot(sizes, means, color=colour, label=title)
    axis.set(xscale="log", xlabel="labelled pairs", ylabel="held-out accuracy")
    axis.set_xticks(sorted({row["pairs"] for row in select(rows, "data")}), minor=False)
    axis.get_xaxis().set_major_formatter(lambda x, _: f"{x:g}")
    axis.minorticks_off()
    axis.legend(fontsize=8, frameon=False)
    return figure


def versus(axis, rows, others, name, label, n=None):
    """Curves of `name` with a mistake or an option in colour, and without in grey: a thin line per seed, and means."""
    for found, colour, text in ((right(rows), GREY, "as it should be"), (others, RED, label)):
        curves = [smooth(row[name][:n]) for row in found]
        for curve in curves:
            axis.plot(curve, color=colour, alpha=0.3, lw=0.8)
        axis.plot(np.mean(curves, axis=0), color=colour, label=text)
    axis.set(xlabel="update")
    axis.legend(fontsize=7, frameon=False)


def whitening_figure(rows):
    figure, axes = panels(2)
    for axis, name, title in zip(axes, ("tokens", "gold"), ("tokens per response", "gold")):
        versus(axis, rows, select(rows, "whitening"), name, "rewards whitened")
        axis.set_title(title)
    return figure


def mistakes_figure(rows):
    """Three mistakes by the curve that shows them, and the first ratio of those that change it."""
    figure, axes = panels(4, 2.8)
    show = [
        ("EOS is padding", "eos", "responses that end", 20),
        ("dropout", "gold", "gold", None),
        ("new critic", "value_loss", "value loss", None),
    ]
    for axis, (arm, name, title, n) in zip(axes, show):
        versus(axis, rows, select(rows, "mistakes", arm), name, arm, n)
        axis.set_title(title)

    last = axes[3]
    draw_ratios(last, "as it\nshould be", right(rows), GREY)
    draw_ratios(last, "dropout", select(rows, "mistakes", "dropout"), RED)
    draw_ratios(last, "bfloat16", select(rows, "mistakes", "bfloat16"), BLUE)
    draw_ratios(last, "bfloat16,\ngeneration", select(rows, "mistakes", "bfloat16, generation"), GREEN)
    last.set(yscale="log", title="abs(first ratio - 1), mean")
    last.tick_params("x", labelsize=7)
    return figure


def draw_ratios(axis, label, found, colour):
    off = ratios_off(found)
    axis.plot([label] * len(off), off, "o", color=colour)


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
    "mistakes": (
        mistakes_figure,
        mistakes_table,
        ["overoptimisation: beta 0.1", *(f"mistakes: {arm}" for arm in MISTAKES)],
    ),
}


def read(path=ROOT / "lab" / "results.jsonl"):
    unreadable = f"{path} cannot be read; `make lab` writes out/lab/results.jsonl"
    with explain(unreadable, OSError, ValueError), open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def missing(rows, name, parts=None):
    """What the figure and table of that name need, and the results do not have."""
    there = set()
    for row in rows:
        there.add(row["experiment"])
        there.add(f"{row['experiment']}: {row['arm']}")
    if parts is None:
        parts = ALL
    _, _, needs = parts[name]
    return [need for need in needs if need not in there]


def write(results, directory, parts=None, page="README.md"):
    """Write the figures that the results allow to directory/figures, and figures and tables into directory/`page`.

    parts: like ALL, and by default that.
    """
    if parts is None:
        parts = ALL
    rows = read(results)
    directory = Path(directory)
    figures = directory / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    path = directory / page
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lacking = {name: missing(rows, name, parts) for name in parts}
    names = [name for name in parts if not lacking[name]]
    for name in names:
        figure, table, _ = parts[name]
        block = [f"<!-- {name} -->"]
        if figure:
            figure(rows).savefig(figures / f"{name}.png")
            block.append(f"![{name}](figures/{name}.png)")
        if table:
            block.append(markdown(table(rows)))
        text = put(text, name, "\n\n".join(block) + "\n<!-- end -->")
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path} and {figures}: {', '.join(names) or 'none'}")
    for name in parts:
        is_begun = any(row["experiment"] == name for row in rows)
        if is_begun and lacking[name]:
            print(f"{name} also needs {', '.join(lacking[name])}")


def put(text, name, block):
    """The text with this block in the place of the one of that name, or at its end."""
    old = re.compile(f"<!-- {name} -->.*?<!-- end -->", re.DOTALL)
    if old.search(text):
        return old.sub(lambda match: block, text)
    return f"{text}\n{block}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="a results.jsonl")
    parser.add_argument("directory", help="where README.md and figures/ go, or are replaced")
    write(**vars(parser.parse_args()))
