"""Every option of PPO, of the reward model and of DPO, off against on, on the toy data with three seeds.

    for s in 1 2 3; do make demo CONFIG=lab/config OUT=out/lab-toy-$s SEED=$s; done   # data, SFT and reward models
    python bench/options.py                                          # trains; goes on where it was stopped
    for s in 1 2 3; do python bench/options.py --seed=$s & done; wait
    python bench/options.py --table                                  # the table, from what has been trained

Runs are short: PPO 20 updates of 64 episodes in 4 minibatches and one epoch, DPO 30 updates of 32
pairs, reward models 75 updates of 32 pairs (and then PPO on them). All samples (temperature 0.7, the first 250
held-out posts) are scored by the gold score, which no stage sees, by the reward model of that seed, and by their
KL to SFT. Every run adds a row to bench/options.jsonl; what has a row there is not run again.
"""

import argparse
import contextlib
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
from hub.files import read_json, read_jsonl, write_jsonl  # noqa: E402
from toy import gold  # noqa: E402
from variants import dpo_losses, ppo_max  # noqa: E402

SEEDS = (1, 2, 3)
OUT = ROOT / "out" / "bench"
RESULTS = ROOT / "bench" / "options.jsonl"
PPO = ["lab/config/toy_ppo.py", f"--episodes={20 * 64}", "--n_minibatches=4", "--n_epochs=1", "--micro_batch_size=16",
       "--samples_every=0", "--eval_split="]  # fmt: skip
DPO = ["lab/config/toy_dpo.py", "--train_split=train[:960]", "--episodes=0", "--eval_split="]
RM = ["lab/config/toy_rm.py", "--train_split=train[:2400]", "--episodes=0"]
NORM = ["--reward_norm=normalize", "--reward_clip=0.8"]
PPO_MAX = [*NORM, "--whiten_advantages=false", "--critic_steps=4", "--critic_lr=9e-4", "--max_grad_norm=1.0",
           "--ptx_coef=0.1"]  # fmt: skip

# name: the stage, or the variant of it that has the option, and what is added to its command line
PPO_OPTIONS = {
    "off": (ppo, []),
    "adaptive KL (target 3, horizon 1000)": (ppo, ["--kl_target=3", "--kl_horizon=1000"]),
    "reward whitening": (ppo, ["--whiten_rewards"]),
    "advantages not whitened": (ppo, ["--whiten_advantages=false"]),
    "advantage clip 0.5": (ppo_max, ["--advantage_clip=0.5"]),
    "reward scaling": (ppo_max, ["--reward_norm=scale"]),
    "reward normalisation, clip 0.8": (ppo_max, NORM),
    "TF-style Adam": (ppo, ["--adam_style=tf", "--adam_eps=1e-5"]),
    "torch-style Adam, the same epsilon": (ppo, ["--adam_eps=1e-5"]),
    "gradient clipping 1.0": (ppo, ["--max_grad_norm=1.0"]),
    "critic alone for 4 updates": (ppo, ["--critic_steps=4"]),
    "critic's learning rate x 3": (ppo, ["--critic_lr=9e-4"]),
    "entropy bonus 0.01": (ppo, ["--entropy_coef=0.01"]),
    "PPO-ptx 0.1": (ppo_max, ["--ptx_coef=0.1"]),
    "parts of PPO-max together": (ppo_max, PPO_MAX),
    "ends after the first full stop": (ppo, ["--truncate_token=PERIOD"]),
}
RM_OPTIONS = {
    "off": (rm, []),
    "gain and bias": (rm, ["--normalize_std"]),
    "label noise 0.1": (rm, ["--label_noise=0.1"]),
    "targets within 0.5 -+ 0.1": (rm, ["--target_clamp=0.1"]),
}
DPO_OPTIONS = {
    "off": (dpo, []),
    "cDPO 0.1": (dpo, ["--label_smoothing=0.1"]),
    "robust 0.1": (dpo_losses, ["--loss_type=robust", "--label_smoothing=0.1"]),
    "hinge": (dpo, ["--loss_type=hinge"]),
    "ipo": (dpo, ["--loss_type=ipo"]),
    "ipo_norm": (dpo_losses, ["--loss_type=ipo_norm"]),
    "apo_zero": (dpo_losses, ["--loss_type=apo_zero"]),
    "SFT term 1.0": (dpo, ["--sft_coef=1.0"]),
}
GROUPS = {"ppo": PPO_OPTIONS, "dpo": DPO_OPTIONS, "rm": RM_OPTIONS}


# ---------------------------------------------------------------------------- runs


