"""GPT-NeoX, the architecture of Pythia, with its weights in the hub's own layout.

    model = GPTNeoX.from_pretrained("EleutherAI/pythia-160m")     # a hub id, or a directory
    logits = model(ids)                                           # (B, T) -> (B, T, V)

The modules carry the hub's names, so `state_dict()` *is* the content of model.safetensors.

Shapes: B batch, T sequence, Q query, R response, V vocabulary, D width, H heads, E = D / H head width.

Every batch is padded on the right. A causal row never looks to its right, so a full pass needs no mask,
and what stands in a pad column cannot reach a real one. RoPE makes attention depend on distances only,
so this is the same function as left padding.
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from configurator import Count, UserError, check, explain, require

# Masks and rotary tables that old Pythia files carry along; they hold nothing that was learned.
BUFFERS = re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)")
# what config.json may say of what is not a choice here
FIXED = dict(model_type="gpt_neox", hidden_act="gelu", attention_bias=True, tie_word_embeddings=False)

ONEDNN = torch.backends.mkldnn.is_available()
PREFILL_ROWS = {"cpu": 4, "cuda": 64}  # queries that generation reads at a time
AT_A_TIME = {"cpu": 2**20, "cuda": 2**24}  # logits that a loss looks at, at a time: on a CPU what fits its cache


@dataclass
class GPTNeoXConfig:
    """The fields of the hub's config.json that shape the computation; the defaults are Pythia-14m's."""

    vocab_size: Count = 50304
    hidden_size: Count = 128
    num_hidden_layers: Count = 6
    num_attention_heads: Count = 4
    intermediate_size: int = 0  # 0: four times hidden_size
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10000.0
    max_position_embeddings: Count = 2048
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_parallel_residual: bool = True
    eos_token_id: int = 0

    def __post_init__(self):
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.rotary_dims = int(self.hidden_size // self.num_attention_heads * self.rotary_pct)
        fits = self.hidden_size % self.num_attention_heads == 0 and self.rotary_dims % 2 == 0 and self.rotary_pct <= 1
        sane = max(self.vocab_size, self.hidden_size, self.intermediate_size) < 10**7 and self.num_hidden_layers < 1000
        require(fits and sane, f"sizes that do not fit together (heads, rotary dims) or are too large: {self}")

    @classmethod
    def from_directory(cls, directory):
        """Read `directory`/config.json; keys that do not shape the computation are ignored."""
        path = os.path.join(directory, "config.json")
        values = read_json(path)
        for name, value in FIXED.items():
            found = values.get(name, value)
            require(found == value, f"{path}: {name} = {found!r} is not supported, only {value!r}")
        # transformers 5 writes the rotary fields under other names
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        plain = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) == "default"
        require(plain, f"{path}: rope scaling {rope!r} is not supported; use a model without it")
        renamed = dict(partial_rotary_factor="rotary_pct", rope_theta="rotary_emb_base")
        values |= {renamed[name]: value for name, value in rope.items() if name in renamed}
        with explain(path, UserError):
            return cls(**{f.name: check(f, values[f.name]) for f in fields(cls) if values.get(f.name) is not None})


# ---------------------------------------------------------------------------- the network


class KVCache:
    """Keys and values of a batch of right-padded queries (B, Q) and of the response tokens behind them.

    Column c < Q holds query token c, column Q + t response token t, in every row. A short row's pad columns
    are never attended to: `mask` (B, columns) is True where a column counts. A response token's *position*
    is its row's own (query length + t), so the gap in the columns leaves no gap in RoPE.

    No shape changes from token to token, and what does change are tensors: a decoding step can be captured.
    """

    def __init__(self, query_lens, width, n_columns):
        self.columns = columns = torch.arange(n_columns, device=query_lens.device)
        self.layers = {}  # layer -> keys and values (2, B, H, columns, E), made at the layer's first tokens
        self.mask, self.query_lens, self.width = columns < query_lens[:, None], query_lens, width
        self.last = columns[:1] + width - 1  # (1,): the last column that is written

    def prefill(self, rows, length):
        """The next pass is over the first `length` columns of the queries `rows`; it attends to itself, causally."""
        self.rows, self.positions = rows, self.columns[:length]
        return self

    def decode(self):
        """The next pass is over one token of every row."""
        self.last += 1
        self.mask.index_fill_(1, self.last, True)
        self.rows, self.positions = None, (self.query_lens + self.last - self.width)[:, None, None]  # (B, 1, T = 1)
        return self

    def update(self, layer, k, v):
        """Store k, v (B, H, T, E) of the tokens now fed; return the keys, values and mask to attend to."""
        if layer not in self.layers:  # zeros, for what is masked must be finite
            self.layers[layer] = k.new_zeros(2, len(self.mask), k.shape[1], self.mask.shape[1], k.shape[3])
        keys, values = self.layers[layer]
        if self.rows is not None:
            keys[self.rows, :, : k.shape[2]], values[self.rows, :, : k.shape[2]] = k, v
            return k, v, None
        return keys.index_copy_(2, self.last, k), values.index_copy_(2, self.last, v), self.mask[:, None, None]


class Linear(nn.Linear):
    """nn.Linear. In float32 on a CPU, without gradients, oneDNN does it: for few rows MKL takes up to twice as long."""

    def forward(self, x):
        plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if ONEDNN and plain and x.is_cpu and x.dtype == torch.float32:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_heads = layer, config.num_attention_heads
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin, cache, select):
        B, T, D = x.shape
        # q, k and v of one head lie side by side, head after head
        qkv = self.query_key_value(x).view(B, T, self.n_heads, 3, D // self.n_heads).permute(3, 0, 2, 1, 4)
        (q, k), v = rotate(qkv[:2], cos, sin), qkv[2]  # (B, H, T, E) each
        k, v, mask = (k, v, None) if cache is None else cache.update(self.layer, k, v)
        if select is not None:  # causal, as seen from these positions
            q = take(q, select[:, None])
            mask = torch.arange(T, device=x.device) <= select[:, None, :, None]  # (B, 1, R, T)
        return self.dense(attend(q, k, v, mask).transpose(1, 2).flatten(2))


def attend(q, k, v, mask):
    """Attention of q (B, H, R, E) to k, v (B, H, T, E) where `mask` (B, 1, R or 1, T) is True; None: causal, R = T."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":  # there two products take a third of SDPA's time
        mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if mask is None else mask
        scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def take(x, index):
    """The vectors of x (.., T, E) at `index` (.., R): (.., R, E)."""
    return x.gather(-2, index[..., None].expand(*x.shape[:-2], -1, x.shape[-1]))


