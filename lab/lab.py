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
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

import dpo  # noqa: E402
import model  # noqa: E402
import ppo  # noqa: E402
import rm  # noqa: E402
import runtime  # noqa: E402
import sample  # noqa: E402
import sft  # noqa: E402
from configurator import configure  # noqa: E402
from data import Tokenizer, last_scalars  # noqa: E402
from evals import samples  # noqa: E402
from lab import report  # noqa: E402
from toy import gold, make_data  # noqa: E402

SEEDS, SIZES = (1, 2, 3), (125, 500, 2000, 8000)
OUT = ROOT / "out" / "lab"
RESULTS = OUT / "results.jsonl"
PAIRS = 500  # labels of the reward model that PPO can fool
UPDATES = 60  # of PPO; 64 episodes in 4 minibatches, one epoch
DRAWS, POSTS = 64, 100  # for best-of-n
EOS = 0  # in the tokenizers of toy/ and of Pythia


# ---------------------------------------------------------------------------- mistakes, each a patch of the project


def eos_is_padding():
    """SFT in which EOS, used as padding, is masked out of the loss with it."""
    inputs = sft.model_inputs

    def without_eos(rows, loss_on, device):
        ids, select, targets, mask = inputs(rows, loss_on, device)
        return ids, select, targets, mask & (targets != EOS)

    return mock.patch.object(sft, "model_inputs", without_eos)


def dropout(p=0.1):
    """Dropout in the models that are trained, in rollout and update, as a forgotten model.eval() leaves it."""
    forward = model.MLP.forward

    def dropped(self, x):
        return F.dropout(forward(self, x), p, training=self.dense_h_to_4h.weight.requires_grad)

    return mock.patch.object(model.MLP, "forward", dropped)


def generation_logprobs():
    """PPO with the old log-probabilities taken from cached generation."""
    rollout = ppo.rollout

    def taken(*args):
        batch = rollout(*args)
        return batch | {"logprobs": batch["sampled_logprobs"]}

    return mock.patch.object(ppo, "rollout", taken)


# ---------------------------------------------------------------------------- runs


def place(name, seed):
    return OUT / f"{name}-{seed}"


def train(stage, name, seed, *argv, patch=None):
    """Run a stage's main, unless it is complete already; its output goes to a log beside its directory."""
    directory = place(name, seed)
    if not (directory / "final").exists():
        argv = [f"config/toy_{stage.__name__}.py", f"--seed={seed}", f"--out_dir={directory}", "--device=cpu", *argv]
        directory.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(open(f"{directory}.log", "w"))
            for context in (contextlib.redirect_stdout(log), contextlib.redirect_stderr(log), patch):
                stack.enter_context(context or contextlib.nullcontext())
            stage.main(configure(stage.Config, argv))
    return directory / "final"


def report_of(name, seed):
    return json.loads((place(name, seed) / "eval.json").read_text())


def base(seed):
    """Data and the SFT model: what everything else starts from."""
    if not (place("data", seed) / "tokenizer.json").exists():
        make_data.write_data(place("data", seed), seed)
    train(sft, "sft", seed, *data(seed, "sft"), f"--tokenizer={place('data', seed)}")


def data(seed, kind):
    return [f"--data={place('data', seed)}/{kind}_{{split}}.jsonl"]


def reward_model(seed, pairs=PAIRS):
    argv = [f"--train_split=train[:{pairs}]", f"--episodes={32 * max(100, pairs // 32)}"]
    start = [f"--model={place('sft', seed)}/final", *data(seed, "comparisons")]
    references = f"--normalize_data={place('data', seed)}/sft_{{split}}.jsonl"
    return train(rm, f"rm-{pairs}", seed, *start, references, *argv)


