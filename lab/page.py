"""A run on one page: how far it is, its curves, its samples, its evaluation, its configuration.

    python lab/page.py out/toy/ppo                # writes out/toy/ppo/report.html, also while the run goes on

The page is one file without scripts, which a browser shows without a network. It shows what the run has written
(config.json; metrics.jsonl, timing.jsonl, samples.jsonl and eval.json where they are there) and the samples/ that
sample.py may have added to the directory. Curves are those of lab/plot.py. Tokens are coloured in samples that hold
`token_kl`, a list of [text, log p - log p of the reference]. Needs matplotlib.
"""

import argparse
import io
import sys
import time
from dataclasses import fields
from html import escape
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dpo  # noqa: E402
import ppo  # noqa: E402
import rm  # noqa: E402
import sft  # noqa: E402
from configurator import UserError, explain, require  # noqa: E402
from hub.files import expand, read_json, read_jsonl  # noqa: E402
from hub.rows import text_of  # noqa: E402
from lab import plot  # noqa: E402

# A field by which a stage's configuration is known. PPO is first, for a variant of it has a beta, too.
STAGES = {"kl_coef": ppo, "normalize_data": rm, "loss_on": sft, "beta": dpo}
SPEEDS = ("seconds", "tokens_per_second", "episodes_per_second")  # of timing.jsonl
SHOWN = 12  # queries at most, of the first kind and of the others
FULL = 3.0  # nats at which a token's colour is full

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --pale: #666; --grid: #ebebeb; --line: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --ink: #e4e4e4; --pale: #a0a0a0; --grid: #33373c; --line: #56b4e9 }
}
* { box-sizing: border-box }
body { max-width: 80rem; margin: 0 auto; padding: 1rem; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
.curves { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)) }
svg { width: 100%; height: auto }
svg text { fill: currentColor }
article { border-top: 1px solid var(--grid); padding: 0.5rem 0 }
article p { margin: 0.2rem 0; white-space: pre-wrap }
summary { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; cursor: pointer }
summary, small, th { color: var(--pale); font-weight: normal }
th { white-space: nowrap }
table { border-spacing: 0; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: 0.1rem 0.5rem 0.1rem 0; text-align: left; vertical-align: top; min-width: 5rem }
td:first-child { min-width: min(13rem, 30vw) }
"""
HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
"""


def page(run):
    """The page of the run in a directory, as HTML. Raises UserError if there is none, or a file of it is damaged."""
    config = read_json(run / "config.json")
    known = [stage for key, stage in STAGES.items() if key in config]
    require(known, f"{run}/config.json: of no training stage; give the directory of a training run")
    stage = known[0]
    metrics = rows_of(run / "metrics.jsonl")
    title = escape(f"{stage.__name__}: {run}")
    parts = [
        f"{HEAD}<title>{title}</title>\n<style>{STYLE}</style>\n<h1>{title}</h1>",
        f"<p>{progress(run, stage, config, metrics)}</p>",
        curves(run, metrics),
        samples("Samples while training", run / "samples.jsonl", plot.read_rows),
        samples("Samples by sample.py", run / "samples" / "samples.jsonl", read_jsonl),
        evaluation(run / "eval.json"),
        configuration(stage, config),
    ]
    return "\n".join(parts)


def rows_of(path):
    """The rows that a run has written so far; none if the file is not there."""
    if not path.exists():
        return []
    return plot.read_rows(path)


def progress(run, stage, config, metrics):
    """How far a run is, in words."""
    values = {field.name: config[field.name] for field in fields(stage.Config) if field.name in config}
    with explain(f"{run}/config.json", UserError):
        cfg = stage.Config(**values)
    name = plot.main_metric(stage.__name__)
    done = str(sum(name in row for row in metrics))
    if cfg.episodes:
        done += f" of {cfg.episodes // cfg.batch_size}"
    if (run / "final").exists():
        return f"finished: {done} updates"
    return f"not finished: {done} updates at {time.strftime('%Y-%m-%d %H:%M')}"


# ---------------------------------------------------------------------------- curves


def curves(run, metrics):
    """A picture for each panel of lab/plot.py, and for each speed."""
    if not metrics:
        return ""
    runs = {run.name: metrics}
    words = plot.summary(run.name, metrics)
    onset = None
    if plot.stage_of(runs) == "ppo":
        onset = plot.collapse(metrics)
    panels = [(metrics, panel.split("+"), onset) for panel in plot.choose_panels(runs)]
    timing = rows_of(run / "timing.jsonl")
    for key in SPEEDS:
        if any(key in row for row in timing):
            panels.append((timing, [key], None))

    smooth = 1 + len(metrics) // 100
    if smooth > 1:
        words += f". Lines are means of {smooth} updates; the values are pale."
    pictures = [picture(rows, keys, onset, smooth) for rows, keys, onset in panels]
    return f'<p>{escape(words)}</p>\n<div class="curves">\n{"".join(pictures)}</div>'


