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

COLUMNS = f"{'':10} {'gold':>14} {'wins':>6} {'reward':>7} {'KL':>6} {'tokens':>7} {'EOS':>6}"


def read(path):
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: cannot be read ({error}); run sample.py with --out_dir={path.parent} first")


def mean(rows, key):
    return sum(row[key] for row in rows) / len(rows)


def line(name, rows, kl):
    stats = gold.evaluate(rows)
    wins = f"{stats['win_rate']:6.1%}"
    score = f"{stats['gold_mean']:6.2f} ± {stats['gold_ci95']:4.2f}"
    numbers = f"{mean(rows, 'score'):7.2f} {kl:>6} {mean(rows, 'tokens'):7.1f} {mean(rows, 'eos'):6.1%}"
    return f"{name:10} {score:>14} {wins} {numbers}"


def main(directory):
    samples = {name: Path(directory) / name / "samples" / "samples.jsonl" for name in ("sft", "ppo", "dpo")}
    rows = {name: read(path) for name, path in samples.items()}
    # the references, as if a policy had written them
    copied = {"response": "reference", "score": "reference_score", "tokens": "reference_tokens"}
    references = [{**row, **{key: row[of] for key, of in copied.items()}, "eos": True} for row in rows["sft"]]
    print(f"{len(references)} held-out posts\n{COLUMNS}")
    print(line("reference", references, "-"))
    for name in rows:
        print(line(name.upper(), rows[name], f"{mean(rows[name], 'kl'):.2f}"))
    print("gold: the score behind the labels, at most 4; wins: by gold, against the reference; reward: the model's;")
    print("KL: to the SFT model, in nats per response; tokens: the mean length; EOS: the share of responses that end")
    print("\nsamples:", *samples.values(), sep="\n  ")
    for name in rows:
        print(f"\n{name.upper()}: {rows[name][0]['response']}", end="")
    print(f"\nreference: {references[0]['response']}\npost: {references[0]['query']}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "out/toy")
