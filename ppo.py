"""PPO: the policy samples responses, the reward model scores them, clipped updates follow; a KL penalty holds it back.

    python ppo.py config/toy_ppo.py                                  # a CPU, minutes
    torchrun --nproc_per_node=8 ppo.py config/ppo_2.8b.py
    ppo.main(ppo.Config(...), score=f)                               # a notebook; f(queries, responses) -> floats

Four models: the policy and the critic are trained, the reference (the initial policy) and the reward model are frozen.
The critic starts from the reward model (detail 22; details are those of arXiv:2403.17031). Every random number is a
function of the seed and of where in the run it is drawn. A variant hands functions to `main`, here called doors: they
replace functions of this file, or are called in addition.

Shapes: B rows, Q query, R response, T = Q + R, V vocabulary. Masks are True where a token counts.

Index t of a (B, R) tensor belongs to response token r(t); what a model says of it stands one column of ids before it.
In each row, whose query has Q tokens and whose response ends with EOS at index `last`:

    column of ids    0 .. Q-2   Q-1   Q    ..  Q + last - 1   Q + last      (after it nothing counts)
    ids              query      q     r0   ..  r(last-1)      EOS
    index t          -          0     1    ..  last           last + 1
    logprobs[t]      -          r0    r1   ..  EOS            -             log p of the token in the next column
    values[t]        -          v0    v1   ..  v(last)        v(last+1)     worth of the text up to here
    mask[t]          -          True  True ..  True           False         the policy's actions
    mask_p1[t]       -          True  True ..  True           True          one more: the value read at EOS

The score is paid at index last + 1, one step after EOS, so that EOS itself is credited through GAE. A response that is
cut off without EOS is paid at its last token; so is one whose EOS is token R - 1, for no index follows.

What travels in a batch, a dict of tensors that are the same on every rank:

    key                               shape    written by    read by
    responses                         (B, R)   rollout       response_lists: every pass; write_samples
    has_eos                           (B,)     rollout       rollout_metrics
    last                              (B,)     rollout       response_lists: where each response ends
    length                            (B,)     rollout       micro-batches, of rows of similar length
    logprobs                          (B, R)   rollout       actor_loss, token_loss; rollout_metrics
    ref_logprobs                      (B, R)   rollout       rollout_metrics, variants
    values                            (B, R)   rollout       advantages (which sets them to 0 outside mask_p1),
                                                             critic_loss (with a critic)
    scores                            (B,)     rollout       advantages; rollout_metrics, write_samples
    kl                                (B, R)   rollout       advantages; rollout_metrics, write_samples
    mask                              (B, R)   rollout       advantages, actor_loss; rollout_metrics
    mask_p1                           (B, R)   rollout       advantages, critic_loss
    entropy, sampled_logprobs         (B, R)   rollout       rollout_metrics
    rewards                           (B, R)   advantages    (nothing: for those who look)
    advantages, weights               (B, R)   advantages    actor_loss: what a token was worth, what it counts
    returns                           (B, R)   advantages    critic_loss (with a critic)

A variant may add others, (B,) or (B, R): they come back in `micro`.

differs from the code of arXiv:2403.17031:
- Log-probabilities are recomputed by the forward pass that trains (the softmax in float32), not taken from generation.
- Means are over all tokens of a minibatch on all processes, not per micro-batch, and whitening is over all
  processes: the result depends neither on the micro-batch nor on the number of processes.
- Metrics leave out padding. `val/ratio` is that of the first minibatch, where it must be 1.
- Nothing after truncate_token counts; arXiv:1909.08593 trains the policy on that as well.
"""

import functools
from dataclasses import dataclass
from typing import Literal

from config.fields import TrainConfig
from configurator import Count, Positive, Signed, configure, require


