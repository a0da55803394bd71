"""PPO: the policy samples responses, the reward model scores them, clipped updates follow; a KL penalty holds it back.

    python ppo.py config/toy_ppo.py                                  # a CPU, minutes
    torchrun --nproc_per_node=8 ppo.py config/ppo_2.8b.py
    ppo.main(ppo.Config(...), score=f)                               # a notebook; f(queries, responses) -> floats

Four models: the policy and the critic are trained, the reference (the initial policy) and the reward model are frozen.
The critic starts from the reward model (detail 22). Every random number depends on (seed, step, row) alone.

Shapes: B rows, Q query, R response, T = Q + R, V vocabulary. Masks are True where a token counts.

    column       0 .. Q-2   Q-1   Q   ..  Q + last  Q + last + 1 ..
    ids          query      q     r0  ..  EOS       (nothing that counts)
    logprobs     -          r0    r1  ..  -                    log p of the *next* token: columns Q-1 .. T-2
    values       -          v0    v1  ..  v(EOS+1)             worth of the text so far, before the next token
    mask         r0 .. EOS: the policy's actions
    mask_p1      one more: the value after EOS. The score is paid there, one step after EOS, so that EOS itself
                 is credited through GAE; a response cut off without EOS is paid at its last token.

With the defaults this is the reference step of arXiv:2403.17031. Beyond it, each by its field and off by default:

    kl_target, kl_horizon        adapt kl_coef to a KL per sequence                            arXiv:1909.08593 2.2
    truncate_token, _after       a token other than EOS ends the response                      arXiv:1909.08593
    adam_style                   eps as in TensorFlow's Adam                                   arXiv:1909.08593
    whiten_rewards               rewards of variance 1                                         arXiv:2403.17031 24
    reward_norm, reward_clip     scores by the moments of all so far, within bounds            arXiv:2307.04964 eq. 18
    advantage_clip               whitened advantages within bounds                             arXiv:2307.04964
    critic_steps, critic_lr      the critic learns first, and at its own rate                  arXiv:2307.04964
    entropy_coef                 entropy bonus                                                 arXiv:1707.06347 eq. 9
    ptx_coef, ptx_data           SFT loss mixed in (PPO-ptx)                                   arXiv:2203.02155 eq. 2
    max_grad_norm                clip the gradient's norm                                      arXiv:2307.04964
    reward_model=a,b             the mean of an ensemble                                       arXiv:1706.03741

differs from the reference step of arXiv:2403.17031:
- Log-probabilities are recomputed by the forward pass that trains (the softmax in float32), not taken from generation.
- Means are over all tokens of a minibatch on all processes, not per micro-batch, and whitening is over all
  processes: the result depends on neither.
- Metrics leave out padding. `val/ratio` is that of the first minibatch, where it must be 1.
differs from the sources of the options:
- Nothing behind truncate_token counts; arXiv:1909.08593 trains the policy on that as well.
- Scores are normalised after a missing EOS has had its score; the reported objective/scores stay as they were.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import runtime
from configurator import Count, Positive, Signed, configure, require
from data import batch_rows, collate, last_scalars, uniforms
from evals.tables import rollout_metrics
from model import GPTNeoX, ScalarModel


@dataclass
class Config(runtime.TrainConfig):
    model: str = "out/sft_1b/final"  # the SFT model, where the policy starts: hub id or directory
    reference: str = ""  # the frozen reference; empty: the same as model
    reward_model: str = "out/rm_1b/final"  # hub id or directory; a,b,c: the mean of these
    critic: str = ""  # where the critic starts; empty: the reward model (with a score function: model, with a new head)
    data: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"  # queries: hub id, directory or file with {split}
    eval_split: str = ""  # of no use here: sample.py evaluates
    max_length: int = 512  # tokens of a query; a longer one is an error
    episodes: Count = 1_000_000  # responses sampled in the whole run
    batch_size: Count = 512  # episodes per update, over all processes
    n_minibatches: Count = 1  # optimizer steps per epoch over a batch
    n_epochs: Count = 4  # passes over each batch
    micro_batch_size: Count = 16  # rows per forward and backward pass and process
    rollout_micro_batch_size: Count = 64  # rows per pass without gradients and process
    schedule: Literal["cosine", "linear", "constant"] = "linear"  # of the learning rate; the first two go to 0
    response_length: Count = 53  # tokens sampled at most
    temperature: Positive = 0.7  # of sampling, and of all log-probabilities
    truncate_token: int = 0  # id of the token that ends a response (arXiv:1909.08593); 0: EOS
    truncate_after: int = 0  # an end before this column does not count
    missing_eos_score: Signed = -1.0  # the score of a response without EOS (detail 23.3)
    kl_coef: float = 0.05  # penalty per nat of KL to the reference
    kl_target: float = 0.0  # adapt kl_coef, which must not be 0, towards this KL per sequence; 0: keep it fixed
    kl_horizon: Count = 10_000  # episodes over which it adapts
    reward_norm: Literal["none", "scale", "normalize"] = "none"  # scores / std of all so far; minus their mean too
    reward_clip: float = 0.0  # then keep scores within -+ this; 0: any
    whiten_rewards: bool = False  # scale rewards to variance 1 (detail 24)
    whiten_advantages: bool = True  # mean 0, variance 1 (detail 25)
    advantage_clip: float = 0.0  # then keep advantages within -+ this; 0: any
    gamma: float = 1.0  # discount
    lam: float = 0.95  # GAE's lambda
    cliprange: float = 0.2  # of the policy's ratio
    cliprange_value: float = 0.2  # of the critic's change
    vf_coef: float = 0.1  # weight of the value loss
    critic_lr: float = 0.0  # the critic's learning rate; 0: the same
    critic_steps: int = 0  # first updates in which the critic alone learns; the policy learns after them
    entropy_coef: float = 0.0  # weight of an entropy bonus
    ptx_coef: float = 0.0  # weight of an SFT loss on as many rows (PPO-ptx, arXiv:2203.02155)
    ptx_data: str = ""  # its rows, longer than queries by response_length at most: as data; empty: data
    samples_every: int = 10  # updates between rows in samples.jsonl; 0: none


# ---------------------------------------------------------------------------- the math


def find_eos(responses, eos_id, after=0):
    """responses (B, R) -> has_eos (B,), last (B,): the index of the first EOS from `after` on, R - 1 if none."""
    is_eos = responses == eos_id
    is_eos[:, :after] = False
    has_eos = is_eos.any(1)
    return has_eos, is_eos.int().argmax(1).where(has_eos, responses.shape[1] - 1)


def cut(batch, rows, more=1):
    """The responses of the batch's `rows` as lists of ids, those before column last + more."""
    return [row[: end + more] for row, end in zip(batch["responses"][rows].tolist(), batch["last"][rows].tolist())]


