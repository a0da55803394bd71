"""The table that ends `make demo`: references, SFT, PPO and DPO on the held-out posts.

    python toy/report.py out/toy

reads {sft,ppo,dpo}/samples/samples.jsonl below that directory. Gold is the score that the labels came from and
that no stage has seen; wins are by gold against the reference, ties count half; reward is the reward model's;
KL is to the SFT model, in nats per response.
"""
import json
import sys
from pathlib import Path

if __package__:
    from . import gold
else:  # run as a script: Python then looks for modules in toy/ itself
    import gold

STAGES = ("sft", "ppo", "dpo")
COLUMNS = f"{'':10} {'gold':>14} {'wins':>6} {'reward':>7} {'KL':>6} {'tokens':>7} {'EOS':>6}"


def read(path):
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: cannot be read ({error}); run sample.py with --out_dir={path.parent} first")


def as_written(row):
    """A row of samples, its reference in the place of the response, as if a policy had written it."""
    return {
        "query": row["query"],
        "response": row["reference"],
        "reference": row["reference"],
        "score": row["reference_score"],
        "tokens": row["reference_tokens"],
        "eos": True,
    }


def mean(rows, key):
    return sum(row[key] for row in rows) / len(rows)


def line(name, rows, kl):
    stats = gold.evaluate(rows)
    score = f"{stats['gold_mean']:6.2f} ± {stats['gold_ci95']:4.2f}"
    wins = f"{stats['win_rate']:6.1%}"
    if name == "reference":
        wins = f"{'-':>6}"  # against itself
    numbers = f"{mean(rows, 'score'):7.2f} {kl:>6} {mean(rows, 'tokens'):7.1f} {mean(rows, 'eos'):6.1%}"
    return f"{name:10} {score:>14} {wins} {numbers}"


def main(directory):
    paths = {stage: Path(directory) / stage / "samples" / "samples.jsonl" for stage in STAGES}
    rows = {stage: read(path) for stage, path in paths.items()}
    references = [as_written(row) for row in rows["sft"]]

    print(f"{len(references)} held-out posts\n{COLUMNS}")
    print(line("reference", references, "-"))
    for stage in STAGES:
        print(line(stage.upper(), rows[stage], f"{mean(rows[stage], 'kl'):.2f}"))
    print("gold: the score behind the labels, at most 4; wins: by gold, against the reference; reward: the reward")
    print("model's score; KL: to the SFT model, in nats per response; tokens: the mean length; EOS: the share of")
    print("responses that end")

    print(f"\n{references[0]['query']}")
    print(f"{'reference':10} {references[0]['response']}")
    for stage in STAGES:
        print(f"{stage.upper():10} {rows[stage][0]['response']}")
    print("\nall samples:", *paths.values(), sep="\n  ")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "out/toy")
