"""Does it help to label again? Rounds of online RLHF with the same number of labels in total, and which pairs to label.

    for s in 1 2 3; do make demo CONFIG=lab/config OUT=out/lab-toy-$s SEED=$s; done     # data and an SFT model
    python lab/online.py                              # all arms; goes on where it was stopped
    python lab/online.py lab                          # then also the figure and the table of lab/online.md

Each arm is a run of variants/online_rlhf.py in out/online, its row of results a line of out/online/results.jsonl: for
each round the curves of its PPO, with gold, which no stage sees but the labels. Arms that begin with the same round
share it.
"""

import contextlib
import os
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from configurator import configure, require  # noqa: E402
from hub.files import read_jsonl, write_jsonl  # noqa: E402
from lab import report  # noqa: E402
from toy import gold  # noqa: E402
from variants import online_rlhf  # noqa: E402

SEEDS = (1, 2, 3)
OUT = ROOT / "out" / "online"
LABELS = 400  # in all rounds together
POOL = 1200  # posts that get two responses in each round: later policies give few that differ
BATCH = 64  # episodes of an update of PPO, in 4 minibatches, one epoch
UPDATES = 20  # of PPO
RM = "lab/config/toy_rm.py --batch_size=16 --micro_batch_size=16 --episodes=640 --warmup_steps=5"
PPO = ["lab/config/toy_ppo.py", f"--episodes={UPDATES * BATCH}", "--n_minibatches=4", "--n_epochs=1", "--members=3"]
PPO += ["--micro_batch_size=16", "--labeller=toy.gold", "--device=cpu", "--accept_changes"]
PPO += ["--kl_coef=0", "--schedule=constant"]  # nothing holds it back: where the reward model is wrong, it goes
PPO += ["--samples_every=1", f"--samples_rows={BATCH}"]  # every response is written, for gold
# arm -> (rounds, how pairs are chosen)
ARMS = {
    "1 round": (1, "random"),
    "4 rounds, random": (4, "random"),
    "4 rounds, disagreement": (4, "disagreement"),
    "2 rounds, random": (2, "random"),
    "2 rounds, disagreement": (2, "disagreement"),
}
CURVES = {"kl": "objective/kl", "proxy": "objective/scores", "tokens": "val/response_length"}


