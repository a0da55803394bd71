"""Sampling with a cache of keys and values: read the queries, then decode one token of every row at a time.

Shapes: B rows, Q query, R response, V vocabulary, H heads, E head width.
"""

import torch
import torch.nn.functional as F

import fast
from configurator import require

PREFILL_ROWS = {"cpu": 4, "cuda": 64}  # queries that are read at a time


class KVCache:
    """Keys and values of a batch of right-padded queries (B, Q) and of the response tokens after them.

    Column c < Q holds query token c, column Q + t response token t, in every row. A short row's pad columns
    are never attended to: `mask` (B, columns) is True where a column counts. A response token's *position*
    is its row's own (query length + t), so the gap in the columns leaves no gap in RoPE.

    No shape changes from token to token, and what does change are tensors, so that a decoding step could become a CUDA
    graph. (None is made here.)
    """

    def __init__(self, query_lens, width, n_columns):
        self.columns = torch.arange(n_columns, device=query_lens.device)
        self.layers = {}  # layer -> keys and values (2, B, H, columns, E), made at the layer's first tokens
        self.mask = self.columns < query_lens[:, None]
        self.query_lens = query_lens
        self.width = width
        self.last = torch.tensor([width - 1], device=query_lens.device)  # the last column that is written
        self.rows = None  # the rows that the next pass reads, if it is a prefill; None: it decodes
        self.positions = None  # of the tokens that are fed next

    def begin_prefill(self, rows, length):
        """The next pass is over the first `length` columns of the queries `rows`; it attends to itself, causally."""
        self.rows = rows
        self.positions = self.columns[:length]

    def begin_decode(self):
        """The next pass is over one token of every row."""
        self.last += 1
        self.mask.index_fill_(1, self.last, True)
        self.rows = None
        self.positions = (self.query_lens + self.last - self.width)[:, None, None]  # (B, 1, 1): row, head, token

    def update(self, layer, k, v):
        """Store k, v (B, H, T, E) of the tokens now fed; return the keys, values and mask to attend to."""
        _, H, T, E = k.shape
        if layer not in self.layers:
            # Zeros, for what is masked must be finite.
            B, n_columns = self.mask.shape
            self.layers[layer] = k.new_zeros(2, B, H, n_columns, E)
        keys, values = self.layers[layer]

        if self.rows is None:
            # A decoding step: one column of every row.
            keys.index_copy_(2, self.last, k)
            values.index_copy_(2, self.last, v)
            return keys, values, self.mask[:, None, None]
        keys[self.rows, :, :T] = k
        values[self.rows, :, :T] = v
        return k, v, None


def prefill(model, queries, query_lens, n_columns, n_rows):
    """Read the queries (B, Q), n_rows at a time; returns the cache, and the logits (B, 1, V) of each row's last token.

    The longest come first, and each group is cut to its own longest.
    """
    order = query_lens.argsort(descending=True)
    cache = KVCache(query_lens, queries.shape[1], n_columns)
    logits = []
    for rows in order.split(n_rows):
        length = int(query_lens[rows[0]])
        last = query_lens[rows, None] - 1
        cache.begin_prefill(rows, length)
        logits.append(model(queries[rows, :length], last, cache))

    logits = torch.cat(logits)  # in the order of the lengths
    return cache, logits[order.argsort()]


def decode_one_token(model, tokens, cache):
    """Feed the tokens (B,) just drawn; returns the logits (B, 1, V) of what follows them."""
    cache.begin_decode()
    return model(tokens[:, None], None, cache)


def sample_token(logits, temperature, uniforms, n_vocab=None):
    """Draw a token for each row of logits (B, V) by inverting the CDF at `uniforms` (B,); temperature 0: the argmax.

    Returns tokens (B,) and their log-probabilities (B,) at that temperature (at 1 if it is 0).
    """
    logits = logits[:, :n_vocab]
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)  # (B, 1)
        probs = F.softmax(logits.float(), dim=-1)  # (B, V)
    else:
        probs = F.softmax(logits.float() / temperature, dim=-1)
        tokens = fast.invert_cdf(probs, uniforms[:, None])
    logprobs = probs.gather(1, tokens).clamp(min=1e-38).log()
    return tokens[:, 0], logprobs[:, 0]


@torch.no_grad()
def generate(
    model, queries, query_lens, max_new_tokens, temperature, uniforms=None,
    eos_id=None, n_vocab=None, return_logprobs=False, all_done=torch.all, prefill_rows=None,
):  # fmt: skip
    """Continue right-padded queries (B, Q) of lengths query_lens (B,) by max_new_tokens = R tokens: (B, R).

    temperature:     0 is greedy; else one uniform of `uniforms` (B, R) in [0, 1) decides each token.
    eos_id:          if given, a row that has drawn it goes on with it, and the loop ends (soon) after all rows have.
    n_vocab:         ids at or above it are never generated.
    return_logprobs: also return the log-probabilities (B, R) of the tokens as they were drawn (0 after EOS).
    all_done:        a function of done (B,) that ends the loop, if not every row alone is to decide it.
    prefill_rows:    queries that are read at a time; it changes speed and memory alone.
    """
    require(temperature >= 0, "generate: temperature must not be negative; 0 is greedy")
    require(temperature == 0 or uniforms is not None, "generate: sampling needs uniforms; or use temperature 0")
    require(int(query_lens.min()) > 0, "generate: no query may be empty")

    device = queries.device
    B = len(queries)
    Q = int(query_lens.max())
    columns = torch.arange(Q, device=device)
    is_query = columns < query_lens[:, None]
    queries = queries[:, :Q].where(is_query, 0)  # a pad id need not be an id of the model
    if uniforms is None:
        uniforms = torch.zeros(B, max_new_tokens, device=device)  # greedy: nothing looks at them
    responses = torch.full((B, max_new_tokens), eos_id or 0, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    ask_every = 16 if queries.is_cuda else 1  # asking whether all are done waits for the GPU
    n_rows = prefill_rows or PREFILL_ROWS.get(device.type, 64)
    cache, logits = prefill(model, queries, query_lens, Q + max_new_tokens, n_rows)

    for t in range(max_new_tokens):
        # 1. Feed the token drawn before.
        if t > 0:
            logits = decode_one_token(model, responses[:, t - 1], cache)
        # 2. Draw the next one.
        tokens, logprob = sample_token(logits[:, 0], temperature, uniforms[:, t], n_vocab)
        # 3. A row that has drawn EOS goes on with it.
        if eos_id is not None:
            tokens = tokens.where(~done, eos_id)
            logprob = logprob.where(~done, 0.0)
            done |= tokens == eos_id
        responses[:, t] = tokens
        logprobs[:, t] = logprob
        # 4. Stop when every row has.
        if (t + 1) % ask_every == 0 and all_done(done):
            break

    if return_logprobs:
        return responses, logprobs
    return responses
