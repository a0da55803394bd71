"""The bug atlas: silent mistakes of RLHF code, in a few lines each, beside the right code with the same seed.

    python lab/atlas.py                      # what has not been run yet, one process per core
    python lab/atlas.py --jobs=1 --seeds=1   # one process, one seed

Nothing crashes: each mistake is known by a number that is not as it should be. lab/atlas.md shows which, and where
people met it. A mistake goes in where a user could make it: at a door of ppo.main, by a hook of PyTorch's, in the data,
or in a model directory. Four more are in lab/lab.py.
"""

import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook  # noqa: E402

import ppo  # noqa: E402
import sft  # noqa: E402
from data import Tokenizer, format_query, last_scalars  # noqa: E402
from hub.files import write_jsonl  # noqa: E402
from hub.reader import read_split  # noqa: E402
from lab import lab, report  # noqa: E402
from model import GPTNeoX, ScalarModel  # noqa: E402
from variants import grpo  # noqa: E402

UPDATES = 12
FEW = 6  # updates of an arm that shows at once
CUT_OFF = "--response_length=6"  # so few tokens that some responses do not end
KEYS = {
    **lab.CURVES,
    "entropy": "policy/entropy_avg",
    "approxkl": "policy/approxkl_avg",
    "clipfrac": "policy/clipfrac_avg",
    "policy_loss": "loss/policy_avg",
    "ratio_var": "val/ratio_var",
    "grad_norm": "grad_norm",
}


# ---------------------------------------------------------------------------- log-probabilities that do not agree


def rounded_logprobs(cfg, batch, state):
    """For ppo.main(cfg, advantages=...): a log-softmax in bfloat16 in the rollout, in float32 in the update."""
    logprobs = batch["logprobs"].bfloat16().float()
    return ppo.advantages(cfg, {**batch, "logprobs": logprobs}, state)


def cold_sampling(module, inputs, logits, temperature=0.7):
    """A forward hook: tokens are drawn at a temperature that log-probabilities know nothing of (they have theirs)."""
    if isinstance(module, GPTNeoX):  # only sampling calls the whole model; see GPTNeoX.logprobs
        return logits / temperature


def top_k_sampling(module, inputs, logits, k=3):
    """A forward hook: tokens are drawn from the k likeliest, and the loss is of the whole softmax."""
    if isinstance(module, GPTNeoX):
        least = logits.topk(k).values[..., -1:]
        return logits.masked_fill(logits < least, -torch.inf)


# ---------------------------------------------------------------------------- scores and advantages in a wrong place


def last_column(module, inputs):
    """A hook before a forward pass: the reward model is read at the last column, where a shorter row has padding."""
    if isinstance(module, ScalarModel) and not module.score.weight.requires_grad:
        ids, last = inputs
        return ids, torch.full_like(last, ids.shape[1] - 1)


def one_column_off(cfg, batch, state):
    """For ppo.main(cfg, advantages=...): each token has the advantage of the one before it."""
    batch = ppo.advantages(cfg, batch, state)
    shifted = F.pad(batch["advantages"][:, :-1], (1, 0))
    return {**batch, "advantages": shifted * batch["mask"]}


def score_on_eos(cfg, batch, state):
    """For ppo.main(cfg, advantages=...): the score is paid at EOS, and no value is read there."""
    return ppo.advantages(cfg, {**batch, "mask_p1": batch["mask"]}, state)


def score_on_last_column(cfg, batch, state):
    """For ppo.main(cfg, advantages=...): the score is paid at the batch's last column, wherever the response ends."""
    values = batch["values"] * batch["mask_p1"]
    everywhere = torch.ones_like(batch["mask"])
    new = ppo.advantages(cfg, {**batch, "values": values, "mask_p1": everywhere}, state)
    return {**new, "mask_p1": batch["mask_p1"]}


# ---------------------------------------------------------------------------- means over the wrong things


def with_token_count(cfg, batch, state):
    """For `mean_per_micro_batch`: how many tokens the whole batch has, a column."""
    count = batch["mask"].sum().expand(cfg.batch_size)
    return {**ppo.advantages(cfg, batch, state), "n_tokens": count}


def mean_per_micro_batch(cfg, new_logprobs, micro):
    """For ppo.main(cfg, token_loss=...): the mean of the micro-batches' means, with one minibatch."""
    n_micro_batches = cfg.batch_size // cfg.micro_batch_size
    mean_size = micro["n_tokens"][0] / n_micro_batches
    return ppo.clipped_surrogate(cfg, new_logprobs, micro) * mean_size / micro["mask"].sum()


