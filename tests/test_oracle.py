"""Two updates of PPO with many options on, beside an oracle: transformers' models in float64, losses token by token.

Options whose default is 1 or off hide what is wrong with them, so none is at its default here: two minibatches and two
epochs, an SFT loss mixed in, the entropy bonus, TensorFlow's Adam with other betas, a clipped gradient, warm-up, and a
critic with its own learning rate.
"""

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipeline import metrics
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXForCausalLM, GPTNeoXModel

import ppo
from data import batch_indices, load_rows
from hub.tokenizer import Tokenizer
from variants import ptx

B = 12
EPOCHS = 2
MINIBATCHES = 2
UPDATES = 2
OPTIONS = dict(
    batch_size=B, micro_batch_size=5, episodes=UPDATES * B, n_epochs=EPOCHS, n_minibatches=MINIBATCHES, lr=1e-3,
    critic_lr=4e-4, adam_style="tf", adam_beta1=0.6, adam_beta2=0.9, max_grad_norm=0.05, weight_decay=0.5,
    warmup_steps=2, schedule="constant", entropy_coef=0.02, ptx_coef=0.5, vf_coef=0.3, cliprange=0.01,
    cliprange_value=0.02, response_length=8,
)  # fmt: skip
# What a float32 pass of these models errs by, see tests/test_details.py; a mean over tokens errs by less.
FORWARD = 2e-5


@pytest.fixture(scope="module")
def trained(pipeline):
    """The run, the batches of its updates, and the rows that it took."""
    directory = pipeline.directory / "oracle"
    policy = enlarged(pipeline.sft, directory / "policy")
    cfg = ptx.Config(**{**asdict(pipeline.config(ppo, "oracle_run")), **OPTIONS, "model": str(policy)})
    batches = []

    def keep(cfg, batch, state):
        batch = ppo.advantages(cfg, batch, state)
        batches.append(batch)
        return batch

    ppo.main(cfg, advantages=keep, before_step=ptx.PretrainingMix(cfg))
    rows = list(load_rows(cfg.data, "train", Tokenizer.load(str(policy)), 1))
    return SimpleNamespace(cfg=cfg, metrics=metrics(cfg), batches=batches, rows=rows)


