"""The network against transformers' GPT-NeoX and float64 NumPy: logits, files, generation, the scalar model.

The oracles share no code with model.py, generation.py, fast.py and hub/. Weights are random and large, LayerNorms
included (`randomise`), so that a wrong norm, activation, rotary layout or head order moves the logits by per cents, not
by rounding.
"""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fast
from configurator import UserError
from generation import generate
from model import GPTNeoX, GPTNeoXConfig, ScalarModel, init_weights, token_logprobs

transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256)
# One file of the hub as it was written in 2023; the rotary values are not the defaults, so that a reader
# which overlooks them is seen.
OLD_CONFIG = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 256, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 4,
    "num_hidden_layers": 2, "rotary_emb_base": 500, "rotary_pct": 0.5, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": True,
    "use_parallel_residual": True, "vocab_size": 97,
}


def randomise(model, seed):
    """Weights for which activations keep a size of about 1 and attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=generator)
            elif "embed_in" in name:
                parameter.normal_(0, 1, generator=generator)
            else:
                parameter.normal_(0, 1.5 / math.sqrt(parameter.shape[1]), generator=generator)
    return model


def hub_model(seed=0, **changes):
    config = transformers.GPTNeoXConfig(**{**SMALL, "bos_token_id": 0, "eos_token_id": 0, **changes})
    return randomise(transformers.GPTNeoXForCausalLM(config).eval(), seed)


def tokens(*shape, vocab_size=97, seed=0):
    return torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model, ids):
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def assert_close(ours, theirs, relative=1e-5):
    """1e-5 of the largest logit: about 100 float32 roundings, and far below any error of the formula."""
    assert ours.shape == theirs.shape
    error = (ours.double() - theirs.double()).abs().max()
    assert error <= relative * theirs.double().abs().max(), f"largest difference {error:.3g}"


def write_directory(directory, tensors, config=OLD_CONFIG):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A small hub model, and ours read from its files."""
    directory = tmp_path_factory.mktemp("pair")
    theirs = hub_model()
    theirs.save_pretrained(directory)
    return theirs, GPTNeoX.from_pretrained(str(directory)).eval()


@pytest.fixture(scope="module")
def tensors():
    """The tensors of OLD_CONFIG by their names in the hub's files (transformers 5 says lm_head in memory)."""
    state = hub_model(rotary_pct=0.5, rotary_emb_base=500).state_dict()
    return {name.replace("lm_head.", "embed_out."): tensor.clone() for name, tensor in state.items()}


# ---------------------------------------------------------------------------- logits

SHAPES = {
    "small": {},
    "70m heads": dict(hidden_size=512, num_attention_heads=8, intermediate_size=2048),
    "1b heads": dict(hidden_size=2048, num_attention_heads=8, intermediate_size=512),  # head_dim 256
    "2.8b heads": dict(hidden_size=2560, num_attention_heads=32, intermediate_size=512),  # 80, of which 20 turn
    "sequential residual": dict(use_parallel_residual=False),
    "all dimensions rotary": dict(rotary_pct=1.0),
    "other rotary base": dict(rotary_pct=0.5, rotary_emb_base=500),
    "other epsilon": dict(layer_norm_eps=0.3),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_match_hub_model(shape, tmp_path):
    theirs = hub_model(**SHAPES[shape])
    theirs.save_pretrained(tmp_path)
    ours = GPTNeoX.from_pretrained(str(tmp_path))
    ids = tokens(2, 40)
    assert_close(logits_of(ours, ids), logits_of(theirs, ids))


def test_logits_match_hub_model_up_to_the_last_position(pair):
    theirs = pair[0]
    ours = pair[1]
    ids = tokens(1, 2048)
    assert_close(logits_of(ours, ids), logits_of(theirs, ids))


@pytest.mark.parametrize("how", ["from_pretrained", "to"])
def test_rotary_angles_stay_float32_in_a_bfloat16_model(how, tmp_path):
    """Angles of position 1500 in bfloat16 are off by whole radians: far more than twice the hub's error."""
    theirs = hub_model(rotary_pct=1.0)
    theirs.save_pretrained(tmp_path)
    if how == "to":
        ours = GPTNeoX.from_pretrained(str(tmp_path)).to(torch.bfloat16)
    else:
        ours = GPTNeoX.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    ids = tokens(1, 1500)
    exact = logits_of(theirs, ids)
    error = (logits_of(ours, ids).float() - exact).abs().mean()
    hub_error = (logits_of(theirs.to(torch.bfloat16), ids).float() - exact).abs().mean()
    assert error <= 2 * hub_error


def test_select_equals_indexing_the_logits(pair):
    ours = pair[1]
    ids = tokens(3, 20)
    select = torch.tensor([[0, 5, 19, 7], [3, 3, 2, 1], [18, 19, 0, 0]])
    whole = logits_of(ours, ids)
    expected = torch.stack([whole[row, select[row]] for row in range(3)])
    with torch.no_grad():
        assert_close(ours(ids, select=select), expected)


def test_trailing_pads_leave_the_logits_alone(pair):
    ours = pair[1]
    ids = tokens(1, 12)
    padded = torch.cat([ids, tokens(1, 9, seed=1)], dim=1)
    assert_close(logits_of(ours, padded)[:, :12], logits_of(ours, ids))


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "changes",
    [{}, dict(use_parallel_residual=False, rotary_pct=0.5, rotary_emb_base=500, layer_norm_eps=1e-3)],
)
def test_saved_model_loads_in_the_hub_library(changes, tmp_path):
    ours = randomise(GPTNeoX(GPTNeoXConfig(**{**SMALL, **changes})), seed=1)
    ours.save_pretrained(str(tmp_path / "saved"))
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True, dtype=torch.float32
    )
    assert type(theirs) is transformers.GPTNeoXForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = tokens(2, 30)
    assert_close(logits_of(ours, ids), logits_of(theirs.eval(), ids))


