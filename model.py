"""GPT-NeoX, the architecture of Pythia, with its weights in the hub's own layout.

    model = GPTNeoX.from_pretrained("EleutherAI/pythia-160m")     # a hub id, or a directory
    logits = model(ids)                                           # (B, T) -> (B, T, V)

The modules carry the hub's names, so `state_dict()` *is* the content of model.safetensors.

Shapes: B batch, T sequence, Q query, R response, V vocabulary, D width, H heads, E = D / H head width. `select` (B, R)
are the positions in a row whose outputs are wanted; without it all are.

Every batch is padded on the right. A causal row never looks to its right, so a full pass needs no mask,
and what stands in a pad column cannot reach a real one. RoPE makes attention depend on distances only,
so this is the same function as left padding.
"""

import math
import os
from dataclasses import asdict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fast
from configurator import explain, require
from fast import Linear
from generation import generate  # noqa: F401 (notebooks take it from here)
from hub.config import FIXED, GPTNeoXConfig
from hub.fetch import find_model
from hub.files import write_json
from hub.weights import copy_rows, load_weights, write_safetensors

# ---------------------------------------------------------------------------- the network


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_heads = config.num_attention_heads
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin, cache, select):
        B, T, D = x.shape
        E = D // self.n_heads
        # q, k and v of one head lie side by side, head after head.
        qkv = self.query_key_value(x).view(B, T, self.n_heads, 3, E)
        qkv = qkv.permute(3, 0, 2, 1, 4)  # (3, B, H, T, E)
        q, k = rotate(qkv[:2], cos, sin)
        v = qkv[2]

        mask = None  # causal
        if cache is not None:
            # The cache stores k and v. A prefill gets these back and no mask; decoding gets all columns, and a mask.
            k, v, mask = cache.update(self.layer, k, v)
        if select is not None:
            # Causal, as seen from these positions. (Never while decoding: here k has the T columns of x.)
            q = take(q, select[:, None])
            columns = torch.arange(T, device=x.device)
            mask = columns <= select[:, None, :, None]  # (B, 1, R, T)

        attended = fast.attend(q, k, v, mask)  # F.scaled_dot_product_attention
        return self.dense(attended.transpose(1, 2).flatten(2))


def take(x, positions):
    """The vectors of x (.., T, E) at `positions` (.., R): (.., R, E)."""
    # (take_along_dim says it shorter, but torch 2.13 would compile it anew for each length.)
    index = positions[..., None].expand(*x.shape[:-2], -1, x.shape[-1])
    return x.gather(-2, index)


def rotate(x, cos, sin):
    """RoPE on the first `rot` of E dims (arXiv:2104.09864, NeoX half style): x (.., T, E); cos, sin (.., T, rot)."""
    rot = cos.shape[-1]
    head = x[..., :rot]
    rest = x[..., rot:]
    first, second = head.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.cat((head * cos + turned * sin, rest), dim=-1)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gelu = config.gelu  # none: exact, by erf; tanh: gpt-neox-20b's approximation
        self.dense_h_to_4h = Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate=self.gelu))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.parallel = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, h, cos, sin, cache=None, select=None):
        attended = self.attention(self.input_layernorm(h), cos, sin, cache, select)
        if select is not None:
            h = take(h, select)
        # In parallel, both branches read the same h.
        read = h if self.parallel else h + attended
        return h + attended + self.mlp(self.post_attention_layernorm(read))


