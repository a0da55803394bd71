"""Direct preference optimisation: the policy learns from pairs, with no reward model and no sampling.

    python dpo.py config/toy_dpo.py                                  # a CPU, a minute
    torchrun --nproc_per_node=8 dpo.py config/dpo_2.8b.py

The reference never changes, so its log-probabilities are computed once, before the first update.
Writes out_dir/final and, if there is an eval_split, out_dir/eval.json: the accuracy of the implicit reward
beta * log(policy / reference).

Shapes: B pairs in a micro-batch, R response tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import runtime
from configurator import UserError, configure
from data import Tokenizer, accuracy_table, batch_rows, collate
from model import GPTNeoX, token_logprobs


@dataclass
class Config(runtime.TrainConfig):
    model: str = "out/sft_1b/final"  # the SFT model, where the policy starts: hub id or directory
    reference: str = ""  # the frozen reference; empty: the same as model
    data: str = "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144"  # hub id, directory or file with {split}
    batch_size: int = 64  # pairs per update, over all processes
    max_length: int = 638  # tokens of query + response; a longer row is an error; 0: any
    beta: float = 0.05  # strength of the pull towards the reference
    loss_type: str = "sigmoid"  # sigmoid, hinge or ipo
    label_smoothing: float = 0.0  # probability that a label is wrong (cDPO); with sigmoid alone


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, loss_type="sigmoid",
             label_smoothing=0.0):  # fmt: skip
    """Losses (B,) and implicit rewards (B,), (B,) from summed log-probabilities (B,) of the responses.

    sigmoid: -log s(beta D), D = log-ratio of chosen - log-ratio of rejected (arXiv:2305.18290 eq. 7); with label
    smoothing e: -(1 - e) log s(beta D) - e log s(-beta D). hinge: max(0, 1 - beta D) (arXiv:2305.10425).
    ipo: (D - 1 / (2 beta))^2 (arXiv:2310.12036 eq. 17).
    """
    if label_smoothing and loss_type != "sigmoid":
        raise UserError(f"label_smoothing does nothing with loss_type {loss_type!r}; set it to 0 or use sigmoid")
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    margin = chosen - rejected
    if loss_type == "sigmoid":
        right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    elif loss_type == "hinge":
        losses = F.relu(1 - beta * margin)
    elif loss_type == "ipo":
        losses = (margin - 1 / (2 * beta)) ** 2
    else:
        raise UserError(f"loss_type {loss_type!r} is not known; use one of sigmoid, hinge, ipo")
    return losses, beta * chosen, beta * rejected


def pair_logprobs(model, queries, responses, n_vocab, device):
    """Summed log-probabilities (B, 2) of the chosen and rejected responses (EOS included), in one forward pass.

    One pass and not two, since a sharded model gathers its parameters once for each.
    """
    flat = [response for row in responses for response in row]
    ids, select, targets, mask = collate([query for query in queries for _ in range(2)], flat, device)
    logprobs = token_logprobs(model(ids, select), targets, n_vocab=n_vocab)  # (2 B, R)
    return (logprobs * mask).sum(1).view(-1, 2)


def predict(run, cfg, model, rows, n_vocab):
    """Summed log-probabilities (n, 2) of every pair of a data set, on every rank."""

    def logprobs(index):
        micro = rows[index]
        return {"logprobs": pair_logprobs(model, micro["query"], micro["responses"], n_vocab, run.device)}

    return run.map_rows(logprobs, rows["length"], cfg.micro_batch_size)["logprobs"]


def update(run, cfg, model, rows, ref_logprobs, n_vocab):
    """Accumulate the gradient of the batch `rows` with ref_logprobs (batch, 2); returns the batch's metrics."""
    names = ("loss/dpo", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected")
    totals = dict.fromkeys(names, 0.0)
    for index in run.share(rows["length"], cfg.micro_batch_size):
        queries, responses = ([rows[name][i] for i in index] for name in ("query", "responses"))
        logprobs = pair_logprobs(model, queries, responses, n_vocab, run.device)  # (B, 2)
        losses, chosen, rejected = dpo_loss(
            *logprobs.unbind(1), *ref_logprobs[index].unbind(1), cfg.beta, cfg.loss_type, cfg.label_smoothing
        )
        runtime.backward(run, losses.sum() / cfg.batch_size)
        for name, values in zip(names, (losses, chosen, rejected, chosen > rejected, *logprobs.unbind(1))):
            totals[name] += values.detach().sum() / cfg.batch_size
    metrics = run.sum(totals)
    return metrics | {"rewards/margins": metrics["rewards/chosen"] - metrics["rewards/rejected"]}


def main(cfg):
    runtime.positive(cfg, "beta")
    dpo_loss(*torch.zeros(4, 1), cfg.beta, cfg.loss_type, cfg.label_smoothing)  # a wrong setting is refused here
    run = runtime.start(cfg)
    if run is None:
        return
    tokenizer = Tokenizer.load(cfg.model)
    rows, held_out = runtime.load_splits(run, tokenizer, n_responses=2)
    total = runtime.count_updates(run, len(rows))
    reference = runtime.load_model(run, GPTNeoX, cfg.reference or cfg.model)
    ref_logprobs = predict(run, cfg, reference, rows, tokenizer.n_vocab)  # (n, 2)
    ref_held_out = predict(run, cfg, reference, held_out, tokenizer.n_vocab) if held_out else None
    del reference
    model = runtime.load_model(run, GPTNeoX, cfg.model, trainable=True)
    trained = nn.ModuleDict({"model": model})
    optimizer = runtime.make_optimizer(cfg, trained)
    for step in run.steps(runtime.resume(run, trained, optimizer)["step"], total):
        index = batch_rows(len(rows), cfg.batch_size, step, cfg.seed)
        metrics = update(run, cfg, model, rows[index], ref_logprobs[index], tokenizer.n_vocab)
        metrics |= runtime.optimizer_step(run, optimizer, step, total)
        run.log(step, metrics, watch=("loss/dpo", "rewards/accuracies"))
        runtime.save_checkpoint(run, step + 1, trained, optimizer)
    if held_out:
        ratios = predict(run, cfg, model, held_out, tokenizer.n_vocab) - ref_held_out  # (n, 2)
        table = accuracy_table(held_out, ratios[:, 0] - ratios[:, 1])
        runtime.report(run, total, {"eval/accuracy": table["all"]["accuracy"]}, table)
    runtime.export(run, model, tokenizer)
    run.close()


if __name__ == "__main__":
    main(configure(Config))