def test_state_dict_is_the_hub_layout(tensors):
    ours = GPTNeoX(GPTNeoXConfig(**SMALL)).state_dict()
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    assert shapes == {name: tensor.shape for name, tensor in tensors.items()}


def test_saved_tensors_are_bitwise_the_model(tmp_path):
    ours = GPTNeoX(GPTNeoXConfig(**SMALL))
    ours.save_pretrained(str(tmp_path))
    again = GPTNeoX.from_pretrained(str(tmp_path))
    assert_same_weights(again, ours)


def assert_same_weights(one, other):
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_as_float32(dtype, tmp_path):
    hub_model().to(dtype).save_pretrained(tmp_path)
    ours = GPTNeoX.from_pretrained(str(tmp_path))
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    ids = tokens(2, 20)
    assert_close(logits_of(ours, ids), logits_of(theirs, ids))


def test_sharded_files_load(pair, tmp_path):
    theirs = pair[0]
    whole = pair[1]
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(GPTNeoX.from_pretrained(str(tmp_path)), whole)


def test_old_and_new_config_files_give_the_same_logits(tensors, tmp_path):
    theirs = hub_model(rotary_pct=0.5, rotary_emb_base=500)
    theirs.save_pretrained(tmp_path / "new")
    assert "rotary_pct" not in json.loads((tmp_path / "new" / "config.json").read_text())  # else no new style
    old = GPTNeoX.from_pretrained(str(write_directory(tmp_path / "old", tensors)))
    new = GPTNeoX.from_pretrained(str(tmp_path / "new"))
    ids = tokens(2, 30)
    assert torch.equal(logits_of(old, ids), logits_of(new, ids))
    assert_close(logits_of(old, ids), logits_of(theirs, ids))


def test_old_buffers_are_ignored(tensors, tmp_path):
    buffers = {}
    for layer in range(2):
        prefix = f"gpt_neox.layers.{layer}.attention."
        buffers[prefix + "bias"] = torch.tril(torch.ones(1, 1, 8, 8, dtype=torch.uint8))
        buffers[prefix + "masked_bias"] = torch.tensor(-1e9)
        buffers[prefix + "rotary_emb.inv_freq"] = torch.ones(4)
    plain = GPTNeoX.from_pretrained(str(write_directory(tmp_path / "plain", tensors)))
    old = GPTNeoX.from_pretrained(str(write_directory(tmp_path / "old", {**tensors, **buffers})))
    ids = tokens(1, 20)
    assert torch.equal(logits_of(plain, ids), logits_of(old, ids))


def refusal(source, cls=GPTNeoX):
    with pytest.raises(UserError) as error:
        cls.from_pretrained(str(source))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "gpt_neox.embed_in.weight",
        "embed_out.weight",
        "gpt_neox.layers.1.attention.dense.bias",
        "gpt_neox.layers.0.attention.query_key_value.bias",  # ends like the old buffers, and is none
    ],
)
def test_missing_tensor_is_named(name, tensors, tmp_path):
    rest = {other: tensor for other, tensor in tensors.items() if other != name}
    assert name in refusal(write_directory(tmp_path / "m", rest))


