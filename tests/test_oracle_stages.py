"""A few updates of SFT, reward model and DPO, beside an oracle: transformers' models in float64, row after row, and
PyTorch's AdamW. On are warm-up, clipped gradients, other betas and a decay that is seen, and of each stage the options
that its test names.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline import metrics, ranked, write_rows
from safetensors.torch import load_file
from test_oracle import Critic, enlarged
from transformers import GPTNeoXForCausalLM

import dpo
import rm
import sft
from data import batch_indices, load_rows
from hub.tokenizer import Tokenizer

B = 6
UPDATES = 4
COMMON = dict(
    batch_size=B, micro_batch_size=4, episodes=B * UPDATES, lr=1e-3, schedule="constant", warmup_steps=3,
    adam_beta1=0.7, adam_beta2=0.9, max_grad_norm=0.5, weight_decay=0.5,
)  # fmt: skip
# As in test_oracle.py, and with a thousandth for a sum over the tokens of a response.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def policy(pipeline):
    return enlarged(pipeline.sft, pipeline.directory / "oracle_stages")


def near(x):
    return pytest.approx(x, rel=TOLERANCE, abs=TOLERANCE)


def tokens_logprobs(model, query, response, n_vocab=None):
    """log p (R,) of each token of the response."""
    logits = model(torch.tensor([query + response])).logits[0, len(query) - 1 : -1, :n_vocab]
    return logits.log_softmax(-1)[range(len(response)), response]


def rows_of(cfg, split, n_responses, **options):
    return list(load_rows(cfg.data, split, Tokenizer.load(str(cfg.model)), n_responses, **options))


def batches(cfg, rows):
    for step in range(UPDATES):
        yield [rows[index] for index in batch_indices(len(rows), B, step, cfg.seed)]


def adamw(cfg, parameters):
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    return torch.optim.AdamW(parameters, cfg.lr, betas, cfg.adam_eps, cfg.weight_decay)


def take_step(cfg, optimizer, step):
    """Returns the gradient's norm, before it is clipped."""
    (group,) = optimizer.param_groups
    gradients = [x.grad for x in group["params"] if x.grad is not None]
    norm = math.sqrt(sum((x**2).sum().item() for x in gradients))
    for gradient in gradients:
        gradient *= min(1.0, cfg.max_grad_norm / norm)
    group["lr"] = cfg.lr * min(1.0, (step + 1) / cfg.warmup_steps)
    optimizer.step()
    optimizer.zero_grad()
    assert norm > cfg.max_grad_norm
    return norm


def compare_weights(cfg, model, name, without=()):
    """A step errs by 2 % of lr at most (test_oracle.py); weight decay alone moves a weight of 1 by half of lr."""
    theirs = {key.replace("lm_head.", "embed_out."): x for key, x in model.state_dict().items()}
    ours = load_file(Path(cfg.out_dir) / name / "model.safetensors")
    assert ours.keys() - without == theirs.keys() - without
    for key in ours.keys() - without:
        atol = 0.02 * UPDATES * cfg.lr
        np.testing.assert_allclose(ours[key].double(), theirs[key].detach(), rtol=0, atol=atol, err_msg=key)


