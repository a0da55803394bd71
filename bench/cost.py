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

QUERY, SUMMARY, SAMPLED = 347, 34, 53
SPEED, BANDWIDTH = 0.35 * 989e12, 0.6 * 3.35e12
ROLLOUT_ROWS = {"1b": 64, "2.8b": 32, "6.9b": 4}  # config/ppo_*.py: rows that decode together on each GPU
SFT_ROWS, PAIRS, EPISODES, EPOCHS, EVAL_ROWS = 116_722, 92_858, 1_000_000, 4, 6_447 + 6_553


def forward(size, tokens, logits):
    """Operations of a pass over a row of `tokens`, with logits at so many of its positions."""
    d, layers, _, vocabulary = PYTHIA[size]
    return 24 * layers * d**2 * tokens + 2 * layers * d * tokens**2 + 2 * vocabulary * d * logits


def decoding(size, rows):
    """Seconds to sample for `rows` queries on one GPU that decodes ROLLOUT_ROWS of them together."""
    d, layers, _, vocabulary = PYTHIA[size]
    weights = 2 * (12 * layers * d**2 + vocabulary * d)
    cache = 4 * layers * d * (QUERY + SAMPLED / 2)  # bytes of a row's keys and values
    together = ROLLOUT_ROWS[size]
    return rows / together * SAMPLED * (weights + together * cache) / BANDWIDTH


def hours(size):
    """GPU-hours of each stage."""
    whole, both = QUERY + SUMMARY, QUERY + SAMPLED
    sft = 3 * forward(size, whole, whole) * SFT_ROWS
    rm = (3 * 2 * PAIRS + 2 * SFT_ROWS) * forward(size, whole, 0)  # pairs; twice over the references
    dpo = (3 + 1) * 2 * PAIRS * forward(size, whole, SUMMARY)  # the policy learns, the reference scores
    # an episode: prefill; policy, reference, critic, reward model; then policy and critic learn
    scalar, language = forward(size, both, 0), forward(size, both, SAMPLED)
    episode = forward(size, QUERY, 1) + 2 * language + 2 * scalar + EPOCHS * 3 * (language + scalar)
    samples = EVAL_ROWS * (forward(size, QUERY, 1) + 2 * language + 2 * scalar)
    flops = {"SFT": sft, "RM": rm, "PPO": episode * EPISODES, "DPO": dpo, "samples of 3 models": 3 * samples}
    sampled = {"PPO": decoding(size, EPISODES), "samples of 3 models": 3 * decoding(size, EVAL_ROWS)}
    return {name: (x / SPEED + sampled.get(name, 0)) / 3600 for name, x in flops.items()}


def main():
    table = {size: hours(size) for size in ROLLOUT_ROWS}
    names = list(table["1b"])
    print("| size |", " | ".join(names), "| one seed | four seeds | days on 8 GPUs |")
    print("|---" * (len(names) + 4) + "|")
    for size, row in table.items():
        one, cells = sum(row.values()), " | ".join(f"{x:.1f}" for x in row.values())
        print(f"| {size} | {cells} | {one:.0f} | {4 * one:.0f} | {4 * one / (8 * 24):.1f} |")
    print(f"\nGPU-hours; all sizes and four seeds: {4 * sum(sum(row.values()) for row in table.values()):.0f}")


if __name__ == "__main__":
    main()