def rotate(x, cos, sin):
    """RoPE on the first `rot` of E dims (arXiv:2104.09864, NeoX half style): x (.., T, E); cos, sin (.., T, rot)."""
    rot = cos.shape[-1]
    head, rest = x[..., :rot], x[..., rot:]
    a, b = head.chunk(2, dim=-1)
    return torch.cat((head * cos + torch.cat((-b, a), dim=-1) * sin, rest), dim=-1)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))  # the exact (erf) GELU


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
        h = h if select is None else take(h, select)
        # in parallel, both branches read the same h
        return h + attended + self.mlp(self.post_attention_layernorm(h if self.parallel else h + attended))


class Body(nn.Module):
    """Embedding, blocks, final LayerNorm: ids (B, T) -> hidden states (B, T, D), or (B, R, D) at `select`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.checkpointing = False  # keep only the blocks' inputs for the backward pass, and compute the rest again

    def forward(self, ids, select=None, cache=None):
        length, limit = ids.shape[1] if cache is None else cache.mask.shape[1], self.config.max_position_embeddings
        require(length <= limit, f"a sequence of {length} tokens is longer than the model's {limit}; shorten the rows")
        h = self.embed_in(ids)
        positions = torch.arange(ids.shape[1], device=ids.device) if cache is None else cache.positions  # (.., T)
        cos, sin = self.rope(positions, h.dtype)
        # if few positions are asked for, the last block need not compute the others' attention and MLP
        early = select is not None and 2 * select.shape[1] < ids.shape[1]
        again = self.checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            inputs = (h, cos, sin, cache, select if early and layer is self.layers[-1] else None)
            h = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False) if again else layer(*inputs)
        return self.final_layer_norm(h if early or select is None else take(h, select))

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
        """Load from a hub id or a directory (single or sharded safetensors) onto the CPU as `dtype`.

        Raises UserError if a tensor is missing, unexpected, mis-shaped or not finite, or a file is unreadable.
        """
        directory = find_model(source, revision)
        with torch.device("meta"):  # no memory and no random numbers spent on weights about to be read
            model = cls(GPTNeoXConfig.from_directory(directory)).to(dtype)
        with explain(f"{directory}: no room for what config.json asks for", RuntimeError):
            model.to_empty(device="cpu")
        load_weights(model, directory)
        return model

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors as transformers reads them.

        With sharded parameters every rank must call this: one tensor at a time is gathered, and rank 0 writes it.
        """
        state, path = self.state_dict(), os.devnull
        if not dist.is_initialized() or dist.get_rank() == 0:
            os.makedirs(directory, exist_ok=True)
            dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
            meta = dict(architectures=[self.architecture], torch_dtype=dtype)
            write_json(os.path.join(directory, "config.json"), {**meta, **FIXED, **asdict(self.config)})
            path = os.path.join(directory, "model.safetensors")
        write_safetensors(path, state)