def normalize_scores(scores, moments, how):
    """Scores (B,) divided by the standard deviation of all so far ("scale"), or minus their mean first ("normalize").

    moments: count, mean and sum of squared deviations of those before; returns the new ones too. (arXiv:2307.04964
    eq. 18 with the running moments of its released code, merged as in Chan et al. 1979)
    """
    (count, mean, squares), x = moments, scores.double()
    n, shift = count + len(x), x.mean().item() - mean
    squares += ((x - x.mean()) ** 2).sum().item() + shift**2 * count * len(x) / n
    mean += shift * len(x) / n
    std = (squares / max(n - 1, 1)) ** 0.5 or 1.0
    return ((x - mean * (how == "normalize")) / std).float(), (n, mean, squares)


def shape_rewards(logprobs, ref_logprobs, scores, last, mask, kl_coef, whiten_rewards=False):
    """Rewards per token (B, R): -kl_coef * KL, plus the score; and the KL (B, R), estimated by log p - log p_ref.

    scores (B,) are paid at last + 1, the step after EOS, or at the last column if there is no such step.
    whiten_rewards: divide by the standard deviation, keep the mean (arXiv:2403.17031 detail 24).
    """
    kl = (logprobs - ref_logprobs) * mask
    rewards = -kl_coef * kl
    end = (last + 1).clamp(max=mask.shape[1] - 1)
    rewards[torch.arange(len(rewards), device=rewards.device), end] += scores
    if whiten_rewards:
        columns = torch.arange(mask.shape[1], device=mask.device)
        rewards = whiten(rewards, columns <= last[:, None] + 1, shift_mean=False)
    return rewards, kl