def run_arm(arm, seed):
    """Run what is missing of an arm; returns its row of results."""
    rounds, choose = ARMS[arm]
    models = f"out/lab-toy-{seed}"
    is_there = (ROOT / models / "sft" / "final").exists()
    require(is_there, f"{models}: has no SFT model; make it as the first line of this file says")
    os.environ["TOY_OUT"] = models  # the configuration files read it
    directory = place(arm, seed)
    if choose == "disagreement":
        # In the first round nobody can disagree yet: it is that of the random arm.
        copy_once(place(f"{rounds} rounds, random", seed) / "round_1", directory / "round_1")

    # Enough responses for a mean and a deviation.
    references = OUT / f"references-{seed}.jsonl"
    posts = read_jsonl(ROOT / models / "data" / "sft_validation.jsonl")
    write_jsonl(references, posts[:128])

    n_labels = LABELS // rounds
    argv = [
        *PPO,
        f"--seed={seed}",
        f"--out_dir={directory}",
        f"--rounds={rounds}",
        f"--n_labels={n_labels}",
        f"--pool={POOL}",
        f"--choose={choose}",
        f"--rm_options={RM} --normalize_data={shlex.quote(str(references))}",
    ]
    with open(f"{directory}.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        online_rlhf.main(configure(online_rlhf.Config, argv))

    found = []
    for number in range(1, rounds + 1):
        found.append(curves_of(directory / f"round_{number}"))
    return {"arm": arm, "seed": seed, "rounds": found}


def place(arm, seed):
    return OUT / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"


def copy_once(source, target):
    """A directory that is complete or not there."""
    if not target.exists():
        temporary = target.with_name("tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary)
        temporary.rename(target)


def curves_of(directory):
    """A round's number of labels, and its PPO: a number per update, gold among them."""
    metrics = read_jsonl(directory / "ppo" / "metrics.jsonl")
    found = {"labels": len(read_jsonl(directory / "pairs.jsonl"))}
    for name, key in CURVES.items():
        found[name] = [round(row[key], 4) for row in metrics]
    written = read_jsonl(directory / "ppo" / "samples.jsonl")
    golds = gold.score([row["query"] for row in written], [row["response"] for row in written])
    found["gold"] = np.reshape(golds, (len(metrics), BATCH)).mean(1).round(4).tolist()
    return found


# ---------------------------------------------------------------------------- figure and table


def select(rows, arm):
    """The rounds of an arm's runs, by seed: lists of curves."""
    found = sorted((row["seed"], row["rounds"]) for row in rows if row["arm"] == arm)
    return [rounds for _, rounds in found]


def arms_of(rows):
    """Those that there are results of; fewer rounds first."""
    there = [arm for arm in ARMS if select(rows, arm)]
    return sorted(there, key=rounds_of)


def rounds_of(arm):
    return ARMS[arm][0]


def ends(rows, arm, name):
    """A curve's last five updates, in the mean: (seeds, rounds)."""
    found = []
    for rounds in select(rows, arm):
        found.append([report.end(curves[name]) for curves in rounds])
    return np.array(found)


def table(rows):
    yield "arm", "labels", "gold (by seed)", "its best", "proxy", "KL", "tokens", "gold after each round"
    for arm in arms_of(rows):
        labels = [sum(curves["labels"] for curves in rounds) for rounds in select(rows, arm)]
        last = {name: ends(rows, arm, name)[:, -1] for name in ("gold", "proxy", "kl", "tokens")}
        best = [report.smooth(rounds[-1]["gold"]).max() for rounds in select(rows, arm)]
        gold_of_rounds = ends(rows, arm, "gold").mean(0)
        yield (
            arm,
            f"{np.mean(labels):.0f}",
            report.mean_and_seeds(last["gold"]),
            report.mean_and_seeds(best),
            report.mean_and_seeds(last["proxy"]),
            float(last["kl"].mean()),
            float(last["tokens"].mean()),
            ", ".join(f"{mean:.2f}" for mean in gold_of_rounds),
        )


def figure(rows):
    found, axes = report.panels(3, 3.2)
    draw_one_round(axes[0], select(rows, "1 round"))
    draw_ends(axes[1], rows)
    draw_rounds(axes[2], select(rows, "4 rounds, random"))
    return found


def draw_one_round(axis, runs):
    """Proxy and gold where nobody labels again; thin: each seed."""
    for name, style, colour in (("proxy", "--", report.PROXY), ("gold", "-", report.GOLD)):
        curves = [report.smooth(rounds[0][name]) for rounds in runs]
        for curve in curves:
            axis.plot(curve, style, color=colour, alpha=0.6, lw=1)
        axis.plot(np.mean(curves, axis=0), style, color=colour, lw=2.5, label=name)
    axis.set_title(f"one round, {LABELS} labels", fontsize=9)
    axis.set_xlabel("update")
    axis.legend(fontsize=8, frameon=False)


def draw_rounds(axis, runs):
    """Gold in each round's PPO, the mean of the seeds."""
    for number in range(4):
        curves = [report.smooth(rounds[number]["gold"]) for rounds in runs]
        alpha = 0.25 * (number + 1)
        axis.plot(np.mean(curves, axis=0), color=report.BLUE, alpha=alpha, label=f"round {number + 1}")
    axis.set_title(f"gold, {LABELS // 4} more random labels each round", fontsize=9)
    axis.set_xlabel("update")
    axis.legend(fontsize=8, frameon=False)


def draw_ends(axis, rows):
    """Gold at the end of each arm: the mean, and a dot per seed."""
    arms = arms_of(rows)
    for number, arm in enumerate(arms):
        last = ends(rows, arm, "gold")[:, -1]
        colour = report.RED if "disagreement" in arm else report.BLUE
        axis.plot([number] * len(last), last, ".", color=colour, alpha=0.7)
        axis.plot(number, last.mean(), "_", ms=18, mew=2, color=colour)
    labels = [arm.replace(", ", "\n") for arm in arms]
    axis.set_xticks(range(len(arms)), labels, fontsize=7)
    axis.set_title(f"gold at the end, {LABELS} labels in all", fontsize=9)


def write(rows, directory):
    """The figure, and the table into directory/online.md, between its markers."""
    (directory / "figures").mkdir(parents=True, exist_ok=True)
    figure(rows).savefig(directory / "figures" / "online.png")
    path = directory / "online.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    block = f"<!-- online -->\n\n![online](figures/online.png)\n\n{report.markdown(table(rows))}\n<!-- end -->"
    path.write_text(report.put(text, "online", block), encoding="utf-8")
    write_jsonl(directory / "online.jsonl", rows)


def main(directories):
    os.chdir(ROOT)
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    results = OUT / "results.jsonl"
    results.touch()
    rows = read_jsonl(results)
    done = [(row["arm"], row["seed"]) for row in rows]
    for arm in ARMS:
        for seed in SEEDS:
            if (arm, seed) not in done:
                rows.append(run_arm(arm, seed))
                write_jsonl(results, rows[-1:], "a")
    for directory in directories or [OUT]:
        write(rows, Path(directory))


if __name__ == "__main__":
    main(sys.argv[1:])