class GPTNeoX(Pretrained):
    """The language model: forward(ids (B, T), select=None (B, R)) -> logits (B, R or T, V)."""

    architecture = "GPTNeoXForCausalLM"
    float32_modules = ()
    logits_chunk = 0  # positions whose logits are there at a time, and are computed again in the backward pass; 0: all

    def __init__(self, config):
        super().__init__(config)
        self.embed_out = Linear(config.hidden_size, config.vocab_size, bias=False)
        init_weights(self)

    def forward(self, ids, select=None, cache=None):
        return self.embed_out(self.gpt_neox(ids, select, cache))

    def logprobs(self, ids, select, targets, *options):
        """`token_logprobs` (B, R) of `targets` (B, R) at the positions `select` (B, R); options go there."""

        def head(h, targets):
            return token_logprobs(self.embed_out(h), targets, *options)

        h = self.gpt_neox(ids, select)
        if not self.logits_chunk:
            return head(h, targets)
        pieces = zip(h.split(self.logits_chunk, 1), targets.split(self.logits_chunk, 1))
        pieces = [checkpoint(head, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        return torch.cat(pieces, -1)


class ScalarHead(nn.Linear):
    def forward(self, h):
        return super().forward(h)[..., 0].float().clone()  # FSDP's hooks warn of outputs that are views


class ScalarModel(Pretrained):
    """A reward model or a critic: forward(ids (B, T), select=None (B, R)) -> scalars (B, R or T).

    The head reads the hidden state after the final LayerNorm (arXiv:2403.17031 details 11 and 12). Its bias
    also carries the reward normalisation, so that nothing lives outside the tensors.
    """

    architecture = "GPTNeoXScalarModel"  # not transformers' sequence classifier, whose head would drop the bias
    float32_modules = ("score",)  # near 5, neighbouring bfloat16 numbers are 0.03 apart

    def __init__(self, config):
        super().__init__(config)
        self.score = ScalarHead(config.hidden_size, 1)
        init_weights(self)

    def forward(self, ids, select=None):
        return self.score(self.gpt_neox(ids, select))


@torch.no_grad()
def init_weights(model, seed=None, only=""):
    """Random weights: N(0, initializer_range), biases 0, LayerNorm 1; the reward head N(0, 1 / sqrt(D + 1)).

    seed: None draws from torch's global generator. With a number each tensor has a generator of its own, so
          that all shardings give the same model. only: a name prefix, for a new head on a trained body.
    """
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.is_meta or not name.startswith(only):
            continue
        generator = None if seed is None else torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
        std = 1 / math.sqrt(model.config.hidden_size + 1) if "score" in name else model.config.initializer_range
        constant = float(name.endswith("norm.weight")) if name.endswith("bias") or "norm" in name else None
        value = torch.randn(parameter.shape, generator=generator) * std if constant is None else constant
        copy_rows(parameter, torch.as_tensor(value).expand(parameter.shape))


# ---------------------------------------------------------------------------- files


def write_safetensors(path, tensors):
    """Write float tensors tensor by tensor, so that no two sharded ones are ever whole at a time.

    The format: the header's length in 8 bytes; the header, JSON, padded to a multiple of 8; the values.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        start, end = end, end + x.numel() * x.element_size()
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[x.dtype]
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(full(x).cpu().contiguous().view(-1).view(torch.uint8).numpy())


def find_model(source, revision="main", patterns=("*.json", "*.safetensors")):
    """A directory as it is; anything else is a hub id, whose files that fit `patterns` are fetched."""
    if os.path.isdir(source):
        return source
    with explain(f"model {source!r}: no directory (is that stage trained?), nor to be had from the hub", Exception):
        return snapshot_download(source, revision=revision, allow_patterns=list(patterns))


def weight_files(directory):
    """Map each stored tensor's name to its file: by the index if there is one, else all of model.safetensors."""
    index = os.path.join(directory, "model.safetensors.index.json")
    if os.path.exists(index):
        with explain(f"{index}: no weight_map; download it again", LookupError, TypeError, AttributeError):
            names = read_json(index)["weight_map"].items()
            return {name: os.path.join(directory, os.path.basename(file)) for name, file in names}
    single = os.path.join(directory, "model.safetensors")
    return dict.fromkeys(open_weights(single).keys(), single)


def open_weights(path):
    with explain(f"{path}: cannot be read as safetensors; copy it again", OSError, ValueError, SafetensorError):
        return safe_open(path, framework="pt")


@torch.no_grad()
def load_weights(model, directory, new_head=False):
    """Fill `model` from `directory`; a sharded parameter reads only its own rows from the file.

    new_head: take the body alone, from a model of either kind, and leave the head as it is.
    """
    part = "gpt_neox." if new_head else ""
    files = {name: path for name, path in weight_files(directory).items() if name.startswith(part)}
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(part)}
    found = {name for name in files if not BUFFERS.fullmatch(name)}
    for problem, names in (("missing", state.keys() - found), ("unexpected", found - state.keys())):
        some = f"{', '.join(sorted(names)[:4])} ({len(names)} in all)"
        require(not names, f"{directory}: {problem} {some}, for a {model.architecture}; is it another model?")
    handles = {path: open_weights(path) for path in set(files.values())}
    for name, tensor in state.items():
        path = files[name]
        with explain(f"{path}: has no tensor {name}; the index does not fit its files", SafetensorError):
            stored = handles[path].get_slice(name)
            shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
        fits, wanted = shape == tensor.shape and dtype in ("F16", "BF16", "F32"), tuple(tensor.shape)
        require(fits, f"{path}: {name} is {dtype} of shape {shape}, but config.json asks for floats of shape {wanted}")
        require(copy_rows(tensor, stored).isfinite().all(), f"{path}: {name} is not finite everywhere; copy it again")


def copy_rows(tensor, source):
    """Copy into `tensor`, or into this rank's shard of it, its rows of the full `source`; return what it holds."""
    start, local = 0, tensor
    if isinstance(tensor, DTensor):
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        start, local = offset[0], tensor.to_local()
    if local.numel():
        local.copy_(source[start : start + len(local)])
    return local


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def read_json(path):
    """Read a JSON object; raises UserError if `path` is missing or holds something else."""
    with explain(f"{path}: cannot be read as JSON; check it or copy it again", OSError, ValueError, RecursionError):
        values = json.loads(Path(path).read_bytes())
    require(isinstance(values, dict), f"{path}: holds a {type(values).__name__}, not a JSON object; copy it again")
    return values


def write_json(path, values):
    """Write a JSON object; a process that is killed meanwhile leaves the old file, whole."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


# ---------------------------------------------------------------------------- probabilities and generation


class TokenLogprobs(torch.autograd.Function):
    """See `token_logprobs`; logits (N, V), tokens (N,). It takes a few rows at a time, in float32: what stands between
    logits and result stays in the cache, and the backward pass turns the logits into their gradient, in place.
    """

    @staticmethod
    def forward(ctx, logits, tokens, temperature, n_vocab, with_entropy):
        logprobs, entropy = torch.zeros(2, len(tokens), device=tokens.device)
        for i, scores in few_rows(logits, temperature, n_vocab):
            log_p = scores.log_softmax(-1)
            logprobs[i] = log_p.gather(-1, tokens[i, None])[:, 0]
            if with_entropy:
                entropy[i] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(logits, tokens, entropy)
        ctx.options = temperature, n_vocab, with_entropy
        return torch.stack((logprobs, entropy))

    @staticmethod
    def backward(ctx, grads):
        (logits, tokens, entropy), (temperature, n_vocab, with_entropy) = ctx.saved_tensors, ctx.options
        for i, scores in few_rows(logits, temperature, n_vocab):
            grad, grad_entropy = grads[:, i, None] / temperature
            weight = -grad  # d log p(token) / d score = 1 if it is that token - p
            if with_entropy:  # d entropy / d score = -p (log p + entropy)
                weight = weight - grad_entropy * (scores.log_softmax(-1) + entropy[i, None])
            logits[i, :n_vocab] = scores.softmax(-1).mul_(weight).scatter_add_(1, tokens[i, None], grad)
            logits[i, n_vocab:] = 0
        return logits, None, None, None, None


def few_rows(logits, temperature, n_vocab):
    """A few rows of logits (N, V) at a time: their slice, and logits / temperature in float32."""
    n = 1 + AT_A_TIME.get(logits.device.type, 2**24) // logits.shape[1]
    for rows in (slice(start, start + n) for start in range(0, len(logits), n)):
        scores = logits[rows, :n_vocab].float()
        yield rows, scores if temperature == 1 else scores / temperature


def token_logprobs(logits, tokens, temperature=1.0, n_vocab=None, with_entropy=False):
    """Log-probabilities (B, R) in float32 of `tokens` (B, R) under softmax(logits (B, R, V) / temperature).

    n_vocab: the ids from there on are padding rows of the vocabulary that no text uses, and have no probability.
    with_entropy: return (2, B, R), with the entropy of that distribution in nats as the second.
    The backward pass uses the logits up: what stands there after it is their gradient, and a graph that still needs
    them raises an error.
    """
    if logits.requires_grad and (logits if logits._base is None else logits._base).is_leaf:
        logits = logits.clone()  # what no model has made is not ours to use up
    options = temperature, n_vocab or logits.shape[-1], with_entropy
    both = TokenLogprobs.apply(logits.flatten(0, -2), tokens.flatten(), *options).view(2, *tokens.shape)
    return (both if with_entropy else both[0]).clone()  # FSDP's hooks warn of outputs that are views


def sample_token(logits, temperature, uniforms, n_vocab=None):
    """Draw a token for each row of logits (B, V) by inverting the CDF at `uniforms` (B,); temperature 0: the argmax.

    Returns tokens (B,) and their log-probabilities (B,) at that temperature (at 1 if it is 0).
    """
    probs = F.softmax(logits[:, :n_vocab].float() / (temperature or 1.0), dim=-1)  # (B, V)
    if temperature == 0:
        tokens = logits[:, :n_vocab].argmax(-1)
    else:
        cdf = probs.cumsum(-1)
        # up to rounding the CDF ends at 1: scaling by its end keeps every draw inside it. `right` skips ids that
        # have no probability at all.
        ends = (uniforms * cdf[:, -1])[:, None]
        tokens = torch.searchsorted(cdf, ends, right=True)[:, 0].clamp(max=cdf.shape[1] - 1)
    return tokens, probs.gather(1, tokens[:, None])[:, 0].clamp(min=1e-38).log()


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def generate(model, queries, query_lens, max_new_tokens, temperature, uniforms=None, eos_id=None, n_vocab=None,
             return_logprobs=False, all_done=torch.all):  # fmt: skip
    """Continue right-padded queries (B, Q) of lengths query_lens (B,) by max_new_tokens = R tokens: (B, R).

    temperature:     0 is greedy; else one uniform of `uniforms` (B, R) in [0, 1) decides each token.
    eos_id:          if given, a row that has drawn it goes on with it, and the loop ends (soon) after all rows have.
    n_vocab:         ids at or above it are never generated.
    return_logprobs: also return the log-probabilities (B, R) of the tokens as they were drawn (0 after EOS).
    all_done:        a function of done (B,) that ends the loop, if not every row alone is to decide it.
    """
    fits = temperature >= 0 and (temperature == 0 or uniforms is not None) and int(query_lens.min()) > 0
    require(fits, "generate: temperature must not be negative; sampling needs uniforms; no query may be empty")
    order = query_lens.argsort(descending=True)
    width, every = int(query_lens[order[0]]), 16 if queries.is_cuda else 1  # to ask a GPU whether all are done stops it
    is_query = torch.arange(width, device=queries.device) < query_lens[:, None]  # (B, width)
    queries = queries[:, :width].where(is_query, 0)  # a pad id need not be an id of the model
    responses = queries.new_full((len(queries), max_new_tokens), eos_id or 0)
    logprobs = torch.zeros(responses.shape, device=queries.device)
    done = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    cache = KVCache(query_lens, width, width + max_new_tokens)
    # the longest queries first, a group at a time, each cut to the longest of its group
    groups = [(rows, int(query_lens[rows[0]])) for rows in order.split(PREFILL_ROWS.get(queries.device.type, 64))]
    logits = [model(queries[rows, :n], query_lens[rows, None] - 1, cache.prefill(rows, n)) for rows, n in groups]
    logits = torch.cat(logits)[order.argsort()]  # (B, 1, V)
    for t in range(max_new_tokens):
        if t:
            logits = model(responses[:, t - 1 : t], None, cache.decode())
        tokens, logprob = sample_token(logits[:, 0], temperature, None if uniforms is None else uniforms[:, t], n_vocab)
        if eos_id is not None:
            tokens, logprob = tokens.where(~done, eos_id), logprob.where(~done, 0.0)
            done |= tokens == eos_id
        responses[:, t], logprobs[:, t] = tokens, logprob
        if (t + 1) % every == 0 and all_done(done):
            break
    return (responses, logprobs) if return_logprobs else responses
