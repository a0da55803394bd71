"""One optimizer for all trained models: AdamW, its schedule, clipping, and the watch for losses that are not finite."""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.adamw import adamw

from configurator import UserError
from hub.weights import full, is_sharded


class AdamW:
    """PyTorch's AdamW, by its function: to make a torch.optim.AdamW would import the compiler, which takes a second.

    Its state is there from the start, so that a checkpoint holds that of every parameter, also of those that have not
    had a gradient yet.
    """

    watchers = ()  # functions that are called after each step: how bench/ and tests/ look on

    def __init__(self, cfg, models, lrs):
        """A group per model; lrs: name -> its learning rate, if not cfg.lr."""
        self.groups = []
        self.state = {}
        self.options = dict(beta1=cfg.adam_beta1, beta2=cfg.adam_beta2)
        self.options.update(weight_decay=cfg.weight_decay, amsgrad=False, maximize=False, fused=True)
        for name, model in models.items():
            parameters = list(model.parameters())
            lr = lrs.get(name) or cfg.lr
            self.groups.append({"parameters": parameters, "initial_lr": lr, "eps": cfg.adam_eps})
            for parameter in parameters:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    @torch.no_grad()
    def step(self):
        """Move the parameters that have a gradient, by the `lr` and `eps` of their groups."""
        for group in self.groups:
            parameters = with_gradient(group["parameters"])
            gradients = [parameter.grad for parameter in parameters]
            lists = {}
            for name in ("exp_avg", "exp_avg_sq", "step"):
                lists[name] = [self.state[parameter][name] for parameter in parameters]
            maxima = []  # of squares: amsgrad would need them
            state = (lists["exp_avg"], lists["exp_avg_sq"], maxima, lists["step"])
            adamw(parameters, gradients, *state, lr=group["lr"], eps=group["eps"], **self.options)
        for watcher in self.watchers:
            watcher()

    def zero_grad(self):
        for parameter in self.state:
            parameter.grad = None


def with_gradient(parameters):
    return [parameter for parameter in parameters if parameter.grad is not None]


def learning_rate(step, total_steps, lr, schedule, warmup_steps=0):
    """The learning rate of update `step` (from 0): "linear" to 0, "cosine" to 0, or "constant"; linear warm-up."""
    if step < warmup_steps:
        return lr * ((step + 1) / warmup_steps)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return lr * (1 - done)
    if schedule == "cosine":
        return lr * (0.5 * (1 + math.cos(math.pi * done)))
    return lr


def backward(run, loss, indices=()):
    """Back-propagate this rank's part of a loss: the caller has divided it by the totals of all ranks.

    indices: positions in the batch of the rows in it, to be named if the loss is not finite.
    FSDP averages gradients over the ranks, and so does `average`; the factor undoes that. (set_gradient_divide_factor
    does not work on gloo, and on the root module alone it leaves the blocks averaged.)
    """
    run.losses.append((indices, loss.detach()))
    (loss * run.world.size).backward()


def optimizer_step(run):
    """One step with the scheduled learning rates; returns {"lr", "grad_norm"}; lr is the first model's.

    If a loss or the gradient is not finite, no weight changes: UserError, or with on_nonfinite="skip" the step is
    left out and counted in run.skipped.
    """
    cfg = run.cfg
    run.phase("optimizer")
    parameters = list(run.models.parameters())
    gradients = [parameter.grad for parameter in with_gradient(parameters)]
    if run.world.size > 1:
        average([gradient for gradient in gradients if not is_sharded(gradient)])
    norm = full(nn.utils.get_total_norm(gradients)).to(run.world.device)
    numbers = torch.stack([norm, *(loss for _, loss in run.losses)])
    # One rank's bad loss stops, or skips, the step on all.
    skip = run.world.any_rank(~numbers.isfinite().all())
    if skip and cfg.on_nonfinite == "stop":
        raise UserError(describe_nonfinite(run, norm))
    run.losses.clear()

    if cfg.max_grad_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, cfg.max_grad_norm, norm)
    for group in run.optimizer.groups:
        group["lr"] = learning_rate(run.step, run.total, group["initial_lr"], cfg.schedule, cfg.warmup_steps)
        if cfg.adam_style == "tf":
            # torch adds eps to the corrected root, TensorFlow to the root before correction.
            n_steps = 1 + run.optimizer.state[group["parameters"][0]]["step"].item()
            group["eps"] = cfg.adam_eps / math.sqrt(1 - cfg.adam_beta2**n_steps)
    if skip:
        run.skipped += 1
    else:
        run.optimizer.step()
    run.optimizer.zero_grad()
    run.phase("rest")
    return {"lr": run.optimizer.groups[0]["lr"], "grad_norm": norm.item()}


def average(gradients):
    """Average gradients over the ranks, as FSDP does: in place, and all at once. (`backward` has multiplied.)"""
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


def describe_nonfinite(run, norm):
    """The gradient's norm, and this rank's rows whose loss is not finite, by their positions in the data."""
    rows = set()
    for indices, loss in run.losses:
        if not loss.isfinite():
            rows.update(run.row_indices()[list(indices)].tolist())
    which = f"this rank's rows whose loss is not finite: {sorted(rows) or 'none'}"
    where = f"step {run.step}, rank {run.world.rank}"
    return f"{where}: the gradient norm is {norm.item()}; {which}; lower lr, or mend the rows"