class Body(nn.Module):
    """Embedding, blocks, final LayerNorm: ids (B, T) -> hidden states (B, T, D), or (B, R, D) at `select`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # (`init_weights` draws it. nn.Embedding would do so, too, on "meta" by PyTorch's compiler, a second's import.)
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_in = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.checkpointing = False  # keep only the blocks' inputs for the backward pass, and compute the rest again

    def forward(self, ids, select=None, cache=None):
        T = ids.shape[1]
        if cache is None:
            length = T
            positions = torch.arange(T, device=ids.device)
        else:
            length = len(cache.columns)  # all that it will ever hold, query and response
            positions = cache.positions  # (T,); decoding: (B, 1, 1), for row, head, token
        limit = self.config.max_position_embeddings
        require(length <= limit, f"a sequence of {length} tokens is longer than the model's {limit}; shorten the rows")

        h = self.embed_in(ids)
        cos, sin = self.rope(positions, h.dtype)
        # If few positions are asked for (half is a guess), the last block need not compute the others.
        early = select is not None and 2 * select.shape[1] < T
        for layer in self.layers:
            is_last = layer is self.layers[-1]
            h = self.run_block(layer, h, cos, sin, cache, select if early and is_last else None)
        if select is not None and not early:
            h = take(h, select)
        return self.final_layer_norm(h)

    def run_block(self, block, *inputs):
        # Dropout is off everywhere, so there is no state of a random generator to preserve.
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def rope(self, positions, dtype):
        """Positions (..., T) -> cos, sin (..., T, rot), computed in float32 and then cast."""
        rot = self.config.rotary_dims
        exponent = torch.arange(0, rot, 2, device=positions.device).float() / rot
        angles = positions[..., None].float() * self.config.rotary_emb_base**-exponent
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class Pretrained(nn.Module):
    """What both models share: a body named `gpt_neox`, loading and saving."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gpt_neox = Body(config)

    @classmethod
    def from_pretrained(cls, source, revision="main", dtype=torch.float32):
        """Load from a hub id (or id@revision) or a directory (single or sharded safetensors) onto the CPU as `dtype`.

        This is for notebooks; stages load by distributed.sharding.load_model.
        Raises UserError if a tensor is missing, unexpected, mis-shaped or not finite, or a file is unreadable.
        """
        directory = find_model(source, revision)
        # On "meta" no memory and no random numbers are spent on weights about to be read.
        with torch.device("meta"):
            model = cls(GPTNeoXConfig.from_directory(directory)).to(dtype)
        with explain(f"{directory}: no room for what config.json asks for", RuntimeError):
            model.to_empty(device="cpu")
        load_weights(model, directory)
        return model

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors as transformers reads them.

        With sharded parameters every rank must call this: one tensor at a time is gathered, and rank 0 writes it.
        """
        state = self.state_dict()
        path = os.devnull  # the others only help to gather
        if not dist.is_initialized() or dist.get_rank() == 0:
            os.makedirs(directory, exist_ok=True)
            path = os.path.join(directory, "model.safetensors")
            dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
            values = dict(architectures=[self.architecture], torch_dtype=dtype, **FIXED, **asdict(self.config))
            write_json(os.path.join(directory, "config.json"), values)
        write_safetensors(path, state)


class GPTNeoX(Pretrained):
    """The language model: forward(ids (B, T), select=None (B, R)) -> logits (B, R or T, V)."""

    architecture = "GPTNeoXForCausalLM"
    float32_modules = ()  # what sharding keeps in float32
    logits_chunk = 0  # positions whose logits are there at a time, and are computed again in the backward pass; 0: all

    def __init__(self, config):
        super().__init__(config)
        self.embed_out = Linear(config.hidden_size, config.vocab_size, bias=False)
        init_weights(self)

    def forward(self, ids, select=None, cache=None):
        return self.embed_out(self.gpt_neox(ids, select, cache))

    def logprobs(self, ids, select, targets, temperature=1.0, n_vocab=None, with_entropy=False, at_a_time=None):
        """`token_logprobs` of `targets` (B, R) at the positions `select` (B, R): (B, R).

        with_entropy: (2, B, R), the entropy second. at_a_time: see fast.token_logprobs.
        """

        def head(h, targets):
            logits = self.embed_out(h)
            return fast.token_logprobs(logits, targets, temperature, n_vocab, with_entropy, at_a_time)

        h = self.gpt_neox(ids, select)
        if not self.logits_chunk:
            return head(h, targets)

        # Only a chunk's logits are there at a time; the backward pass computes them again.
        pieces = []
        for start in range(0, targets.shape[1], self.logits_chunk):
            columns = slice(start, start + self.logits_chunk)
            piece = (h[:, columns], targets[:, columns])
            pieces.append(checkpoint(head, *piece, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(pieces, -1)


class ScalarHead(nn.Linear):
    def forward(self, h):
        return super().forward(h)[..., 0].float().clone()  # FSDP's hooks warn of outputs that are views


class ScalarModel(Pretrained):
    """A reward model or a critic: forward(ids (B, T), select=None (B, R)) -> scalars (B, R or T).

    The head reads the hidden state after the final LayerNorm (arXiv:2403.17031 details 11 and 12). The
    reward normalisation is folded into its bias (and weight, if a deviation is set): nothing is stored beside them.
    """

    architecture = "GPTNeoXScalarModel"  # not transformers' sequence classifier, whose head would drop the bias
    float32_modules = ("score",)  # a reward near 5 would be rounded to steps of 0.03 in bfloat16

    def __init__(self, config):
        super().__init__(config)
        self.score = ScalarHead(config.hidden_size, 1)
        init_weights(self)

    def forward(self, ids, select=None):
        return self.score(self.gpt_neox(ids, select))


def token_logprobs(logits, tokens, temperature=1.0, n_vocab=None, with_entropy=False):
    """Log-probabilities (B, R) in float32 of `tokens` (B, R) under softmax(logits (B, R, V) / temperature).

    n_vocab: the ids from there on are padding rows of the vocabulary that no text uses, and have no probability.
    with_entropy: return (2, B, R), with the entropy of that distribution in nats as the second.
    This is the definition, to read and to test by; training takes `fast.token_logprobs`, the same in less memory.
    """
    log_p = (logits[..., :n_vocab].float() / temperature).log_softmax(-1)
    logprobs = log_p.gather(-1, tokens[..., None])[..., 0]
    if not with_entropy:
        return logprobs

    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.stack((logprobs, entropy))


@torch.no_grad()
def init_weights(model, seed=None, only=""):
    """Random weights: N(0, initializer_range), biases 0, LayerNorm 1; the reward head N(0, 1 / sqrt(D + 1)).

    seed: None draws from torch's global generator. With a number each tensor has a generator of its own, so
          that all shardings give the same model. only: a name prefix, for a new head on a trained body.
    Nothing happens to parameters on "meta", which are about to be read from a file.
    """
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.is_meta or not name.startswith(only):
            continue

        if name.endswith("bias"):
            value = torch.zeros(parameter.shape)
        elif "norm" in name:
            value = torch.ones(parameter.shape)
        else:
            generator = None
            if seed is not None:
                # Each tensor's own, so that a rank that holds a part of it draws the same.
                generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
            std = model.config.initializer_range
            if "score" in name:
                std = 1 / math.sqrt(model.config.hidden_size + 1)
            value = torch.randn(parameter.shape, generator=generator) * std
        copy_rows(parameter, value)  # this rank's part of it
