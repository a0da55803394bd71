"""The laboratory: what RLHF does to a policy where the true score is known, and what goes wrong when a detail does.

    python lab/lab.py overoptimisation       # three seeds, 9 PPO runs: figures and tables
    python lab/lab.py                        # everything; goes on where it was stopped

The world is toy/'s, whose gold score made the labels. Here the reward model sees few of them, so that it can be fooled,
and PPO runs long enough to do so. "Proxy" is that reward model's score, the one that PPO is paid; "gold" is never seen.
Runs go to out/lab, as many at a time as there are cores, each on one; then lab/report.py writes figures and tables
there. lab/README.md shows ours, and says what they show.
"""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.modules.module import register_module_forward_hook  # noqa: E402
from tqdm import tqdm  # noqa: E402

import dpo  # noqa: E402
import ppo  # noqa: E402
import rm  # noqa: E402
import sample  # noqa: E402
import sft  # noqa: E402
from configurator import configure  # noqa: E402
from data import Tokenizer  # noqa: E402
from evals import samples, scores  # noqa: E402
from hub.files import write_jsonl  # noqa: E402
from hub.weights import load_weights  # noqa: E402
from lab import report  # noqa: E402
from model import MLP, GPTNeoX, GPTNeoXConfig, ScalarModel  # noqa: E402
from runtime import World, load_model, load_split, stage  # noqa: E402
from toy import gold, make_data  # noqa: E402

SEEDS = (1, 2, 3)
OUT = ROOT / "out" / "lab"
RESULTS = OUT / "results.jsonl"
SIZES = (125, 500, 2000, 8000)  # labels that reward models are trained on
PAIRS = 500  # labels of the reward model that PPO can fool
BATCH = 64  # episodes of an update of PPO, in 4 minibatches, one epoch
UPDATES = 60  # of PPO
DRAWS = 64  # responses to each post, for best-of-n
POSTS = 100  # posts, for best-of-n
EOS = 0  # in the tokenizers of toy/ and of Pythia


# ---------------------------------------------------------------------------- mistakes: what goes in at a door


def eos_is_padding(rows, loss_on, device):
    """For sft.main(cfg, inputs=...): EOS, used as padding, is masked out of the loss with it."""
    ids, select, targets, mask = sft.model_inputs(rows, loss_on, device)
    return ids, select, targets, mask & (targets != EOS)


def dropout(module, inputs, output, p=0.1):
    """A hook of PyTorch's, behind every module's forward pass: dropout in the models that are trained, in rollout and
    update, as a forgotten model.eval() leaves it.
    """
    if isinstance(module, MLP) and module.dense_h_to_4h.weight.requires_grad:
        return F.dropout(output, p)


def generation_logprobs(cfg, batch, state):
    """For ppo.main(cfg, advantages=...): the old log-probabilities are taken from cached generation."""
    logprobs = batch["sampled_logprobs"]
    kl = (logprobs - batch["ref_logprobs"]) * batch["mask"]
    return ppo.advantages(cfg, {**batch, "logprobs": logprobs, "kl": kl}, state)


# ---------------------------------------------------------------------------- runs


def place(name, seed):
    return OUT / f"{name}-{seed}"


