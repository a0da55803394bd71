"""What the paper's table would cost on H100s: estimated from FLOPs and bytes, not measured.

    python bench/cost.py

Counts the passes that the stages make over rows of average length: 347 tokens of query and 34 of summary (means over
1,362 posts of the TL;DR data, by Pythia's tokenizer), 53 tokens sampled. A pass over T tokens takes 24 L d^2 T
operations in the blocks, 2 L d T^2 in causal attention and 2 V d for each position that has logits; backward takes
twice as many. Training and scoring are taken to run at 35 % of 989e12 operations per second, decoding to read weights
and cache at 60 % of 3.35e12 bytes per second. Communication, data and checkpoints are not counted.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from plan import PYTHIA  # noqa: E402

QUERY = 347  # tokens of a query, of a reference summary, and sampled ones
SUMMARY = 34
SAMPLED = 53
SPEED = 0.35 * 989e12  # operations per second
BANDWIDTH = 0.6 * 3.35e12  # bytes per second
ROLLOUT_ROWS = {"1b": 64, "2.8b": 32, "6.9b": 4}  # config/ppo_*.py: rows that decode together on each GPU
SFT_ROWS = 116_722
PAIRS = 92_858
EPISODES = 1_000_000
EPOCHS = 4
EVAL_ROWS = 6_447 + 6_553


def forward(size, tokens, logits):
    """Operations of a pass over a row of `tokens`, with logits at so many of its positions."""
    d, layers, _, vocabulary = PYTHIA[size]
    blocks = 24 * layers * d**2 * tokens
    attention = 2 * layers * d * tokens**2
    return blocks + attention + 2 * vocabulary * d * logits


def decoding(size, rows):
    """Seconds to sample for `rows` queries on one GPU that decodes ROLLOUT_ROWS of them together."""
    d, layers, _, vocabulary = PYTHIA[size]
    weights = 2 * (12 * layers * d**2 + vocabulary * d)
    cache = 4 * layers * d * (QUERY + SAMPLED / 2)  # bytes of a row's keys and values
    together = ROLLOUT_ROWS[size]
    n_batches = rows / together
    return n_batches * SAMPLED * (weights + together * cache) / BANDWIDTH


def hours(size):
    """GPU-hours of each stage."""
    whole = QUERY + SUMMARY
    both = QUERY + SAMPLED
    sft = 3 * forward(size, whole, whole) * SFT_ROWS
    rm = (3 * 2 * PAIRS + 2 * SFT_ROWS) * forward(size, whole, 0)  # pairs; twice over the references
    dpo = (3 + 1) * 2 * PAIRS * forward(size, whole, SUMMARY)  # the policy learns, the reference scores

    # An episode: prefill; policy, reference, critic, reward model; then policy and critic learn.
    prefill = forward(size, QUERY, 1)
    scalar = forward(size, both, 0)
    language = forward(size, both, SAMPLED)
    scoring = 2 * language + 2 * scalar
    episode = prefill + scoring + EPOCHS * 3 * (language + scalar)
    samples = 3 * EVAL_ROWS * (prefill + scoring)

    def in_hours(flops, seconds=0):
        return (flops / SPEED + seconds) / 3600

    return {
        "SFT": in_hours(sft),
        "RM": in_hours(rm),
        "PPO": in_hours(episode * EPISODES, decoding(size, EPISODES)),
        "DPO": in_hours(dpo),
        "samples of 3 models": in_hours(samples, 3 * decoding(size, EVAL_ROWS)),
    }


def main():
    table = {size: hours(size) for size in ROLLOUT_ROWS}
    names = list(table["1b"])
    print("| size |", " | ".join(names), "| one seed | four seeds | days on 8 GPUs |")
    print("|---" * (len(names) + 4) + "|")
    total = 0
    for size, row in table.items():
        cells = " | ".join(f"{x:.1f}" for x in row.values())
        one = sum(row.values())
        print(f"| {size} | {cells} | {one:.0f} | {4 * one:.0f} | {4 * one / (8 * 24):.1f} |")
        total += 4 * one
    print(f"\nGPU-hours; all sizes and four seeds: {total:.0f}")


if __name__ == "__main__":
    main()
