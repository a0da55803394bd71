"""The same numbers as the plain way, up to rounding, sooner and in less memory. (Plain: in model.py, or said there.)

    invert_cdf        the sums of blocks of ids, then those in one block
    token_logprobs    a few rows at a time; the backward pass turns the logits into their gradient, in place
    Linear            oneDNN for products in float32 on a CPU that need no gradient
    attend            two products where PyTorch's kernel is slow: bfloat16 on a CPU
"""

import torch
import torch.nn.functional as F
from torch import nn

ONEDNN = torch.backends.mkldnn.is_available()
BLOCK = 256  # ids whose probabilities are added up first
CHUNK = {"cpu": 2**20, "cuda": 2**24}  # logits that are looked at together: on a CPU what fits its cache


class Linear(nn.Linear):
    """nn.Linear. In float32 on a CPU, without gradients, oneDNN does it: for few rows MKL takes up to twice as long."""

    def forward(self, x):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        if ONEDNN and x.is_cpu and x.dtype == torch.float32:
            # The product, with no function after it.
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


def attend(q, k, v, mask):
    """Attention of q (B, H, R, E) to k, v (B, H, T, E) where `mask` (B, 1, R or 1, T) is True; None: causal, R = T."""
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        is_causal = mask is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)

    # There two products take a third of that kernel's time.
    R, E = q.shape[2:]
    T = k.shape[2]
    if mask is None:
        everywhere = torch.ones(R, T, dtype=torch.bool)
        mask = everywhere.tril()

    scores = (q * E**-0.5) @ k.transpose(2, 3)
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    return weights @ v


def invert_cdf(probs, uniforms):
    """The ids (B, 1) at which the sum of probs (B, V) from the left passes `uniforms` (B, 1).

    The plain way is `find_column(probs, uniforms)`. But a running sum over 50,000 ids is slow: this one runs over 200
    blocks, and then over the 256 ids of a block.
    """
    B, V = probs.shape
    missing = -V % BLOCK
    blocks = F.pad(probs, (0, missing)).view(B, -1, BLOCK)
    masses = blocks.sum(-1, dtype=torch.float64)  # (B, blocks)
    # Up to rounding they add up to 1: scaled by their sum, every draw is inside.
    total = masses.sum(-1, keepdim=True)
    draws = uniforms * total
    block, left = find_column(masses, draws)

    rows = torch.arange(B, device=probs.device)
    inside = blocks[rows, block[:, 0]]  # (B, BLOCK)
    index, _ = find_column(inside, left)
    return block * BLOCK + index


def find_column(probs, draws):
    """The columns (B, 1) of probs (B, N) where their sum from the left passes the draws (B, 1); and the draws (B, 1)
    less the sum of the columns before.
    """
    # In float32 thousands of unlikely ids would add nothing to the sum, and never be drawn.
    cdf = probs.double().cumsum(-1)
    # `right`, and the last column, skip what has no probability at all.
    column = torch.searchsorted(cdf, draws, right=True)
    end = cdf[:, -1:]
    last = (cdf < end).sum(-1, keepdim=True)
    column = column.minimum(last)

    reached = cdf.gather(1, column)
    before = reached - probs.gather(1, column)
    left = (draws - before).clamp(min=0)
    return column, left


def token_logprobs(logits, tokens, temperature=1.0, n_vocab=None, with_entropy=False, at_a_time=None):
    """`model.token_logprobs` of logits (B, R, V) and tokens (B, R), looking at so many logits at a time.

    The backward pass uses the logits up: what stands there after it is their gradient, and a graph that still needs
    them raises an error.
    """
    V = logits.shape[-1]
    # A leaf, or a view of one, is the caller's own and must not be overwritten.
    owner = logits
    if logits._base is not None:
        owner = logits._base
    if logits.requires_grad and owner.is_leaf:
        logits = logits.clone()

    if at_a_time is None:
        at_a_time = CHUNK.get(logits.device.type, CHUNK["cuda"])
    n_rows = 1 + at_a_time // V
    flat = logits.flatten(0, -2)
    both = TokenLogprobs.apply(flat, tokens.flatten(), temperature, n_vocab or V, n_rows, with_entropy)
    both = both.view(2, *tokens.shape)
    # FSDP's hooks warn of outputs that are views.
    if with_entropy:
        return both.clone()
    return both[0].clone()


class TokenLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies (2, N) of logits (N, V) and tokens (N,), in float32.

    It takes a few rows at a time: what stands between logits and result stays in the cache.
    """

    @staticmethod
    def forward(ctx, logits, tokens, temperature, n_vocab, n_rows, with_entropy):
        # One piece of memory: two leave a hole that breaks up the heap, and a CPU's peak grows by a set of logits.
        logprobs, entropy = torch.zeros(2, len(tokens), device=tokens.device)
        for rows, scores in few_rows(logits, temperature, n_vocab, n_rows):
            log_p = scores.log_softmax(-1)
            chosen = log_p.gather(-1, tokens[rows, None])
            logprobs[rows] = chosen[:, 0]
            if with_entropy:
                entropy[rows] = -(log_p.exp() * log_p).sum(-1)

        ctx.save_for_backward(logits, tokens, entropy)
        ctx.options = (temperature, n_vocab, n_rows)
        ctx.with_entropy = with_entropy
        return torch.stack((logprobs, entropy))

    @staticmethod
    def backward(ctx, grads):
        logits, tokens, entropy = ctx.saved_tensors
        temperature, n_vocab, n_rows = ctx.options
        for rows, scores in few_rows(logits, temperature, n_vocab, n_rows):
            grad_logprob, grad_entropy = grads[:, rows, None] / temperature
            # d log p(token) / d score = (1 if it is that token) - p
            weight = -grad_logprob
            if ctx.with_entropy:
                # d entropy / d score = -p (log p + entropy)
                log_p = scores.log_softmax(-1)
                weight = weight - grad_entropy * (log_p + entropy[rows, None])
            gradient = scores.softmax(-1).mul_(weight)
            gradient.scatter_add_(1, tokens[rows, None], grad_logprob)
            # The logits have served: their gradient takes their place.
            logits[rows, :n_vocab] = gradient
            logits[rows, n_vocab:] = 0
        return logits, None, None, None, None, None


def few_rows(logits, temperature, n_vocab, n_rows):
    """n_rows rows of logits (N, V) at a time: their slice, and logits / temperature in float32."""
    for start in range(0, len(logits), n_rows):
        rows = slice(start, start + n_rows)
        scores = logits[rows, :n_vocab].float()
        if temperature != 1:
            scores = scores / temperature
        yield rows, scores