@dataclass
class Config(TrainConfig):
    """Numbers are checked: an int or a float is from 0, a Count from 1, a Positive above 0, a Signed any."""

    # ---- models
    model: str = "out/sft_1b/final"  # the SFT model, where the policy starts: hub id or directory
    reference: str = ""  # the frozen reference; empty: the same as model
    reward_model: str = "out/rm_1b/final"  # hub id or directory; a,b,c: the mean of these (variants/ensemble.py: other)
    critic: str = ""  # where the critic starts; empty: the (first) reward model, or, if a function scores, `model`
    # ---- data
    data: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"  # queries: hub id, directory or file (hub/reader.py)
    eval_split: str = ""  # of no use here: sample.py evaluates
    max_length: int = 512  # tokens of a query: posts have been cut to max_query_tokens; a longer query is an error
    # ---- batch
    episodes: Count = 1_000_000  # responses sampled in the whole run
    batch_size: Count = 512  # episodes per update, over all processes
    group_size: Count = 1  # responses to the same query, side by side in a batch
    n_minibatches: Count = 1  # optimizer steps per epoch over a batch
    n_epochs: Count = 4  # passes over each batch
    micro_batch_size: Count = 16  # rows that a process takes through one pass with gradients
    rollout_micro_batch_size: Count = 64  # rows that a process takes through one pass without gradients
    # ---- sampling
    response_length: Count = 53  # tokens sampled at most
    temperature: Positive = 0.7  # of sampling, and of all log-probabilities
    truncate_token: int = 0  # id of the token that ends a response (arXiv:1909.08593); 0: EOS
    truncate_after: int = 0  # an end among the first so many tokens does not count
    # ---- reward
    missing_eos_score: Signed = -1.0  # the score of a response without EOS (detail 23.3)
    kl_coef: float = 0.05  # penalty per nat of KL to the reference
    kl_target: float = 0.0  # adapt kl_coef towards this KL per sequence; 0: keep it fixed
    kl_horizon: Count = 10_000  # episodes over which it adapts (arXiv:1909.08593 2.2)
    whiten_rewards: bool = False  # scale rewards to variance 1 (detail 24)
    # ---- advantage
    gamma: float = 1.0  # discount
    lam: float = 0.95  # GAE's lambda
    whiten_advantages: bool = True  # mean 0, variance 1 (detail 25)
    # ---- loss
    cliprange: float = 0.2  # of the policy's ratio
    cliprange_value: float = 0.2  # of the critic's change
    vf_coef: float = 0.1  # weight of the value loss
    entropy_coef: float = 0.0  # weight of an entropy bonus (arXiv:1707.06347 eq. 9)
    # ---- optimizer
    schedule: Literal["cosine", "linear", "constant"] = "linear"  # of the learning rate; the first two go to 0
    critic_lr: float = 0.0  # the critic's learning rate; 0: the same
    critic_steps: int = 0  # first updates in which the critic alone learns (arXiv:2307.04964)
    # ---- logging
    samples_every: int = 10  # updates between rows in samples.jsonl; 0: none
    samples_rows: Count = 4  # how many rows each time


if __name__ == "__main__":
    cfg = configure(Config)  # before the imports that take seconds: --help and a wrong option are answered at once

import numpy as np
import torch
import torch.nn.functional as F

from data import collate, pick, uniforms
from evals import colour, scores
from hub.files import split_names, write_jsonl
from model import GPTNeoX, ScalarModel
from runtime import Run, backward, generate_rows, load_model, optimizer_step, stage, start


def train(run, cfg, policy, reference, critic, scorer, advantages, token_loss, before_step, after_update):
    """Every update: sample a batch, work out what each token was worth, and take a few steps on it.

    scorer(queries, responses, row_indices) -> scores of a few rows; queries and responses are lists of ids.
    The last four are doors, see `main`: by default `advantages`, `clipped_surrogate`, nothing and nothing.
    """
    for step in run.updates():
        row_indices = run.row_indices()
        queries = run.rows[row_indices]["query"]
        batch = rollout(run, cfg, policy, reference, critic, scorer, queries, row_indices)
        batch = advantages(cfg, batch, run.state)

        # These describe the samples, and so the policy as it was before the update.
        metrics = {"episode": (step + 1) * cfg.batch_size}
        # `advantages` has left the coefficient in `state`, if the rewards have a penalty.
        metrics.update(rollout_metrics(batch, run.state.get("kl_coef", 0.0)))
        metrics.update(ppo_update(run, cfg, policy, critic, queries, batch, token_loss, before_step))

        # A checkpoint keeps these. `advantages` looks at the first at the next batch, a variant at either.
        run.state["kl"] = metrics["objective/kl"]
        run.state["update_kl"] = metrics["policy/approxkl_avg"]
        if after_update is not None:
            after_update(run, policy, reference)

        run.log(metrics, watch=("objective/scores", "objective/kl", "val/eos_rate"))
        if run.world.is_main and cfg.samples_every and step % cfg.samples_every == 0:
            write_samples(run, cfg, queries, batch)


