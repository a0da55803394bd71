"""The variants beside PPO on the toy data: the same models, posts and number of episodes, three seeds.

    for s in 1 2 3; do make demo SEED=$s; done       # data, SFT and reward models
    python bench/variants.py                         # trains and samples; goes on where it was stopped
    python bench/variants.py --table                 # the table of variants/README.md, from what has been measured

Every arm has PPO's configuration of the toy (config/toy_ppo.py: 36 updates of 64 episodes) and its own defaults. Gold
is the mean over the 500 held-out posts of the score that no stage has seen, with its 95 % interval; reward is the
reward model's score, KL that to SFT in nats per response. Seconds are those from one row of metrics.jsonl to the next
(the median), memory is the process's largest resident set. Run it alone: both depend on what else the machine does.
Rows are appended to bench/variants.jsonl.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hub.files import read_json, read_jsonl, write_jsonl  # noqa: E402
from toy import gold  # noqa: E402

SEEDS = (1, 2, 3)
OUT = ROOT / "out" / "bench"
RESULTS = ROOT / "bench" / "variants.jsonl"
ARMS = {
    "ppo": ["ppo.py"],
    "truly_ppo": ["-m", "variants.truly_ppo"],
    "kl_penalty": ["-m", "variants.kl_penalty"],
    "grpo": ["-m", "variants.grpo"],
    "rloo": ["-m", "variants.rloo"],
}


def demo(seed):
    """Where `make demo SEED=...` has left data and models."""
    name = "toy" if seed == 1 else f"toy-{seed}"
    return ROOT / "out" / name


def run_arm(name, seed):
    directory = OUT / f"variant-{name}-{seed}"
    environment = {**os.environ, "TOY_OUT": str(demo(seed)), "OMP_WAIT_POLICY": "passive"}
    options = ["config/toy_ppo.py", f"--seed={seed}", f"--out_dir={directory}"]
    seconds, peak = measure([*ARMS[name], *options], environment, directory / "metrics.jsonl")

    model = f"--model={directory}/final"
    samples = f"--out_dir={directory}/samples"
    command = [sys.executable, "sample.py", "config/toy_sample.py", model, samples, "--seed=1"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    summary = read_json(directory / "samples" / "summary.json")
    stats = gold.evaluate_file(directory / "samples" / "samples.jsonl")
    row = {"name": name, "seed": seed, "gold": stats["gold_mean"], "interval": stats["gold_ci95"]}
    row["wins"] = stats["win_rate"]
    for key in ("score", "kl", "tokens", "eos"):
        row[key] = summary[key]
    row["seconds"] = seconds
    row["gib"] = peak
    write_jsonl(RESULTS, [row], "a")
    print(json.dumps(row), flush=True)


def measure(command, environment, metrics):
    """Run a training command: median seconds between rows of its metrics, and its peak memory in GiB."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    moments = []
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        n_rows = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if n_rows > len(moments):
            moments.append(time.perf_counter())
        time.sleep(0.01)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    gaps = [later - earlier for earlier, later in zip(moments, moments[1:])]
    return statistics.median(gaps), usage.ru_maxrss / 2**20


def table(rows):
    print("| | gold, seeds 1, 2, 3 | mean | wins | reward | KL | tokens | seconds per update | peak memory |")
    print("|" + "---|" * 9)
    for name in ARMS:
        found = [row for row in rows if row["name"] == name]
        if not found:
            continue
        golds = ", ".join(f"{row['gold']:.2f} ± {row['interval']:.2f}" for row in found)
        formats = {"gold": ".2f", "wins": ".1%", "score": ".2f", "kl": ".2f", "tokens": ".1f"}
        means = {key: statistics.mean(row[key] for row in found) for key in formats}
        cells = " | ".join(format(means[key], style) for key, style in formats.items())
        seconds = statistics.median(row["seconds"] for row in found)
        gib = max(row["gib"] for row in found)
        print(f"| {name} | {golds} | {cells} | {seconds:.2f} s | {gib:.2f} GiB |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of what has been measured")
    args = parser.parse_args()
    rows = read_jsonl(RESULTS) if RESULTS.exists() else []
    if args.table:
        table(rows)
        return
    done = {(row["name"], row["seed"]) for row in rows}
    # Seed by seed, so that all arms see the same state of the machine.
    for seed in SEEDS:
        for name in ARMS:
            if (name, seed) not in done:
                run_arm(name, seed)


if __name__ == "__main__":
    main()
