"""The memory that a stage needs on each GPU, term by term, for any configuration; and the settings that make it fit.

    python bench/plan.py ppo config/ppo_6.9b.py --gpus=8                        # the terms, and the peak
    python bench/plan.py ppo config/ppo_6.9b.py --gpus=8 --micro_batch_size=2 --activation_checkpointing
    python bench/plan.py ppo config/ppo_6.9b.py --gpus=8 --fit=80               # the first settings that fit 80 GB
    python bench/plan.py --table                                                # the table of the README
    python bench/plan.py --check                                                # against measured peaks, on this CPU

What lies there all the time (masters, Adam, frozen models) is counted. What a pass needs on top of it is found by
running that pass - the project's own model, losses and backward - on meta tensors, which have shapes but no memory,
and adding up the storages that are alive at a time. What FSDP gathers and reduces is counted by its rules: two blocks
and the root's parameters in the compute dtype, a block's gradient in it and in float32. All rows are as long as the
configuration allows. GB are 1e9 bytes; the CUDA context, nccl's buffers and fragmentation come on top: 4 GB or more.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from dataclasses import astuple
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import dpo  # noqa: E402
import model as nplus  # noqa: E402
import ppo  # noqa: E402
import rm  # noqa: E402
import sft  # noqa: E402
from configurator import configure, require  # noqa: E402
from data import Tokenizer  # noqa: E402
from model import GPTNeoX, GPTNeoXConfig, KVCache, ScalarModel, sample_token  # noqa: E402

STAGES = dict(sft=sft, rm=rm, ppo=ppo, dpo=dpo)
# hidden size, layers, heads, vocabulary (the hub's config.json)
PYTHIA = {"14m": (128, 6, 4, 50304), "70m": (512, 6, 8, 50304), "160m": (768, 12, 12, 50304),
          "410m": (1024, 24, 16, 50304), "1b": (2048, 16, 8, 50304), "1.4b": (2048, 24, 16, 50304),
          "2.8b": (2560, 32, 32, 50304), "6.9b": (4096, 32, 32, 50432), "12b": (5120, 36, 40, 50688)}  # fmt: skip


def shape_of(source):
    """The shape of a model directory, or of the Pythia whose size is in the name."""
    if (Path(source) / "config.json").exists():
        return GPTNeoXConfig.from_directory(source)
    sizes = [size for size in PYTHIA if f"_{size}/" in f"{source}/" or f"-{size}" in source]
    require(sizes, f"{source}: not a directory with a config.json, nor a name with one of {', '.join(PYTHIA)}")
    width, layers, heads, vocabulary = PYTHIA[max(sizes, key=len)]
    return GPTNeoXConfig(vocabulary, width, layers, heads)


# ---------------------------------------------------------------------------- passes without memory


class Peak(TorchDispatchMode):
    """Adds up the storages that operations make while they are alive."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in known | self.live.keys():
                storage = x.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        self.most = max(self.most, self.now)
        return result

    def free(self, key):
        self.now -= self.live.pop(key)


@contextlib.contextmanager
def as_on(device):
    """Meta tensors take no device's paths. Attention: GPUs do not write the T x T matrix, nor do CPUs in float32."""
    plain = nplus.F.scaled_dot_product_attention

    def attention(q, k, v, attn_mask=None, is_causal=False):
        if attn_mask is not None or (device == "cpu" and q.dtype == torch.bfloat16):
            return (q @ k.transpose(2, 3)).masked_fill(torch.ones((), device="meta") < 0, 0).softmax(-1) @ v
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]

    nplus.F.scaled_dot_product_attention = attention
    for limit in (nplus.AT_A_TIME, nplus.PREFILL_ROWS):
        limit["meta"] = limit[device]
    yield
    nplus.F.scaled_dot_product_attention = plain