# ---------------------------------------------------------------------------- the rollout


def rollout(run, cfg, policy, reference, critic, scorer, queries, row_indices):
    """Sample a response to each of the batch's queries (B lists of ids), and measure it with every model.

    row_indices (B,): the rows of the data that the queries are of, for the scorer.
    Returns the batch: see the table at the top.
    """
    n_vocab = run.tokenizer.n_vocab
    eos_id = run.tokenizer.eos_id
    end_id = cfg.truncate_token or eos_id

    # 1. Sample (detail 23.1): one uniform number decides each token. A row that has drawn `stop` only repeats it.
    #    With truncate_after an early EOS is no end, so no row may be stopped.
    run.phase("generation")
    draws = uniforms((len(queries), cfg.response_length), cfg.seed, run.step)
    stop = None if cfg.truncate_after else end_id
    rows_per_pass = cfg.rollout_micro_batch_size
    responses, sampled = generate_rows(cfg, run.world, policy, queries, draws, stop, n_vocab, rows_per_pass)

    # 2. A response ends at its first EOS, by which we mean end_id from here on. What comes after does not count
    #    (detail 23.2).
    has_eos, last = find_eos(responses, end_id, cfg.truncate_after)
    query_lens = torch.tensor(list(map(len, queries)), device=last.device)
    batch = {"responses": responses, "sampled_logprobs": sampled, "has_eos": has_eos, "last": last}
    batch["length"] = query_lens + last + 1

    # 3. Measure it: log-probabilities by the pass that trains, the critic's values, the score. Each rank does so for
    #    its share of the rows (`indices`, positions in the batch), and then all have all of them.
    def measure(indices):
        ids, select, targets = sequence_inputs(run, queries, batch, indices)
        options = {"temperature": cfg.temperature, "n_vocab": n_vocab}
        logprobs, entropy = policy.logprobs(ids, select, targets, **options, with_entropy=True)
        ref_logprobs = reference.logprobs(ids, select, targets, **options)
        columns = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "entropy": entropy}
        if critic is not None:
            columns["values"] = critic(ids, select)

        # Micro-batches are as wide as their own longest response; a batch has response_length columns.
        missing = cfg.response_length - select.shape[1]
        columns = {name: F.pad(column, (0, missing)) for name, column in columns.items()}

        ended = response_lists(batch, indices)
        if end_id != eos_id:
            # A reward model is read at the tokenizer's own EOS: append it. (No end at all: see 4.)
            ended = [response + [eos_id] for response in ended]
        columns["scores"] = scorer(pick(queries, indices), ended, row_indices[indices])
        return columns

    run.phase("scoring")
    batch.update(run.world.map_rows(measure, batch["length"].tolist(), rows_per_pass))
    run.phase("rest")
    refuse_nonfinite(batch, run.step)

    # 4. Without EOS a score means nothing (detail 13): a constant takes its place (detail 23.3).
    batch["scores"] = batch["scores"].where(has_eos, cfg.missing_eos_score)
    index = torch.arange(cfg.response_length, device=last.device)
    batch["mask"] = index <= last[:, None]
    batch["mask_p1"] = index <= last[:, None] + 1
    batch["kl"] = (batch["logprobs"] - batch["ref_logprobs"]) * batch["mask"]
    return batch


def find_eos(responses, eos_id, after=0):
    """responses (B, R) -> has_eos (B,), last (B,): the index of the first EOS from `after` on, R - 1 if none."""
    is_eos = responses == eos_id
    is_eos[:, :after] = False
    has_eos = is_eos.any(1)
    first = is_eos.int().argmax(1)
    return has_eos, first.where(has_eos, responses.shape[1] - 1)


def sequence_inputs(run, queries, batch, indices):
    """ids (B, T), select and targets (B, R') of the batch's rows at `indices`, for a pass through a model.

    `collate` selects only columns that predict a token of the response. The last value that counts is read at EOS: for
    EOS to be such a column, one token after it is kept.
    """
    responses = response_lists(batch, indices, n_after_eos=1)
    ids, select, targets, _ = collate(pick(queries, indices), responses, run.world.device)
    return ids, select, targets