def enlarged(source, directory):
    """A model whose matrices are eight times as large: attention is then far from uniform."""
    directory.mkdir(parents=True)
    for path in Path(source).iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    large = {name: 8 * x if x.dim() > 1 else x for name, x in tensors.items()}
    save_file(large, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


class Critic(torch.nn.Module):
    """The reward model's files as a critic, by transformers: ids (1, T) -> values (T,)."""

    def __init__(self, directory):
        super().__init__()
        self.gpt_neox = GPTNeoXModel.from_pretrained(directory).double()
        head = load_file(Path(directory) / "model.safetensors")
        self.weight = torch.nn.Parameter(head["score.weight"][0].double())
        self.bias = torch.nn.Parameter(head["score.bias"][0].double())

    def forward(self, ids):
        return self.gpt_neox(ids).last_hidden_state[0] @ self.weight + self.bias


def clip(number, low, high):
    return max(low, min(high, number))


class Oracle:
    """Actor, critic and their optimizer; `update` takes the steps of one batch."""

    def __init__(self, cfg, n_vocab):
        self.cfg = cfg
        self.n_vocab = n_vocab
        self.actor = GPTNeoXForCausalLM.from_pretrained(cfg.model).double()
        self.critic = Critic(cfg.reward_model)
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.n_of_actor = len(list(self.actor.parameters()))
        self.means = [torch.zeros_like(x) for x in self.parameters]
        self.squares = [torch.zeros_like(x) for x in self.parameters]
        self.n_steps = 0

    def logits(self, query, response):
        """(R, V): what the actor says at each token of the response."""
        return self.actor(torch.tensor([query + response])).logits[0, len(query) - 1 : -1]

    def update(self, number, batch, queries, mixed):
        """Returns the means over all steps of what ppo.py logs of an update."""
        sums = Counter()
        n_steps = EPOCHS * MINIBATCHES
        for epoch in range(EPOCHS):
            order = np.random.default_rng((self.cfg.seed, number, epoch)).permutation(B)
            for part in range(MINIBATCHES):
                rows = order[part * B // MINIBATCHES : (part + 1) * B // MINIBATCHES]
                step = self.minibatch(batch, queries, rows)
                sums["loss/ptx_avg"] = self.mixed_in([mixed[row] for row in rows])  # the last one is logged
                if epoch == part == 0:
                    sums["val/ratio"] = step["val/ratio_avg"]
                for name, x in step.items():
                    sums[name] += x / n_steps
                sums["grad_norm"] = self.step(number)  # the last one is logged
        return sums

    def minibatch(self, batch, queries, rows):
        """Adds the gradients of these rows; returns the sums that are logged of them."""
        cfg = self.cfg
        stats = Counter()
        n_actions = batch["mask"][rows].sum().item()
        n_values = batch["mask_p1"][rows].sum().item()
        for row in rows:
            response = batch["responses"][row].tolist()
            scores = (self.logits(queries[row], response)[:, : self.n_vocab] / cfg.temperature).log_softmax(-1)
            values = self.critic(torch.tensor([queries[row] + response]))[len(queries[row]) - 1 : -1]
            loss = 0.0
            for t in range(len(response)):
                if batch["mask"][row, t]:
                    advantage = batch["advantages"][row, t].item()
                    log_ratio = scores[t, response[t]] - batch["logprobs"][row, t].item()
                    ratio = log_ratio.exp()
                    near = clip(ratio, 1 - cfg.cliprange, 1 + cfg.cliprange)
                    gain = min(advantage * ratio, advantage * near)
                    entropy = -(scores[t].exp() * scores[t]).sum()
                    loss = loss - (gain + cfg.entropy_coef * entropy) / n_actions
                    stats["loss/policy_avg"] -= torch.as_tensor(gain).item() / n_actions
                    stats["policy/clipfrac_avg"] += float(advantage * near < advantage * ratio) / n_actions
                    stats["policy/approxkl_avg"] += 0.5 * log_ratio.item() ** 2 / n_actions
                    stats["val/ratio_avg"] += ratio.item() / n_actions
                    stats["val/ratio_var"] += (ratio.item() - 1) ** 2 / n_actions
                if batch["mask_p1"][row, t]:
                    before = batch["values"][row, t].item()
                    goal = batch["returns"][row, t].item()
                    near = clip(values[t], before - cfg.cliprange_value, before + cfg.cliprange_value)
                    plain = (values[t] - goal) ** 2
                    clipped = (near - goal) ** 2
                    worse = torch.as_tensor(max(plain, clipped))
                    loss = loss + cfg.vf_coef * 0.5 * worse / n_values
                    stats["loss/value_avg"] += 0.5 * worse.item() / n_values
                    stats["val/clipfrac_avg"] += float(clipped > plain) / n_values
            loss.backward()
        return stats

    def mixed_in(self, rows):
        """Adds ptx_coef times the gradient of the SFT loss; returns that loss."""
        n_tokens = sum(len(row["responses"][0]) for row in rows)
        total = 0.0
        for row in rows:
            response = row["responses"][0]
            logprobs = self.logits(row["query"], response).log_softmax(-1)
            loss = -sum(logprobs[t, token] for t, token in enumerate(response)) / n_tokens
            (self.cfg.ptx_coef * loss).backward()
            total += loss.item()
        return total

    @torch.no_grad()
    def step(self, number):
        """TensorFlow's Adam (epsilon beside the uncorrected root), decoupled decay, all gradients' norm clipped."""
        cfg = self.cfg
        self.n_steps += 1
        norm = math.sqrt(sum((x.grad**2).sum().item() for x in self.parameters))
        scale = min(1.0, cfg.max_grad_norm / norm)
        warm = min(1.0, (number + 1) / cfg.warmup_steps)
        correction = math.sqrt(1 - cfg.adam_beta2**self.n_steps) / (1 - cfg.adam_beta1**self.n_steps)
        for index, parameter in enumerate(self.parameters):
            lr = warm * (cfg.lr if index < self.n_of_actor else cfg.critic_lr)
            gradient = scale * parameter.grad
            self.means[index].mul_(cfg.adam_beta1).add_((1 - cfg.adam_beta1) * gradient)
            self.squares[index].mul_(cfg.adam_beta2).add_((1 - cfg.adam_beta2) * gradient**2)
            move = self.means[index] / (self.squares[index].sqrt() + cfg.adam_eps)
            parameter -= lr * cfg.weight_decay * parameter + lr * correction * move
            parameter.grad = None
        return norm


def test_two_updates_with_many_options_match_an_oracle(trained, tmp_path):
    """Every metric of both updates, and where every weight of the policy has gone.

    Metrics: a float32 log-probability errs by FORWARD, so a mean of ratios times advantages (of size 1, at most 4) by
    4 FORWARD; a weight that errs by 2 % of a step (below) moves the log-probabilities of the next steps by 2 % of what
    that step did, and they by at most 0.1 in all: 2e-3. Shares that are clipped: a token at the very edge may fall on
    either side. Weights: a step is lr m / (sqrt(v) + eps); m and v sum gradients that err by 2e-7 (test_details.py) and
    eps is 1e-5, so a step errs by 2 % of lr.
    """
    cfg = trained.cfg
    oracle = Oracle(cfg, Tokenizer.load(cfg.model).n_vocab)
    n_rows = len(trained.rows)
    for number in range(UPDATES):
        queries = [trained.rows[index]["query"] for index in batch_indices(n_rows, B, number, cfg.seed)]
        mixed = [trained.rows[index] for index in batch_indices(n_rows, B, number, cfg.seed + 1)]
        batch = trained.batches[number]
        check_rollout(oracle, batch, queries, trained.metrics[number])

        expected = oracle.update(number, batch, queries, mixed)
        row = trained.metrics[number]
        n_tokens = batch["mask"].sum().item()
        for name, x in expected.items():
            tolerance = 2e-3 * max(1.0, abs(x))
            if "clipfrac" in name:
                tolerance = 2.5 / n_tokens
            if name in ("policy/approxkl_avg", "val/ratio_var"):
                tolerance = 0.05 * x + 1e-9
            assert row[name] == pytest.approx(x, abs=tolerance), (number, name)
        assert row["val/ratio"] == pytest.approx(1.0, abs=FORWARD)
        assert row["grad_norm"] > 2 * cfg.max_grad_norm  # the gradient was clipped
        assert row["policy/clipfrac_avg"] > 0.05 and row["val/clipfrac_avg"] > 0.05
        assert row["lr"] == pytest.approx(cfg.lr * (number + 1) / cfg.warmup_steps)
        assert row["episode"] == (number + 1) * B

    oracle.actor.save_pretrained(tmp_path)
    before = load_file(f"{cfg.model}/model.safetensors")
    after = load_file(f"{cfg.out_dir}/final/model.safetensors")
    wanted = load_file(tmp_path / "model.safetensors")
    assert after.keys() == wanted.keys()
    n_steps = UPDATES * EPOCHS * MINIBATCHES
    for name in after:
        moved = (after[name].double() - before[name].double()).numpy()
        should = (wanted[name].double() - before[name].double()).numpy()
        np.testing.assert_allclose(moved, should, rtol=0, atol=0.02 * n_steps * cfg.lr, err_msg=name)


def check_rollout(oracle, batch, queries, row):
    """The metrics that describe the samples, from the oracle's own logits."""
    entropies = []
    nll = 0.0
    with torch.no_grad():
        for number, query in enumerate(queries):
            response = batch["responses"][number].tolist()
            scores = (oracle.logits(query, response)[:, : oracle.n_vocab] / oracle.cfg.temperature).log_softmax(-1)
            for t in range(int(batch["mask"][number].sum())):
                entropies.append(-(scores[t].exp() * scores[t]).sum().item())
                nll -= scores[t, response[t]].item()
    assert row["policy/entropy_avg"] == pytest.approx(np.mean(entropies), abs=2e-3)
    assert row["objective/entropy"] == pytest.approx(nll / B, rel=2e-3)
    assert row["val/perplexity"] == pytest.approx(math.exp(nll / len(entropies)), rel=2e-3)
    assert row["val/response_length"] == len(entropies) / B