def meta(cls, shape, dtype, cfg=None):
    with torch.device("meta"):
        model = cls(shape).to(dtype)
    if cfg:
        model.gpt_neox.checkpointing, model.logits_chunk = cfg.activation_checkpointing, cfg.logits_chunk
    for parameter in model.parameters():  # FSDP shards a gradient as soon as it is there: counted in `gathered`
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return model


@functools.cache
def count(cls, *shape):
    """Parameters of a block, of the rest, of all."""
    model = meta(cls, GPTNeoXConfig(*shape), torch.float32)
    block, whole = (sum(p.numel() for p in part.parameters()) for part in (model.gpt_neox.layers[0], model))
    return block, whole - block * len(model.gpt_neox.layers), whole


def tokens(rows, length):
    return torch.zeros(rows, length, dtype=torch.long, device="meta")


# ---------------------------------------------------------------------------- the terms


class Plan:
    """Terms in bytes, per process: `always`, and per phase what comes on top."""

    def __init__(self, stage, cfg, processes, dtype, n_vocab=None):
        self.stage, self.cfg, self.processes, self.dtype = stage, cfg, processes, dtype
        self.on_cpu = cfg.device == "cpu"
        self.size, self.shards = dtype.itemsize, cfg.shard_size or processes
        self.shape, self.always, self.phases = shape_of(cfg.model), {}, {}
        self.n_vocab = n_vocab or self.shape.vocab_size
        # one process, in float32: nothing is gathered, nor reduced
        self.plain = processes == 1 and dtype == torch.float32 and cfg.offload == "none"
        getattr(self, stage)()

    def peak_of(self, function):
        with as_on("cpu" if self.on_cpu else "cuda"), Peak() as peak:
            function()
        return peak.most

    @property
    def peak(self):
        return sum(self.always.values()) + max(sum(terms.values()) for terms in self.phases.values())

    def parameters(self, cls, shape=None):
        return count(cls, *astuple(shape or self.shape))

    def trained(self, name, cls, shape=None):
        n = self.parameters(cls, shape)[2] / self.shards
        if self.cfg.offload != "all":
            self.always |= {f"{name}: masters": 4 * n, f"{name}: Adam's moments": 8 * n}

    def frozen(self, name, cls, source):
        if self.cfg.offload == "none":
            self.always[f"{name}: weights"] = self.size * self.parameters(cls, shape_of(source))[2] / self.shards

    def gathered(self, *kinds, backward=False):
        """What FSDP holds whole during a pass through models, each a class and its shape (if not the policy's)."""
        blocks, rests, wholes = zip(*(self.parameters(*kind) for kind in kinds))
        if self.plain:
            return {}
        if backward and self.cfg.train_gather:
            return {"gathered: all": self.size * sum(wholes), "unsharded gradients": 4 * sum(wholes)}
        block = max(blocks)
        terms = {"gathered: two blocks": 2 * self.size * block, "gathered: embeddings, head": self.size * sum(rests)}
        if backward:  # a block's gradient, and its copy in float32 to reduce; the rest's comes last
            whole = (self.size + 4) * max(block, *rests) + self.size * rests[-1]
            terms["unsharded gradients, to reduce"] = whole
        return terms

    def update(self, function, kind, other=None, name="update", first=True):
        """The training pass `function` of a model of this kind; AdamW's step. other: of a model that learns, too,
        after this one (or before it, if this is not the first).
        """
        kinds = [kind] + [other] * (other is not None)
        sizes = [4 * self.parameters(*kind)[2] / self.shards * (self.cfg.offload != "all") for kind in kinds]
        terms = self.gathered(*(kinds if self.cfg.train_gather else [kind]), backward=True)
        terms["activations and logits"] = self.peak_of(function)
        # gradients stay from one micro-batch to the next; those of the first come while its activations go
        rows = self.cfg.batch_size // (self.processes * getattr(self.cfg, "n_minibatches", 1))
        terms["gradients"] = sum(sizes if rows > self.cfg.micro_batch_size else sizes[1:] if not first else [])
        self.phases[name], self.phases["optimizer step"] = terms, {"gradients": sum(sizes)}

    def train(self, cls, rows, length, n_predicted, loss):
        """A stage with one model: loss(model, ids, select)."""
        self.trained("model", cls)
        model = meta(cls, self.shape, self.dtype, self.cfg)
        self.update(lambda: loss(model, tokens(rows, length), tokens(rows, n_predicted)).backward(), (cls,))

    def sft(self):
        rows, T = self.cfg.micro_batch_size, self.cfg.max_length

        def loss(model, ids, select):
            return model.logprobs(ids, select, select).sum()

        self.train(GPTNeoX, rows, T, T - 1 if self.cfg.loss_on == "all" else T - self.cfg.max_query_tokens, loss)

    def rm(self):
        loss = lambda model, ids, select: model(ids, select).sum()  # noqa: E731
        self.train(ScalarModel, 2 * self.cfg.micro_batch_size, self.cfg.max_length, 1, loss)

    def dpo(self):
        rows, T = 2 * self.cfg.micro_batch_size, self.cfg.max_length

        def loss(model, ids, select):
            return model.logprobs(ids, select, select, 1.0, self.n_vocab).sum()

        self.train(GPTNeoX, rows, T, T - self.cfg.max_query_tokens, loss)

    def ppo(self):
        cfg, R = self.cfg, self.cfg.response_length
        Q = cfg.max_length
        sources = list(filter(None, cfg.reward_model.split(",")))
        critic_shape = shape_of(cfg.critic or (sources[0] if sources else cfg.model))
        self.trained("policy", GPTNeoX)
        self.trained("critic", ScalarModel, critic_shape)
        self.frozen("reference", GPTNeoX, cfg.reference or cfg.model)
        for source in sources:
            self.frozen(f"reward model {source}", ScalarModel, source)
        policy = meta(GPTNeoX, self.shape, self.dtype, cfg)
        critic = meta(ScalarModel, critic_shape, self.dtype, cfg)
        rows, whole = cfg.rollout_micro_batch_size, self.size * self.parameters(GPTNeoX)[2]
        lengths = torch.zeros(rows, dtype=torch.long, device="meta")

        @torch.no_grad()
        def prefill():
            few = tokens(min(nplus.PREFILL_ROWS["meta"], rows), 1)[:, 0]
            cache = KVCache(lengths, Q, Q + R)
            policy(tokens(len(few), Q), tokens(len(few), 1), cache.prefill(few, Q))
            logits = policy(tokens(rows, 1), None, cache.decode())
            sample_token(logits[:, 0], cfg.temperature, torch.zeros(rows, device="meta"), self.n_vocab)

        cache = 2 * self.shape.num_hidden_layers * rows * (Q + R) * self.shape.hidden_size * self.size
        rest = self.peak_of(prefill) - cache
        held = {"gathered: the policy": whole} if cfg.rollout_gather else self.gathered((GPTNeoX,))
        held = {} if self.plain else held
        self.phases["generation"] = held | {"key-value cache": cache, "activations of the prefill, sampling": rest}

        @torch.no_grad()
        def measure():
            select = tokens(rows, R)
            policy.logprobs(tokens(rows, Q + R), select, select, cfg.temperature, self.n_vocab, True)

        self.phases["scoring"] = held | {"activations and logits": self.peak_of(measure)}

        ids, select = tokens(cfg.micro_batch_size, Q + R), tokens(cfg.micro_batch_size, R)
        zeros, n = torch.zeros(select.shape, device="meta"), torch.zeros((), device="meta")
        names = ("logprobs", "advantages", "returns", "values")
        batch = dict.fromkeys(names, zeros) | dict(mask=zeros > 0, mask_p1=zeros > 0)

        def update_policy():
            new = policy.logprobs(ids, select, select, cfg.temperature, self.n_vocab, cfg.entropy_coef > 0)
            new, entropy = new if cfg.entropy_coef > 0 else (new, None)
            ppo.actor_loss(cfg, new, batch, n, entropy)[0].backward()

        def update_critic():
            ppo.critic_loss(cfg, critic(ids, select), batch, n)[0].backward()

        # PPO-ptx has a backward pass of its own, through rows no longer than these and the policy alone
        kinds = (GPTNeoX,), (ScalarModel, critic_shape)
        self.update(update_policy, *kinds, name="the policy's update")
        self.update(update_critic, *kinds[::-1], name="the critic's update", first=False)

    def lines(self):
        rows = [(f"always: {name}", size) for name, size in self.always.items()]
        for phase, terms in self.phases.items():
            rows += [(f"{phase}: {name}", size) for name, size in terms.items()]
            rows.append((f"= {phase}, with all above 'always'", sum(terms.values()) + sum(self.always.values())))
        return [f"{size / 1e9:9.2f} GB  {name}" for name, size in rows] + [f"{self.peak / 1e9:9.2f} GB  PEAK"]