def response_lists(batch, indices, n_after_eos=0):
    """The responses of the batch's rows at `indices` as lists of ids, up to EOS and so many tokens after it."""
    responses = batch["responses"][indices].tolist()
    ends = batch["last"][indices] + 1 + n_after_eos
    return [ids[:end] for ids, end in zip(responses, ends.tolist())]


def refuse_nonfinite(batch, step):
    for name, column in batch.items():
        is_finite = column.isfinite().view(len(column), -1).all(1)
        bad = (~is_finite).nonzero()[:, 0].tolist()
        which = f"{name} of the batch's rows {bad} are not finite"
        require(not bad, f"step {step}: {which}; look at those, or lower lr")


# ---------------------------------------------------------------------------- what each token was worth


def advantages(cfg, batch, state):
    """Add to a rollout's batch what the update needs: rewards, advantages, weights and returns (B, R).

    state: what a resumed run needs, in JSON: the KL coefficient, and the KL that `train` leaves there.
    """
    # 1. The penalty's coefficient.
    kl_coef = next_kl_coef(cfg, state)
    state["kl_coef"] = kl_coef

    # 2. Rewards: the penalty at each token, the score at the end.
    rewards = shape_rewards(batch["kl"], batch["scores"], batch["mask_p1"], kl_coef, cfg.whiten_rewards)

    # 3. Advantages, and the returns that the critic learns. After the last value that counts nothing is worth anything.
    values = batch["values"] * batch["mask_p1"]
    estimates = gae(rewards, values, cfg.gamma, cfg.lam)
    returns = estimates + values

    # 4. Advantages of mean 0 and variance 1 over the whole batch (detail 25).
    mask = batch["mask"]
    if cfg.whiten_advantages:
        estimates = whiten(estimates, mask)
    new = {"rewards": rewards, "values": values, "returns": returns}
    return {**batch, **new, "advantages": estimates * mask, "weights": mask}


def next_kl_coef(cfg, state):
    """The coefficient for this batch: an adaptive one follows the KL of the last batch.

    The controller is made anew each time, for `state` is what a checkpoint keeps.
    """
    controller = FixedKLController(cfg.kl_coef)
    if cfg.kl_target:
        before = state.get("kl_coef", cfg.kl_coef)
        controller = AdaptiveKLController(before, cfg.kl_target, cfg.kl_horizon)
    if "kl" in state:
        controller.update(state["kl"], cfg.batch_size)
    return controller.value


class FixedKLController:
    def __init__(self, kl_coef):
        self.value = kl_coef

    def update(self, kl, n_episodes):
        """Leave the coefficient as it is."""


