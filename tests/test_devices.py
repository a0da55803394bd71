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
import runtime
import sample
import sft

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
    """Two that go past the mode above: torch.tensor(values, device=...), and the way back to a list."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") == AWAY:
            return torch.tensor(*args, **kwargs | dict(device="cpu")).to(AWAY)
        if func is torch.Tensor.tolist and isinstance(args[0], Away):
            return args[0].here.tolist()
        return func(*args, **kwargs)


def compute(func, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = any(isinstance(x, Away) for x in tensors)
    for x in tensors if there and func not in COPIES else ():
        number = x.dim() == 0 and torch.Tag.pointwise in func.tags  # a GPU takes that for a number
        index = func in INDEXING and isinstance(args[0], Away) and x.dtype in (torch.int64, torch.bool)
        meets = f"{func}: a tensor on {x.device}, of shape {tuple(x.shape)}, meets one on the GPU"
        assert isinstance(x, Away) or number or index, meets
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]) == AWAY
        kwargs = kwargs | dict(device="cpu" if there else kwargs["device"])
    given = {id(x.here if isinstance(x, Away) else x): x for x in tensors}  # what works in place returns one of these
    args, kwargs = tree_map(lambda x: x.here if isinstance(x, Away) else x, (args, kwargs))

    def answer(x):
        if not isinstance(x, torch.Tensor) or id(x) in given:
            return given.get(id(x), x)
        return Away(x) if there else x

    return tree_map(answer, func(*args, **kwargs))


@pytest.fixture
def away(monkeypatch):
    """A context in which stages run on AWAY."""

    def init(run, cfg):
        original(run, cfg)
        run.device = AWAY

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch, Pretend(), Values():
            patch.setattr(runtime.Run, "__init__", init)
            patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [AWAY.type])
            yield

    original, optimizer = runtime.Run.__init__, importlib.import_module("torch.optim.optimizer")
    return context


def test_tensors_here_and_there_do_not_mix():
    with Pretend(), Values():
        x = torch.ones(3, device=AWAY)
        assert (x + 1).device == AWAY and (x + torch.tensor(1.0)).sum().item() == 6
        assert x[torch.tensor([0, 2])].cpu().equal(torch.ones(2))
        mixed = (
            lambda: x + torch.ones(3),
            lambda: torch.stack([x[0], torch.tensor(1.0)]),
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
    "ppo, options": (ppo, EVERYTHING | dict(episodes=32, n_epochs=1, whiten_rewards=True)),
    "ppo, another end": (ppo, dict(truncate_token=13, truncate_after=2, n_minibatches=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_stage_runs_there_as_it_does_here(pipeline, away, tmp_path, name):
    """Undone: rm.ranking_loss with the pairs' indices on the CPU, which stopped every reward model on a GPU."""
    stage, changes = CASES[name]
    if changes.get("data") == "ranked":
        changes = changes | dict(data=write_rows(tmp_path / "ranked_train.jsonl", ranked(16)))
    cfg = pipeline.config(stage, "here", **changes | dict(out_dir=str(tmp_path / "here")))
    stage.main(cfg)
    there = dataclasses.replace(cfg, out_dir=str(tmp_path / "there"))
    with away():
        stage.main(there)
    if not changes.get("normalize_std"):  # whose gain multiplies rounding, too
        same_metrics(metrics(there), metrics(cfg))


@pytest.mark.parametrize("changes", [{}, dict(best_of=2), dict(compare=2), dict(prompt="SUBREDDIT: r/pets")])
def test_samples_are_drawn_there_as_here(pipeline, away, capsys, changes):
    cfg = pipeline.config(sample, "", **changes | dict(out_dir="", split="validation[:7]"))
    sample.main(cfg)
    here = capsys.readouterr().out
    with away():
        sample.main(cfg)
    assert capsys.readouterr().out == here != ""
