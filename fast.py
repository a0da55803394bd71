"""The same numbers as the plain way in model.py, sooner and in less memory.

    token_logprobs    a few rows at a time; the backward pass turns the logits into their gradient, in place
    Linear            oneDNN for products in float32 on a CPU that need no gradient
    attend            two products where PyTorch's kernel is slow: bfloat16 on a CPU
"""

import torch
import torch.nn.functional as F
from torch import nn

ONEDNN = torch.backends.mkldnn.is_available()
AT_A_TIME = {"cpu": 2**20}  # logits that a loss looks at, at a time: on a CPU what fits its cache; elsewhere 2**24


class Linear(nn.Linear):
    """nn.Linear. In float32 on a CPU, without gradients, oneDNN does it: for few rows MKL takes up to twice as long."""

    def forward(self, x):
        plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if ONEDNN and plain and x.is_cpu and x.dtype == torch.float32:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


def attend(q, k, v, mask):
    """Attention of q (B, H, R, E) to k, v (B, H, T, E) where `mask` (B, 1, R or 1, T) is True; None: causal, R = T."""
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    # There two products take a third of that kernel's time.
    if mask is None:
        mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def token_logprobs(logits, tokens, temperature=1.0, n_vocab=None, with_entropy=False):
    """`model.token_logprobs`; logits (B, R, V), tokens (B, R).

    The backward pass uses the logits up: what stands there after it is their gradient, and a graph that still needs
    them raises an error.
    """
    made_here = logits if logits._base is None else logits._base
    if logits.requires_grad and made_here.is_leaf:
        logits = logits.clone()  # what no model has made is not ours to use up
    if n_vocab is None:
        n_vocab = logits.shape[-1]
    both = TokenLogprobs.apply(logits.flatten(0, -2), tokens.flatten(), temperature, n_vocab, with_entropy)
    both = both.view(2, *tokens.shape)
    # FSDP's hooks warn of outputs that are views.
    return both.clone() if with_entropy else both[0].clone()


class TokenLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies (2, N) of logits (N, V) and tokens (N,), in float32. What stands between logits
    and result stays in the cache.
    """

    @staticmethod
    def forward(ctx, logits, tokens, temperature, n_vocab, with_entropy):
        logprobs, entropy = torch.zeros(2, len(tokens), device=tokens.device)
        for rows, scores in few_rows(logits, temperature, n_vocab):
            log_p = scores.log_softmax(-1)
            logprobs[rows] = log_p.gather(-1, tokens[rows, None])[:, 0]
            if with_entropy:
                entropy[rows] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(logits, tokens, entropy)
        ctx.temperature = temperature
        ctx.n_vocab = n_vocab
        ctx.with_entropy = with_entropy
        return torch.stack((logprobs, entropy))

    @staticmethod
    def backward(ctx, grads):
        logits, tokens, entropy = ctx.saved_tensors
        for rows, scores in few_rows(logits, ctx.temperature, ctx.n_vocab):
            grad_logprob, grad_entropy = grads[:, rows, None] / ctx.temperature
            # d log p(token) / d score = (1 if it is that token) - p
            weight = -grad_logprob
            if ctx.with_entropy:
                # d entropy / d score = -p (log p + entropy)
                weight = weight - grad_entropy * (scores.log_softmax(-1) + entropy[rows, None])
            gradient = scores.softmax(-1).mul_(weight).scatter_add_(1, tokens[rows, None], grad_logprob)
            logits[rows, : ctx.n_vocab] = gradient
            logits[rows, ctx.n_vocab :] = 0
        return logits, None, None, None, None


def few_rows(logits, temperature, n_vocab):
    """A few rows of logits (N, V) at a time: their slice, and logits / temperature in float32."""
    n = 1 + AT_A_TIME.get(logits.device.type, 2**24) // logits.shape[1]
    for start in range(0, len(logits), n):
        rows = slice(start, start + n)
        scores = logits[rows, :n_vocab].float()
        if temperature != 1:
            scores = scores / temperature
        yield rows, scores