@pytest.mark.parametrize(
    "name",
    ["gpt_neox.layers.2.mlp.dense_4h_to_h.bias", "lm_head.weight", "score.weight", "gpt_neox.attention.bias"],
)
def test_unexpected_tensor_is_named(name, tensors, tmp_path):
    assert name in refusal(write_directory(tmp_path / "m", {**tensors, name: torch.ones(3)}))


@pytest.mark.parametrize("shape", [(97, 65), (98, 64), (64,), (64, 97)])
def test_misshaped_tensor_is_named(shape, tensors, tmp_path):
    message = refusal(write_directory(tmp_path / "m", {**tensors, "embed_out.weight": torch.ones(shape)}))
    assert "embed_out.weight" in message
    assert all(str(size) in message for size in shape)


@pytest.mark.parametrize("damage", ["tail lost", "header lost", "garbage", "empty"])
def test_damaged_file_is_named(damage, tensors, tmp_path):
    file = write_directory(tmp_path / "m", tensors) / "model.safetensors"
    data = file.read_bytes()
    broken = {
        "tail lost": data[:-100], "header lost": data[:20], "empty": b"",
        "garbage": np.random.default_rng(0).bytes(5000),
    }
    file.write_bytes(broken[damage])
    assert "model.safetensors" in refusal(tmp_path / "m")


def test_missing_shard_is_named(pair, tmp_path):
    pair[0].save_pretrained(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(tmp_path)


def test_missing_directory_is_named(tmp_path):
    assert "nothing_here" in refusal(tmp_path / "nothing_here")


def test_directory_without_safetensors_is_refused(tensors, tmp_path):
    """Old releases hold only pytorch_model.bin, a pickle, which can run code: never opened."""
    directory = write_directory(tmp_path / "m", tensors)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "safetensors" in refusal(directory)


@pytest.mark.parametrize("text", [None, "{not json", "[]"])
def test_bad_config_file_is_named(text, tensors, tmp_path):
    directory = write_directory(tmp_path / "m", tensors)
    if text is None:
        (directory / "config.json").unlink()
    else:
        (directory / "config.json").write_text(text)
    assert "config.json" in refusal(directory)


# ---------------------------------------------------------------------------- generation

QUERY_LENS = torch.tensor([5, 12, 1, 9])


def queries(seed=0):
    return tokens(4, 12, seed=seed)


def hub_greedy(model, ids, lens, n):
    """The hub's own cached generation on left-padded rows; every default which could stop it is cleared."""
    width = ids.shape[1]
    left = torch.zeros_like(ids)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lens.tolist()):
        left[row, width - length :] = ids[row, :length]
        mask[row, width - length :] = 1
    settings = transformers.GenerationConfig(
        max_new_tokens=n, min_new_tokens=n, do_sample=False, num_beams=1, eos_token_id=None,
        bos_token_id=None, pad_token_id=0,
    )
    model.generation_config = settings
    out = model.generate(left, attention_mask=mask, generation_config=settings)
    return out[:, width:]


def uncached_argmax(model, ids, lens, responses):
    """The most likely token at every step of `responses`: one full pass per row, no padding, no cache."""
    n_tokens = responses.shape[1]
    likeliest = []
    for query, length, response in zip(ids, lens.tolist(), responses, strict=True):
        logits = logits_of(model, torch.cat([query[:length], response])[None])
        likeliest.append(logits[:, -n_tokens - 1 : -1].argmax(-1))
    return torch.cat(likeliest)


@pytest.mark.parametrize("changes", [{}, dict(use_parallel_residual=False, rotary_pct=1.0)])
def test_greedy_generation_matches_hub_generation_with_left_padding(changes, tmp_path):
    theirs = hub_model(seed=3, **changes)
    theirs.save_pretrained(tmp_path)
    ours = GPTNeoX.from_pretrained(str(tmp_path))
    ids = queries()
    expected = hub_greedy(theirs, ids, QUERY_LENS, 53)
    assert torch.equal(expected, uncached_argmax(theirs, ids, QUERY_LENS, expected))  # two oracles agree
    assert all(len(row.unique()) > 3 for row in expected)  # one token for ever would hide a broken cache
    responses = generate(ours, ids, QUERY_LENS, 53, 0, None)
    assert responses.shape == (4, 53)
    assert torch.equal(responses, expected)


