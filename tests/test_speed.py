"""What is done for speed and memory changes no result: each way against the plain one, in float64 where that is exact
enough to compare tokens. Nothing here is timed; bench/ does that.
"""

import bisect
import dataclasses
import itertools
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pipeline import metrics
from torch._dynamo.testing import CompileCounter
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.weak import TensorWeakRef

import fast
import model as plain
import ppo
import sft
from data import pad_right
from generation import KVCache, generate
from model import GPTNeoX, GPTNeoXConfig, ScalarModel

SMALL = GPTNeoXConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)

# float32 holds scores below 16 to 2^-21; an entropy and a gradient add 64 products of those.
SCORES = 64 * 2.0**-21


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_ids(*shape, seed=0):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def small(cls=GPTNeoX, dtype=torch.float64, shape=SMALL):
    """A model whose biases and norms do something."""
    torch.manual_seed(1)
    model = cls(shape).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.1 * random(*parameter.shape).to(dtype)
    return model


# ---------------------------------------------------------------------------- losses: a few rows at a time, in place


def by_autograd(logits, tokens, temperature, n_vocab):
    """Log-probabilities and entropies (2, ..) in the dtype of the logits."""
    log_p = F.log_softmax(logits[..., :n_vocab] / temperature, -1)
    logprobs = log_p.gather(-1, tokens[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.stack((logprobs, entropy))


@pytest.mark.parametrize("temperature, n_vocab", [(1.0, None), (0.7, 50)])
@pytest.mark.parametrize("at_a_time", [1, 3 * 64, 2**20])
def test_logprobs_entropy_and_their_gradients_match_autograd_in_float64(temperature, n_vocab, at_a_time):
    """Undone: no factor 1 / temperature in the gradient, the entropy's sign, a last group of rows left out."""
    logits = 3 * random(2, 7, 64)
    tokens = random_ids(2, 7) % 50
    weights = random(2, 2, 7, seed=1)
    ours = logits.clone().requires_grad_()
    exact = logits.double().requires_grad_()
    got = fast.token_logprobs(ours, tokens, temperature, n_vocab, with_entropy=True, at_a_time=at_a_time)
    want = by_autograd(exact, tokens, temperature, n_vocab)
    (got * weights).sum().backward()
    (want * weights.double()).sum().backward()
    np.testing.assert_allclose(got.detach(), want.detach(), atol=SCORES)
    np.testing.assert_allclose(ours.grad, exact.grad, atol=SCORES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature, n_vocab", [(1.0, None), (0.7, 50)])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_fast_logprobs_are_the_plain_ones(with_entropy, temperature, n_vocab, dtype):
    """Values and gradients of fast.token_logprobs, which trains, and of model.token_logprobs, which explains it.

    Undone: fast.py computes in the dtype of the logits, gives ids from n_vocab on a probability, or leaves the
    entropy out of the gradient.
    """
    logits = (3 * random(2, 7, 64)).to(dtype)
    tokens = random_ids(2, 7) % 50
    results = []
    for function in (plain.token_logprobs, fast.token_logprobs):
        leaf = logits.clone().requires_grad_()
        out = function(leaf, tokens, temperature, n_vocab, with_entropy)
        (out * random(*out.shape, seed=1)).sum().backward()
        results.append({"values": out.detach(), "gradients": leaf.grad})
    explained, trained = results
    assert trained["values"].dtype == explained["values"].dtype == torch.float32
    assert trained["values"].shape == explained["values"].shape
    np.testing.assert_allclose(trained["values"], explained["values"], rtol=0, atol=SCORES)
    assert trained["gradients"].dtype == explained["gradients"].dtype == dtype
    # Gradients are of size 8 at most: bfloat16 rounds the last digit of each, and those may fall to either side.
    atol = SCORES if dtype == torch.float32 else 8 * 2.0**-8
    np.testing.assert_allclose(trained["gradients"].float(), explained["gradients"].float(), rtol=0, atol=atol)
    assert explained["gradients"].abs().max() > 0.5


def test_the_gradient_takes_the_place_of_the_logits():
    states = random(5, 8)
    weight = random(64, 8).requires_grad_()
    tokens = random_ids(5)
    logits = states @ weight.t()
    before = logits.detach().clone()
    places = []
    logits.register_hook(lambda grad: places.append(grad.untyped_storage().data_ptr()))
    fast.token_logprobs(logits, tokens).sum().backward()
    assert places == [logits.untyped_storage().data_ptr()]
    probs = before.double().softmax(-1)
    want = (F.one_hot(tokens, 64) - probs).t() @ states.double()
    np.testing.assert_allclose(weight.grad, want, atol=SCORES)


def test_logits_used_twice_are_an_error_and_not_a_wrong_gradient():
    logits = random(5, 8) @ random(64, 8).requires_grad_().t()
    other = logits.square().sum()
    fast.token_logprobs(logits, random_ids(5)).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("part", [slice(None), slice(1, 4)])
def test_a_leaf_is_left_as_it_is(part):
    """Also behind a view of it."""
    logits = random(5, 64).requires_grad_()
    before = logits.detach().clone()
    fast.token_logprobs(logits[part] if part.stop else logits, random_ids(5)[part]).sum().backward()
    assert torch.equal(logits.detach(), before)
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("with_entropy", [False, True])
def test_chunks_of_logits_change_nothing(with_entropy):
    """The same numbers from each chunk; a weight's gradient is their sum, in another order."""
    model = small(dtype=torch.float32)
    ids = random_ids(2, 12)
    select = torch.arange(3, 10).expand(2, -1)
    targets = random_ids(2, 7, seed=2)
    outputs = []
    gradients = []
    for chunk in (0, 3):
        model.logits_chunk = chunk
        model.zero_grad()
        out = model.logprobs(ids, select, targets, 0.7, 60, with_entropy)
        out.sum().backward()
        outputs.append(out.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert outputs[0].shape == ((2, 2, 7) if with_entropy else (2, 7))
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=2.0**-18)
    for name, whole in gradients[0].items():
        # Gradients are of size 10 or less, from sums of at most 14 x 64 products.
        np.testing.assert_allclose(whole, gradients[1][name], rtol=0, atol=10 * 30 * 2.0**-24, err_msg=name)


# ---------------------------------------------------------------------------- the last block, where it is asked for


@pytest.mark.parametrize("cls", [GPTNeoX, ScalarModel])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_few_positions_are_those_of_the_whole_pass(cls, checkpointing):
    """Outputs, and gradients of all weights; rows ask for different positions, some twice."""
    model = small(cls)
    model.gpt_neox.checkpointing = checkpointing
    ids = random_ids(3, 16)
    select = torch.tensor([[0, 1, 2], [13, 14, 15], [4, 9, 9]])
    few = model(ids, select)
    whole = model(ids)[torch.arange(3)[:, None], select]
    # The scalars are float32, which rounds at 2^-24 of values near 1.
    is_scalar = cls is ScalarModel
    np.testing.assert_allclose(few.detach(), whole.detach(), atol=1e-5 if is_scalar else 1e-12)
    weights = list(model.parameters())
    few_grads = torch.autograd.grad(few.square().sum(), weights, retain_graph=True)
    whole_grads = torch.autograd.grad(whole.square().sum(), weights)
    for (name, _), few_grad, whole_grad in zip(model.named_parameters(), few_grads, whole_grads):
        rtol = 1e-5 if is_scalar else 1e-9
        np.testing.assert_allclose(few_grad, whole_grad, rtol=rtol, atol=1e-6, err_msg=name)


def test_the_last_block_computes_few_positions():
    """Undone: the whole block, and a choice afterwards. And with most positions asked for, the causal kernel."""
    model = small()
    widths = []
    last_block = model.gpt_neox.layers[-1]
    last_block.mlp.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    model(random_ids(2, 16), torch.tensor([[3], [5]]))
    model(random_ids(2, 16), torch.arange(15).expand(2, -1))
    assert widths == [1, 16]


# ---------------------------------------------------------------------------- generation


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_number_of_queries_read_at_a_time_changes_no_token(temperature):
    queries, query_lens = pad_right([random_ids(n, seed=n).tolist() for n in (3, 9, 5, 1, 9, 7)])
    uniforms = torch.rand(6, 8)
    model = small()
    widths = []
    results = []
    model.gpt_neox.register_forward_pre_hook(lambda module, inputs: widths.append(len(inputs[0])))
    for n_rows in (1, 4, 100):
        results.append(generate(model, queries, query_lens, 8, temperature, uniforms, prefill_rows=n_rows))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    # The queries, and then seven tokens of all six rows.
    assert widths == [1] * 6 + [6] * 7 + [4, 2] + [6] * 7 + [6] + [6] * 7


def test_a_decoding_step_has_static_shapes_and_places():
    """What a CUDA graph asks for: one graph for all tokens, and a cache that stays where it is."""
    model = small().requires_grad_(False)
    counter = CompileCounter()
    step = torch.compile(model, backend=counter)
    query_lens = torch.tensor([4, 2])
    queries = random_ids(2, 4)
    cache = KVCache(query_lens, 4, 20)

    def places():
        return [tensor.data_ptr() for tensor in (cache.mask, cache.last, *cache.layers.values())]

    graphs = []
    with torch.no_grad():
        cache.begin_prefill(torch.arange(2), 4)
        model(queries, query_lens[:, None] - 1, cache)
        places_before = places()
        for t in range(12):
            cache.begin_decode()
            step(random_ids(2, 1, seed=t), None, cache)
            graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[2] > 0  # the first tokens may compile; no later one does
    assert places() == places_before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_models_activations_are_gone_when_the_other_learns(pipeline, dtype):
    """In the second update. Undone: one loss and one backward pass for policy and critic."""
    kept = []
    alive = []

    def keep(module, inputs):
        if torch.is_grad_enabled():
            kept.append(TensorWeakRef(inputs[0]))  # the gradient of the weight needs it

    def look(module, inputs):
        if torch.is_grad_enabled():
            alive.append(sum(activation() is not None for activation in kept))

    def watch(run, policy, reference):
        if run.step == 0:
            for model in run.models.values():
                first_block = model.gpt_neox.layers[0]
                first_block.register_forward_pre_hook(look)
                first_block.mlp.dense_4h_to_h.register_forward_pre_hook(keep)

    ppo.main(pipeline.config(ppo, f"ppo_in_turn_{dtype}", dtype=dtype), after_update=watch)
    # Four epochs of three micro-batches, and both models in each.
    assert len(kept) == len(alive) == 24
    assert not any(alive)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_bfloat16_on_a_cpu(causal):
    q = random(2, 4, 12 if causal else 1, 8, seed=0)
    k = random(2, 4, 12, 8, seed=1)
    v = random(2, 4, 12, 8, seed=2)
    mask = None
    if not causal:
        mask = torch.arange(12) < torch.tensor([12, 5])[:, None, None, None]
    rounded = [x.to(torch.bfloat16) for x in (q, k, v)]
    got = fast.attend(*rounded, mask)
    exact = [x.double() for x in rounded]
    want = F.scaled_dot_product_attention(*exact, attn_mask=mask, is_causal=causal)
    assert got.dtype == torch.bfloat16
    # Scores (below 8), weights and sums (below 4) are each rounded to 8 bits.
    np.testing.assert_allclose(got.double(), want, atol=8 * 2.0**-9 * 4 + 4 * 2.0**-8)


# ---------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("n_ids", [1, 2, 255, 256, 257, 1000])
def test_two_steps_find_the_id_of_one(n_ids):
    """Ids without probability at both ends, in blocks and in between are never drawn, whatever the draw."""
    generator = torch.Generator().manual_seed(n_ids)
    probs = torch.rand(n_ids, generator=generator) ** 8
    probs[torch.rand(n_ids, generator=generator) < 0.5] = 0
    probs[300:600] = 0
    probs[-1] = 0
    probs[n_ids // 3] = 0.1
    draws = torch.rand(4000, generator=generator, dtype=torch.float64)
    draws = torch.cat([draws, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)])[:, None]
    rows = (probs / probs.sum()).expand(len(draws), -1)
    ids = fast.invert_cdf(rows, draws)
    # One id after the other: the first whose sum passes the draw.
    sums = list(itertools.accumulate(rows[0].double().tolist()))
    plain = [bisect.bisect_right(sums, draw * sums[-1]) for draw in draws[:-1, 0].tolist()]
    assert ids[:-1, 0].tolist() == plain
    assert (rows.gather(1, ids) > 0).all()
    if n_ids > 200:
        assert len(ids.unique()) > 50


# ---------------------------------------------------------------------------- options


def test_chunks_round_alike_in_all_models(pipeline):
    """Undone: the reference's logits in one piece. At the first update both models are the same."""
    cfg = pipeline.config(ppo, "chunks", logits_chunk=2, episodes=8)
    widths = set()

    def note_width(module, inputs, logits):
        is_head = isinstance(module, fast.Linear) and module.bias is None
        if is_head:
            widths.add(logits.shape[1])

    with register_module_forward_hook(note_width):
        ppo.main(cfg)
    assert metrics(cfg)[0]["objective/kl"] == 0.0
    assert widths == {1, 2}  # one in generation, two in all other passes


def test_compiled_blocks_serve_all_lengths(pipeline):
    """A run whose rows have many lengths compiles each kind of pass once or twice, and logs the same losses."""
    counter = CompileCounter()
    logs = []
    for compiled in (False, True):
        options = dict(micro_batch_size=2, eval_split="", episodes=24)
        cfg = pipeline.config(sft, f"compile_{compiled}", compile=compiled, **options)
        with torch.compiler.set_stance("default", force_backend=counter):
            sft.main(cfg)
        logs.append(metrics(cfg))
    layers = GPTNeoXConfig.from_directory(cfg.model).num_hidden_layers
    assert logs[0] == logs[1]
    assert 0 < counter.frame_count <= 3 * layers


HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists() and shutil.which("g++")


@pytest.mark.skipif(not HEADERS, reason="torch.compile on a CPU needs g++ and Python's headers")
def test_compiled_code_computes_the_same():
    """With what torch.compile really makes, in passes with and without gradients. Undone: oneDNN's call compiled."""
    torch._dynamo.reset()
    shape = dataclasses.replace(SMALL, num_hidden_layers=2)  # the last block, and one that is not
    eager = small(dtype=torch.float32, shape=shape)
    compiled = small(dtype=torch.float32, shape=shape)
    for layer in compiled.gpt_neox.layers:  # as distributed.sharding.load_model does
        layer.forward = torch.compile(layer.forward, dynamic=True)
    for T in (9, 12):
        ids = random_ids(2, T)
        select = torch.arange(T - 4, T - 1).expand(2, -1)
        targets = random_ids(2, 3)
        with torch.no_grad():
            want = eager.logprobs(ids, select, targets)
            got = compiled.logprobs(ids, select, targets)
        # roundings of values below 16, some 64 in a row
        np.testing.assert_allclose(got, want, atol=64 * 2.0**-20)
        for model in (eager, compiled):
            model.zero_grad()
            model.logprobs(ids, select, targets).sum().backward()
        for (name, expected), parameter in zip(eager.named_parameters(), compiled.parameters()):
            atol = 64 * 2.0**-20 * max(1, expected.grad.abs().max())
            np.testing.assert_allclose(parameter.grad, expected.grad, atol=atol, err_msg=name)