def policy(seed, name, argv, start="sft", patch=None):
    """A PPO run; returns its curves, lists with a number per update, gold among them, and a few of its responses."""
    models = [f"--model={place(start, seed)}/final", f"--reward_model={reward_model(seed)}", *data(seed, "sft")]
    batch = ["--n_minibatches=4", "--n_epochs=1", "--micro_batch_size=16", "--samples_every=1"]
    every = mock.patch.object(ppo, "write_samples", functools.partial(ppo.write_samples, n=64))  # the whole batch
    argv = [*models, *batch, f"--episodes={UPDATES * 64}", *argv]
    with every:
        train(ppo, name, seed, *argv, patch=patch)
    metrics, samples = (report.read(place(name, seed) / f"{which}.jsonl") for which in ("metrics", "samples"))
    columns = dict(kl="objective/kl", proxy="objective/scores", tokens="val/response_length", eos="val/eos_rate",
                   ratio="val/ratio", value_loss="loss/value_avg", perplexity="val/perplexity",
                   gap="val/generation_gap")  # fmt: skip
    curves = {name: [row[key] for row in metrics] for name, key in columns.items()}
    scores = gold.score([row["query"] for row in samples], [row["response"] for row in samples])
    curves["gold"] = np.reshape(scores, (len(metrics), -1)).mean(1).tolist()
    texts = [(row["step"], row["response"], row["score"], true) for row, true in zip(samples, scores)]
    return curves | {"texts": texts[:: 64 * 10] + texts[-64:-63]}


def best_of_n(seed):
    """Draw many responses from SFT; returns, for each n, KL, and the proxy and gold of the best of n by proxy."""
    argv = [f"--model={place('sft', seed)}/final", f"--seed={seed}", "--response_length=24", "--device=cpu"]
    cfg = configure(sample.Config, [*data(seed, "sft"), f"--split=validation[:{POSTS}]", *argv])
    numbers = {}

    @runtime.stage
    def draw(cfg):
        run = runtime.Run(cfg)
        run.tokenizer = Tokenizer.load(cfg.model)
        language_model = runtime.load_model(run, model.GPTNeoX, cfg.model)
        scorer = runtime.load_model(run, model.ScalarModel, str(reward_model(seed)))
        queries = run.load(cfg.data, cfg.split)[:]["query"] * DRAWS
        responses = samples.sample(run, cfg, language_model, queries)
        score = functools.partial(last_scalars, [scorer], run.device)
        texts = ([run.tokenizer.decode(ids) for ids in rows] for rows in (queries, responses))
        numbers.update(proxy=samples.measure(run, cfg, score, queries, responses), gold=gold.score(*texts))

    draw(cfg)
    proxy, true = (np.reshape(numbers[key], (DRAWS, POSTS)) for key in ("proxy", "gold"))
    ns = [2**k for k in range(int(math.log2(DRAWS)) + 1)]
    means = [[float(best_of_mean(proxy, scores, n)) for n in ns] for scores in (proxy, true)]
    return dict(n=ns, kl=[math.log(n) - (n - 1) / n for n in ns], proxy=means[0], gold=means[1])


def best_of_mean(ranks, scores, n):
    """The mean score of the best of n by rank, over all sets of n of the N draws: arrays (N, posts).

    The i-th best of N (from 0) is the best of a set of n if the others come from the N - 1 - i behind it.
    """
    N = len(ranks)
    weights = [math.comb(N - 1 - i, n - 1) / math.comb(N, n) for i in range(N)]
    order = np.argsort(-ranks, axis=0, kind="stable")
    return weights @ np.take_along_axis(scores, order, axis=0).mean(1)


def without_eos(seed):
    argv = [*data(seed, "sft"), f"--tokenizer={place('data', seed)}"]
    train(sft, "sft-eos-is-padding", seed, *argv, patch=eos_is_padding())
    return policy(seed, "ppo-eos-is-padding", ["--kl_coef=0.1", f"--episodes={20 * 64}"], start="sft-eos-is-padding")


