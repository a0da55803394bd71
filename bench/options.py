"""Every option of PPO, of the reward model and of DPO, off against on, on the toy data with three seeds.

    for s in 1 2 3; do make demo SEED=$s; done                       # data, SFT and reward models
    python bench/options.py                                          # trains; goes on where it was stopped
    for s in 1 2 3; do python bench/options.py --seed=$s & done; wait
    python bench/options.py --table                                  # the table, from what has been trained

Runs are shorter than the demo's: PPO 20 updates of 64 episodes in 4 minibatches and one epoch, DPO 30 updates of 32
pairs, reward models 75 updates of 32 pairs (and then PPO on them). All samples (temperature 0.7, the first 250
held-out posts) are scored by the gold score, which no stage sees, by the demo's reward model of that seed, and by their
KL to SFT. Every run adds a row to bench/options.jsonl; what has a row there is not run again.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dpo  # noqa: E402
import ppo  # noqa: E402
import rm  # noqa: E402
import sample  # noqa: E402
from configurator import configure  # noqa: E402
from toy import gold  # noqa: E402

SEEDS = (1, 2, 3)
OUT, RESULTS = ROOT / "out" / "bench", ROOT / "bench" / "options.jsonl"
PPO = ["config/toy_ppo.py", f"--episodes={20 * 64}", "--n_minibatches=4", "--n_epochs=1", "--micro_batch_size=16",
       "--samples_every=0", "--eval_split="]  # fmt: skip
DPO = ["config/toy_dpo.py", "--train_split=train[:960]", "--episodes=0", "--eval_split="]
RM = ["config/toy_rm.py", "--train_split=train[:2400]", "--episodes=0"]
NORM = ["--reward_norm=normalize", "--reward_clip=0.8"]
PPO_MAX = [*NORM, "--whiten_advantages=false", "--critic_steps=4", "--critic_lr=9e-4", "--max_grad_norm=1.0",
           "--ptx_coef=0.1"]  # fmt: skip

# name: what is added to the stage's command line
PPO_OPTIONS = {
    "off": [],
    "adaptive KL (target 3, horizon 1000)": ["--kl_target=3", "--kl_horizon=1000"],
    "reward whitening": ["--whiten_rewards"],
    "advantages not whitened": ["--whiten_advantages=false"],
    "advantage clip 0.5": ["--advantage_clip=0.5"],
    "reward scaling": ["--reward_norm=scale"],
    "reward normalisation, clip 0.8": NORM,
    "TF-style Adam": ["--adam_style=tf", "--adam_eps=1e-5"],
    "torch-style Adam, the same epsilon": ["--adam_eps=1e-5"],
    "gradient clipping 1.0": ["--max_grad_norm=1.0"],
    "critic alone for 4 updates": ["--critic_steps=4"],
    "critic's learning rate x 3": ["--critic_lr=9e-4"],
    "entropy bonus 0.01": ["--entropy_coef=0.01"],
    "PPO-ptx 0.1": ["--ptx_coef=0.1"],
    "parts of PPO-max together": PPO_MAX,
    "ends after the first full stop": ["--truncate_token=PERIOD"],
}
RM_OPTIONS = {
    "off": [],
    "gain and bias": ["--normalize_std"],
    "label noise 0.1": ["--label_noise=0.1"],
    "targets within 0.5 -+ 0.1": ["--target_clamp=0.1"],
}
DPO_OPTIONS = {
    "off": [],
    "cDPO 0.1": ["--label_smoothing=0.1"],
    "robust 0.1": ["--loss_type=robust", "--label_smoothing=0.1"],
    **{name: [f"--loss_type={name}"] for name in ("hinge", "ipo", "ipo_norm", "apo_zero")},
    "SFT term 1.0": ["--sft_coef=1.0"],
}  # fmt: skip
GROUPS = {"ppo": PPO_OPTIONS, "dpo": DPO_OPTIONS, "rm": RM_OPTIONS}


def demo(seed):
    return ROOT / "out" / (f"toy-{seed}" if seed > 1 else "toy")


def place(group, name, seed):
    return OUT / f"{group}-{re.sub('[^a-z0-9.]+', '-', name.lower())}-{seed}"


def train(group, name, seed, directory):
    """Train the option's policy in `directory`; returns its reward model's held-out accuracy, if it trained one."""
    extra, common, accuracy = list(GROUPS[group][name]), [f"--seed={seed}", f"--out_dir={directory}"], None
    if "--truncate_token=PERIOD" in extra:
        vocab = json.loads((demo(seed) / "data" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        extra = [f"--truncate_token={vocab['.']}"]
    if group == "dpo":
        dpo.main(configure(dpo.Config, [*DPO, *common, *extra]))
    elif group == "rm":
        rm.main(configure(rm.Config, [*RM, f"--seed={seed}", f"--out_dir={directory}-rm", *extra]))
        accuracy = json.loads(Path(f"{directory}-rm/eval.json").read_text())["eval/accuracy"]
        ppo.main(configure(ppo.Config, [*PPO, *common, f"--reward_model={directory}-rm/final"]))
    else:
        ppo.main(configure(ppo.Config, [*PPO, *common, *extra]))
    return accuracy


def run(group, name, seed):
    os.environ["TOY_OUT"] = str(demo(seed))
    directory = place(group, name, seed)
    accuracy = train(group, name, seed, directory)
    argv = ["config/toy_sample.py", f"--model={directory}/final", "--split=validation[:250]", "--seed=1"]
    sample.main(configure(sample.Config, [*argv, f"--out_dir={directory}/samples"]))
    summary = json.loads((directory / "samples" / "summary.json").read_text())
    stats = gold.evaluate_file(directory / "samples" / "samples.jsonl")
    row = dict(group=group, name=name, seed=seed, gold=stats["gold_mean"], reward=summary["score"], kl=summary["kl"],
               tokens=summary["tokens"], eos=summary["eos"], accuracy=accuracy)  # fmt: skip
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def table(rows):
    """Print Markdown: a row per option, with the mean over seeds, and the change of gold in each seed."""
    for group, options in GROUPS.items():
        print(f"\n| {group} | gold | change (by seed) | reward | KL | tokens |{' accuracy |' * (group == 'rm')}")
        print("|---" * (6 + (group == "rm")) + "|")
        off = {row["seed"]: row for row in rows if row["group"] == group and row["name"] == "off"}
        for name in options:
            found = [row for row in rows if row["group"] == group and row["name"] == name]
            if not found:
                continue
            mean = {key: sum(row[key] for row in found) / len(found) for key in ("gold", "reward", "kl", "tokens")}
            by_seed = ", ".join(f"{row['gold'] - off[row['seed']]['gold']:+.2f}" for row in found if name != "off")
            change = mean["gold"] - sum(row["gold"] for row in off.values()) / len(off)
            cells = [name, f"{mean['gold']:.2f}", f"{change:+.2f} ({by_seed})" if by_seed else "",
                     *(f"{mean[key]:.2f}" for key in ("reward", "kl")), f"{mean['tokens']:.1f}"]  # fmt: skip
            if group == "rm":
                cells.append(f"{sum(row['accuracy'] for row in found) / len(found):.3f}")
            print("| " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seed", type=int, choices=SEEDS)
    args = parser.parse_args()
    os.chdir(ROOT)
    OUT.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if args.table:
        return table(sorted(rows, key=lambda row: row["seed"]))
    done = {(row["group"], row["name"], row["seed"]) for row in rows}
    seeds = [args.seed] if args.seed else SEEDS
    for group, name, seed in [(g, name, seed) for g in GROUPS for name in GROUPS[g] for seed in seeds]:
        if (group, name, seed) not in done:
            with open(OUT / f"log-{seed}.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
                run(group, name, seed)
            print(group, name, seed, flush=True)


if __name__ == "__main__":
    main()
