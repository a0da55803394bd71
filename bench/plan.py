"""The memory that a stage needs on each GPU, term by term, for any configuration; and the settings that make it fit.

    python bench/plan.py ppo config/ppo_6.9b.py --gpus=8                        # the terms, and the peak
    python bench/plan.py ppo config/ppo_6.9b.py --gpus=8 --micro_batch_size=2 --activation_checkpointing
    python bench/plan.py ppo config/ppo_6.9b.py --gpus=8 --fit=80               # the first settings that fit 80 GB
    python bench/plan.py --table                                                # the table of distributed/README.md
    python bench/plan.py --check                                                # against measured peaks, on this CPU

What lies there all the time (masters, Adam, frozen models) is counted. What a pass needs on top of it is found by
running that pass - the project's own model, losses and backward - on meta tensors, which have shapes but no memory,
and adding up the storages that are alive at a time. What FSDP gathers and reduces is counted by its rules: two blocks
and the root's parameters in the compute dtype, a block's gradient in it and in float32. All rows are as long as the
configuration allows. GB are 1e9 bytes; the CUDA context, nccl's buffers and fragmentation come on top: 4 GB or more.
"""

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dpo  # noqa: E402
import fast  # noqa: E402
import ppo  # noqa: E402
import rm  # noqa: E402
import sft  # noqa: E402
from configurator import configure, require  # noqa: E402
from data import Tokenizer  # noqa: E402
from distributed.optimizer import AdamW  # noqa: E402
from generation import PREFILL_ROWS, KVCache, decode_one_token, sample_token  # noqa: E402
from hub.files import write_jsonl  # noqa: E402
from model import GPTNeoX, GPTNeoXConfig, ScalarModel  # noqa: E402
from variants import ppo_max, rloo  # noqa: E402

STAGES = {"sft": sft, "rm": rm, "ppo": ppo, "ppo_max": ppo_max, "rloo": rloo, "dpo": dpo}
# hidden size, layers, heads, vocabulary (the hub's config.json)
PYTHIA = {
    "14m": (128, 6, 4, 50304),
    "70m": (512, 6, 8, 50304),
    "160m": (768, 12, 12, 50304),
    "410m": (1024, 24, 16, 50304),
    "1b": (2048, 16, 8, 50304),
    "1.4b": (2048, 24, 16, 50304),
    "2.8b": (2560, 32, 32, 50304),
    "6.9b": (4096, 32, 32, 50432),
    "12b": (5120, 36, 40, 50688),
}


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
        self.live = {}  # a storage's address -> its bytes
        self.now = 0
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {storage._cdata for storage in storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in storages(result):
            key = storage._cdata
            if key not in given and key not in self.live:
                self.live[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, key)
        self.most = max(self.most, self.now)
        return result

    def free(self, key):
        self.now -= self.live.pop(key)


def storages(values):
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class Attention(TorchFunctionMode):
    """Meta tensors take no device's kernel: attention with what it makes on `device`, cpu or cuda.

    GPUs do not write the T x T matrix, nor do CPUs in float32, unless there is a mask.
    """

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        q, k, v = args
        in_two_products = self.device == "cpu" and q.dtype == torch.bfloat16
        if kwargs["attn_mask"] is not None or in_two_products:
            scores = q @ k.transpose(2, 3)
            scores = scores.masked_fill(torch.zeros((), dtype=torch.bool, device="meta"), 0)
            return scores.softmax(-1) @ v
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]

    def put_around(self, module):
        """Be on during the module's forward passes. (`with` would be off while the backward pass runs a checkpointed
        block again: PyTorch takes a function mode away during what the mode itself lets through.)
        """
        module.register_forward_pre_hook(self.begin)
        module.register_forward_hook(self.end, always_call=True)

    def begin(self, module, inputs):
        self.__enter__()

    def end(self, module, inputs, output):
        self.__exit__(None, None, None)


def on_meta(kind, dtype):
    """A model without memory."""
    with torch.device("meta"):
        return kind.cls(kind.shape).to(dtype)


def drop_gradient(parameter):
    parameter.grad = None


def tokens(rows, length):
    return torch.zeros(rows, length, dtype=torch.long, device="meta")


class Kind(NamedTuple):
    """What a model is: GPTNeoX or ScalarModel, and its shape."""

    cls: type
    shape: GPTNeoXConfig


class Count(NamedTuple):
    """Parameters of a block, of the rest, of all."""

    block: int
    rest: int
    whole: int


def count(kind):
    return count_parameters(kind.cls, *astuple(kind.shape))


