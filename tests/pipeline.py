"""A tiny trained pipeline for the tests of the stages: toy data, a small SFT model, a reward model."""

import contextlib
import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook

import rm
import sft
from distributed.optimizer import AdamW
from fast import Linear

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(batch_size=8, micro_batch_size=3, episodes=16, lr=1e-3, device="cpu", dtype="float32")


def make_data(directory):
    """Toy rows: 60 posts and 40 pairs to train on, 21 and 15 held out (numbers that divide by nothing)."""
    sizes = ["--sft-train=60", "--sft-validation=21", "--comparisons-train=40", "--comparisons-validation=15"]
    subprocess.run([sys.executable, "toy/make_data.py", directory, "--seed=0", *sizes], cwd=ROOT, check=True)
    return directory


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# every option of PPO at once, and of variants/ppo_max.py, to whose Config they belong
EVERYTHING = dict(
    reward_norm="normalize", reward_clip=2.0, advantage_clip=1.0, ptx_coef=0.5,
    critic_steps=3, critic_lr=2e-3, entropy_coef=0.01, max_grad_norm=1.0, adam_style="tf", kl_target=0.5,
)  # fmt: skip


def ranked(n):
    """Rankings of 2 to 4 responses, by how many vowels they have."""
    words = [" aeiou", " aei", " xyz", " bcd"]
    return [{"prompt": f"letters {i}:", "responses": words[: 2 + i % 3]} for i in range(n)]


class Pipeline:
    """Where the pieces are, and configurations of every stage on them."""

    def __init__(self, directory):
        self.directory = directory
        self.data = make_data(directory / "data")
        shape = dict(vocab_size=896, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        (self.data / "config.json").write_text(json.dumps(shape))
        self.sft = directory / "sft" / "final"
        self.rm = directory / "rm" / "final"
        # 40 updates: enough that the policy sometimes ends its response
        sft.main(self.config(sft, "sft", episodes=320, lr=5e-3))
        rm.main(self.config(rm, "rm"))

    def config(self, stage, name, **changes):
        """stage: a module with a Config; a variant begins with the values of the stage whose Config it extends."""
        posts = f"{self.data}/sft_{{split}}.jsonl"
        pairs = f"{self.data}/comparisons_{{split}}.jsonl"
        policy = str(self.sft)
        reward_model = str(self.rm)
        stages = dict(
            sft=dict(scratch=True, model=str(self.data), data=posts, loss_on="response"),
            rm=dict(model=policy, data=pairs, normalize_data=posts),
            ppo=dict(model=policy, reward_model=reward_model, data=posts, response_length=10,
                     rollout_micro_batch_size=3),
            dpo=dict(model=policy, data=pairs),
            sample=dict(model=policy, reward_model=reward_model, reference=policy, data=posts, response_length=10),
        )  # fmt: skip
        kinds = [cls.__module__ for cls in stage.Config.__mro__]
        kind = next(kind for kind in kinds if kind in stages)
        known = {field.name for field in dataclasses.fields(stage.Config)}
        small = {key: value for key, value in SMALL.items() if key in known}
        out_dir = str(self.directory / name)
        return stage.Config(**{**small, **stages[kind], "out_dir": out_dir, **changes})


def arguments(cfg):
    """The command line that gives `cfg`."""
    return [f"--{key}={value}" for key, value in dataclasses.asdict(cfg).items()]


def metrics(cfg_or_dir):
    directory = getattr(cfg_or_dir, "out_dir", cfg_or_dir)
    return read_rows(Path(directory) / "metrics.jsonl")


# ---------------------------------------------------------------------------- what happens in the middle of a run


@contextlib.contextmanager
def in_update(cfg, step, action):
    """While this context lasts, action() is called in update `step` of a run of cfg, after its first optimizer step."""
    steps_per_update = getattr(cfg, "n_epochs", 1) * getattr(cfg, "n_minibatches", 1)
    numbers = itertools.count()

    def watch():
        if next(numbers) == step * steps_per_update:
            action()

    AdamW.watchers = (watch,)
    try:
        yield
    finally:
        AdamW.watchers = ()


def nan_in(passes):
    """While this context lasts, the logits of these forward passes of training, numbered from 0, are NaN."""
    numbers = itertools.count()

    def hook(module, inputs, logits):
        # embed_out is the one Linear without a bias; a rollout or an evaluation computes no gradient.
        is_head = isinstance(module, Linear) and module.bias is None
        if is_head and torch.is_grad_enabled() and next(numbers) in passes:
            return logits * math.nan
        return None

    return register_module_forward_hook(hook)


# ---------------------------------------------------------------------------- what two runs have in common

# Two runs that add the same float32 numbers in another order. A sum of n terms then differs by about sqrt(n) u of
# the terms' size, u = 6e-8; n is at most 2,000 here (a batch's tokens; the products of a layer), which gives 3e-6;
# three times that, relative, and absolute where terms of size 1 cancel. Adam adds less: it moves a weight by
# lr g / (|g| + eps), so rounding d of a gradient moves it by at most lr d / eps = 1e-3 x 1e-8 / 1e-5 = 1e-6 where
# |g| < eps, where it hardly matters for the loss (|g| times that, over all 1e5 weights: 1e-6), and by less elsewhere.
ROUNDING = 1e-5


def same_metrics(ours, theirs):
    """Assert that two lists of metric rows have the same keys and, up to rounding, the same numbers."""
    assert [list(row) for row in ours] == [list(row) for row in theirs]
    for left, right in zip(ours, theirs):
        for key in left:
            where = f"{left['step']} {key}"
            np.testing.assert_allclose(left[key], right[key], rtol=ROUNDING, atol=ROUNDING, err_msg=where)