def float64_cdfs(theirs, ids, lens, responses, temperature, n_vocab):
    """(B, R, n_vocab) cumulative probabilities, from full forward passes over each unpadded row."""
    cdfs = []
    for query, length, response in zip(ids, lens.tolist(), responses, strict=True):
        logits = logits_of(theirs, torch.cat([query[:length], response])[None])
        scores = logits[0, length - 1 : -1, :n_vocab].double().numpy() / temperature
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        cdfs.append(np.cumsum(weights / weights.sum(-1, keepdims=True), axis=-1))
    return np.stack(cdfs)


@pytest.mark.parametrize("temperature, n_vocab", [(1.0, None), (0.7, None), (1.7, 60)])
def test_sampling_inverts_the_cdf(temperature, n_vocab, pair):
    theirs = pair[0]
    ours = pair[1]
    ids = queries()
    draws = uniform(4, 30)
    responses = generate(ours, ids, QUERY_LENS, 30, temperature, draws, n_vocab=n_vocab)
    cdfs = float64_cdfs(theirs, ids, QUERY_LENS, responses, temperature, n_vocab)
    checked = 0
    for place in np.ndindex(4, 30):
        cdf = cdfs[place]
        draw = draws[place].item()
        # Nearer than that, float32 may fall on either side of the edge.
        if np.abs(cdf - draw).min() > 1e-4:
            assert responses[place] == np.searchsorted(cdf, draw, side="right")
            checked += 1
    assert checked > 100  # of 120: about 97 edges x 2e-4 = 2 % are skipped


def constant_model(logits):
    """A model whose logits are the given vector, whatever it reads: the last norm gives (1, 0, 0, ...)."""
    config = GPTNeoXConfig(vocab_size=len(logits), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=16)  # fmt: skip
    model = GPTNeoX(config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        parameters["gpt_neox.final_layer_norm.weight"].zero_()
        parameters["gpt_neox.final_layer_norm.bias"].zero_()[0] = 1
        parameters["embed_out.weight"].zero_()[:, 0] = torch.as_tensor(logits)
    return model


def generate_constant(logits, draws, temperature=1.0, **settings):
    n_rows, n_tokens = draws.shape
    ids = torch.zeros(n_rows, 3, dtype=torch.long)  # id 0, which below is also EOS: in a query it stops nothing
    query_lens = torch.full((n_rows,), 3)
    return generate(constant_model(logits), ids, query_lens, n_tokens, temperature, draws, **settings)


def test_sampled_frequencies_are_the_softmax():
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -3.0])
    probs = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    responses = generate_constant(logits, uniform(500, 20), 0.7).numpy()
    observed = np.bincount(responses.ravel(), minlength=6)
    expected = 1e4 * probs
    chi_square = ((observed - expected) ** 2 / expected).sum()
    # the mean of a chi-square with 5 degrees of freedom, and 5 of its deviations
    assert chi_square < 5 + 5 * math.sqrt(2 * 5)


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_ids_from_n_vocab_up_are_never_generated(temperature):
    logits = torch.linspace(-2, 2, 40)
    logits[30:] = 100.0  # without the guard, certain
    responses = generate_constant(logits, uniform(64, 20), temperature, n_vocab=30)
    assert responses.max() <= 29
    if temperature == 0:
        assert (responses == 29).all()
    else:
        # By the same draws: the excluded ids take no probability.
        without = generate_constant(logits[:30], uniform(64, 20), temperature)
        assert (responses == without).float().mean() > 0.99


@pytest.mark.parametrize("seed", [0, 3])  # on a CPU the sum of seed 0 ends at 1 - 2^-23, that of 3 above 1
def test_largest_uniform_gives_a_possible_token(seed):
    """A float32 running sum over 50,277 probabilities can end below the largest uniform, 1 - 2^-24."""
    logits = torch.randn(50304, generator=torch.Generator().manual_seed(seed))
    logits[50267:50277] = -1e4  # the last ids of the tokenizer have no probability
    responses = generate_constant(logits, torch.full((8, 4), 1 - 2**-24), n_vocab=50277)
    assert responses.max() < 50267
    assert responses.min() > 50267 * 0.99  # it stands for the end of the distribution


def test_token_of_probability_zero_is_never_drawn():
    logits = [-1e4, 0.0, -1e4, 0.0, -1e4]  # exp underflows to exactly 0
    draws = torch.tensor([[0.0, 0.25, 0.75, 1 - 2**-24]])  # a uniform may be exactly 0
    assert generate_constant(logits, draws).tolist() == [[1, 1, 3, 3]]