class AdaptiveKLController:
    """Raise the coefficient while KL is above target, lower it while below. (arXiv:1909.08593 section 2.2)"""

    def __init__(self, kl_coef, target, horizon):
        self.value = kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, kl, n_episodes):
        """kl: the batch's mean KL per sequence, in nats; n_episodes: its size."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= max(1 + error * n_episodes / self.horizon, 0.1)  # a short horizon must not turn its sign


def shape_rewards(kl, scores, mask_p1, kl_coef, whiten_rewards=False):
    """Rewards per token (B, R): -kl_coef * KL, plus the score.

    kl (B, R) is estimated by log p - log p_ref. scores (B,) are paid where mask_p1 ends: at the step after EOS, or at
    the last column if there is no such step.
    whiten_rewards: divide by the standard deviation, keep the mean (arXiv:2403.17031 detail 24).
    """
    rewards = -kl_coef * kl
    end = mask_p1.sum(1) - 1
    rewards.scatter_add_(1, end[:, None], scores[:, None])
    if whiten_rewards:
        return whiten(rewards, mask_p1, shift_mean=False)
    return rewards


def gae(rewards, values, gamma, lam):
    """Generalised advantage estimation: (B, R) from rewards and values (B, R). (arXiv:1506.02438 eq. 16)

    The value after the last index is 0. Rewards and values are 0 after a row's end: no advantage flows back from there.
    """
    advantages = torch.zeros_like(rewards)
    next_value = 0.0
    advantage = 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages


def whiten(x, mask, shift_mean=True):
    """Scale x (B, R) to variance 1 (biased) and mean 0 over `mask`; shift_mean=False keeps the mean. 0 elsewhere."""
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean) ** 2 * mask).sum() / count
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened * mask


# ---------------------------------------------------------------------------- the update


def ppo_update(run, cfg, policy, critic, queries, batch, token_loss, before_step=None):
    """n_epochs x n_minibatches optimizer steps on one batch.

    Returns metrics, each the mean over the steps, except: val/ratio is from the first step, lr and grad_norm are from
    the last, and what before_step adds is from its last call.
    """
    n_steps = cfg.n_epochs * cfg.n_minibatches
    policy_learns = critic is None or run.step >= cfg.critic_steps
    shares = []  # each micro-batch's statistics / n_steps: summed over all steps and ranks they are the logged means
    added = {}  # what before_step has added to the metrics
    for number, indices in enumerate(minibatch_indices(cfg, run.step)):
        micro_stats = accumulate(run, cfg, policy, critic, queries, batch, indices, token_loss, policy_learns)
        for stats in micro_stats:
            shares.append({name: x / n_steps for name, x in stats.items()})
        if number == 0:
            # Before any step of this update the ratio must be 1, or rollout and update disagree.
            first_ratios = [{"val/ratio": stats["val/ratio_avg"]} for stats in micro_stats]

        if before_step is not None and policy_learns:
            numbers = run.world.sum_scalars(micro_stats)
            if before_step(run, cfg, numbers):
                # Without gradients the policy stays as it is; the critic takes its steps.
                policy_learns = False
                policy.zero_grad()
            added = {name: x for name, x in numbers.items() if name not in shares[0]}
        last_step = optimizer_step(run)

    first_ratio = run.world.sum_scalars(first_ratios)
    return {**first_ratio, **run.world.sum_scalars(shares), **added, **last_step}


def minibatch_indices(cfg, step):
    """Positions in the batch of each optimizer step's rows: n_epochs times all of them, in another order."""
    for epoch in range(cfg.n_epochs):
        order = np.random.default_rng((cfg.seed, step, epoch)).permutation(cfg.batch_size)
        yield from np.split(order, cfg.n_minibatches)


def accumulate(run, cfg, policy, critic, queries, batch, indices, token_loss, policy_learns):
    """Accumulate the gradients of a minibatch, the batch's rows at `indices`, from this rank's share of it.

    Returns for each micro-batch a dict of statistics, which add up to the minibatch's.
    """
    minibatch = {name: x[indices] for name, x in batch.items()}
    # The losses are means over the whole minibatch: over all micro-batches, and all ranks.
    total_weight = minibatch["weights"].sum()
    n_values = minibatch["mask_p1"].sum()
    options = {"temperature": cfg.temperature, "n_vocab": run.tokenizer.n_vocab}
    micro_stats = []
    for places in run.micro_batches(minibatch["length"].tolist()):  # in the minibatch
        run.phase("policy")
        micro_indices = indices[places]  # in the batch
        ids, select, targets = sequence_inputs(run, queries, batch, micro_indices)
        micro = {}
        for name, x in minibatch.items():
            micro[name] = x[places] if x.dim() == 1 else x[places, : select.shape[1]]

        # One model at a time: its activations are gone before the next one's come.
        new_entropy = None
        with torch.set_grad_enabled(policy_learns):
            if cfg.entropy_coef > 0:
                new_logprobs, new_entropy = policy.logprobs(ids, select, targets, **options, with_entropy=True)
            else:
                new_logprobs = policy.logprobs(ids, select, targets, **options)
        loss, stats = actor_loss(cfg, token_loss, new_logprobs, micro, total_weight, new_entropy)
        if policy_learns:
            backward(run, loss, micro_indices)  # loss.backward(), see distributed/optimizer.py
        if critic is not None:
            run.phase("critic")
            loss, critic_stats = critic_loss(cfg, critic(ids, select), micro, n_values)
            backward(run, loss, micro_indices)
            stats.update(critic_stats)
        micro_stats.append(stats)
    run.phase("rest")
    return micro_stats


