"""Supervised fine-tuning: the model learns to continue a query with its reference response and EOS.

    python sft.py config/toy_sft.py                                  # a CPU, a minute
    torchrun --nproc_per_node=8 sft.py config/sft_2.8b.py

Writes out_dir/final, where the reward model, PPO and DPO start.

Shapes: B micro-batch, R predicted tokens, V vocabulary.

differs: the paper's code averages over micro-batches of one sequence; here every micro-batch is weighted by its share
of the whole batch, which gives the same mean over sequences for any micro-batch size and number of processes.
"""

from dataclasses import dataclass
from typing import Literal

from config.fields import TrainConfig
from configurator import Count, configure


@dataclass
class Config(TrainConfig):
    # ---- models
    model: str = "EleutherAI/pythia-1b-deduped"  # hub id or directory
    tokenizer: str = ""  # hub id, directory or tokenizer.json; empty: the model's
    scratch: bool = False  # begin with random weights; of `model` only config.json is read
    # ---- data
    data: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"  # hub id, directory or file (hub/reader.py)
    max_length: int = 562  # tokens of query + response; 0: as many as the model takes
    # ---- batch
    batch_size: Count = 128  # rows per update, over all processes
    # ---- loss
    loss_on: Literal["all", "response"] = "all"  # all: query and response, as in the paper; or the response alone
    reduction: Literal["sequence", "token"] = "sequence"  # mean of the rows' means, as in the paper; mean over tokens
    # ---- logging
    eval_every: int = 0  # updates between evaluations; 0: only after the last
    export_every: int = 0  # updates between models in out_dir/step_N, for sample.py to choose from; 0: only the last


if __name__ == "__main__":
    cfg = configure(Config)  # before the imports that take seconds: --help and a wrong option are answered at once

from data import collate
from model import GPTNeoX
from runtime import Run, backward, load_model, optimizer_step, stage, start


@stage
def main(cfg, inputs=None):
    """inputs: a function like `model_inputs`, in its place."""
    models = {"model": cfg.model}
    functions = {"inputs": inputs}
    world, data = start(cfg, 1, models, functions, tokenizer_source=cfg.tokenizer)
    model = load_model(cfg, world, data.tokenizer, GPTNeoX, cfg.model, trainable=True, scratch=cfg.scratch)
    inputs = inputs or model_inputs

    run = Run(cfg, world, data, {"model": model})
    for step in run.updates():
        # The evaluation is of the model as it is before this update.
        metrics = {}
        if run.held_out and cfg.eval_every and step % cfg.eval_every == 0:
            metrics = evaluate(run, cfg, model, inputs)
        metrics.update(update(run, cfg, model, inputs))
        metrics.update(optimizer_step(run))
        run.log(metrics, watch=("loss/sft", "lr"))
        if cfg.export_every and (step + 1) % cfg.export_every == 0:
            run.export(model, f"step_{step + 1}")

    if run.held_out:
        run.log(evaluate(run, cfg, model, inputs), watch=("eval/loss",))
    run.export(model)


def update(run, cfg, model, inputs):
    """Accumulate the gradient of this step's batch; returns its loss."""
    batch = run.batch()
    n_tokens = count_tokens(batch, cfg.loss_on)
    parts = []
    for indices in run.micro_batches(batch["length"]):
        ids, select, targets, mask = inputs(batch[indices], cfg.loss_on, run.world.device)
        # Over the whole vocabulary: its padding rows have to learn that they are not used.
        logprobs = model.logprobs(ids, select, targets)  # (B, R)
        # Each micro-batch adds its share of the whole batch's mean.
        weights = loss_weights(mask, cfg.reduction, cfg.batch_size, n_tokens)
        loss = -(logprobs * weights).sum()
        backward(run, loss, indices)
        parts.append({"loss/sft": loss})

    return run.world.sum_scalars(parts)


def count_tokens(batch, loss_on):
    """How many tokens of the batch are predicted."""
    if loss_on == "all":
        return sum(length - 1 for length in batch["length"])
    return sum(len(responses[0]) for responses in batch["responses"])


def model_inputs(rows, loss_on, device):
    """Rows of a data set -> ids, select, targets, mask. The first token of all is never predicted."""
    queries = rows["query"]
    responses = [responses[0] for responses in rows["responses"]]
    if loss_on == "all":
        # The first token is the query, the rest is to be predicted.
        whole = [query + response for query, response in zip(queries, responses)]
        queries = [ids[:1] for ids in whole]
        responses = [ids[1:] for ids in whole]
    return collate(queries, responses, device)


def loss_weights(mask, reduction, n_rows, n_tokens):
    """What each token's -log p counts in the loss: (B, R), summing to 1 over a batch of n_rows and n_tokens."""
    if reduction == "token":
        return mask / n_tokens
    return mask / mask.sum(1, keepdim=True) / n_rows


def evaluate(run, cfg, model, inputs):
    """Loss on held-out rows, reduced as in training."""
    rows = run.held_out

    def measure(indices):
        ids, select, targets, mask = inputs(rows[indices], cfg.loss_on, run.world.device)
        logprobs = model.logprobs(ids, select, targets)
        return {"nll": -(logprobs * mask).sum(1), "tokens": mask.sum(1)}

    sums = run.world.map_rows(measure, rows["length"], cfg.micro_batch_size)
    if cfg.reduction == "token":
        loss = sums["nll"].sum() / sums["tokens"].sum()
    else:
        loss = (sums["nll"] / sums["tokens"]).mean()
    return {"eval/loss": loss.item()}


if __name__ == "__main__":
    main(cfg)
