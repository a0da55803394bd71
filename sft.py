"""Supervised fine-tuning: the model learns to continue a query with its reference response and EOS.

    python sft.py config/toy_sft.py                                  # a CPU, a minute
    torchrun --nproc_per_node=8 sft.py config/sft_2.8b.py

Writes out_dir/final, where the reward model, PPO and DPO start.

Shapes: B micro-batch, R predicted tokens, V vocabulary.

differs: the reference averages over micro-batches of one sequence; here every micro-batch is weighted by its share
of the whole batch, which gives the same mean over sequences for any micro-batch size and number of processes.
"""

from dataclasses import dataclass
from typing import Literal

import runtime
from configurator import Count, configure
from data import collate
from model import GPTNeoX


@dataclass
class Config(runtime.TrainConfig):
    model: str = "EleutherAI/pythia-1b-deduped"  # hub id or directory
    data: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"  # hub id, directory, or file with {split} in its path
    batch_size: Count = 128  # rows per update, over all processes
    max_length: int = 562  # tokens of query + response; a longer row is an error; 0: any
    eval_every: int = 0  # updates between evaluations; 0: only after the last
    export_every: int = 0  # updates between models in out_dir/step_N, for sample.py to choose from; 0: only the last
    loss_on: Literal["all", "response"] = "all"  # all: query and response, as the reference; or the response alone
    reduction: Literal["sequence", "token"] = "sequence"  # mean over rows of the row's mean, as the reference; over all
    tokenizer: str = ""  # hub id, directory or tokenizer.json; empty: the model's
    scratch: bool = False  # begin with random weights; of `model` only config.json is read


def loss_weights(mask, reduction, n_rows, n_tokens):
    """What each token's -log p counts in the loss: (B, R), summing to 1 over a batch of n_rows and n_tokens."""
    if reduction == "token":
        return mask / n_tokens
    return mask / mask.sum(1, keepdim=True) / n_rows


def model_inputs(rows, loss_on, device):
    """Rows of a data set -> ids, select, targets, mask. The first token of all is never predicted."""
    pairs = [(query, responses[0]) for query, responses in zip(rows["query"], rows["responses"])]
    if loss_on == "all":
        pairs = [((query + response)[:1], (query + response)[1:]) for query, response in pairs]
    return collate(*zip(*pairs), device)


def update(run, cfg, model, rows):
    """Accumulate the gradient of the batch `rows`; returns the batch's loss."""
    n_tokens = sum(n - 1 if cfg.loss_on == "all" else len(r[0]) for n, r in zip(rows["length"], rows["responses"]))
    parts = []
    for index in run.accumulate(rows["length"], cfg.micro_batch_size):
        ids, select, targets, mask = model_inputs(rows[index], cfg.loss_on, run.device)
        logprobs = model.logprobs(ids, select, targets)  # (B, R)
        loss = -(logprobs * loss_weights(mask, cfg.reduction, cfg.batch_size, n_tokens)).sum()
        runtime.backward(run, loss, index)
        parts.append({"loss/sft": loss})
    return run.sum(parts)


def evaluate(run, cfg, model, rows):
    """Loss on held-out rows, reduced as in training."""

    def nll(index):
        ids, select, targets, mask = model_inputs(rows[index], cfg.loss_on, run.device)
        return {"nll": -(model.logprobs(ids, select, targets) * mask).sum(1), "tokens": mask.sum(1)}

    nll, tokens = run.map_rows(nll, rows["length"], cfg.micro_batch_size).values()
    return {"eval/loss": (nll.sum() / tokens.sum() if cfg.reduction == "token" else (nll / tokens).mean()).item()}


@runtime.stage
def main(cfg):
    run = runtime.start(cfg, n_responses=1, tokenizer=cfg.tokenizer)
    model = runtime.load_model(run, GPTNeoX, cfg.model, trainable=True, scratch=cfg.scratch)
    for step in run.train({"model": model}):
        now = run.held_out and cfg.eval_every and step % cfg.eval_every == 0
        metrics = evaluate(run, cfg, model, run.held_out) if now else {}
        metrics |= update(run, cfg, model, run.rows.select(run.batch()))
        run.log(metrics | runtime.optimizer_step(run), watch=("loss/sft", "lr"))
        if cfg.export_every and (step + 1) % cfg.export_every == 0:
            runtime.export(run, model, f"step_{step + 1}")
    if run.held_out:
        run.log(evaluate(run, cfg, model, run.held_out), watch=("eval/loss",))
    runtime.export(run, model)


if __name__ == "__main__":
    main(configure(Config))
