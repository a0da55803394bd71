"""The fields that all scripts share. Nothing slow is imported here: the scripts at the top answer `--help` and a wrong
option at once.
"""

from dataclasses import dataclass, fields
from typing import Literal

from configurator import Count, Share, check
from hub.files import expand


@dataclass
class RunConfig:
    """The fields that all scripts share."""

    # ---- the run
    out_dir: str = "out/run"  # where everything that a run writes goes
    seed: int = 44413  # decides the initial weights, the data order and every sampled token
    accept_changes: bool = False  # go on in an out_dir that holds a run with another configuration
    # ---- data
    max_query_tokens: Count = 512  # posts are cut to this (arXiv:2403.17031 detail 2.2); articles to no less than 1919
    too_long: Literal["stop", "drop", "cut"] = "stop"  # rows longer than max_length, or the model; cut: their responses
    # ---- processes and memory
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute; auto: bfloat16 on cuda; the masters are float32
    shard_size: int = 0  # processes that share one copy of a model, a node's for example; 0: all
    offload: Literal["none", "frozen", "all"] = "none"  # to CPU memory: frozen models; or trained ones and Adam's too
    rollout_gather: bool = True  # sample with a model's parameters whole on each process; False: block by block
    compile: bool = False  # torch.compile of each block, once for all lengths; generation goes without

    def __post_init__(self):
        for field in fields(self):
            check(field, getattr(self, field.name), type(self).__qualname__)
        self.out_dir = expand(self.out_dir)


@dataclass
class TrainConfig(RunConfig):
    """The fields that all training stages share; the values are those of arXiv:2403.17031."""

    # ---- data
    train_split: str = "train"  # the rows to train on
    eval_split: str = "validation"  # empty: no evaluation
    max_length: int = 638  # tokens of query + response; 0: as many as the model takes
    # ---- batch
    episodes: int = 0  # rows in the whole run, shuffled anew in each epoch; 0: every row once
    batch_size: Count = 64  # rows per update, over all processes
    micro_batch_size: Count = 1  # rows that a process takes through one pass with gradients
    # ---- optimizer
    lr: float = 3e-6  # peak learning rate
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # of the learning rate; the first two go to 0
    warmup_steps: int = 0  # updates over which it rises to its peak
    adam_beta1: Share = 0.9  # decay of the gradient's mean
    adam_beta2: Share = 0.999  # decay of the squared gradient's mean
    adam_eps: float = 1e-5  # added to the root of the latter
    adam_style: Literal["torch", "tf"] = "torch"  # tf: eps is added before the bias correction (arXiv:1909.08593)
    weight_decay: float = 0.01  # decoupled, on all parameters
    max_grad_norm: float = 0.0  # clip the gradient's global norm; 0: do not clip
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what to do when a loss or the gradient is not finite
    # ---- memory
    train_gather: bool = False  # keep parameters and gradients whole on each process until a step's last micro-batch
    logits_chunk: int = 0  # positions of a row whose logits are in memory together, computed again for backward; 0: all
    activation_checkpointing: bool = False  # compute a block's activations again in the backward pass
    # ---- checkpoints
    save_every: int = 0  # updates between resumable checkpoints; 0: none but that of a run stopped by a signal
    keep_checkpoints: Count = 2  # how many of them to keep: the last ones
    keep_every: int = 0  # and those after each multiple of this many updates; 0: no others
    # ---- logging
    log_to: Literal["none", "csv", "tensorboard", "wandb"] = "none"  # where metrics go besides metrics.jsonl