# settings in the order of what they cost in time
def settings(stage, cfg):
    """Ever smaller micro-batches, without and with activation checkpointing, then sharded rollouts and offload."""
    for offload in ("none", "frozen", "all"):
        for gather in (True, False) if stage == "ppo" else (True,):
            for checkpointing in (False, True):
                micro = cfg.micro_batch_size
                while micro:
                    changes = dict(offload=offload, rollout_gather=gather, activation_checkpointing=checkpointing,
                                   micro_batch_size=micro)  # fmt: skip
                    if stage == "ppo":
                        smaller = cfg.rollout_micro_batch_size * micro // cfg.micro_batch_size
                        changes["rollout_micro_batch_size"] = max(1, smaller)
                    yield changes
                    micro //= 2


def fit(stage, cfg, gpus, gigabytes):
    """The first settings whose peak leaves 5 GB of the GPU, as (changes, peak), or None."""
    for changes in settings(stage, cfg):
        peak = Plan(stage, type(cfg)(**{**vars(cfg), **changes}), gpus, torch.bfloat16).peak
        if peak < (gigabytes - 5) * 1e9:
            return {name: value for name, value in changes.items() if value != getattr(cfg, name)}, peak
    return None


def table(stage="ppo"):
    rows = ["| size | " + " | ".join(f"{n} x {g} GB" for n, g in MACHINES) + " |", "|---" * (len(MACHINES) + 1) + "|"]
    for size in ("1b", "2.8b", "6.9b"):
        cells = []
        for n, gigabytes in MACHINES:
            found = fit(stage, configure(STAGES[stage].Config, [str(ROOT / f"config/{stage}_{size}.py")]), n, gigabytes)
            changes, peak = found or ({}, 0)
            lines = [f"{peak / 1e9:.0f} GB", *(f"{name}={value}" for name, value in changes.items())]
            cells.append("<br>".join(lines) if found else "does not fit")
        rows.append(f"| {size} | " + " | ".join(cells) + " |")
    return rows