def test_columns_after_eos_hold_eos():
    logits = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    free = generate_constant(logits, uniform(64, 25))
    stopped = generate_constant(logits, uniform(64, 25), eos_id=0)
    expected = free.clone()
    for row in expected:
        places = (row == 0).nonzero()
        if len(places):
            row[places[0] :] = 0
    assert (expected != free).any()
    assert torch.equal(stopped, expected)


def test_generation_has_full_width_when_every_row_stops_at_once():
    responses = generate_constant([50.0, 0.0], uniform(3, 7), eos_id=0)
    assert torch.equal(responses, torch.zeros(3, 7, dtype=torch.long))


def test_eos_other_than_zero_is_kept():
    responses = generate_constant([0.0, 0.0, 50.0], uniform(2, 6), eos_id=2)
    assert responses.tolist() == [[2] * 6] * 2


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_generation_ignores_pad_columns(temperature, pair):
    narrow = queries()
    wider = torch.cat([narrow, tokens(4, 5, seed=8)], dim=1)
    for number, length in enumerate(QUERY_LENS.tolist()):
        wider[number, length:] = tokens(17 - length, seed=9 + number)  # other ids in the pads
    padded = wider.clone()
    for row, length in zip(padded, QUERY_LENS.tolist(), strict=True):
        row[length:] = 50277  # the tokenizer's pad id, which this model does not have
    results = [generate(pair[1], ids, QUERY_LENS, 20, temperature, uniform(4, 20)) for ids in (narrow, wider, padded)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_generation_ignores_the_other_rows(temperature, pair):
    ours = pair[1]
    ids = queries()
    draws = uniform(4, 20)
    together = generate(ours, ids, QUERY_LENS, 20, temperature, draws)
    for number, length in enumerate(QUERY_LENS.tolist()):
        row = slice(number, number + 1)
        alone = generate(ours, ids[row, :length], QUERY_LENS[row], 20, temperature, draws[row])
        assert torch.equal(alone[0], together[number])


def test_generation_leaves_its_inputs_and_the_model_alone(pair):
    ours = pair[1]
    inputs = [queries(), QUERY_LENS.clone(), uniform(4, 6)]
    before = [tensor.clone() for tensor in inputs]
    logits_before = logits_of(ours, inputs[0])

    def responses():
        ids, query_lens, draws = inputs
        return generate(ours, ids, query_lens, 6, 1.0, draws)

    first = responses()
    assert torch.equal(responses(), first)
    assert not first.requires_grad
    assert all(map(torch.equal, inputs, before))
    assert torch.equal(logits_of(ours, inputs[0]), logits_before)


# ---------------------------------------------------------------------------- token_logprobs

LOGPROBS = [pytest.param(token_logprobs, id="plain"), pytest.param(fast.token_logprobs, id="fast")]


def numpy_logprobs(logits, ids, temperature, n_vocab):
    scores = logits.double().numpy()[..., :n_vocab] / temperature
    out = np.empty(ids.shape)
    for place in np.ndindex(*ids.shape):
        shifted = scores[place] - scores[place].max()
        out[place] = shifted[ids[place]] - np.log(np.exp(shifted).sum())
    return out


@pytest.mark.parametrize("function", LOGPROBS)
@pytest.mark.parametrize("n_vocab", [None, 50])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_match_float64(temperature, n_vocab, function):
    logits = 10 * torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0))
    logits[0, 0] += 1e4  # exp of this overflows
    logits[..., 50:] += 30  # excluded ids would dominate
    ids = tokens(3, 7, vocab_size=50)
    got = function(logits, ids, temperature=temperature, n_vocab=n_vocab)
    assert got.dtype == torch.float32
    assert got.shape == (3, 7)
    # float32 holds logits of 1e4 / 0.7 to 1e-3 (spacing 2^-10), all others (below 100 / 0.7) to 2^-17
    tolerance = np.full((3, 7), 4 * 2.0**-16)
    tolerance[0, 0] = 4 * 2.0**-10
    error = np.abs(got.double().numpy() - numpy_logprobs(logits, ids, temperature, n_vocab))
    assert (error <= tolerance).all()