@pytest.mark.parametrize("loss_on", ["all", "response"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_sft_matches_an_oracle(pipeline, policy, loss_on, reduction):
    """Its losses, in training and on held-out rows every third update, and its models after 3 updates and the last."""
    options = dict(loss_on=loss_on, reduction=reduction, eval_every=3, export_every=3)
    out_dir = f"oracle_sft_{loss_on}_{reduction}"
    cfg = pipeline.config(sft, out_dir, **{**COMMON, **options, "scratch": False, "model": str(policy)})
    sft.main(cfg)
    logged = metrics(cfg)
    model = GPTNeoXForCausalLM.from_pretrained(policy).double()
    optimizer = adamw(cfg, model.parameters())

    def loss(rows):
        sums = []
        for row in rows:
            query, response = row["query"], row["responses"][0]
            if loss_on == "all":
                query, response = query[:1], query[1:] + response
            sums.append(-tokens_logprobs(model, query, response))
        if reduction == "token":
            return torch.cat(sums).mean()
        return torch.stack([x.mean() for x in sums]).mean()

    held_out = rows_of(cfg, "validation", 1)
    for step, rows in enumerate(batches(cfg, rows_of(cfg, "train", 1))):
        assert ("eval/loss" in logged[step]) == (step in (0, 3))
        if step in (0, 3):
            assert logged[step]["eval/loss"] == near(loss(held_out).item())
        of_batch = loss(rows)
        of_batch.backward()
        assert logged[step]["loss/sft"] == near(of_batch.item())
        assert logged[step]["grad_norm"] == near(take_step(cfg, optimizer, step))
        if step == 2:
            compare_weights(cfg, model, "step_3")
    assert logged[UPDATES]["eval/loss"] == near(loss(held_out).item())
    compare_weights(cfg, model, "final")
    assert [path.name for path in Path(cfg.out_dir).glob("step_*")] == ["step_3"]


def test_dpo_matches_an_oracle(pipeline, policy):
    """With smoothed labels, an SFT term and a reference of its own: each metric of each update, and the weights."""
    options = dict(beta=0.3, label_smoothing=0.2, sft_coef=0.7, model=str(policy), reference=str(pipeline.sft))
    options["eval_split"] = ""
    cfg = pipeline.config(dpo, "oracle_dpo", **{**COMMON, **options})
    dpo.main(cfg)
    logged = metrics(cfg)
    reference = GPTNeoXForCausalLM.from_pretrained(pipeline.sft).double().requires_grad_(False)
    model = GPTNeoXForCausalLM.from_pretrained(policy).double()
    optimizer = adamw(cfg, model.parameters())
    n_vocab = Tokenizer.load(str(policy)).n_vocab

    def log_sigmoid(x):
        return -torch.log(1 + torch.exp(-x))

    for step, rows in enumerate(batches(cfg, rows_of(cfg, "train", 2))):
        n_tokens = sum(len(row["responses"][0]) for row in rows)
        sums = dict.fromkeys(["loss/dpo", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen",
                              "logps/rejected", "logps/accuracies"], 0.0)  # fmt: skip
        for row in rows:
            logps = [tokens_logprobs(model, row["query"], x, n_vocab).sum() for x in row["responses"]]
            before = [tokens_logprobs(reference, row["query"], x, n_vocab).sum() for x in row["responses"]]
            rewards = [cfg.beta * (now - then) for now, then in zip(logps, before)]
            margin = rewards[0] - rewards[1]
            loss = -0.8 * log_sigmoid(margin) - 0.2 * log_sigmoid(-margin)
            (loss / B - cfg.sft_coef * logps[0] / n_tokens).backward()
            sums["loss/dpo"] += loss.item()
            for place, name in enumerate(("chosen", "rejected")):
                sums[f"rewards/{name}"] += rewards[place].item()
                sums[f"logps/{name}"] += logps[place].item()
            sums["logps/accuracies"] += float(logps[0] > logps[1])
            sums["rewards/accuracies"] += float(rewards[0] > rewards[1])
        for name, x in sums.items():
            assert logged[step][name] == near(x / B), (step, name)
        assert logged[step]["rewards/margins"] == near((sums["rewards/chosen"] - sums["rewards/rejected"]) / B)
        assert logged[step]["grad_norm"] == near(take_step(cfg, optimizer, step))
    compare_weights(cfg, model, "final")


@pytest.mark.parametrize("kind", ["pairs", "rankings"])
def test_the_reward_model_matches_an_oracle(pipeline, policy, tmp_path, kind):
    """Probabilities as labels, kept within 0.2 and 0.8, or rankings of 2 to 4; one label in ten is the toss of a coin.
    Each metric, and the weights, between two normalisations of mean and deviation.
    """
    rows = ranked(20)
    if kind == "pairs":
        words = [" aeiou", " aei", " xyz", " bcd"]
        rows = []
        for number in range(20):
            chosen, rejected = words[number % 4], words[(number + 1) % 4]
            rows.append({"prompt": f"letters {number}:", "chosen": chosen, "rejected": rejected,
                         "target": 0.5 + number / 40})  # fmt: skip
    data = write_rows(tmp_path / "rows.jsonl", rows)
    options = dict(data=data, normalize_data=data, normalize_std=True, eval_split="", model=str(policy))
    options.update(label_noise=0.1, target_clamp=0.3)
    cfg = pipeline.config(rm, f"oracle_rm_{kind}", **{**COMMON, **options})
    rm.main(cfg)
    logged = metrics(cfg)
    rows = rows_of(cfg, "train", 2, ranked=True)

    # The head as it is drawn; training begins after its normalisation.
    start = pipeline.config(rm, f"oracle_rm_{kind}_start", **{**COMMON, **options, "normalize_data": "", "lr": 0.0})
    start.weight_decay = 0.0
    start.episodes = B
    rm.main(start)
    model = Critic(f"{start.out_dir}/final")
    parameters = [x for name, x in model.named_parameters() if name != "bias"]
    optimizer = adamw(cfg, parameters)

    def reward(row, place):
        return model(torch.tensor([row["query"] + row["responses"][place]]))[-1]

    @torch.no_grad()
    def normalize():
        best = torch.stack([reward(row, 0) for row in rows])
        mean, std = best.mean(), best.std(correction=0)
        model.weight /= std
        model.bias.copy_((model.bias - mean) / std)
        return mean.item(), std.item()

    normalize()
    for step, batch in enumerate(batches(cfg, rows)):
        sums = dict.fromkeys(["loss/rm", "train/accuracy", "train/margin"], 0.0)
        for row in batch:
            rewards = [reward(row, place) for place in range(len(row["responses"]))]
            losses = []
            for worse in range(len(rewards)):
                for better in range(worse):
                    p = 0.9 * torch.sigmoid(rewards[better] - rewards[worse]) + 0.05
                    target = min(max(row["target"], 0.2), 0.8)
                    losses.append(-target * torch.log(p) - (1 - target) * torch.log(1 - p))
            loss = sum(losses) / len(losses)
            (loss / B).backward()
            sums["loss/rm"] += loss.item()
            sums["train/accuracy"] += float(rewards[0] > rewards[-1])
            sums["train/margin"] += (rewards[0] - rewards[-1]).item()
        model.bias.grad = None
        for name, x in sums.items():
            assert logged[step][name] == near(x / B), (step, name)
        assert logged[step]["grad_norm"] == near(take_step(cfg, optimizer, step))

    mean, std = normalize()
    assert logged[UPDATES]["normalize/mean"] == near(mean)
    assert logged[UPDATES]["normalize/std"] == near(std)
    compare_weights(cfg, model, "final", {"score.weight", "score.bias", "weight", "bias"})
    wanted = {"score.weight": model.weight[None], "score.bias": model.bias[None]}
    final = load_file(Path(cfg.out_dir) / "final" / "model.safetensors")
    for name, x in wanted.items():
        np.testing.assert_allclose(final[name].double(), x.detach(), atol=0.02 * UPDATES * cfg.lr / std, rtol=TOLERANCE)