def actor_loss(cfg, token_loss, new_logprobs, micro, total_weight, new_entropy=None):
    """A micro-batch's part of its minibatch's policy loss, and of its statistics (a dict of scalars); both add up.

    token_loss: by default `clipped_surrogate`, which is `policy_loss`.
    total_weight: what all tokens of the minibatch count together, over all micro-batches and ranks.
    """
    weights = micro["weights"] / total_weight  # (B, R)
    logprobs = micro["logprobs"]
    new_logprobs = new_logprobs.where(micro["mask"], logprobs)  # after EOS nothing must overflow exp
    pg_loss = token_loss(cfg, new_logprobs, micro)  # (B, R)
    with torch.no_grad():
        ratio = torch.exp(new_logprobs - logprobs)
        # By PPO's clip of each token's ratio: a variant with another clip, or none, is not described by it.
        clipped = ratio.clamp(1 - cfg.cliprange, 1 + cfg.cliprange)
        is_clipped = micro["advantages"] * clipped < micro["advantages"] * ratio
        stats = {
            "loss/policy_avg": (pg_loss * weights).sum(),
            "policy/approxkl_avg": (0.5 * (new_logprobs - logprobs) ** 2 * weights).sum(),
            "policy/clipfrac_avg": (is_clipped * weights).sum(),
            "val/ratio_avg": (ratio * weights).sum(),
            # The spread around 1, not around the mean: 0 before any step.
            "val/ratio_var": ((ratio - 1) ** 2 * weights).sum(),
        }
    if new_entropy is not None:
        pg_loss = pg_loss - cfg.entropy_coef * new_entropy
    return (pg_loss * weights).sum(), stats


def clipped_surrogate(cfg, new_logprobs, micro):
    """PPO's loss of each token of a micro-batch: (B, R)."""
    return policy_loss(new_logprobs, micro["logprobs"], micro["advantages"], cfg.cliprange)


def policy_loss(new_logprobs, logprobs, advantages, cliprange):
    """PPO-Clip's surrogate, negated: (B, R). (arXiv:1707.06347 eq. 7)"""
    ratio = torch.exp(new_logprobs - logprobs)
    pg_loss = -advantages * ratio
    pg_loss_clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(pg_loss, pg_loss_clipped)


def critic_loss(cfg, new_values, micro, n_values):
    """A micro-batch's part of the value loss, times vf_coef, and of its statistics.

    n_values: how many values count in the whole minibatch.
    """
    weights = micro["mask_p1"] / n_values
    vf_loss = value_loss(new_values, micro["values"], micro["returns"], cfg.cliprange_value)
    is_clipped = vf_loss > 0.5 * (new_values - micro["returns"]) ** 2
    loss = (vf_loss * weights).sum()
    stats = {"loss/value_avg": loss.detach(), "val/clipfrac_avg": (is_clipped * weights).sum()}
    return cfg.vf_coef * loss, stats


def value_loss(new_values, values, returns, cliprange_value):
    """Half the larger squared error of two: the value's, and that of the value clipped to stay near the old: (B, R)."""
    change = new_values - values
    clipped = values + change.clamp(-cliprange_value, cliprange_value)
    vf_loss = (new_values - returns) ** 2
    vf_loss_clipped = (clipped - returns) ** 2
    return 0.5 * torch.maximum(vf_loss, vf_loss_clipped)


# ---------------------------------------------------------------------------- what is written


def rollout_metrics(batch, kl_coef):
    """What the samples say, before any update; sums are per sequence, in nats."""
    mask = batch["mask"]
    tokens = mask.sum().item()
    scores = batch["scores"].mean().item()
    kl = batch["kl"].sum(1).mean().item()
    gap = (batch["sampled_logprobs"] - batch["logprobs"]).abs()
    nll = -(batch["logprobs"] * mask).sum()
    ref_nll = -(batch["ref_logprobs"] * mask).sum()
    return {
        "objective/kl": kl,
        "objective/kl_coef": kl_coef,
        "objective/entropy": -(batch["logprobs"] * mask).sum(1).mean().item(),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": scores - kl_coef * kl,
        "objective/scores": scores,
        "policy/entropy_avg": (batch["entropy"] * mask).sum().item() / tokens,
        "val/num_eos_tokens": batch["has_eos"].sum().item(),
        "val/eos_rate": batch["has_eos"].float().mean().item(),
        "val/response_length": tokens / len(mask),
        "val/generation_gap": (gap * mask).sum().item() / tokens,
        "val/perplexity": (nll / tokens).exp().item(),
        "val/ref_perplexity": (ref_nll / tokens).exp().item(),
    }