def demo(seed):
    """Where the first line above has put data and models."""
    return ROOT / "out" / f"lab-toy-{seed}"


def place(group, name, seed):
    return OUT / f"{group}-{re.sub('[^a-z0-9.]+', '-', name.lower())}-{seed}"


def train(group, name, seed, directory):
    """Train the option's policy in `directory`; returns its reward model's held-out accuracy, if it trained one."""
    stage, options = GROUPS[group][name]
    options = [option.replace("PERIOD", full_stop(seed)) for option in options]
    common = [f"--seed={seed}", f"--out_dir={directory}"]
    if group == "rm":
        reward_model = f"{directory}-rm"
        stage.main(configure(stage.Config, [*RM, f"--seed={seed}", f"--out_dir={reward_model}", *options]))
        ppo.main(configure(ppo.Config, [*PPO, *common, f"--reward_model={reward_model}/final"]))
        return read_json(f"{reward_model}/eval.json")["eval/accuracy"]
    shorter = PPO if group == "ppo" else DPO
    stage.main(configure(stage.Config, [*shorter, *common, *options]))
    return None


def full_stop(seed):
    """The id of "."."""
    return str(read_json(demo(seed) / "data" / "tokenizer.json")["model"]["vocab"]["."])


def run(group, name, seed):
    """Train, sample and measure; adds a row to RESULTS."""
    os.environ["TOY_OUT"] = str(demo(seed))
    directory = place(group, name, seed)
    accuracy = train(group, name, seed, directory)
    argv = ["lab/config/toy_sample.py", f"--model={directory}/final", "--split=validation[:250]", "--seed=1"]
    sample.main(configure(sample.Config, [*argv, f"--out_dir={directory}/samples"]))
    summary = read_json(directory / "samples" / "summary.json")
    stats = gold.evaluate_file(directory / "samples" / "samples.jsonl")
    row = {
        "group": group,
        "name": name,
        "seed": seed,
        "gold": stats["gold_mean"],
        "reward": summary["score"],
        "kl": summary["kl"],
        "tokens": summary["tokens"],
        "eos": summary["eos"],
        "accuracy": accuracy,
    }
    write_jsonl(RESULTS, [row], "a")
    print(row, flush=True)


def run_missing(rows, seeds):
    """Run what has no row yet; what is printed goes to a log for each seed."""
    done = {(row["group"], row["name"], row["seed"]) for row in rows}
    for group, options in GROUPS.items():
        for name in options:
            for seed in seeds:
                if (group, name, seed) in done:
                    continue
                with open(OUT / f"log-{seed}.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
                    run(group, name, seed)
                print(group, name, seed, flush=True)


# ---------------------------------------------------------------------------- the table


def print_tables(rows):
    """Markdown: a row per option, with the mean over seeds, and the change of gold in each seed."""
    for group, options in GROUPS.items():
        titles = [group, "gold", "change (by seed)", "reward", "KL", "tokens"]
        if group == "rm":
            titles.append("accuracy")
        print(f"\n| {' | '.join(titles)} |")
        print("|---" * len(titles) + "|")
        off = select(rows, group, "off")
        for name in options:
            found = select(rows, group, name)
            if found:
                print(f"| {' | '.join(cells(group, name, found, off))} |")


def select(rows, group, name):
    """An option's rows, by seed."""
    found = [row for row in rows if row["group"] == group and row["name"] == name]
    return sorted(found, key=lambda row: row["seed"])


def cells(group, name, found, off):
    row = [name, f"{mean(found, 'gold'):.2f}", ""]
    if name != "off":
        off_by_seed = {other["seed"]: other["gold"] for other in off}
        changes = [f"{one['gold'] - off_by_seed[one['seed']]:+.2f}" for one in found]
        row[2] = f"{mean(found, 'gold') - mean(off, 'gold'):+.2f} ({', '.join(changes)})"
    row += [f"{mean(found, 'reward'):.2f}", f"{mean(found, 'kl'):.2f}", f"{mean(found, 'tokens'):.1f}"]
    if group == "rm":
        row.append(f"{mean(found, 'accuracy'):.3f}")
    return row


def mean(rows, key):
    return sum(row[key] for row in rows) / len(rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seed", type=int, choices=SEEDS)
    args = parser.parse_args()
    os.chdir(ROOT)
    OUT.mkdir(parents=True, exist_ok=True)
    rows = read_jsonl(RESULTS) if RESULTS.exists() else []
    if args.table:
        print_tables(rows)
    else:
        run_missing(rows, [args.seed] if args.seed else SEEDS)


if __name__ == "__main__":
    main()