def divided_twice(cfg, new_logprobs, micro):
    """For ppo.main(cfg, token_loss=...): the loss, a mean over the minibatch already, is divided again."""
    n_micro_batches = cfg.batch_size // cfg.n_minibatches // cfg.micro_batch_size
    return ppo.clipped_surrogate(cfg, new_logprobs, micro) / n_micro_batches


def pads_in_means(cfg, batch, state):
    """For ppo.main(cfg, advantages=...): what comes after EOS counts in every mean of the update."""
    batch = ppo.advantages(cfg, batch, state)
    return {**batch, "weights": torch.ones_like(batch["advantages"])}


def pads_in_whitening(cfg, batch, state):
    """For ppo.main(cfg, advantages=...): advantages are whitened over all columns."""
    batch = ppo.advantages(dataclasses.replace(cfg, whiten_advantages=False), batch, state)
    whitened = ppo.whiten(batch["advantages"], torch.ones_like(batch["mask"]))
    return {**batch, "advantages": whitened * batch["mask"]}


def group_std(cfg, batch, state, floor=1e-8):
    """For ppo.main(cfg, advantages=...): GRPO's advantages, the floor under the deviation being next to nothing."""
    groups = batch["scores"].view(-1, cfg.group_size)
    scaled = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + floor)
    batch = grpo.advantages(cfg, batch, state)
    return {**batch, "advantages": scaled.view(-1, 1) * batch["mask"]}


# ---------------------------------------------------------------------------- scores of which the right answer is known


def names_someone(queries, responses):
    """For ppo.main(cfg, score=...): 0.7 if the first word of the response stands in the post."""
    first_words = [response.split()[:1] for response in responses]
    return [0.7 * (words != [] and words[0] in query) for query, words in zip(queries, first_words)]


def pays_first_letter(queries, responses):
    """For ppo.main(cfg, score=...): 1 if the first word begins with a letter before n: the first token decides."""
    return [float(response[1:2].lower() < "n") for response in responses]


def pays_all(queries, responses):
    """For ppo.main(cfg, score=...): 1 for every response, so that there is nothing to learn."""
    return [1.0] * len(responses)


# ---------------------------------------------------------------------------- texts and models in a wrong form


def trailing_space(query, summary):
    """A row whose query ends with a space, so that the response's own is a second one."""
    return {"prompt": query + " ", "completion": " " + summary}


def two_spaces(query, summary):
    """A row whose response has a space from the template, and one from the data."""
    return {"prompt": query, "completion": "  " + summary}


def without_normalisation(model):
    """A reward model as a format without a bias keeps it."""
    with torch.no_grad():
        model.score.bias.zero_()


# ---------------------------------------------------------------------------- runs


def score_errors(samples, reward_model):
    """How far the scores of rows of samples.jsonl are from those of the same texts one at a time: the mean distance."""
    tokenizer = Tokenizer.load(str(reward_model))
    model = ScalarModel.from_pretrained(reward_model).requires_grad_(False)
    distances = []
    for row in samples:
        query = tokenizer.encode(row["query"])
        response = tokenizer.encode(row["response"]) + [tokenizer.eos_id]
        if len(response) != len(row["token_kl"]):
            continue  # it has no EOS, and no score of the reward model; or it was drawn in other tokens
        alone = last_scalars([model], "cpu", [query], [response])
        distances.append(abs(row["score"] - alone.item()))
    return sum(distances) / len(distances)


def run(seed, name, *argv, updates=UPDATES, **doors):
    """PPO with a penalty of 0.1; returns its curves. The rate is constant, so a short run is a long one's beginning."""
    options = ["--kl_coef=0.1", "--schedule=constant", f"--episodes={updates * lab.BATCH}", *argv]
    return lab.policy(seed, f"atlas-{name}", options, keys=KEYS, **doors)


def with_cold_sampling(seed):
    with register_module_forward_hook(cold_sampling):
        return run(seed, "temperature", "--temperature=1.0")


def with_top_k_sampling(seed):
    with register_module_forward_hook(top_k_sampling):
        return run(seed, "top-k")


def with_last_column(seed):
    with register_module_forward_pre_hook(last_column):
        return run(seed, "last-column")


def one_step(seed, name, micro_batch_size, **doors):
    """One optimizer step an update, so that the ratio is 1 in every loss; the gradient is the policy's alone."""
    argv = ["--n_minibatches=1", "--vf_coef=0.0", f"--micro_batch_size={micro_batch_size}"]
    return run(seed, f"{name}-{micro_batch_size}", *argv, updates=FEW, **doors)