def gae(rewards, values, gamma, lam):
    """Generalised advantage estimation: (B, R) from rewards and values (B, R). (arXiv:1506.02438 eq. 16)

    The value after the last column is 0.
    """
    advantages, next_value, advantage = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages


def whiten(x, mask, shift_mean=True):
    """Scale x (B, R) to variance 1 (biased) and mean 0 over `mask`; shift_mean=False keeps the mean. 0 elsewhere."""
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean) ** 2 * mask).sum() / count
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def policy_loss(new_logprobs, logprobs, advantages, cliprange):
    """PPO-Clip's surrogate, negated: (B, R). (arXiv:1707.06347 eq. 7)"""
    ratio = torch.exp(new_logprobs - logprobs)
    pg_loss = -advantages * ratio
    pg_loss_clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(pg_loss, pg_loss_clipped)


def value_loss(new_values, values, returns, cliprange_value):
    """Half the squared error, or that of the value clipped to stay near the old one if it is larger: (B, R)."""
    clipped = values + (new_values - values).clamp(-cliprange_value, cliprange_value)
    vf_loss = (new_values - returns) ** 2
    vf_loss_clipped = (clipped - returns) ** 2
    return 0.5 * torch.maximum(vf_loss, vf_loss_clipped)


class FixedKLController:
    def __init__(self, kl_coef):
        self.value = kl_coef

    def update(self, kl, n_episodes):
        """Leave the coefficient as it is."""