def picture(rows, keys, onset, smooth):
    """A panel as SVG, in the colours of the page."""
    figure = plot.new_figure(1)
    from matplotlib import rc_context  # `new_figure` has seen to it that matplotlib is there

    figure.set_size_inches(4.4, 2.6)
    plot.draw_panel(figure.axes[0], {"": rows}, keys, {"": onset}, smooth)
    figure.axes[0].set_xlabel("update")
    file = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # none of it
    # Text stays text, and the same run gives the same page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nplus"}):
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)

    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") :]  # inside HTML nothing may stand before it
    for colour, name in (("#000000", "currentColor"), ("#ebebeb", "var(--grid)"), ("#0072b2", "var(--line)")):
        drawing = drawing.replace(colour, name)
    return drawing


# ---------------------------------------------------------------------------- samples


def samples(title, path, read):
    """Some of the samples in a file, by query: first of the queries with several answers or coloured ones."""
    queries = read_samples(path, read)
    if not queries:
        return ""
    first = [query for query, answers in queries.items() if len(answers) > 1 or "<span" in answers[0]]
    others = [query for query in queries if query not in first]
    shown = spread(first) + spread(others)
    html = ""
    for query in shown:
        text = escape(query)
        html += f"<article><details><summary>{text}</summary><p>{text}</p></details>\n"
        html += "".join(queries[query]) + "</article>\n"
    legend = f"{len(shown)} of {len(queries)} queries; click on one to read all of it."
    if "<span" in html:
        scale = "".join(token(f" {nats} ", nats) for nats in range(-3, 4))
        legend += f" Colours: log p - log p of the reference, in nats: {scale}"
    return f"<h2>{title}</h2>\n<p>{legend}</p>\n{html}"


def read_samples(path, read):
    """{query: its answers as HTML}"""
    queries = {}
    rows = read(path) if path.exists() else []
    for number, row in enumerate(rows, 1):
        with explain(f"{path}: line {number}", UserError):
            label = f"update {row['step']}" if "step" in row else "response"
            html = answer(label, row)
            if "reference" in row:
                reference = {"response": row["reference"], "score": row.get("reference_score")}
                html += answer("reference", reference)
            queries.setdefault(text_of(row, "query"), []).append(html)
    return queries


def answer(label, row):
    """A response and its numbers as HTML, with coloured tokens if it has theirs."""
    text = escape(text_of(row, "response"))
    if row.get("token_kl"):
        with explain("token_kl is no list of [text, number]", TypeError, ValueError, AttributeError):
            text = "".join(token(part, nats) for part, nats in row["token_kl"])
    numbers = [f"{name} {cell(row[name])}" for name in ("score", "kl") if row.get(name) is not None]
    return f"<p><small>{escape(label)}</small> {text} <small>{', '.join(numbers)}</small></p>\n"


def token(text, nats):
    """A token on blue if it is likelier than by the reference, on orange if it is less likely."""
    colour = "0 114 178" if nats > 0 else "230 120 0"
    strength = 0.6 * min(abs(nats) / FULL, 1)
    return f'<span title="{nats:+.2f}" style="background: rgb({colour} / {strength:.2f})">{escape(text)}</span>'


def spread(items):
    """Some of the items, evenly, with the first and the last."""
    places = np.linspace(0, len(items) - 1, min(SHOWN, len(items)))
    return [items[place] for place in places.round().astype(int)]


# ---------------------------------------------------------------------------- tables


def evaluation(path):
    """eval.json: its numbers, and the accuracy of each group of rows."""
    if not path.exists():
        return ""
    values = read_json(path)
    groups = values.pop("accuracy", {})
    columns = ["accuracy", "expected", "n"]
    rows = []
    with explain(f"{path}: its accuracy is no table", AttributeError):
        for group, row in groups.items():
            rows.append([group] + [row.get(column) for column in columns])
    return "<h2>Evaluation</h2>\n" + table(["", ""], values.items()) + table(["", *columns], rows)


def configuration(stage, config):
    """config.json, first the fields that are not as the stage has them by itself."""
    defaults = {field.name: field.default for field in fields(stage.Config)}
    changed = []
    others = []
    for name, value in config.items():
        if name == "inputs" or value == defaults.get(name):
            others.append([name, repr(value)])
        else:
            changed.append([name, repr(value), repr(defaults.get(name, ""))])
    title = f"<h2>Configuration</h2>\n<p>{len(changed)} fields differ from the defaults of {stage.__name__}.py:</p>\n"
    return title + table(["", "", "default"], changed) + "<p>The others:</p>\n" + table(["", ""], others)


def table(head, rows):
    lines = ["<table>"]
    lines.append("<tr><th>" + "<th>".join(head))
    for row in rows:
        lines.append("<tr><td>" + "<td>".join(map(cell, row)))
    return "\n".join([*lines, "</table>\n"])


def cell(value):
    """A value as HTML: numbers to four digits, nothing for null."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(str(value))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=expand, help="the out_dir of a run; report.html goes there")
    run = Path(parser.parse_args(argv).directory)
    text = page(run)
    with explain(f"{run}/report.html cannot be written", OSError):
        (run / "report.html").write_text(text, encoding="utf-8", errors="replace")
    print(f"wrote {run}/report.html")


if __name__ == "__main__":
    main()
