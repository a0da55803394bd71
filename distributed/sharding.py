"""Models over processes: FSDP2, and weights that each rank reads for itself.

Memory is saved by sharding, and time by keeping parameters whole where they fit: while responses are sampled, or until
a step's last micro-batch. A process that holds a model alone, and computes in float32, has nothing to share or to cast:
there models are plain modules. Several such processes are replicas, whose gradients optimizer.py averages.
"""

import contextlib
import gc
import os

import torch

from configurator import require
from data import pad_right, pick
from generation import generate
from hub.fetch import find_model
from hub.tokenizer import Tokenizer
from hub.weights import load_weights
from model import GPTNeoXConfig, init_weights


def load_model(cfg, world, tokenizer, cls, source, trainable=False, scratch=False, new_head=False):
    """Build a sharded model; each rank reads only its own rows of the weights.

    tokenizer: that of the rows; a model of another one, or with a smaller vocabulary, is refused.
    trainable: float32 masters; a frozen model is kept in the compute dtype.
    scratch:   draw all weights; of `source` only config.json is read.
    new_head:  draw the scalar head, and read the body, of either kind of model.
    """
    directory = find_model(source)
    with torch.device("meta"):
        model = cls(GPTNeoXConfig.from_directory(directory))
    size = model.config.vocab_size
    small = f"{directory}: vocab_size {size} is less than the tokenizer's {tokenizer.n_vocab}; use its own"
    require(size >= tokenizer.n_vocab, small)
    if not os.path.exists(os.path.join(directory, "tokenizer.json")):
        taken = f"its ids are taken for those of {tokenizer.path}"
        world.print(f"{directory}: no tokenizer.json; {taken}")
    elif not scratch:
        refuse_other_tokenizer(directory, tokenizer, may_learn=trainable)
    if cfg.compile:
        for layer in model.gpt_neox.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)

    offload = cfg.offload == "all" or (cfg.offload == "frozen" and not trainable)
    shard(model, world, torch.float32 if trainable else world.dtype, offload)
    model.to_empty(device="cpu" if offload else world.device)
    model.gpt_neox.checkpointing = trainable and cfg.activation_checkpointing
    model.logits_chunk = getattr(cfg, "logits_chunk", 0)  # of frozen ones too: the reference rounds as the policy does
    if scratch:
        init_weights(model, cfg.seed)
    else:
        if new_head:
            init_weights(model, cfg.seed, only="score")
        load_weights(model, directory, new_head)
    return model.requires_grad_(trainable)


def refuse_other_tokenizer(directory, tokenizer, may_learn):
    """Raise UserError if a model's own tokenizer gives another meaning to an id of `tokenizer`, or none.

    may_learn: ids that it does not know are no trouble.
    """
    path = os.path.join(directory, "tokenizer.json")
    theirs = Tokenizer.load(directory)
    known = theirs.vocabulary
    for id, text in tokenizer.vocabulary.items():
        is_new = id not in known and may_learn
        which = f"{path}: id {id} is {known.get(id)!r} there, and {text!r} in {tokenizer.path}"
        require(is_new or known.get(id) == text, f"{which}; use models of one tokenizer")
    ends = may_learn or theirs.eos_id == tokenizer.eos_id
    which = f"{path}: EOS is {theirs.eos_token!r} there, and {tokenizer.eos_token!r} for the rows"
    require(ends, f"{which}; name the same in tokenizer_config.json")


def shard(model, world, master_dtype, offload=False):
    """FSDP2: every block, then the rest; masters in master_dtype, compute in world.dtype, reductions in float32.

    The modules that a model lists in `float32_modules` compute in float32 whatever world.dtype is.
    offload: the shards live in CPU memory, gradients and the optimizer's state with them.
    """
    model.to(master_dtype)
    if world.n_shards == 1 and world.dtype == torch.float32 and not offload:
        return  # nothing to share, to cast or to move
    from torch.distributed import fsdp  # it imports PyTorch's compiler, which takes a second

    gc.collect()  # FSDP's modules are in cycles: a model that is no longer used goes before this one takes memory
    options = dict(mesh=world.mesh, reshard_after_forward=True)
    if offload:
        options["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    float32 = fsdp.MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    mixed = fsdp.MixedPrecisionPolicy(param_dtype=world.dtype, reduce_dtype=torch.float32)
    for name in model.float32_modules:
        fsdp.fully_shard(model.get_submodule(name).float(), mp_policy=float32, **options)
    for module in [*model.gpt_neox.layers, model]:
        fsdp.fully_shard(module, mp_policy=mixed, **options)
    # FSDP gathers parameters for `forward`, and for what else it is told of.
    if hasattr(model, "logprobs"):
        fsdp.register_fsdp_forward_method(model, "logprobs")


def keep_whole(models, yes):
    """Set whether the next passes leave parameters of sharded models whole on each process, and gradients unreduced."""
    for model in models:
        if hasattr(model, "set_requires_gradient_sync"):  # FSDP has made it one of its modules
            model.set_requires_gradient_sync(not yes)
            model.set_reshard_after_forward(not yes)
            model.set_reshard_after_backward(not yes)


def without_compiling(cfg):
    """While this lasts, compiled blocks run as they are written: they would be compiled anew for the cache's shapes."""
    if cfg.compile:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def generate_rows(cfg, world, model, queries, draws, stop, n_vocab, micro_batch_size):
    """Sample for n queries (lists of ids) with draws (n, R): responses and their logprobs (n, R), on all ranks.

    A response that has drawn the id `stop` goes on with it; None: all are sampled to their end.
    With cfg.rollout_gather the parameters stay whole meanwhile, with no collective per token; without it they are
    gathered block by block for each, and all ranks take as many steps as the slowest.
    """

    def all_done(done):
        if cfg.rollout_gather:
            return done.all()
        return not world.any_rank(~done.all())

    def sample(indices):
        ids, lengths = pad_right(pick(queries, indices))
        uniforms = draws[indices].to(world.device)
        with without_compiling(cfg):
            responses, logprobs = generate(
                model, ids.to(world.device), lengths.to(world.device), draws.shape[1], cfg.temperature, uniforms,
                eos_id=stop, n_vocab=n_vocab, return_logprobs=True, all_done=all_done,
            )  # fmt: skip
        return {"responses": responses, "logprobs": logprobs}

    keep_whole([model], cfg.rollout_gather)
    rows = world.map_rows(sample, list(map(len, queries)), micro_batch_size)
    keep_whole([model], False)  # the next forward pass shards them again
    return rows["responses"], rows["logprobs"]
