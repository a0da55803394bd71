"""Where the seconds of a PPO update went, beside what their operations need at the least on this machine.

    python ppo.py config/toy_ppo.py --out_dir=out/phases        # after `make demo`; by one process
    python bench/phases.py out/phases                           # a table, and out/phases/phases.png

Measured are the medians of timing.jsonl, without the first update. The floor of a phase is counted: its products at the
rate of a large product on this machine, and what has no products at the rate of a large copy. A pass is counted as in
bench/bench.py, for rows of mean length. All four models are taken to have the policy's shape, and to be in float32.

    generation   the queries once, then each token alone; that weights are read for each token is not counted
    scoring      policy and reference with logits, critic and reward model without
    policy       forward and backward, which is twice the work, in each epoch
    critic       the same without logits
    optimizer    parameter, gradient and two moments are read, and three of them written, in each step
    rest         nothing is counted
"""

import argparse
import functools
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from plan import shape_of  # noqa: E402

from bench import copy_peak, matmul_peak, operations_of_a_pass  # noqa: E402
from configurator import require  # noqa: E402
from hub.files import read_json, read_jsonl  # noqa: E402
from lab import plot  # noqa: E402
from model import GPTNeoX, ScalarModel  # noqa: E402

PHASES = ("generation", "scoring", "policy", "critic", "optimizer", "rest")


def operations(shape, cfg, query, response):
    """{phase: operations} of an update, for queries and responses of these mean lengths."""
    whole = query + response
    sizes = (shape.hidden_size, shape.num_hidden_layers, shape.vocab_size)
    forward = functools.partial(operations_of_a_pass, *sizes)
    language = forward(whole, response)
    scalar = forward(whole, response, logits=False)
    one_scalar = forward(whole, 1, logits=False)
    trained = 3 * cfg["n_epochs"]
    row = {
        "generation": forward(whole - 1, response),
        "scoring": 2 * language + scalar + one_scalar,
        "policy": trained * language,
        "critic": trained * scalar,
    }
    return {phase: cfg["batch_size"] * x for phase, x in row.items()}


def floors(run, timing):
    """{phase: seconds} that an update needs at the least."""
    cfg = read_json(run / "config.json")
    shape = shape_of(cfg["model"])
    rows = read_jsonl(run / "metrics.jsonl")
    response = statistics.mean(row["val/response_length"] for row in rows)
    n_tokens = statistics.median(row["tokens_per_second"] * row["seconds"] for row in timing)
    query = n_tokens / (cfg["batch_size"] * cfg["n_epochs"]) - response

    rate = matmul_peak("cpu", None)
    bandwidth = copy_peak("cpu")
    print(f"{query:.0f} + {response:.0f} tokens; {rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s")
    found = {phase: x / rate for phase, x in operations(shape, cfg, query, response).items()}
    n_parameters = sum(x.numel() for cls in (GPTNeoX, ScalarModel) for x in cls(shape).parameters())
    n_steps = cfg["n_epochs"] * cfg["n_minibatches"]
    found["optimizer"] = 7 * 4 * n_parameters * n_steps / bandwidth
    found["rest"] = 0.0
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the directory of a run of ppo.py on a CPU, by one process")
    run = parser.parse_args().run
    timing = read_jsonl(run / "timing.jsonl")[1:]
    require(timing and "seconds/policy" in timing[0], f"{run}: no phases of PPO in timing.jsonl, or one update alone")
    measured = {phase: statistics.median(row[f"seconds/{phase}"] for row in timing) for phase in PHASES}
    floor = floors(run, timing)

    print("| phase | measured, s | floor, s | share |\n|---|---|---|---|")
    for phase in PHASES:
        share = f"{floor[phase] / measured[phase]:.0%}" if floor[phase] else ""
        print(f"| {phase} | {measured[phase]:.3f} | {floor[phase]:.3f} | {share} |")
    total = sum(measured.values())
    print(f"| all | {total:.3f} | {sum(floor.values()):.3f} | {sum(floor.values()) / total:.0%} |")
    figure = plot.draw_phases({"measured": measured, "at the least": floor})
    figure.savefig(run / "phases.png")
    print(f"wrote {run / 'phases.png'}")


if __name__ == "__main__":
    main()