@functools.cache
def count_parameters(cls, *shape):
    model = on_meta(Kind(cls, GPTNeoXConfig(*shape)), torch.float32)
    layers = model.gpt_neox.layers
    block = sum(parameter.numel() for parameter in layers[0].parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    return Count(block, whole - block * len(layers), whole)


# ---------------------------------------------------------------------------- the terms


class Plan:
    """Terms in bytes, per process: `always`, and per phase what comes on top."""

    def __init__(self, stage, cfg, processes, dtype, n_vocab=None):
        self.cfg = cfg
        self.processes = processes
        self.dtype = dtype
        self.size = dtype.itemsize
        self.shards = cfg.shard_size or processes
        self.device = "cpu" if cfg.device == "cpu" else "cuda"
        self.at_a_time = fast.CHUNK[self.device]
        self.shape = shape_of(cfg.model)
        self.n_vocab = n_vocab or self.shape.vocab_size
        # A process that has whole models in float32: nothing is gathered.
        self.is_alone = self.shards == 1 and dtype == torch.float32 and cfg.offload == "none"
        self.always = {}
        self.phases = {}
        stages = {"sft": self.sft, "rm": self.rm, "dpo": self.dpo, "ppo": self.ppo, "ppo_max": self.ppo}
        stages["rloo"] = functools.partial(self.ppo, with_critic=False)
        stages[stage]()

    def model(self, kind):
        """A model without memory, to run passes through."""
        model = on_meta(kind, self.dtype)
        model.gpt_neox.checkpointing = self.cfg.activation_checkpointing
        model.logits_chunk = self.cfg.logits_chunk
        for block in model.gpt_neox.layers:
            Attention(self.device).put_around(block.attention)
        # FSDP shards a gradient as soon as it is there: it is counted in `gathered`, not here.
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(drop_gradient)
        return model

    @property
    def peak(self):
        return sum(self.always.values()) + max(sum(terms.values()) for terms in self.phases.values())

    def peak_of(self, function):
        with Peak() as peak:
            function()
        return peak.most

    # ------------------------------------------------------------------------ what lies there all the time

    def trained(self, name, kind):
        if self.cfg.offload != "all":
            n = count(kind).whole / self.shards
            self.always[f"{name}: masters"] = 4 * n
            self.always[f"{name}: Adam's moments"] = 8 * n

    def frozen(self, name, kind):
        if self.cfg.offload == "none":
            self.always[f"{name}: weights"] = self.size * count(kind).whole / self.shards

    # ------------------------------------------------------------------------ what comes on top in an update

    def update(self, name, function, kind, before=None, after=None):
        """The training pass `function` of a model of this kind; AdamW's step.

        before, after: the kind of a model that learns in the same step, before this one or after it.
        """
        kinds = [other for other in (before, kind, after) if other is not None]
        if self.cfg.train_gather:
            terms = self.gathered_for_update(kinds)
        else:
            terms = self.gathered(kind, backward=True)
        terms["activations and logits"] = self.peak_of(function)

        # Gradients stay from one micro-batch to the next; those of the first come while its activations go.
        rows = self.cfg.batch_size // (self.processes * getattr(self.cfg, "n_minibatches", 1))
        if rows > self.cfg.micro_batch_size:
            terms["gradients"] = sum(map(self.gradients, kinds))
        elif before is not None:
            terms["gradients"] = self.gradients(before)
        else:
            terms["gradients"] = 0
        self.phases[name] = terms
        gradients = sum(map(self.gradients, kinds))
        self.phases["optimizer step"] = {"gradients": gradients}
        if self.is_alone and self.processes > 1:
            self.phases["optimizer step"]["gradients, to average"] = gradients

    def gradients(self, kind):
        if self.cfg.offload == "all":
            return 0
        return 4 * count(kind).whole / self.shards

    def gathered(self, kind, backward=False):
        """What FSDP holds whole during a pass through a model."""
        if self.is_alone:
            return {}
        n = count(kind)
        terms = {
            "gathered: two blocks": 2 * self.size * n.block,
            "gathered: embeddings, head": self.size * n.rest,
        }
        if backward:
            # A block's gradient, and its copy in float32 to reduce; the rest's comes last.
            to_reduce = (self.size + 4) * max(n.block, n.rest)
            terms["unsharded gradients, to reduce"] = to_reduce + self.size * n.rest
        return terms

    def gathered_for_update(self, kinds):
        """What FSDP holds with train_gather: all models that are trained, and their gradients."""
        if self.is_alone:
            return {}
        whole = sum(count(kind).whole for kind in kinds)
        return {"gathered: all": self.size * whole, "unsharded gradients": 4 * whole}

    # ------------------------------------------------------------------------ stages with one model

    def sft(self):
        T = self.cfg.max_length
        n_predicted = T - 1 if self.cfg.loss_on == "all" else T - self.cfg.max_query_tokens
        self.train_language_model(self.cfg.micro_batch_size, T, n_predicted, None)

    def dpo(self):
        T = self.cfg.max_length
        self.train_language_model(2 * self.cfg.micro_batch_size, T, T - self.cfg.max_query_tokens, self.n_vocab)

    def train_language_model(self, rows, T, n_predicted, n_vocab):
        kind = Kind(GPTNeoX, self.shape)
        model = self.model(kind)

        def step():
            select = tokens(rows, n_predicted)
            logprobs = model.logprobs(tokens(rows, T), select, select, 1.0, n_vocab, False, self.at_a_time)
            logprobs.sum().backward()

        self.trained("model", kind)
        self.update("update", step, kind)

    def rm(self):
        rows = 2 * self.cfg.micro_batch_size
        kind = Kind(ScalarModel, self.shape)
        model = self.model(kind)

        def step():
            rewards = model(tokens(rows, self.cfg.max_length), tokens(rows, 1))
            rewards.sum().backward()

        self.trained("model", kind)
        self.update("update", step, kind)

    # ------------------------------------------------------------------------ PPO

    def ppo(self, with_critic=True):
        cfg = self.cfg
        sources = [source for source in cfg.reward_model.split(",") if source]
        start_of_critic = cfg.critic or (sources[0] if sources else cfg.model)
        policy = Kind(GPTNeoX, self.shape)
        critic = None
        self.trained("policy", policy)
        if with_critic:
            critic = Kind(ScalarModel, shape_of(start_of_critic))
            self.trained("critic", critic)
        self.frozen("reference", Kind(GPTNeoX, shape_of(cfg.reference or cfg.model)))
        for source in sources:
            self.frozen(f"reward model {source}", Kind(ScalarModel, shape_of(source)))
        self.rollout(policy)
        self.ppo_update(policy, critic)

    def rollout(self, kind):
        cfg = self.cfg
        Q = cfg.max_length
        R = cfg.response_length
        rows = cfg.rollout_micro_batch_size
        policy = self.model(kind)
        few = min(PREFILL_ROWS[self.device], rows)

        @torch.no_grad()
        def generate():
            cache = KVCache(tokens(rows, 1)[:, 0], Q, Q + R)
            cache.begin_prefill(tokens(few, 1)[:, 0], Q)
            policy(tokens(few, Q), tokens(few, 1), cache)
            logits = decode_one_token(policy, tokens(rows, 1)[:, 0], cache)
            uniforms = torch.zeros(rows, device="meta")
            sample_token(logits[:, 0], cfg.temperature, uniforms, self.n_vocab)

        @torch.no_grad()
        def measure():
            select = tokens(rows, R)
            options = (cfg.temperature, self.n_vocab, True, self.at_a_time)
            policy.logprobs(tokens(rows, Q + R), select, select, *options)

        held = self.gathered(kind)
        if cfg.rollout_gather and not self.is_alone:
            held = {"gathered: the policy": self.size * count(kind).whole}
        cache = 2 * self.shape.num_hidden_layers * rows * (Q + R) * self.shape.hidden_size * self.size
        rest = self.peak_of(generate) - cache
        self.phases["generation"] = {
            **held,
            "key-value cache": cache,
            "activations of the prefill, sampling": rest,
        }
        self.phases["scoring"] = {**held, "activations and logits": self.peak_of(measure)}

    def ppo_update(self, policy_kind, critic_kind):
        cfg = self.cfg
        policy = self.model(policy_kind)
        R = cfg.response_length
        ids = tokens(cfg.micro_batch_size, cfg.max_length + R)
        select = tokens(cfg.micro_batch_size, R)
        zeros = torch.zeros(select.shape, device="meta")
        total = torch.zeros((), device="meta")
        micro = dict.fromkeys(("logprobs", "advantages", "returns", "values"), zeros)
        micro.update(dict.fromkeys(("mask", "mask_p1", "weights"), zeros > 0))
        with_entropy = cfg.entropy_coef > 0
        options = (cfg.temperature, self.n_vocab, with_entropy, self.at_a_time)

        def update_policy():
            new = policy.logprobs(ids, select, select, *options)
            new_logprobs, new_entropy = new if with_entropy else (new, None)
            loss, _ = ppo.actor_loss(cfg, ppo.clipped_surrogate, new_logprobs, micro, total, new_entropy)
            loss.backward()

        def update_critic():
            critic = self.model(critic_kind)
            loss, _ = ppo.critic_loss(cfg, critic(ids, select), micro, total)
            loss.backward()

        # PPO-ptx has a backward pass of its own, through rows no longer than these and the policy alone.
        self.update("the policy's update", update_policy, policy_kind, after=critic_kind)
        if critic_kind is not None:
            self.update("the critic's update", update_critic, critic_kind, before=policy_kind)

    # ------------------------------------------------------------------------ what is printed

    def lines(self):
        rows = [(f"always: {name}", size) for name, size in self.always.items()]
        always = sum(self.always.values())
        for phase, terms in self.phases.items():
            rows += [(f"{phase}: {name}", size) for name, size in terms.items()]
            rows.append((f"= {phase}, with all above 'always'", sum(terms.values()) + always))
        rows.append(("PEAK", self.peak))
        return [f"{size / 1e9:9.2f} GB  {name}" for name, size in rows]


# ---------------------------------------------------------------------------- settings that fit


def settings(stage, cfg):
    """Ever smaller micro-batches, without and with activation checkpointing, then sharded rollouts and offload: in the
    order of what they cost in time.
    """
    samples = stage.startswith("ppo")
    for offload in ("none", "frozen", "all"):
        for gather in (True, False) if samples else (True,):
            for checkpointing in (False, True):
                micro = cfg.micro_batch_size
                while micro:
                    changes = {
                        "offload": offload,
                        "rollout_gather": gather,
                        "activation_checkpointing": checkpointing,
                        "micro_batch_size": micro,
                    }
                    if samples:
                        smaller = cfg.rollout_micro_batch_size * micro // cfg.micro_batch_size
                        changes["rollout_micro_batch_size"] = max(1, smaller)
                    yield changes
                    micro //= 2


def fit(stage, cfg, gpus, gigabytes):
    """The first settings whose peak leaves 5 GB of the GPU, as (changes, peak), or None."""
    for changes in settings(stage, cfg):
        peak = Plan(stage, replace(cfg, **changes), gpus, torch.bfloat16).peak
        if peak < (gigabytes - 5) * 1e9:
            return {name: value for name, value in changes.items() if value != getattr(cfg, name)}, peak
    return None


MACHINES = [(1, 80), (2, 80), (4, 80), (8, 80), (1, 141)]  # GPUs, and GB of each


def table(stage="ppo"):
    titles = [f"{gpus} x {gigabytes} GB" for gpus, gigabytes in MACHINES]
    rows = [f"| size | {' | '.join(titles)} |", "|---" * (len(MACHINES) + 1) + "|"]
    for size in ("1b", "2.8b", "6.9b"):
        cfg = configure(STAGES[stage].Config, [str(ROOT / f"config/{stage}_{size}.py")])
        cells = [cell(fit(stage, cfg, gpus, gigabytes)) for gpus, gigabytes in MACHINES]
        rows.append(f"| {size} | {' | '.join(cells)} |")
    return rows


def cell(found):
    if found is None:
        return "does not fit"
    changes, peak = found
    lines = [f"{peak / 1e9:.0f} GB"]
    lines += [f"{name}={value}" for name, value in changes.items()]
    return "<br>".join(lines)


# ---------------------------------------------------------------------------- the check

# stage, processes, settings
CASES = [
    ("sft", 1, {}),
    ("sft", 2, {}),
    ("sft", 1, {"activation_checkpointing": True}),
    ("rm", 1, {}),
    ("dpo", 1, {}),
    ("ppo", 1, {}),
    ("ppo", 2, {}),
    ("ppo", 1, {"activation_checkpointing": True, "micro_batch_size": 2}),
    ("ppo", 2, {"rollout_gather": False, "rollout_micro_batch_size": 16}),
    ("ppo", 1, {"dtype": "bfloat16"}),
]
Q = 256  # tokens of a query, and of a response
R = 64


def check():
    """Rows as long as the configuration allows and random weights: 8 layers of width 768, 64 M parameters."""
    directory = Path(tempfile.mkdtemp(prefix="plan-"))
    tokenizer = write_inputs(directory)
    print("| stage | processes | settings | planned | measured | ratio |")
    print("|---" * 6 + "|")
    for number, (stage, processes, changes) in enumerate(CASES):
        out_dir = directory / f"run_{number}"
        cfg = config_of(stage, directory, out_dir, changes)
        planned = Plan(stage, cfg, processes, getattr(torch, cfg.dtype), tokenizer.n_vocab).peak / 1e9
        measured = measure(stage, cfg, processes) / 1e9
        shutil.rmtree(out_dir)
        names = ", ".join(f"{name}={value}" for name, value in changes.items())
        ratio = planned / measured
        cells = [stage, str(processes), names, f"{planned:.2f} GB", f"{measured:.2f} GB", f"{ratio:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    shutil.rmtree(directory)


def write_inputs(directory):
    """Models and rows, 32 of them; returns the tokenizer."""
    subprocess.run([sys.executable, "toy/make_data.py", directory / "toy", "--seed=0"], cwd=ROOT, check=True)
    shape = GPTNeoXConfig(vocab_size=4096, hidden_size=768, num_hidden_layers=8, num_attention_heads=12)
    for cls, name in ((GPTNeoX, "policy"), (ScalarModel, "reward")):
        cls(shape).save_pretrained(directory / name)
        shutil.copy(directory / "toy" / "tokenizer.json", directory / name)
    tokenizer = Tokenizer.load(str(directory / "policy"))
    prompt = " the" * Q
    chosen = " the" * (R - 1)
    rejected = " a" * (R - 1)
    lengths = [len(tokenizer.encode(text)) for text in (prompt, chosen, rejected)]
    require(lengths == [Q, R - 1, R - 1], f"the toy tokenizer makes {lengths} tokens of the rows")
    write_jsonl(directory / "posts.jsonl", [{"prompt": prompt, "completion": chosen}] * 32)
    write_jsonl(directory / "pairs.jsonl", [{"prompt": prompt, "chosen": chosen, "rejected": rejected}] * 32)
    return tokenizer


def config_of(stage, directory, out_dir, changes):
    """Two updates of eight rows."""
    values = dict(
        model=str(directory / "policy"), data=str(directory / "posts.jsonl"), out_dir=str(out_dir), device="cpu",
        dtype="float32", eval_split="", max_length=Q + R, max_query_tokens=Q, batch_size=8, micro_batch_size=4,
        episodes=16,
    )  # fmt: skip
    if stage in ("rm", "dpo"):
        values["data"] = str(directory / "pairs.jsonl")
    if stage == "rm":
        values["normalize_data"] = ""
    if stage == "ppo":
        values.update(
            reward_model=str(directory / "reward"), max_length=Q, response_length=R, n_epochs=1,
            rollout_micro_batch_size=4, samples_every=0,
        )  # fmt: skip
    values.update(changes)
    return STAGES[stage].Config(**values)


def measure(stage, cfg, processes):
    """The largest peak of a rank in a run of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is given back
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    options = [f"--{name}={value}" for name, value in asdict(cfg).items()]
    command = [*torchrun, "bench/plan.py", stage, "--measure", *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    require(result.returncode == 0, result.stderr[-2000:])
    lines = [line for line in result.stdout.splitlines() if line.startswith('{"peak')]
    return max(json.loads(line)["peak"] for line in lines)


def run_and_print_peaks(stage, cfg):
    """What each process of `measure` does: after every optimizer step it prints by how much its memory has grown at
    most since its first model began to be built.
    """
    import datasets  # noqa: F401 (libraries that a run imports on its way are no part of the plan)
    import pandas  # noqa: F401
    from torch.distributed import checkpoint, fsdp  # noqa: F401

    before = []

    def begin(module, name, submodule):
        if not before:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
            before.append(high_water_mark())

    def report():
        print(json.dumps({"peak": high_water_mark() - before[0]}), flush=True)

    register_module_module_registration_hook(begin)
    AdamW.watchers = (report,)
    stage.main(cfg)


def high_water_mark():
    """The most bytes that this process has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=STAGES)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--fit", type=float, default=0.0)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.table:
        print("\n".join(table()))
        return
    if args.check:
        check()
        return
    if args.stage is None:
        parser.error("name a stage, --table or --check")
    cfg = configure(STAGES[args.stage].Config, rest)
    if args.measure:
        run_and_print_peaks(STAGES[args.stage], cfg)
    elif args.fit:
        found = fit(args.stage, cfg, args.gpus, args.fit)
        if found is None:
            print("does not fit")
        else:
            changes, peak = found
            print(f"{peak / 1e9:.1f} GB with {changes or 'these settings'}")
    else:
        dtype = torch.float32 if cfg.dtype == "float32" else torch.bfloat16
        print("\n".join(Plan(args.stage, cfg, args.gpus, dtype).lines()))


if __name__ == "__main__":
    main()
