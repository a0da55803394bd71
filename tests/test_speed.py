"""What is done for speed and memory changes no result: each way against the plain one, in float64 where that is exact
enough to compare tokens. Nothing here is timed; bench/ does that.
"""

import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pipeline import metrics
from torch._dynamo.testing import CompileCounter
from torch.utils.weak import TensorWeakRef

import model as nplus
import ppo
import runtime
import sft
from data import pad_right
from model import GPTNeoX, GPTNeoXConfig, KVCache, ScalarModel, attend, generate, token_logprobs

SMALL = GPTNeoXConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(*shape, seed=0):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def small(cls=GPTNeoX, dtype=torch.float64):
    torch.manual_seed(1)
    model = cls(SMALL).to(dtype)
    for parameter in model.parameters():  # biases and norms that do something
        parameter.data += 0.1 * random(*parameter.shape).to(dtype)
    return model


# ---- losses: a few rows at a time, in place


def plain(logits, tokens, temperature, n_vocab):
    logprobs = F.log_softmax(logits[..., :n_vocab] / temperature, -1)
    return logprobs.gather(-1, tokens[..., None])[..., 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("temperature, n_vocab", [(1.0, None), (0.7, 50)])
@pytest.mark.parametrize("at_a_time", [1, 3 * 64, 2**20])
def test_logprobs_entropy_and_their_gradients_match_autograd_in_float64(monkeypatch, temperature, n_vocab, at_a_time):
    """Undone: no factor 1 / temperature in the gradient, the entropy's sign, a last group of rows left out."""
    monkeypatch.setitem(nplus.AT_A_TIME, "cpu", at_a_time)
    logits, tokens, weights = 3 * random(2, 7, 64), ids(2, 7) % 50, random(2, 2, 7, seed=1)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = token_logprobs(ours, tokens, temperature, n_vocab, with_entropy=True)
    want = torch.stack(plain(exact, tokens, temperature, n_vocab))
    (got * weights).sum().backward()
    (want * weights.double()).sum().backward()
    # float32 holds scores below 16 to 2^-21; an entropy adds 64 products of those
    np.testing.assert_allclose(got.detach(), want.detach(), atol=64 * 2.0**-21)
    np.testing.assert_allclose(ours.grad, exact.grad, atol=64 * 2.0**-21)


def test_the_gradient_takes_the_place_of_the_logits():
    x, weight, tokens = random(5, 8), random(64, 8).requires_grad_(), ids(5)
    logits = x @ weight.t()
    kept, places = logits.detach().clone(), []
    logits.register_hook(lambda grad: places.append(grad.untyped_storage().data_ptr()))
    token_logprobs(logits, tokens).sum().backward()
    assert places == [logits.untyped_storage().data_ptr()]
    p = kept.double().softmax(-1)
    want = (F.one_hot(tokens, 64) - p).t() @ x.double()
    np.testing.assert_allclose(weight.grad, want, atol=64 * 2.0**-21)


def test_logits_used_twice_are_an_error_and_not_a_wrong_gradient():
    logits = random(5, 8) @ random(64, 8).requires_grad_().t()
    other = logits.square().sum()
    token_logprobs(logits, ids(5)).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("part", [slice(None), slice(1, 4)])
def test_a_leaf_is_left_as_it_is(part):
    """Also behind a view of it."""
    logits = random(5, 64).requires_grad_()
    before = logits.detach().clone()
    token_logprobs(logits[part] if part.stop else logits, ids(5)[part]).sum().backward()
    assert torch.equal(logits.detach(), before) and logits.grad.abs().sum() > 0


@pytest.mark.parametrize("with_entropy", [False, True])
def test_chunks_of_logits_change_nothing(with_entropy):
    """The same numbers from each chunk; a weight's gradient is their sum, in another order."""
    model, results = small(dtype=torch.float32), []
    rows, select, targets = ids(2, 12), torch.arange(3, 10).expand(2, -1), ids(2, 7, seed=2)
    for model.logits_chunk in (0, 3):
        model.zero_grad()
        out = model.logprobs(rows, select, targets, 0.7, 60, with_entropy)
        out.sum().backward()
        results.append((out.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert results[0][0].shape == ((2, 2, 7) if with_entropy else (2, 7))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=0, atol=2.0**-18)
    for name, grad in results[0][1].items():  # of size 10 or less, from sums of at most 14 x 64 products
        np.testing.assert_allclose(grad, results[1][1][name], rtol=0, atol=10 * 30 * 2.0**-24, err_msg=name)


# ---- the last block, at the positions that are asked for


@pytest.mark.parametrize("cls", [GPTNeoX, ScalarModel])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_few_positions_are_those_of_the_whole_pass(cls, checkpointing):
    """Outputs, and gradients of all weights; rows ask for different positions, some twice."""
    model, rows = small(cls), ids(3, 16)
    model.gpt_neox.checkpointing = checkpointing
    select = torch.tensor([[0, 1, 2], [13, 14, 15], [4, 9, 9]])
    few = model(rows, select)
    whole = model(rows)[torch.arange(3)[:, None], select]
    np.testing.assert_allclose(few.detach(), whole.detach(), atol=1e-5 if cls is ScalarModel else 1e-12)
    weights = list(model.parameters())
    grads = [torch.autograd.grad(out.square().sum(), weights, retain_graph=True) for out in (few, whole)]
    for (name, _), a, b in zip(model.named_parameters(), *grads):
        # the scalar's float32 rounds at 2^-24 of values near 1
        np.testing.assert_allclose(a, b, rtol=1e-5 if cls is ScalarModel else 1e-9, atol=1e-6, err_msg=name)


def test_the_last_block_computes_few_positions(monkeypatch):
    """Undone: the whole block, and a choice afterwards. And with most positions asked for, the causal kernel."""
    model, seen = small(), []
    model.gpt_neox.layers[-1].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    model(ids(2, 16), torch.tensor([[3], [5]]))
    model(ids(2, 16), torch.arange(15).expand(2, -1))
    assert seen == [1, 16]


# ---- generation


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_number_of_queries_read_at_a_time_changes_no_token(monkeypatch, temperature):
    queries, uniforms = [ids(n, seed=n).tolist() for n in (3, 9, 5, 1, 9, 7)], torch.rand(6, 8)
    results = []
    for rows in (1, 4, 100):
        monkeypatch.setitem(nplus.PREFILL_ROWS, "cpu", rows)
        results.append(generate(small(), *pad_right(queries), 8, temperature, uniforms))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_decoding_step_has_static_shapes_and_places():
    """What a CUDA graph asks for: one graph for all tokens, and a cache that stays where it is."""
    model, counter = small().requires_grad_(False), CompileCounter()
    query_lens, queries = torch.tensor([4, 2]), ids(2, 4)
    cache = KVCache(query_lens, 4, 20)
    with torch.no_grad():
        model(queries, query_lens[:, None] - 1, cache.prefill(torch.arange(2), 4))
        places = [cache.mask.data_ptr(), cache.last.data_ptr(), *(layer.data_ptr() for layer in cache.layers.values())]
        step, graphs = torch.compile(model, backend=counter), []
        for t in range(12):
            step(ids(2, 1, seed=t), None, cache.decode())
            graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[2] > 0  # the first tokens may compile; no later one does
    now = [cache.mask.data_ptr(), cache.last.data_ptr(), *(layer.data_ptr() for layer in cache.layers.values())]
    assert now == places


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_models_activations_are_gone_when_the_other_learns(pipeline, monkeypatch, dtype):
    """Undone: one loss and one backward pass for policy and critic."""
    kept, alive, load = [], [], runtime.load_model

    def keep(module, inputs):  # the weight's gradient needs them
        if torch.is_grad_enabled():
            kept.append(TensorWeakRef(inputs[0]))

    def look(module, inputs):
        if torch.is_grad_enabled():
            alive.append(sum(ref() is not None for ref in kept))

    def watched(run, cls, *args, trainable=False, **options):
        model = load(run, cls, *args, trainable=trainable, **options)
        if trainable:
            model.gpt_neox.layers[0].register_forward_pre_hook(look)
            model.gpt_neox.layers[0].mlp.dense_4h_to_h.register_forward_pre_hook(keep)
        return model

    monkeypatch.setattr(runtime, "load_model", watched)
    ppo.main(pipeline.config(ppo, f"ppo_in_turn_{dtype}", episodes=8, dtype=dtype))
    assert len(kept) == len(alive) >= 4 and not any(alive)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_bfloat16_on_a_cpu(causal):
    q, k, v = (random(2, 4, 1 if i == 0 and not causal else 12, 8, seed=i) for i in range(3))
    mask = None if causal else torch.arange(12)[None, None, None] < torch.tensor([12, 5])[:, None, None, None]
    got = attend(*(x.to(torch.bfloat16) for x in (q, k, v)), mask)
    exact = (x.to(torch.bfloat16).double() for x in (q, k, v))
    want = F.scaled_dot_product_attention(*exact, attn_mask=mask, is_causal=causal)
    # scores (below 8), weights and sums (below 4) are each rounded to 8 bits
    assert got.dtype == torch.bfloat16
    np.testing.assert_allclose(got.double(), want, atol=8 * 2.0**-9 * 4 + 4 * 2.0**-8)


# ---- options


def test_chunks_round_alike_in_all_models(pipeline):
    """Undone: the reference's logits in one piece. At the first update both models are the same."""
    cfg = pipeline.config(ppo, "chunks", logits_chunk=2, episodes=8)
    ppo.main(cfg)
    assert metrics(cfg)[0]["objective/kl"] == 0.0


def test_compiled_blocks_serve_all_lengths(pipeline, monkeypatch):
    """A run whose rows have many lengths compiles each kind of pass once or twice, and logs the same losses."""
    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, backend=counter, **options))
    logs = []
    for compile in (False, True):
        options = dict(micro_batch_size=2, eval_split="", episodes=24)
        cfg = pipeline.config(sft, f"compile_{compile}", compile=compile, **options)
        sft.main(cfg)
        logs.append(metrics(cfg))
    layers = GPTNeoXConfig.from_directory(cfg.model).num_hidden_layers
    assert logs[0] == logs[1] and 0 < counter.frame_count <= 3 * layers


HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists() and shutil.which("g++")


@pytest.mark.skipif(not HEADERS, reason="torch.compile on a CPU needs g++ and Python's headers")
def test_compiled_code_computes_the_same():
    """With what torch.compile really makes, in passes with and without gradients. Undone: oneDNN's call compiled."""
    torch._dynamo.reset()
    plain, compiled = (small(dtype=torch.float32) for _ in range(2))
    for layer in compiled.gpt_neox.layers:  # as runtime.load_model does
        layer.forward = torch.compile(layer.forward, dynamic=True)
    for T in (9, 12):
        x, select = ids(2, T), torch.arange(T - 4, T - 1).expand(2, -1)
        with torch.no_grad():
            want, got = (model.logprobs(x, select, ids(2, 3)) for model in (plain, compiled))
        # roundings of values below 16, some 64 in a row
        np.testing.assert_allclose(got, want, atol=64 * 2.0**-20)
        for model in (plain, compiled):
            model.zero_grad()
            model.logprobs(x, select, ids(2, 3)).sum().backward()
        for (name, p), q in zip(plain.named_parameters(), compiled.parameters()):
            np.testing.assert_allclose(q.grad, p.grad, atol=64 * 2.0**-20 * max(1, p.grad.abs().max()), err_msg=name)