def train(script, name, seed, *argv, config="", **doors):
    """Run a stage's main(cfg, **doors), unless it is complete already; its output goes to a log beside its directory.

    config: the stage whose values in lab/config/ a variant begins with. Returns the directory of the model.
    """
    directory = place(name, seed)
    final = directory / "final"
    if final.exists():
        return final
    directory.parent.mkdir(parents=True, exist_ok=True)
    values = f"lab/config/toy_{config or script.__name__}.py"
    common = [values, f"--seed={seed}", f"--out_dir={directory}", "--device=cpu"]
    cfg = configure(script.Config, [*common, *argv])
    with open(f"{directory}.log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        script.main(cfg, **doors)
    return final


def base(seed):
    """Data and the SFT model: what everything else starts from."""
    directory = place("data", seed)
    if not (directory / "tokenizer.json").exists():
        make_data.write_data(directory, seed)
    train(sft, "sft", seed, data(seed, "sft"), f"--tokenizer={directory}")


def data(seed, kind):
    return f"--data={place('data', seed)}/{kind}_{{split}}.jsonl"


def start(seed, name="sft"):
    return f"--model={place(name, seed)}/final"


def reward_model(seed, pairs=PAIRS):
    """A reward model that has seen so many labels: its directory."""
    references = f"--normalize_data={place('data', seed)}/sft_{{split}}.jsonl"
    rows = [data(seed, "comparisons"), references, f"--train_split=train[:{pairs}]"]
    return train(rm, f"rm-{pairs}", seed, start(seed), *rows, episodes_of_pairs(pairs))


def episodes_of_pairs(pairs):
    """100 updates of 32 pairs, or one pass over all pairs if that is more."""
    return f"--episodes={32 * max(100, pairs // 32)}"


CURVES = {
    "kl": "objective/kl",
    "proxy": "objective/scores",
    "tokens": "val/response_length",
    "eos": "val/eos_rate",
    "ratio": "val/ratio",
    "value_loss": "loss/value_avg",
    "perplexity": "val/perplexity",
    "gap": "val/generation_gap",
}


def policy(seed, name, argv, sft_model="sft", script=ppo, keys=CURVES, **doors):
    """A run of PPO, or of a variant of it.

    Returns its curves, lists with a number per update, by `keys` and gold, and a few of its responses.
    """
    models = [start(seed, sft_model), f"--reward_model={reward_model(seed)}"]
    batch = ["--n_minibatches=4", "--n_epochs=1", "--micro_batch_size=16", f"--episodes={UPDATES * BATCH}"]
    whole = ["--samples_every=1", f"--samples_rows={BATCH}"]  # every response is written, for gold
    train(script, name, seed, *models, data(seed, "sft"), *batch, *whole, *argv, config="ppo", **doors)

    metrics = report.read(place(name, seed) / "metrics.jsonl")
    curves = {}
    for curve, key in keys.items():
        if key in metrics[0]:  # without a critic there is no value loss
            curves[curve] = [row[key] for row in metrics]
    written = report.read(place(name, seed) / "samples.jsonl")
    golds = gold.score([row["query"] for row in written], [row["response"] for row in written])
    curves["gold"] = np.reshape(golds, (len(metrics), BATCH)).mean(1).tolist()
    texts = []
    for row, true in zip(written, golds):
        texts.append((row["step"], row["response"], row["score"], true))
    first_of_each = texts[::BATCH]
    return {**curves, "texts": [*first_of_each[::10], first_of_each[-1]]}


def accuracy(directory):
    """A reward model's accuracy on held-out pairs, or that of DPO's implicit reward."""
    return json.loads((directory.parent / "eval.json").read_text())["eval/accuracy"]


# ---------------------------------------------------------------------------- best of n


def best_of_n(seed):
    """Draw many responses from SFT; returns, for each n, KL, and the proxy and gold of the best of n by proxy."""
    argv = [start(seed), data(seed, "sft"), f"--split=validation[:{POSTS}]", f"--seed={seed}"]
    cfg = configure(sample.Config, [*argv, "--response_length=24", "--device=cpu"])
    found = {}
    draw(cfg, str(reward_model(seed)), found)
    proxy = np.reshape(found["proxy"], (DRAWS, POSTS))
    true = np.reshape(found["gold"], (DRAWS, POSTS))
    sizes = [2**power for power in range(int(math.log2(DRAWS)) + 1)]
    return {
        "n": sizes,
        "kl": [math.log(n) - (n - 1) / n for n in sizes],
        "proxy": [float(best_of_mean(proxy, proxy, n)) for n in sizes],
        "gold": [float(best_of_mean(proxy, true, n)) for n in sizes],
    }


@stage
def draw(cfg, scorer, found):
    """Sample DRAWS responses for each query; their proxy and gold, round after round, go to the dict `found`."""
    world = World(cfg)
    tokenizer = Tokenizer.load(cfg.model)
    language_model = load_model(cfg, world, tokenizer, GPTNeoX, cfg.model)
    score = scores.by_models(cfg, world, tokenizer, scorer)
    rows = load_split(cfg, world, tokenizer, cfg.data, cfg.split, n_responses=0)[:]
    queries = rows["query"] * DRAWS
    responses = samples.sample(cfg, world, tokenizer, language_model, queries)
    found["proxy"] = samples.measure(cfg, world, score, queries, responses)
    found["gold"] = gold.score(list(map(tokenizer.decode, queries)), list(map(tokenizer.decode, responses)))


def best_of_mean(ranks, values, n):
    """The mean value of the best of n by rank, over all sets of n of the N draws: arrays (N, posts).

    The i-th best of N (from 0) is the best of a set of n if the others come from the N - 1 - i behind it.
    """
    N = len(ranks)
    weights = [math.comb(N - 1 - i, n - 1) / math.comb(N, n) for i in range(N)]
    order = np.argsort(-ranks, axis=0, kind="stable")
    return weights @ np.take_along_axis(values, order, axis=0).mean(1)


# ---------------------------------------------------------------------------- experiments


def reward_accuracy(seed, pairs):
    return {"pairs": pairs, "accuracy": accuracy(reward_model(seed, pairs))}


def implicit_accuracy(seed, pairs):
    rows = [data(seed, "comparisons"), f"--train_split=train[:{pairs}]"]
    final = train(dpo, f"dpo-{pairs}", seed, start(seed), *rows, episodes_of_pairs(pairs))
    return {"pairs": pairs, "accuracy": accuracy(final)}


def whitened(seed):
    return policy(seed, "ppo-whitened", ["--kl_coef=0.1", "--whiten_rewards"])


def with_eos_as_padding(seed):
    name = "sft-eos-is-padding"
    train(sft, name, seed, data(seed, "sft"), f"--tokenizer={place('data', seed)}", inputs=eos_is_padding)
    return policy(seed, "ppo-eos-is-padding", ["--kl_coef=0.1", f"--episodes={20 * BATCH}"], sft_model=name)


def with_dropout(seed):
    with register_module_forward_hook(dropout):
        return policy(seed, "ppo-dropout", ["--kl_coef=0.1"])


def with_new_critic(seed):
    """PPO whose critic starts from the SFT model with a new head, not from the reward model."""
    source = place("sft", seed) / "final"
    directory = place("critic", seed)
    critic = ScalarModel(GPTNeoXConfig.from_directory(source))
    load_weights(critic, source, new_head=True)
    critic.save_pretrained(directory)
    return policy(seed, "ppo-new-critic", ["--kl_coef=0.1", f"--critic={directory}"])


BF16 = ["--kl_coef=0.1", "--dtype=bfloat16", f"--episodes={8 * BATCH}"]


def in_bfloat16(seed):
    return policy(seed, "ppo-bfloat16", BF16)


def with_generation_logprobs(seed):
    return policy(seed, "ppo-generation-bfloat16", BF16, advantages=generation_logprobs)


# experiment -> arm -> function of the seed that returns a row of results
EXPERIMENTS = {
    "overoptimisation": {
        f"beta {beta}": functools.partial(policy, name=f"ppo-beta-{beta}", argv=[f"--kl_coef={beta}"])
        for beta in report.BETAS
    },
    "best_of_n": {"best of n": best_of_n},
    "data": {
        **{f"rm {pairs}": functools.partial(reward_accuracy, pairs=pairs) for pairs in SIZES},
        **{f"dpo {pairs}": functools.partial(implicit_accuracy, pairs=pairs) for pairs in SIZES[1:3]},
    },
    "whitening": {"whitened": whitened},
    "mistakes": {
        "EOS is padding": with_eos_as_padding,
        "dropout": with_dropout,
        "new critic": with_new_critic,
        "bfloat16": in_bfloat16,
        "bfloat16, generation": with_generation_logprobs,
    },
}


# ---------------------------------------------------------------------------- all of it


def prepare(seed):
    """What a process of the pool does first: the models of a seed that its arms start from."""
    os.chdir(ROOT)
    torch.set_num_threads(1)
    base(seed)
    reward_model(seed)


def run_arm(function, experiment, arm, seed):
    """What a process of the pool does then: one arm, a function of the seed; returns its row of results."""
    prepare(seed)  # all is there; what is not complete is trained
    torch.manual_seed(seed)  # for dropout and for a new head; all else draws by its own seeds
    row = function(seed)
    return {"experiment": experiment, "arm": arm, "seed": seed, **row}


def missing_arms(experiments, seeds, results):
    """(experiment, arm, seed) of what has no row in `results` yet."""
    rows = report.read(results) if results.exists() else []
    done = {(row["experiment"], row["arm"], row["seed"]) for row in rows}
    missing = []
    for experiment in experiments:
        for arm in experiments[experiment]:
            missing += [(experiment, arm, seed) for seed in seeds if (experiment, arm, seed) not in done]
    return missing


def run_all(experiments, results, seeds=SEEDS, jobs=None):
    """Run what is missing, `jobs` at a time (as many as there are cores); the base of a seed goes first.

    experiments: like EXPERIMENTS. results: the file that each arm appends a row to.
    """
    missing = missing_arms(experiments, seeds, results)
    seeds = sorted({seed for _, _, seed in missing})
    results.parent.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        bases = {pool.submit(prepare, seed): seed for seed in seeds}
        waiting = set(bases)
        with tqdm(total=len(missing) + len(seeds)) as bar:
            while waiting:
                future = next(as_completed(waiting))
                waiting.remove(future)
                row = future.result()
                bar.update()
                if future in bases:
                    for experiment, arm, seed in missing:
                        if seed == bases[future]:
                            function = experiments[experiment][arm]
                            waiting.add(pool.submit(run_arm, function, experiment, arm, seed))
                else:
                    write_jsonl(results, [row], "a")


def add_options(parser):
    """What the programs of the laboratory share."""
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 1 2 3")
    parser.add_argument("--jobs", type=int, help="processes at a time; default: as many as there are cores")


def run_page(name, arms, parts, doc):
    """What lab/NAME.py does as a script: run what is missing of its arms, and fill its page's figures and tables."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    args = parser.parse_args()
    results = OUT / f"{name}.jsonl"
    run_all({name: arms}, results, args.seeds, args.jobs)
    report.write(results, OUT, parts, f"{name}.md")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; none: all")
    add_options(parser)
    args = parser.parse_args()
    names = args.experiments or list(EXPERIMENTS)
    unknown = sorted(set(names) - set(EXPERIMENTS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(EXPERIMENTS)}")
    run_all({name: EXPERIMENTS[name] for name in names}, RESULTS, args.seeds, args.jobs)
    report.write(RESULTS, OUT)


if __name__ == "__main__":
    main()