MACHINES = [(1, 80), (2, 80), (4, 80), (8, 80), (1, 141)]

# ---------------------------------------------------------------------------- the check

WORKER = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch, datasets, pandas
import runtime
import {stage} as stage

def high(reset=False):
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

start, peaks = runtime.start, []
def begin(*args, **kwargs):
    run = start(*args, **kwargs)
    peaks.append(high(reset=True))
    return run
runtime.start = begin
def end(run, *args, **kwargs):
    print(json.dumps(dict(rank=run.rank, peak=high() - peaks[0])), flush=True)
    run.end("measured")
runtime.export = end
stage.main(stage.Config(**{values!r}))
"""


def measure(stage, values, processes, directory):
    (directory / "worker.py").write_text(WORKER.format(root=str(ROOT), stage=stage, values=values))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    result = subprocess.run([*command, directory / "worker.py"], env=env, capture_output=True, text=True)
    require(result.returncode == 0, result.stderr[-2000:])
    return max(json.loads(line)["peak"] for line in result.stdout.splitlines() if line.startswith('{"rank'))


CASES = [("sft", 1, {}), ("sft", 2, {}), ("sft", 1, dict(activation_checkpointing=True)), ("rm", 1, {}), ("dpo", 1, {}),
         ("ppo", 1, {}), ("ppo", 2, {}), ("ppo", 1, dict(activation_checkpointing=True, micro_batch_size=2)),
         ("ppo", 2, dict(rollout_gather=False, rollout_micro_batch_size=16)),
         ("ppo", 1, dict(dtype="bfloat16"))]  # fmt: skip


def check():
    """Rows as long as the configuration allows and random weights: 8 layers of width 768, 64 M parameters."""
    directory, Q, R = Path(tempfile.mkdtemp(prefix="plan-")), 256, 64
    subprocess.run([sys.executable, "toy/make_data.py", directory / "toy", "--seed=0"], cwd=ROOT, check=True)
    shape = GPTNeoXConfig(vocab_size=4096, hidden_size=768, num_hidden_layers=8, num_attention_heads=12)
    for cls, name in ((GPTNeoX, "policy"), (ScalarModel, "reward")):
        cls(shape).save_pretrained(directory / name)
        shutil.copy(directory / "toy" / "tokenizer.json", directory / name)
    tokenizer = Tokenizer.load(str(directory / "policy"))
    prompt, answers = " the" * Q, [" the" * (R - 1), " a" * (R - 1)]
    lengths = [len(tokenizer.encode(text)) for text in (prompt, *answers)]
    require(lengths == [Q, R - 1, R - 1], f"the toy tokenizer makes {lengths} tokens of the rows")
    row = dict(prompt=prompt, chosen=answers[0], rejected=answers[1])
    (directory / "pairs.jsonl").write_text((json.dumps(row) + "\n") * 32)
    (directory / "posts.jsonl").write_text((json.dumps(dict(prompt=prompt, completion=answers[0])) + "\n") * 32)
    rows = ["| stage | processes | settings | planned | measured | ratio |", "|---" * 6 + "|"]
    for stage, processes, changes in CASES:
        values = dict(model=str(directory / "policy"), data=str(directory / "posts.jsonl"), max_length=Q + R,
                      device="cpu", dtype="float32", eval_split="", batch_size=8, micro_batch_size=4, episodes=16,
                      max_query_tokens=Q)  # fmt: skip
        if stage in ("rm", "dpo"):
            values |= dict(data=str(directory / "pairs.jsonl"))
        if stage == "rm":
            values |= dict(normalize_data="")
        if stage == "ppo":
            values |= dict(max_length=Q, response_length=R, reward_model=str(directory / "reward"), n_epochs=1,
                           rollout_micro_batch_size=4, samples_every=0)  # fmt: skip
        cfg = STAGES[stage].Config(**values | changes | dict(out_dir=str(directory / f"{stage}-{len(rows)}")))
        plan = Plan(stage, cfg, processes, getattr(torch, cfg.dtype), tokenizer.n_vocab).peak / 1e9
        seen = measure(stage, vars(cfg), processes, directory) / 1e9
        names = ", ".join(f"{name}={value}" for name, value in changes.items())
        rows.append(f"| {stage} | {processes} | {names} | {plan:.2f} GB | {seen:.2f} GB | {plan / seen:.2f} |")
        print(rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=STAGES)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--fit", type=float, default=0.0)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    args, rest = parser.parse_known_args()
    if args.table:
        return print("\n".join(table()))
    if args.check:
        return print("\n".join(check()))
    cfg = configure(STAGES[args.stage].Config, rest)
    if args.fit:
        found = fit(args.stage, cfg, args.gpus, args.fit)
        print("does not fit" if found is None else f"{found[1] / 1e9:.1f} GB with {found[0] or 'these settings'}")
    else:
        dtype = torch.float32 if cfg.dtype == "float32" else torch.bfloat16
        print("\n".join(Plan(args.stage, cfg, args.gpus, dtype).lines()))


if __name__ == "__main__":
    main()