def write_samples(run, cfg, queries, batch):
    """A few rows of this update's rollout into samples.jsonl."""
    rows = []
    for number, response in enumerate(response_lists(batch, slice(cfg.samples_rows))):
        row = {"step": run.step, "query": run.tokenizer.decode(queries[number])}
        row["response"] = run.tokenizer.decode(response)
        row["score"] = batch["scores"][number].item()
        kl = batch["kl"][number]
        row["kl"] = kl.sum().item()
        row["token_kl"] = list(zip(colour.pieces(run.tokenizer, response), kl.tolist()))
        rows.append(row)
    write_jsonl(run.out_dir / "samples.jsonl", rows, "a")


# ---------------------------------------------------------------------------- the models and the doors


@stage  # errors become one line
def main(cfg, score=None, advantages=advantages, token_loss=clipped_surrogate, with_critic=True,
         before_step=None, after_update=None, combine=scores.mean):  # fmt: skip
    """Load data and models, train, and write out_dir/final. All but cfg change one thing; the functions are doors:

    score(queries, responses, rows) -> floats       in place of the reward model: lists of texts, and the data's rows
                                                    (dicts), which a function of two arguments does not get. As with a
                                                    reward model, without EOS the score is missing_eos_score.
    advantages(cfg, batch, state) -> batch          with `advantages`, `weights` and, with a critic, `returns`
    token_loss(cfg, new_logprobs, micro) -> (B, R)  the loss of each token, from a micro-batch of the batch
    before_step(run, cfg, metrics) -> bool          before an optimizer step that trains the policy, with the numbers
                                                    of this minibatch; True: neither this step nor a later one of
                                                    this update trains the policy. What it adds to `metrics` is logged.
    after_update(run, policy, reference)            after each update. It may move the reference, which then has
                                                    float32 masters and a place in checkpoints.
    combine(rewards) -> (B,)                        from the rewards of several reward models, (models, B)
    with_critic                                     False: no critic is there, a batch has no values, and `advantages`
                                                    must be one that does without
    """
    models = {"model": cfg.model, "reference": cfg.reference or cfg.model}
    if score is None:
        models["reward_model"] = cfg.reward_model
    if cfg.critic and with_critic:
        models["critic"] = cfg.critic
    functions = {"score": score, "advantages": advantages, "token_loss": token_loss}
    functions.update(before_step=before_step, after_update=after_update, combine=combine)
    # Of each row the query alone is read.
    world, data = start(cfg, 0, models, functions, n_minibatches=cfg.n_minibatches)
    n_vocab = data.tokenizer.n_vocab
    # At these limits or above, the policy never learns, or no response can end.
    limits = dict(critic_steps=data.n_updates, truncate_token=n_vocab, truncate_after=cfg.response_length)
    for name, limit in limits.items():
        require(getattr(cfg, name) < limit, f"{name} must be below {limit} in this run; lower it")
    require(cfg.kl_coef > 0 or cfg.kl_target == 0, "kl_target adapts kl_coef by factors; set a kl_coef above 0")
    sizes = f"batch_size {cfg.batch_size} must be a multiple of group_size {cfg.group_size}"
    require(cfg.batch_size % cfg.group_size == 0, sizes)

    load = functools.partial(load_model, cfg, world, data.tokenizer)

    policy = load(GPTNeoX, cfg.model, trainable=True)
    reference = load(GPTNeoX, cfg.reference or cfg.model, trainable=after_update is not None)
    if score is None:
        scorer = scores.by_models(cfg, world, data.tokenizer, cfg.reward_model, combine)
    else:
        scorer = scores.by_function(cfg, world, data, score)

    models = {"policy": policy}
    critic = None
    if with_critic:
        if cfg.critic:
            critic = load(ScalarModel, cfg.critic, trainable=True)
        elif score is None:
            critic = load(ScalarModel, split_names(cfg.reward_model)[0], trainable=True)
        else:
            critic = load(ScalarModel, cfg.model, trainable=True, new_head=True)
        models["critic"] = critic

    run = Run(cfg, world, data, models, lrs={"critic": cfg.critic_lr})
    if after_update is not None:
        run.models["reference"] = reference  # behind the optimizer's back: checkpoints alone look there
    train(run, cfg, policy, reference, critic, scorer, advantages, token_loss, before_step, after_update)
    run.export(policy)


if __name__ == "__main__":
    main(cfg)