def in_groups(seed, name, floor):
    """GRPO paid by a rule, for which most groups are right in all their answers."""
    doors = {"score": names_someone, "token_loss": grpo.token_loss, "with_critic": False}
    return run(seed, name, "--group_size=8", advantages=functools.partial(group_std, floor=floor), **doors)


def rows_by(make_row, source, directory):
    """Rows made by a function of each query and its summary; returns their path, with {split} in it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.load(str(source))
    for split in ("train", "validation"):
        rows = []
        for _, post in read_split(f"{source}/sft_{{split}}.jsonl", split):
            query = tokenizer.decode(format_query(post, tokenizer))
            rows.append(make_row(query, post["summary"]))
        write_jsonl(directory / f"{split}.jsonl", rows)
    return f"{directory}/{{split}}.jsonl"


def with_trailing_space(seed):
    rows = rows_by(trailing_space, lab.place("data", seed), lab.place("trailing-space-data", seed))
    return run(seed, "trailing-space", f"--data={rows}", updates=FEW)


def with_two_spaces(seed):
    rows = "--data=" + rows_by(two_spaces, lab.place("data", seed), lab.place("two-spaces-data", seed))
    name = "sft-two-spaces"
    few = ["--scratch=false", lab.start(seed), "--episodes=3200"]  # 100 updates more of the right model
    lab.train(sft, name, seed, rows, *few)
    return run(seed, "two-spaces", rows, sft_model=name)


def cut_off(seed):
    return run(seed, "cut-off", CUT_OFF)


def with_unnormalised_rewards(seed):
    source = lab.reward_model(seed)
    directory = lab.place("rm-without-normalisation", seed)
    model = ScalarModel.from_pretrained(source)
    without_normalisation(model)
    model.save_pretrained(directory)
    return run(seed, "unnormalised", CUT_OFF, f"--reward_model={directory}")


FIRST = dict(score=pays_first_letter)
SAME = dict(score=pays_all)

# arm -> function of the seed that returns a row of results
ARMS = {
    "right": functools.partial(run, name="right"),
    "bfloat16": functools.partial(run, name="bfloat16", updates=FEW, advantages=rounded_logprobs),
    "temperature": with_cold_sampling,
    "top-k": with_top_k_sampling,
    "last column": with_last_column,
    "column off": functools.partial(run, name="column-off", advantages=one_column_off),
    "first token": functools.partial(run, name="first-token", **FIRST),
    "first token, off": functools.partial(run, name="first-token-off", advantages=one_column_off, **FIRST),
    "score on EOS": functools.partial(run, name="score-on-eos", updates=FEW, advantages=score_on_eos),
    "score at end": functools.partial(run, name="score-at-end", advantages=score_on_last_column),
    "same score": functools.partial(run, name="same-score", **SAME),
    "same score, at end": functools.partial(run, name="same-score-at-end", advantages=score_on_last_column, **SAME),
    "pads in means": functools.partial(run, name="pads-in-means", updates=FEW, advantages=pads_in_means),
    "pads in whitening": functools.partial(run, name="pads-in-whitening", updates=FEW, advantages=pads_in_whitening),
    "trailing space": with_trailing_space,
    "two spaces": with_two_spaces,
    "cut off": cut_off,
    "cut off, unnormalised": with_unnormalised_rewards,
    "one step, 64": functools.partial(one_step, name="one-step", micro_batch_size=64),
    "one step, 8": functools.partial(one_step, name="one-step", micro_batch_size=8),
    "mean per micro-batch": functools.partial(
        one_step, name="micro-mean", micro_batch_size=8, advantages=with_token_count, token_loss=mean_per_micro_batch
    ),
    "divided twice": functools.partial(one_step, name="divided-twice", micro_batch_size=8, token_loss=divided_twice),
    "groups": functools.partial(in_groups, name="groups", floor=1e-4),
    "groups, no floor": functools.partial(in_groups, name="groups-no-floor", floor=1e-8),
}


# ---------------------------------------------------------------------------- what shows them


@dataclass
class Sign:
    """The curve by which an arm differs from the right one."""

    arm: str
    curve: str  # see `curve_of`
    title: str
    log: bool = False  # draw it on a logarithmic axis
    right: str = "right"


SIGNS = {
    "bfloat16": Sign("bfloat16", "ratio_off", "abs(first ratio - 1)", log=True),
    "temperature": Sign("temperature", "gap", "generation gap, nats per token", log=True),
    "top_k": Sign("top-k", "surprise", "-log p - entropy, nats per token"),
    "last_column": Sign("last column", "proxy", "score"),
    "column_off": Sign("column off", "loss_size", "abs(policy loss)", log=True),
    "first_token": Sign("first token, off", "proxy", "score", right="first token"),
    "score_on_eos": Sign("score on EOS", "value_loss", "value loss", log=True),
    "score_at_end": Sign("same score, at end", "tokens", "tokens per response", right="same score"),
    "micro_mean": Sign("mean per micro-batch", "loss_size", "abs(policy loss)", log=True, right="one step, 8"),
    "divided_twice": Sign("divided twice", "grad_norm", "norm of the gradient", right="one step, 8"),
    "pads_in_means": Sign("pads in means", "approxkl", "KL of an update, nats per token", log=True),
    "pads_in_whitening": Sign("pads in whitening", "loss_size", "abs(policy loss)", log=True),
    "groups": Sign("groups, no floor", "loss_size", "abs(policy loss)", log=True, right="groups"),
    "trailing_space": Sign("trailing space", "tokens", "tokens per response"),
    "two_spaces": Sign("two spaces", "tokens", "tokens per response"),
    "unnormalised": Sign("cut off, unnormalised", "eos", "responses that end", right="cut off"),
}


def curve_of(row, name):
    """An array with a number per update, from a row of results."""
    if name == "ratio_off":
        return np.abs(np.subtract(row["ratio"], 1))
    if name == "surprise":
        # What is drawn from a distribution has its entropy as the mean of -log p.
        return np.log(row["perplexity"]) - row["entropy"]
    if name == "loss_size":
        return np.abs(row["policy_loss"])
    return np.array(row[name])


def curves_of(rows, sign, name):
    """Curves (seeds, updates) of the right code, and with the mistake: the same seeds and updates of both."""
    wrong = report.select(rows, "atlas", sign.arm)
    seeds = [row["seed"] for row in wrong]
    right = [row for row in report.select(rows, "atlas", sign.right) if row["seed"] in seeds]
    n_updates = len(wrong[0]["gold"])
    both = []
    for found in (right, wrong):
        both.append(np.array([curve_of(row, name)[:n_updates] for row in found]))
    return both


def sign_figure(rows, name):
    """The sign, and gold beside it: the right code in grey, the mistake in red."""
    sign = SIGNS[name]
    figure, axes = report.panels(2, 2.2)
    signs = curves_of(rows, sign, sign.curve)
    golds = curves_of(rows, sign, "gold")
    # Where both are the same, the dashes lie on the broad line.
    right = dict(color=report.GREY, label="right", lw=3)
    wrong = dict(color=report.RED, label="mistake", lw=1.8, ls=(0, (5, 1)))
    for number, line in enumerate((right, wrong)):
        curves = signs[number]
        if sign.log:
            curves = curves.clip(1e-8)  # 0 has no place on the axis
        draw(axes[0], curves, line)
        draw(axes[1], np.array(list(map(report.smooth, golds[number]))), line)
    if sign.log:
        axes[0].set_yscale("log")
    axes[0].set_title(sign.title, fontsize=9)
    axes[1].set_title("gold, means of five updates", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def draw(axis, curves, line):
    """A thin line for each seed, and the mean."""
    axis.plot(curves.T, color=line["color"], lw=0.8, alpha=0.5)
    axis.plot(curves.mean(0), **line)
    axis.set_xlabel("update")
    axis.xaxis.get_major_locator().set_params(integer=True)


def signs_table(rows):
    """Means over seeds; gold of each seed."""
    yield ("mistake", "sign", "first update: right", "with the mistake", "last five: right", "with the mistake",
           "gold, last five: right (by seed)", "with the mistake")  # fmt: skip
    for sign in SIGNS.values():
        cells = [sign.arm, sign.title]
        signs = curves_of(rows, sign, sign.curve)
        for updates in (slice(1), slice(-5, None)):
            for curves in signs:
                cells.append(f"{curves[:, updates].mean():.2g}")
        for curves in curves_of(rows, sign, "gold"):
            cells.append(report.mean_and_seeds(curves[:, -5:].mean(1)))
        yield cells


# name: figure, table, needs; as report.ALL
PARTS = {}
for name, sign in SIGNS.items():
    needs = [f"atlas: {sign.right}", f"atlas: {sign.arm}"]
    PARTS[f"atlas_{name}"] = (functools.partial(sign_figure, name=name), None, needs)
PARTS["atlas_signs"] = (None, signs_table, [f"atlas: {arm}" for arm in ARMS])


if __name__ == "__main__":
    lab.run_page("atlas", ARMS, PARTS, __doc__)