@pytest.mark.parametrize("function", LOGPROBS)
def test_token_logprobs_of_bfloat16_logits_are_computed_in_float32(function):
    logits = (5 * torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    ids = tokens(2, 5, vocab_size=300)
    got = function(logits, ids, temperature=0.7)
    assert got.dtype == torch.float32
    # a division or log-softmax in bfloat16 is off by 2^-8 of values of about 10
    np.testing.assert_allclose(got.numpy(), numpy_logprobs(logits, ids, 0.7, None), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("function", LOGPROBS)
def test_token_logprobs_gradient_is_onehot_minus_softmax(function):
    logits = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = tokens(2, 3, vocab_size=15)
    function(logits, ids, temperature=0.7, n_vocab=15).sum().backward()
    weights = np.exp(logits.detach().double().numpy()[..., :15] / 0.7)
    expected = np.zeros((2, 3, 20))
    expected[..., :15] = -weights / weights.sum(-1, keepdims=True)
    for place in np.ndindex(2, 3):
        expected[place][ids[place]] += 1
    np.testing.assert_allclose(logits.grad.numpy(), expected / 0.7, atol=1e-6)


# ---------------------------------------------------------------------------- the scalar model


@pytest.fixture(scope="module")
def scalar_tensors(tensors):
    body = {name: tensor for name, tensor in tensors.items() if name != "embed_out.weight"}
    return {**body, "score.weight": torch.randn(1, 64), "score.bias": torch.tensor([0.7])}


def test_scalars_are_the_head_on_the_final_norm(scalar_tensors, tmp_path):
    ours = ScalarModel.from_pretrained(str(write_directory(tmp_path / "m", scalar_tensors)))
    theirs = hub_model(rotary_pct=0.5, rotary_emb_base=500)
    ids = tokens(3, 25)
    with torch.no_grad():
        hidden = theirs.gpt_neox(ids).last_hidden_state
        expected = hidden @ scalar_tensors["score.weight"][0] + scalar_tensors["score.bias"]  # (B, T)
        assert_close(ours(ids), expected)
        select = torch.tensor([[24], [3], [0]])
        assert_close(ours(ids, select=select), expected.gather(1, select))


def test_scalar_model_round_trip_keeps_the_head(scalar_tensors, tmp_path):
    ours = ScalarModel.from_pretrained(str(write_directory(tmp_path / "m", scalar_tensors)))
    ours.save_pretrained(str(tmp_path / "again"))
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == scalar_tensors.keys()
    assert all(torch.equal(saved[name], scalar_tensors[name]) for name in saved)
    ids = tokens(2, 10)
    again = ScalarModel.from_pretrained(str(tmp_path / "again"))
    assert torch.equal(logits_of(again, ids), logits_of(ours, ids))


def test_scalar_head_starts_with_the_published_deviation():
    """std 1 / sqrt(d + 1), bias 0: arXiv:2403.17031 detail 11."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(**{**SMALL, "hidden_size": 1024, "num_hidden_layers": 1, "intermediate_size": 16})
    parameters = dict(ScalarModel(config).named_parameters())
    weight = parameters["score.weight"].detach().double()
    assert weight.numel() == 1024
    assert parameters["score.bias"].tolist() == [0.0]
    # 5 standard errors: of a deviation from n normal values 1 / sqrt(2 n), of a mean std / sqrt(n)
    assert abs(weight.std().item() * math.sqrt(1025) - 1) < 5 / math.sqrt(2 * 1024)
    assert abs(weight.mean().item()) < 5 / 1025


def test_scalar_model_refuses_a_language_model(tensors, tmp_path):
    message = refusal(write_directory(tmp_path / "m", tensors), ScalarModel)
    assert "score.weight" in message or "embed_out.weight" in message


def test_language_model_refuses_a_scalar_model(scalar_tensors, tmp_path):
    message = refusal(write_directory(tmp_path / "m", scalar_tensors))
    assert "score.weight" in message or "embed_out.weight" in message


def test_the_seed_decides_initial_weights_and_each_tensor_has_its_own():
    """Two draws of a standard normal differ by 2 / sqrt(pi) = 1.13 deviations in the mean; for the smallest matrix, of
    32 x 32, that is within 4 %.
    """
    shape = GPTNeoXConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    weights = {}
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        model = GPTNeoX(shape)
        init_weights(model, seed)
        weights[name] = {key: x.detach() for key, x in model.named_parameters() if x.dim() > 1}

    matrices = list(weights["first"].items())
    for number, (key, x) in enumerate(matrices):
        assert torch.equal(x, weights["again"][key])
        same_shape = [y for _, y in matrices[:number] if y.shape == x.shape]
        for y in [weights["other"][key], *same_shape]:
            assert (x - y).abs().mean() > shape.initializer_range