class AdaptiveKLController:
    """Raise the coefficient while KL is above target, lower it while below. (arXiv:1909.08593 section 2.2)"""

    def __init__(self, kl_coef, target, horizon):
        self.value, self.target, self.horizon = kl_coef, target, horizon

    def update(self, kl, n_episodes):
        """kl: the batch's mean KL per sequence, in nats; n_episodes: its size."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= max(1 + error * n_episodes / self.horizon, 0.1)  # a short horizon must not turn its sign


# ---------------------------------------------------------------------------- the rollout


def forward(run, cfg, model, queries, batch, index, with_entropy=False):
    """A policy's pass over the rows `index`, each cut one token behind EOS: the last value that counts is read at EOS,
    in the column that predicts that token.

    Returns ids (B, T) and select (B, R'), for the other models' passes; logprobs (B, R'); entropy (B, R') or None.
    """
    ids, select, targets, _ = collate([queries[i] for i in index], cut(batch, index, more=2), run.device)
    logprobs = model.logprobs(ids, select, targets, cfg.temperature, run.tokenizer.n_vocab, with_entropy)
    return ids, select, *(logprobs if with_entropy else (logprobs, None))


def rollout(run, cfg, policy, reference, critic, score, queries, step):
    """Sample a response to each of the batch's queries (B lists of ids), and measure it with every model.

    score(queries, responses) -> (rows,) gets lists of ids, the responses cut behind EOS, or behind truncate_token and
    with an EOS added, for that is where a reward model is read.
    Returns a dict of tensors over the whole batch, the same on every rank: responses, sampled_logprobs, logprobs,
    ref_logprobs, values and entropy (B, R), scores, has_eos, last and length (B,).
    """
    draws, size = uniforms((len(queries), cfg.response_length), cfg.seed, step), cfg.rollout_micro_batch_size
    end_id, added = cfg.truncate_token or run.tokenizer.eos_id, [run.tokenizer.eos_id] * (cfg.truncate_token > 0)
    stop = None if cfg.truncate_after else end_id
    responses, sampled = runtime.generate_rows(run, policy, queries, draws, cfg.temperature, stop, size)
    has_eos, last = find_eos(responses, end_id, cfg.truncate_after)
    batch = dict(responses=responses, sampled_logprobs=sampled, has_eos=has_eos, last=last)
    batch["length"] = torch.tensor([len(query) for query in queries], device=last.device) + last

    def measure(index):
        ids, select, logprobs, spread = forward(run, cfg, policy, queries, batch, index, with_entropy=True)
        ref_logprobs = forward(run, cfg, reference, queries, batch, index)[2]
        columns = dict(logprobs=logprobs, ref_logprobs=ref_logprobs, values=critic(ids, select), entropy=spread)
        columns = {name: F.pad(x, (0, cfg.response_length - x.shape[1])) for name, x in columns.items()}
        return columns | {"scores": score([queries[i] for i in index], [row + added for row in cut(batch, index)])}

    measured = run.map_rows(measure, batch["length"].tolist(), size)
    for name, x in measured.items():
        bad = (~x.isfinite()).view(len(x), -1).any(1).nonzero()[:, 0].tolist()
        require(not bad, f"step {step}: {name} of the batch's rows {bad} are not finite; look at those, or lower lr")
    return measured | batch


def prepare(cfg, batch, kl_coef, state=None):
    """Add to a rollout's tensors what the update needs: masks, rewards, advantages (whitened) and returns.

    state["moments"]: of the scores so far; with cfg.reward_norm it takes in this batch's.
    """
    last = batch["last"]
    columns = torch.arange(cfg.response_length, device=last.device)
    mask, mask_p1 = columns <= last[:, None], columns <= last[:, None] + 1
    paid = scores = batch["scores"].where(batch["has_eos"], cfg.missing_eos_score)
    if cfg.reward_norm != "none":
        paid, state["moments"] = normalize_scores(scores, state["moments"], cfg.reward_norm)
    paid = paid.clamp(-(cfg.reward_clip or torch.inf), cfg.reward_clip or torch.inf)
    logprobs, ref_logprobs, values = batch["logprobs"], batch["ref_logprobs"], batch["values"] * mask_p1
    rewards, kl = shape_rewards(logprobs, ref_logprobs, paid, last, mask, kl_coef, cfg.whiten_rewards)
    advantages = gae(rewards, values, cfg.gamma, cfg.lam)
    returns = advantages + values
    advantages = whiten(advantages, mask) if cfg.whiten_advantages else advantages * mask
    advantages = advantages.clamp(-(cfg.advantage_clip or torch.inf), cfg.advantage_clip or torch.inf)
    new = dict(mask=mask, mask_p1=mask_p1, scores=scores, rewards=rewards, kl=kl, values=values)
    return batch | new | dict(returns=returns, advantages=advantages)


# ---------------------------------------------------------------------------- the update


def actor_loss(cfg, new_logprobs, micro, n_actions, new_entropy=None):
    """A micro-batch's part of its minibatch's policy loss, and of its statistics (a dict of scalars); both add up.

    n_actions: how many tokens count in the whole minibatch, over all micro-batches and ranks.
    """
    weights, logprobs, advantages = micro["mask"] / n_actions, micro["logprobs"], micro["advantages"]  # (B, R) each
    new_logprobs = new_logprobs.where(micro["mask"], logprobs)  # what stands behind EOS must not overflow exp
    pg_loss = policy_loss(new_logprobs, logprobs, advantages, cfg.cliprange)
    with torch.no_grad():
        ratio = torch.exp(new_logprobs - logprobs)
        stats = {
            "loss/policy_avg": (pg_loss * weights).sum(),
            "policy/approxkl_avg": (0.5 * (new_logprobs - logprobs) ** 2 * weights).sum(),
            "policy/clipfrac_avg": ((pg_loss > -advantages * ratio) * weights).sum(),
            "val/ratio_avg": (ratio * weights).sum(),
            "val/ratio_var": ((ratio - 1) ** 2 * weights).sum(),
        }
    objective = pg_loss if new_entropy is None else pg_loss - cfg.entropy_coef * new_entropy
    return (objective * weights).sum(), stats


def critic_loss(cfg, new_values, micro, n_values):
    """The same of the value loss, times vf_coef. n_values: how many values count in the whole minibatch."""
    weights = micro["mask_p1"] / n_values
    vf_loss = value_loss(new_values, micro["values"], micro["returns"], cfg.cliprange_value)
    loss, is_clipped = (vf_loss * weights).sum(), vf_loss > 0.5 * (new_values - micro["returns"]) ** 2
    return cfg.vf_coef * loss, {"loss/value_avg": loss.detach(), "val/clipfrac_avg": (is_clipped * weights).sum()}


def ptx_update(run, cfg, policy, rows):
    """Accumulate the gradient of ptx_coef * mean -log p per token of the rows' responses; returns that mean.

    (PPO-ptx: arXiv:2203.02155 eq. 2)
    """
    n_tokens, parts = sum(len(row[0]) for row in rows["responses"]), []
    for index in run.accumulate(rows["length"], cfg.micro_batch_size):
        micro = rows[index]
        ids, select, targets, mask = collate(micro["query"], [row[0] for row in micro["responses"]], run.device)
        loss = -(policy.logprobs(ids, select, targets) * mask).sum() / n_tokens
        runtime.backward(run, cfg.ptx_coef * loss)
        parts.append({"loss/ptx_avg": loss})
    return run.sum(parts)


def ppo_update(run, cfg, policy, critic, queries, batch, ptx_rows=None):
    """n_epochs x n_minibatches optimizer steps on one batch; returns metrics: means over them, but for val/ratio,
    lr, grad_norm and loss/ptx_avg (the last step's). ptx_rows: as many rows for PPO-ptx.
    """
    learns, parts, metrics = run.step >= cfg.critic_steps, [], {}  # does the policy learn, or the critic alone?
    n_steps, bonus = cfg.n_epochs * cfg.n_minibatches, cfg.entropy_coef > 0
    for epoch in range(cfg.n_epochs):
        order = np.random.default_rng((cfg.seed, run.step, epoch)).permutation(len(queries))
        for number, minibatch in enumerate(np.split(order, cfg.n_minibatches)):
            n_actions, n_values = batch["mask"][minibatch].sum(), batch["mask_p1"][minibatch].sum()
            for index in run.accumulate(batch["length"][minibatch].tolist(), cfg.micro_batch_size):
                rows = minibatch[index]
                with torch.set_grad_enabled(learns):
                    ids, select, new_logprobs, spread = forward(run, cfg, policy, queries, batch, rows, bonus)
                micro = {name: x[rows] if x.dim() == 1 else x[rows, : select.shape[1]] for name, x in batch.items()}
                loss, stats = actor_loss(cfg, new_logprobs, micro, n_actions, spread)
                if learns:  # a model at a time: its activations are gone before the next one's come
                    runtime.backward(run, loss, rows)
                loss, more = critic_loss(cfg, critic(ids, select), micro, n_values)
                runtime.backward(run, loss, rows)
                # before any step of this update the ratio must be 1, or rollout and update disagree
                ratio = stats["val/ratio_avg"] * (epoch == number == 0)
                parts.append({"val/ratio": ratio} | {name: x / n_steps for name, x in (stats | more).items()})
            if ptx_rows and learns:
                metrics = ptx_update(run, cfg, policy, ptx_rows.select(minibatch))
            metrics |= runtime.optimizer_step(run)
    return run.sum(parts) | metrics


def write_samples(run, queries, batch, n=4):
    decode, responses = run.tokenizer.decode, cut(batch, slice(n))
    columns = zip(map(decode, queries), map(decode, responses), batch["scores"].tolist(), batch["kl"].sum(1).tolist())
    rows = [dict(step=run.step, query=q, response=r, score=s, kl=kl) for q, r, s, kl in columns]
    runtime.write_jsonl(run.out_dir / "samples.jsonl", rows, "a")


@runtime.stage
def main(cfg, score=None):
    """score: a function of (query texts, response texts) -> list of floats that replaces the reward model.

    As with a reward model, a response without EOS scores missing_eos_score instead.
    """
    run = runtime.start(cfg, n_responses=0, n_minibatches=cfg.n_minibatches)
    limits = dict(critic_steps=run.total, truncate_token=run.tokenizer.n_vocab, truncate_after=cfg.response_length)
    for name, limit in limits.items():  # beyond them the policy would never learn, or no response ever end
        require(getattr(cfg, name) < limit, f"{name} must be below {limit} in this run; lower it")
    policy = runtime.load_model(run, GPTNeoX, cfg.model, trainable=True)
    reference = runtime.load_model(run, GPTNeoX, cfg.reference or cfg.model)
    sources = cfg.reward_model.split(",") if score is None else []
    reward_models = [runtime.load_model(run, ScalarModel, source) for source in sources]

    def scorer(queries, responses):
        if score is None:
            return last_scalars(reward_models, run.device, queries, responses)
        texts = ([run.tokenizer.decode(ids) for ids in rows] for rows in (queries, responses))
        scores = [float(x) for x in score(*texts)]
        require(len(scores) == len(responses), f"score gave {len(scores)} for {len(responses)} texts; return one each")
        return torch.tensor(scores, device=run.device)

    head = cfg.critic or (sources[0] if sources else "")
    critic = runtime.load_model(run, ScalarModel, head or cfg.model, trainable=True, new_head=not head)
    longest = cfg.max_length and cfg.max_length + cfg.response_length
    ptx = cfg.ptx_coef and run.load(cfg.ptx_data or cfg.data, cfg.train_split, n_responses=1, max_length=longest)
    kl_control = FixedKLController(cfg.kl_coef)
    if cfg.kl_target:
        kl_control = AdaptiveKLController(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    state = {"kl_coef": cfg.kl_coef, "moments": (0, 0.0, 0.0)}
    for step in run.train({"policy": policy, "critic": critic}, state, lrs={"critic": cfg.critic_lr}):
        if cfg.kl_target:  # a resumed run's; a fixed one is as configured, and may be changed on the way
            kl_control.value = state["kl_coef"]
        queries = run.rows[run.batch()]["query"]
        batch = rollout(run, cfg, policy, reference, critic, scorer, queries, step)
        batch = prepare(cfg, batch, kl_control.value, state)
        metrics = {"episode": (step + 1) * cfg.batch_size} | rollout_metrics(batch, kl_control.value)
        ptx_rows = ptx and ptx.select(batch_rows(len(ptx), cfg.batch_size, step, cfg.seed + 1))
        metrics |= ppo_update(run, cfg, policy, critic, queries, batch, ptx_rows)
        kl_control.update(metrics["objective/kl"], cfg.batch_size)
        state["kl_coef"] = kl_control.value
        run.log(metrics, watch=("objective/scores", "objective/kl", "val/eos_rate"))
        if run.is_main and cfg.samples_every and step % cfg.samples_every == 0:
            write_samples(run, queries, batch)
    runtime.export(run, policy)


if __name__ == "__main__":
    main(configure(Config))
