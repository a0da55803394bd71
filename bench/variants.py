"""The variants beside PPO and DPO on the toy data: the same models, posts and number of episodes, three seeds.

    for s in 1 2 3; do make demo CONFIG=lab/config OUT=out/lab-toy-$s SEED=$s; done       # data, SFT and reward models
    python bench/variants.py                         # trains and samples, an arm per core; goes on where it was stopped
    python bench/variants.py --speed                 # seconds and memory, by turns; run it alone
    python bench/variants.py --table                 # the tables of variants/README.md, from what has been measured

Every arm has PPO's or DPO's configuration of the laboratory's toy (lab/config/toy_ppo.py: 36 updates of 64 episodes;
lab/config/toy_dpo.py: 150 updates of 32 pairs) and its own defaults, but for what its line here says. Gold is the mean
over the 500 held-out posts of the score that no stage has seen, with its 95 % interval; reward is the reward model's
score, KL that to SFT in nats per response. Rows are appended to bench/variants.jsonl.

Seconds are those from one row of metrics.jsonl to the next, the median of three rounds in which all arms take a few
updates each, one after the other; memory is the process's largest resident set, less that of one that has imported the
stage and done nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hub.files import read_json, read_jsonl, write_jsonl  # noqa: E402
from toy import gold  # noqa: E402

SEEDS = (1, 2, 3)
ROUNDS = 3
UPDATES = 4  # of a round
OUT = ROOT / "out" / "bench"
RESULTS = ROOT / "bench" / "variants.jsonl"


class Arm(NamedTuple):
    launch: str  # what follows "python", without the configuration
    what: str
    test: str


PPO_ARMS = {
    "ppo": Arm("ppo.py", "PPO, arXiv:1707.06347", "tests/test_details.py"),
    "truly_ppo": Arm("-m variants.truly_ppo", "rollback beyond the clip (PPO-RB), arXiv:1903.07940",
                     "test_rollback_matches_numbers_by_hand"),
    "trust_region": Arm("-m variants.truly_ppo --form=trust_region", "no gradient from a KL on (TR-PPO)",
                        "test_trust_region_matches_numbers_by_hand"),
    "trust_region_rollback": Arm("-m variants.truly_ppo --form=trust_region_rollback --delta=0.03 --alpha=0.05",
                                 "a slope back from there (Truly PPO)", "test_trust_region_matches_numbers_by_hand"),
    "truly": Arm("-m variants.truly_ppo --form=truly --delta=0.03", "the KL itself back from there (its authors' code)",
                 "test_trust_region_matches_numbers_by_hand"),
    "kl_penalty": Arm("-m variants.kl_penalty --critic_steps=0",
                      "no clip, a penalty on KL(old, new), arXiv:1707.06347 eq. 8",
                      "test_kl_penalty_estimates_the_kl_from_old_to_new"),
    "early_stop": Arm("-m variants.early_stop", "an update ends at a KL, Spinning Up",
                      "test_early_stop_leaves_out_the_later_steps"),
    "k2_in_loss": Arm("-m variants.kl_estimators --kl_estimator=k2 --kl_in=loss",
                      "the penalty in the loss, by k2, arXiv:2510.01555", "tests/test_kl_lab.py"),
    "k3_in_loss": Arm("-m variants.kl_estimators --kl_estimator=k3 --kl_in=loss", "the same by k3, arXiv:2512.21852",
                      "tests/test_kl_lab.py"),
    "k3_weighted": Arm("-m variants.kl_estimators --kl_estimator=k3 --kl_in=weighted_loss",
                       "the same, times the ratio, arXiv:2512.02556", "tests/test_kl_lab.py"),
    "reference_ema": Arm("-m variants.reference_ema --ema=0.02", "the reference follows, arXiv:2404.10719",
                         "test_a_reference_that_follows_is_in_the_checkpoint"),
    "importance": Arm("-m variants.importance --dtype=bfloat16",
                      "weights between sampler and trainer, arXiv:1802.01561, 2510.18855",
                      "test_importance_weights_undo_another_sampler"),
    "ptx": Arm("-m variants.ptx --ptx_coef=0.1", "an SFT loss mixed in, arXiv:2203.02155 eq. 2",
               "test_ptx_adds_the_sft_loss"),
    "ppo_max": Arm("-m variants.ppo_max --reward_norm=normalize --reward_clip=0.8 --ptx_coef=0.1",
                   "scores normalised and clipped, with ptx, arXiv:2307.04964",
                   "test_ppo_max_recipe_goes_on_top_of_any_configuration"),
    "reinforce_pp": Arm("-m variants.reinforce_pp", "no critic, whitening is the baseline, arXiv:2501.03262",
                        "test_reinforce_pp_pays_all_that_comes_after"),
    "rloo": Arm("-m variants.rloo", "no critic, the other answers are the baseline, arXiv:2402.14740",
                "test_rloo_takes_the_others_as_the_baseline"),
    "grpo": Arm("-m variants.grpo --group_size=4", "scores scaled within a group, k3 in the loss, arXiv:2402.03300",
                "test_grpo_scores_an_answer_against_its_group"),
    "dr_grpo": Arm("-m variants.dr_grpo --group_size=4 --kl_coef=0.05",
                   "without deviation and length, arXiv:2503.20783",
                   "test_dr_grpo_divides_by_a_constant"),
    "gspo": Arm("-m variants.sequence_ratio --group_size=4 --kl_coef=0.05",
                "the ratio of a whole answer (GSPO), arXiv:2507.18071",
                "test_gspo_takes_the_mean_log_ratio"),
    "clip_higher": Arm("-m variants.sequence_ratio --group_size=4 --kl_coef=0.05 --ratio_of=token --clip_low=0.2 "
                       "--clip_high=0.28", "the clip of DAPO, wider above, arXiv:2503.14476",
                       "test_clip_higher_bounds_the_two_sides_apart"),
    "online_dpo": Arm("-m variants.online_dpo --n_minibatches=1", "DPO on fresh pairs, arXiv:2402.04792",
                      "test_online_dpo_has_the_gradient_of_dpo"),
}  # fmt: skip
FAMILY = "test_dpo_loss_of_each_type_matches_table"
DPO_ARMS = {
    "dpo": Arm("dpo.py", "DPO, arXiv:2305.18290", "tests/test_math.py"),
    "hinge": Arm("dpo.py --loss_type=hinge", "no pull beyond a margin, arXiv:2309.06657", FAMILY),
    "ipo": Arm("dpo.py --loss_type=ipo", "the margin goes to a number (IPO), arXiv:2310.12036", FAMILY),
    "ipo_norm": Arm("-m variants.dpo_losses --loss_type=ipo_norm --beta=1", "IPO per token, as in newer TRL", FAMILY),
    "sigmoid_norm": Arm("-m variants.dpo_losses --loss_type=sigmoid_norm --beta=1", "DPO per token", FAMILY),
    "robust": Arm("-m variants.dpo_losses --loss_type=robust --label_smoothing=0.1",
                  "labels may be wrong, without bias, arXiv:2403.00409", "test_robust_dpo_undoes_flipped_labels"),
    "cdpo": Arm("dpo.py --label_smoothing=0.1", "labels may be wrong (cDPO)", FAMILY),
    "exo_pair": Arm("-m variants.dpo_losses --loss_type=exo_pair --label_smoothing=0.001",
                    "the reverse KL to the label, arXiv:2402.00856", FAMILY),
    "nca_pair": Arm("-m variants.dpo_losses --loss_type=nca_pair",
                    "chosen rise, both fall a little, arXiv:2402.05369", FAMILY),
    "bco_pair": Arm("-m variants.dpo_losses --loss_type=bco_pair",
                    "a classifier of responses, arXiv:2404.04656", FAMILY),
    "sppo_hard": Arm("-m variants.dpo_losses --loss_type=sppo_hard",
                     "rewards go to 1/2 and -1/2, arXiv:2405.00675", FAMILY),
    "apo_zero": Arm("-m variants.dpo_losses --loss_type=apo_zero",
                    "chosen rise, rejected fall, arXiv:2408.06266", FAMILY),
    "apo_down": Arm("-m variants.dpo_losses --loss_type=apo_down",
                    "both fall, rejected more, arXiv:2408.06266", FAMILY),
    "discopop": Arm("-m variants.dpo_losses --loss_type=discopop",
                    "found by a language model, arXiv:2406.08414", FAMILY),
    "mpo": Arm("-m variants.dpo_losses --loss_type=sigmoid,bco_pair,sft --loss_weights=0.8,0.2,1",
               "three at once, arXiv:2411.10442", "test_dpo_mixes_losses_and_sft"),
    "aot": Arm("-m variants.aot", "sorted over the batch, arXiv:2406.05882", "test_aot_sorts_the_whole_batch"),
    "aot_unpaired": Arm("-m variants.aot --loss_type=aot_unpaired", "the same of single responses",
                        "test_aot_sorts_the_whole_batch"),
    "tr_dpo": Arm("-m variants.tr_dpo --sync_every=30", "the reference follows, arXiv:2404.09656",
                  "test_tr_dpo_begins_anew_after_each_move"),
    "forward_kl": Arm("-m variants.f_dpo --divergence=forward_kl", "pulled by the forward KL, arXiv:2309.16240",
                      "test_f_dpo_rewards_are_those_of_the_best_policy"),
    "js": Arm("-m variants.f_dpo --divergence=js", "by the Jensen-Shannon divergence",
              "test_f_dpo_rewards_are_those_of_the_best_policy"),
    "wpo": Arm("-m variants.wpo", "pairs weigh by their probability, arXiv:2406.11827",
               "test_wpo_weighs_pairs_by_the_policy"),
    "bco": Arm("-m variants.bco", "bco_pair with a threshold, arXiv:2404.04656",
               "test_bco_threshold_is_the_mean_reward_so_far"),
}  # fmt: skip


def demo(seed):
    """Where the first line above has left data and models."""
    return ROOT / "out" / f"lab-toy-{seed}"


def environment(seed, threads):
    return {**os.environ, "TOY_OUT": str(demo(seed)), "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads)}


def command(stage, arm, seed, directory):
    script, *options = arm.launch.split()
    if script == "-m":
        script = f"-m {options.pop(0)}"
    return [*script.split(), f"lab/config/toy_{stage}.py", f"--seed={seed}", f"--out_dir={directory}", *options]


# ---------------------------------------------------------------------------- gold


def run_arm(stage, name, arm, seed, threads):
    directory = OUT / f"variant-{name}-{seed}"
    env = environment(seed, threads)
    options = dict(cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run([sys.executable, *command(stage, arm, seed, directory)], **options)

    model = f"--model={directory}/final"
    samples = f"--out_dir={directory}/samples"
    subprocess.run([sys.executable, "sample.py", "lab/config/toy_sample.py", model, samples, "--seed=1"], **options)
    summary = read_json(directory / "samples" / "summary.json")
    stats = gold.evaluate_file(directory / "samples" / "samples.jsonl")
    row = {"name": name, "seed": seed, "gold": stats["gold_mean"], "interval": stats["gold_ci95"]}
    row["wins"] = stats["win_rate"]
    for key in ("score", "kl", "tokens", "eos"):
        row[key] = summary[key]
    write_jsonl(RESULTS, [row], "a")
    print(json.dumps(row), flush=True)


def run_gold(arms, names, workers):
    done = {(row["name"], row["seed"]) for row in results("gold")}
    threads = max(1, os.cpu_count() // workers)
    with ThreadPoolExecutor(workers) as pool:
        waiting = []
        for seed in SEEDS:
            for name, (stage, arm) in arms.items():
                if (name, seed) not in done and name in names:
                    waiting.append(pool.submit(run_arm, stage, name, arm, seed, threads))
        for future in waiting:
            future.result()


# ---------------------------------------------------------------------------- speed


def run_speed(arms, names):
    idle = imported_gib()
    done = {(row["name"], row["round"]) for row in results("seconds")}
    for number in range(ROUNDS):
        for name, (stage, arm) in arms.items():
            if (name, number) in done or name not in names:
                continue
            directory = OUT / f"speed-{name}-{number}"
            size = 64 if stage == "ppo" else 32
            call = [*command(stage, arm, 1, directory), f"--episodes={UPDATES * size}", "--eval_split="]
            seconds, peak = measure(call, environment(1, os.cpu_count()), directory / "metrics.jsonl")
            row = {"name": name, "round": number, "seconds": seconds, "gib": peak - idle}
            write_jsonl(RESULTS, [row], "a")
            print(json.dumps(row), flush=True)


def imported_gib():
    """The resident set of a process that has imported a stage and what it loads its data with."""
    code = "import ppo, datasets, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(found.stdout)


def measure(call, env, metrics):
    """Run a training command: median seconds between rows of its metrics, and its peak memory in GiB."""
    process = subprocess.Popen(
        [sys.executable, *call], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
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
        raise SystemExit(f"{' '.join(call)} failed")
    gaps = [later - earlier for earlier, later in zip(moments, moments[1:])]
    return statistics.median(gaps), usage.ru_maxrss / 2**20


# ---------------------------------------------------------------------------- tables


def results(key):
    """The rows that have been measured and hold `key`."""
    rows = read_jsonl(RESULTS) if RESULTS.exists() else []
    return [row for row in rows if key in row]


def print_table(arms):
    titles = "launch, what changes, test, gold (seeds 1 2 3), wins, reward, KL, tokens, seconds, GiB"
    print("|", " | ".join(titles.split(", ")), "|")
    print("|" + "---|" * len(titles.split(", ")))
    for name, arm in arms.items():
        print("|", " | ".join([f"`{arm.launch}`", arm.what, f"`{arm.test}`", *cells(name)]), "|")


def cells(name):
    found = sorted((row for row in results("gold") if row["name"] == name), key=lambda row: row["seed"])
    rounds = [row for row in results("seconds") if row["name"] == name]
    texts = [""] * 5
    if found:
        seeds = " ".join(f"{row['gold']:.2f}" for row in found)
        texts = [f"{statistics.mean(row['gold'] for row in found):.2f} ({seeds})"]
        for key, style in {"wins": ".0%", "score": ".2f", "kl": ".2f", "tokens": ".1f"}.items():
            texts.append(format(statistics.mean(row[key] for row in found), style))
    times = ["", ""]
    if rounds:
        times = [f"{statistics.median(row[key] for row in rounds):.2f}" for key in ("seconds", "gib")]
    return [*texts, *times]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="arms; none: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="arms at a time, for gold")
    parser.add_argument("--speed", action="store_true", help="measure seconds and memory")
    parser.add_argument("--table", action="store_true", help="print the tables of what has been measured")
    args = parser.parse_args()
    arms = {name: ("ppo", arm) for name, arm in PPO_ARMS.items()}
    arms.update({name: ("dpo", arm) for name, arm in DPO_ARMS.items()})
    names = args.names or list(arms)
    if args.table:
        print_table(PPO_ARMS)
        print()
        print_table(DPO_ARMS)
    elif args.speed:
        run_speed(arms, names)
    else:
        run_gold(arms, names, args.workers)


if __name__ == "__main__":
    main()
