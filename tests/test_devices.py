"""No tensor that lies on the CPU may meet one on the GPU: every stage runs on a pretended device.

Its tensors hold CPU tensors, but say that they are elsewhere; an operation on tensors of both kinds fails, where it
would on a GPU. (Elsewhere is PyTorch's device without memory, the only one that needs no driver.)
"""

import contextlib
import dataclasses
import importlib

import pytest
import torch
from pipeline import EVERYTHING, metrics, ranked, same_metrics, write_rows
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import dpo
import ppo
import rm
import sample
import sft
from distributed import processes
from variants import ppo_max

AWAY = torch.device("meta", 0)  # not torch.device("meta"), which models are built on
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)  # what may have one tensor here and one there
INDEXING = (aten.index.Tensor, aten.index_put_.default)  # a GPU fetches the indices


class Away(torch.Tensor):
    """A tensor that says it is on the device AWAY; `here` has its values."""

    @staticmethod
    def __new__(cls, here):
        form = dict(strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, device=AWAY, **form)

    is_meta = False  # it has values

    def __init__(self, here):
        self.here = here

    def __format__(self, spec):
        return format(self.here, spec)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Makes tensors on AWAY where that is asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Values(TorchFunctionMode):
    """What goes past the mode above: tensors made of values on a device, and the way back to a list."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist and isinstance(args[0], Away):
            return args[0].here.tolist()
        makes_tensor = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        if makes_tensor and kwargs.get("device") == AWAY:
            return func(*args, **{**kwargs, "device": "cpu"}).to(AWAY)
        return func(*args, **kwargs)


def compute(func, args, kwargs):
    """Do an operation with the values of its tensors; its results are on AWAY if one of these is, or it asks for it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, Away) for tensor in tensors)
    if there and func not in COPIES:
        for tensor in tensors:
            refuse_meeting(func, args, tensor)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]) == AWAY
        kwargs = {**kwargs, "device": "cpu" if there else kwargs["device"]}

    def unwrap(leaf):
        return leaf.here if isinstance(leaf, Away) else leaf

    given = {id(unwrap(tensor)): tensor for tensor in tensors}

    def wrap(leaf):
        if id(leaf) in given:
            return given[id(leaf)]  # what works in place returns a tensor that it was given
        if there and isinstance(leaf, torch.Tensor):
            return Away(leaf)
        return leaf

    args, kwargs = tree_map(unwrap, (args, kwargs))
    return tree_map(wrap, func(*args, **kwargs))


def refuse_meeting(func, args, tensor):
    """Fail if `tensor`, of an operation on the GPU, lies on the CPU; two kinds may."""
    is_number = tensor.dim() == 0 and torch.Tag.pointwise in func.tags  # a GPU takes that for a number
    is_index = func in INDEXING and isinstance(args[0], Away) and tensor.dtype in (torch.int64, torch.bool)
    meets = f"{func}: a tensor on {tensor.device}, of shape {tuple(tensor.shape)}, meets one on the GPU"
    assert isinstance(tensor, Away) or is_number or is_index, meets


@pytest.fixture
def away(monkeypatch):
    """A context in which stages run on AWAY, and a fused AdamW may, too."""
    optimizer = importlib.import_module("torch.optim.optimizer")

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch, Pretend(), Values():
            patch.setattr(processes, "pick_device", lambda name: AWAY)
            patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [AWAY.type])
            yield

    return context


def test_tensors_here_and_there_do_not_mix():
    with Pretend(), Values():
        ones = torch.ones(3, device=AWAY)
        assert (ones + 1).device == AWAY
        assert (ones + torch.tensor(1.0)).sum().item() == 6
        assert torch.as_tensor(True, device=AWAY).device == AWAY
        assert ones[torch.tensor([0, 2])].cpu().equal(torch.ones(2))
        mixed = (
            lambda: ones + torch.ones(3),
            lambda: torch.stack([ones[0], torch.tensor(1.0)]),
            lambda: torch.ones(3)[torch.tensor([0, 2], device=AWAY)],
        )
        for work in mixed:
            with pytest.raises(AssertionError, match="meets one on the GPU"):
                work()


CASES = {
    "sft": (sft, dict(eval_every=1, export_every=1)),
    "sft, all tokens": (sft, dict(loss_on="all", reduction="token", logits_chunk=3)),
    "rm": (rm, {}),
    "rm, options": (rm, dict(normalize_std=True, target_clamp=0.1, label_noise=0.1)),
    "rm, rankings": (rm, dict(data="ranked", eval_split="", normalize_data="")),
    "dpo": (dpo, dict(sft_coef=0.5, activation_checkpointing=True)),
    "ppo": (ppo, dict(samples_every=1, save_every=1)),
    "ppo, options": (ppo_max, {**EVERYTHING, **dict(episodes=32, n_epochs=1, whiten_rewards=True)}),
    "ppo, another end": (ppo, dict(truncate_token=13, truncate_after=2, n_minibatches=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_stage_runs_there_as_it_does_here(pipeline, away, tmp_path, name):
    """Undone: rm.py:ranking_loss with the pairs' indices on the CPU, which stopped every reward model on a GPU."""
    stage, changes = CASES[name]
    changes = dict(changes)
    if changes.get("data") == "ranked":
        changes["data"] = write_rows(tmp_path / "ranked_train.jsonl", ranked(16))
    here = pipeline.config(stage, "", **{**changes, "out_dir": str(tmp_path / "here")})
    there = dataclasses.replace(here, out_dir=str(tmp_path / "there"))
    stage.main(here)
    with away():
        stage.main(there)
    if not changes.get("normalize_std"):  # whose gain multiplies rounding, too
        same_metrics(metrics(there), metrics(here))


@pytest.mark.parametrize("changes", [{}, dict(best_of=2), dict(compare=2), dict(prompt="SUBREDDIT: r/pets")])
def test_samples_are_drawn_there_as_here(pipeline, away, capsys, changes):
    cfg = pipeline.config(sample, "", **changes, out_dir="", split="validation[:7]")
    sample.main(cfg)
    here = capsys.readouterr().out
    with away():
        sample.main(cfg)
    assert capsys.readouterr().out == here != ""