def new_critic(seed):
    """PPO whose critic starts from the SFT model with a new head, not from the reward model."""
    source, directory = str(place("sft", seed) / "final"), str(place("critic", seed))
    critic = model.ScalarModel(model.GPTNeoXConfig.from_directory(source))
    model.load_weights(critic, source, new_head=True)
    critic.save_pretrained(directory)
    return policy(seed, "ppo-new-critic", ["--kl_coef=0.1", f"--critic={directory}"])


def reward_accuracy(seed, pairs):
    reward_model(seed, pairs)
    return dict(pairs=pairs, accuracy=report_of(f"rm-{pairs}", seed)["eval/accuracy"])


def implicit_accuracy(seed, pairs):
    argv = [f"--model={place('sft', seed)}/final", *data(seed, "comparisons"), f"--train_split=train[:{pairs}]"]
    train(dpo, f"dpo-{pairs}", seed, *argv, f"--episodes={32 * max(100, pairs // 32)}")
    return dict(pairs=pairs, accuracy=report_of(f"dpo-{pairs}", seed)["eval/accuracy"])


BF16 = ["--kl_coef=0.1", "--dtype=bfloat16", f"--episodes={8 * 64}"]
# experiment -> arm -> function of the seed that returns a row of results
EXPERIMENTS = {
    "overoptimisation": {
        f"beta {beta}": functools.partial(policy, name=f"ppo-beta-{beta}", argv=[f"--kl_coef={beta}"])
        for beta in report.BETAS
    },
    "best_of_n": {"best of n": best_of_n},
    "data": {
        **{f"rm {n}": functools.partial(reward_accuracy, pairs=n) for n in SIZES},
        **{f"dpo {n}": functools.partial(implicit_accuracy, pairs=n) for n in SIZES[1:3]},
    },
    "whitening": {"whitened": lambda seed: policy(seed, "ppo-whitened", ["--kl_coef=0.1", "--whiten_rewards"])},
    "mistakes": {
        "EOS is padding": without_eos,
        "dropout": lambda seed: policy(seed, "ppo-dropout", ["--kl_coef=0.1"], patch=dropout()),
        "new critic": new_critic,
        "bfloat16": lambda seed: policy(seed, "ppo-bfloat16", BF16),
        "bfloat16, generation": lambda s: policy(s, "ppo-generation-bfloat16", BF16, patch=generation_logprobs()),
    },
}


# ---------------------------------------------------------------------------- all of it


def job(experiment, arm, seed):
    """What a process of the pool does: the base of a seed (no experiment), or one arm; returns its row of results."""
    os.chdir(ROOT)
    torch.set_num_threads(1)
    base(seed)
    reward_model(seed)
    torch.manual_seed(seed)  # for dropout and for a new head; all else draws by its own seeds
    return experiment and {"experiment": experiment, "arm": arm, "seed": seed, **EXPERIMENTS[experiment][arm](seed)}


def run_all(experiments):
    """Run what has no row in RESULTS yet, as many at a time as there are cores; the base of a seed goes first."""
    done = {(row["experiment"], row["arm"], row["seed"]) for row in report.read(RESULTS)} if RESULTS.exists() else set()
    todo = [(name, arm, seed) for name in experiments for arm in EXPERIMENTS[name] for seed in SEEDS]
    todo = [key for key in todo if key not in done]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(job, None, "", seed): seed for seed in SEEDS if any(key[2] == seed for key in todo)}
        with tqdm(total=len(todo) + len(waiting)) as bar:
            while waiting:
                future = next(as_completed(waiting))
                seed, row = waiting.pop(future), future.result()
                bar.update()
                if row is None:
                    waiting |= {pool.submit(job, *key): seed for key in todo if key[2] == seed}
                else:
                    runtime.write_jsonl(RESULTS, [row], "a")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; none: all")
    names = parser.parse_args().experiments or list(EXPERIMENTS)
    if unknown := set(names) - set(EXPERIMENTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(EXPERIMENTS)}")
    run_all(names)
    report.write(RESULTS, OUT)


if __name__ == "__main__":
    main()
