"""The mathematics of the options: numbers worked by hand or published, and float64 NumPy on random inputs.

Two tolerances for float32 results. PRINTED is for numbers that are printed to six decimals: half of the last one,
5e-7, plus float32 rounding (u = 6e-8) of a few values of size 1. NEAR is for random inputs, of size 1 to 10: each
operation leaves u = 6e-8 of that, 6e-7, and none of the formulas has more than some ten of them. EXACT is for
float64 results, u = 1.1e-16: 1e-12 is ten operations on values of size 1,000.
"""

import json
import math

import numpy as np
import pytest
import torch
from pipeline import ROUNDING
from safetensors.torch import load_file

import sft
from configurator import UserError
from data import Tokenizer, batch_indices, load_rows
from dpo import dpo_loss
from evals.tables import accuracy_table
from rm import preference_loss, ranking_loss
from variants import dpo_losses
from variants.ppo_max import normalize_scores

PRINTED = dict(atol=1e-6, rtol=0)
NEAR = dict(atol=1e-5, rtol=1e-5)
EXACT = dict(atol=1e-12, rtol=1e-12)


def t(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def normal(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def check(got, expected, tolerance=NEAR):
    got = got.detach()
    assert got.shape == torch.Size(np.shape(expected))
    np.testing.assert_allclose(got.double().numpy(), np.asarray(expected, dtype=np.float64), **tolerance)


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x):
    """log(1 + e^x), which is -log sigmoid(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def slope(f, x, h=1e-5):
    """Central difference. It is wrong by h^2 f''' / 6 and by 2 u |f| / 2h = 1e-11 |f|."""
    return (f(x + h) - f(x - h)) / (2 * h)


# ---- running moments of the scores -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["scale", "normalize"])
@pytest.mark.parametrize(
    "offset, spread, tolerance",
    # results of size 1 to 10 from float64 moments: NEAR. At 1,000 the scores themselves are a multiple of 6e-5; as
    # they are given to NumPy as float32, only a mean kept in float32 would add an error, of 3e-5 / 0.5 deviations:
    # 1e-4. (Moments as plain float32 sums of squares would lose all: 1e6 u = 0.06 against a variance of 0.25.)
    [(0.7, 2.0, NEAR), (1000.0, 0.5, dict(atol=1e-4, rtol=1e-5))],
)
def test_scores_are_normalized_by_all_so_far(how, offset, spread, tolerance):
    moments = (0, 0.0, 0.0)
    seen = np.zeros(0)
    for seed, size in enumerate([5, 8, 1, 3, 64]):
        scores = offset + seed * spread + normal(size, seed=seed, scale=spread)
        seen = np.concatenate([seen, scores.double().numpy()])
        got, moments = normalize_scores(scores, moments, how)
        assert got.dtype == torch.float32
        shift = seen.mean() if how == "normalize" else 0.0
        check(got, (seen[-size:] - shift) / seen.std(ddof=1), tolerance)
        count, mean, squares = moments
        assert count == len(seen)
        assert mean == pytest.approx(seen.mean(), rel=1e-6)
        assert squares == pytest.approx(((seen - seen.mean()) ** 2).sum(), rel=1e-3)  # 2 x 3e-5 / 0.5, as above


def test_scores_match_hand_example():
    """1, 3: mean 2, variance 2. Then 5: mean 3, variance 4."""
    got, moments = normalize_scores(t([1.0, 3.0]), (0, 0.0, 0.0), "normalize")
    check(got, [-math.sqrt(0.5), math.sqrt(0.5)], PRINTED)
    assert moments == pytest.approx((2, 2.0, 2.0), abs=1e-6)
    check(normalize_scores(t([5.0]), moments, "normalize")[0], [1.0], PRINTED)
    check(normalize_scores(t([5.0]), moments, "scale")[0], [2.5], PRINTED)


@pytest.mark.parametrize("how", ["scale", "normalize"])
@pytest.mark.parametrize("score, size", [(0.0, 4), (2.0, 4), (0.1, 7), (-1.3, 3), (2.0, 1)])
def test_equal_first_scores_give_finite_numbers(how, score, size):
    first = torch.full((size,), score)
    second = normal(6, scale=2)
    got, moments = normalize_scores(first, (0, 0.0, 0.0), how)
    assert got.isfinite().all()
    if how == "normalize":  # a mean in float64 leaves 1e-16, and no floor of the deviation would make 1e-6 of that
        check(got, [0.0] * size, PRINTED)
    seen = np.concatenate([first.double().numpy(), second.double().numpy()])
    shift = seen.mean() if how == "normalize" else 0.0
    check(normalize_scores(second, moments, how)[0], (seen[-6:] - shift) / seen.std(ddof=1))


# ---- preferences with noisy labels -----------------------------------------------------------------------


@pytest.mark.parametrize("difference, probability", [(0.0, 0.5), (1.0, 0.707953), (2.0, 0.842717)])
def test_noisy_preference_matches_published_probabilities(difference, probability):
    """arXiv:1706.03741: a tenth of the labels is the toss of a coin."""
    loss = preference_loss(t([difference - 3]), t([-3.0]), noise=0.1)
    check(torch.exp(-loss), [probability], PRINTED)


@pytest.mark.parametrize("noise", [0.1, 0.4])
def test_noisy_preference_matches_loop_and_gradient(noise):
    """In float64: the loss and both gradients against central differences, with one soft target per pair.

    The loss is below 20 and its third derivative below 1, so that slope() is right to 1e-10 / 6 + 2e-10."""
    chosen, rejected = (normal(9, seed=seed, scale=3, dtype=torch.float64).requires_grad_() for seed in (0, 1))
    targets = [1.0, 0.5, 0.7, 0.6, 1.0, 0.3, 0.0, 0.9, 0.55]

    def pair(d, p):
        yes, no = (sum([(1 - noise) * sigmoid(x), noise * 0.5]) for x in (d, -d))
        return -p * math.log(yes) - (1 - p) * math.log(no)

    differences = (chosen - rejected).tolist()
    loss = preference_loss(chosen, rejected, t(targets, torch.float64), noise)
    check(loss, [pair(d, p) for d, p in zip(differences, targets)], EXACT)
    loss.sum().backward()
    slopes = [slope(lambda x, p=p: pair(x, p), d) for d, p in zip(differences, targets)]
    check(chosen.grad, slopes, dict(atol=1e-9, rtol=0))
    check(rejected.grad, [-x for x in slopes], dict(atol=1e-9, rtol=0))


def test_noise_bounds_the_loss_of_a_wrong_margin():
    """-log(0.1 / 2) = 2.995732 and no gradient, where the plain loss is 1,000 with gradient -1."""
    chosen = t([-1000.0, 1000.0]).requires_grad_()
    loss = preference_loss(chosen, t([0.0, 0.0]), noise=0.1)
    check(loss, [2.995732, -math.log(0.95)], PRINTED)
    loss.sum().backward()
    check(chosen.grad, [0, 0], PRINTED)


def test_labels_of_pure_noise_teach_nothing():
    chosen = normal(5, scale=4).requires_grad_()
    loss = preference_loss(chosen, normal(5, seed=1), noise=1.0)
    check(loss, [math.log(2)] * 5, PRINTED)
    loss.sum().backward()
    assert not chosen.grad.any()


# ---- rankings of different lengths -----------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0.0, 1e9, -1e9])
def test_padded_ranking_matches_published_number(padding):
    """(log(1 + e^-1) twice, log(1 + e^-2) once) / 3; the first response gains -(0.268941 + 0.119203) / 3."""
    rewards = t([[2.0, 1.0, 0.0, padding, padding], [0.5, -0.5, padding, padding, padding]]).requires_grad_()
    loss = ranking_loss(rewards, counts=torch.tensor([3, 2]))
    check(loss, [0.251150, 0.313262], PRINTED)
    loss.sum().backward()
    expected = [[-0.129381, 0, 0.129381, 0, 0], [-0.268941, 0.268941, 0, 0, 0]]
    check(rewards.grad, expected, PRINTED)
    assert not rewards.grad[0, 3:].any()
    assert not rewards.grad[1, 2:].any()


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("padding", [0.0, 1e9])
def test_ragged_ranking_matches_loop_and_gradient(padding, noise):
    """In float64; the mean over pairs is below 20, its third derivative below 1: see the pairs above."""
    counts = [2, 6, 3, 5, 4]
    targets = [1.0, 0.9, 0.5, 1.0, 0.6]
    rewards = normal(5, 6, scale=2, dtype=torch.float64)

    def row_loss(row, p):
        losses = []
        for i in range(len(row)):
            for j in range(i + 1, len(row)):
                d = row[i] - row[j]
                yes, no = ((1 - noise) * sigmoid(x) + noise / 2 for x in (d, -d))
                losses.append(-p * math.log(yes) - (1 - p) * math.log(no))
        return sum(losses) / len(losses)

    expected = []
    grad = np.zeros((5, 6))
    for b, (n, p) in enumerate(zip(counts, targets)):
        row = rewards[b, :n].tolist()
        expected.append(row_loss(row, p))
        for j in range(n):
            grad[b, j] = slope(lambda x, j=j, row=row, p=p: row_loss([*row[:j], x, *row[j + 1 :]], p), row[j])
        rewards[b, n:] = padding
    rewards.requires_grad_()
    loss = ranking_loss(rewards, t(targets, torch.float64)[:, None], torch.tensor(counts), noise)
    check(loss, expected, EXACT)
    loss.sum().backward()
    check(rewards.grad, grad, dict(atol=1e-9, rtol=0))


# ---- DPO's other losses ----------------------------------------------------------------------------------

# c = 1, r = -0.5, beta = 0.1, lengths 10 and 5
DPO_TABLE = [
    ("sigmoid", 0.0, 0.620957), ("sigmoid", 0.1, 0.635957), ("hinge", 0.0, 0.85), ("ipo", 0.0, 12.25),
    ("ipo_norm", 0.0, 23.04), ("exo_pair", 1e-3, 2.505517), ("nca_pair", 0.0, 1.350825), ("robust", 0.1, 0.602207),
    ("bco_pair", 0.0, 1.312856), ("sppo_hard", 0.0, 36.25), ("apo_zero", 0.0, 0.962523), ("apo_down", 0.0, 0.987549),
    ("discopop", 0.0, 0.849338), ("sigmoid_norm", 0.0, 0.683197),
]  # fmt: skip


# log-ratios c and r of the chosen and the rejected response, beta, smoothing, their lengths -> the loss
DPO_FORMULAS = {
    "sigmoid": lambda c, r, b, e, m, n: (1 - e) * softplus(-b * (c - r)) + e * softplus(b * (c - r)),
    "robust": lambda c, r, b, e, m, n: ((1 - e) * softplus(b * (r - c)) - e * softplus(b * (c - r))) / (1 - e - e),
    "hinge": lambda c, r, b, e, m, n: max(0.0, 1 - b * c + b * r),
    "ipo": lambda c, r, b, e, m, n: (c - r - 0.5 / b) ** 2,
    "ipo_norm": lambda c, r, b, e, m, n: (c / m - r / n - 0.5 / b) ** 2,
    "apo_zero": lambda c, r, b, e, m, n: sigmoid(-b * c) + sigmoid(b * r),
    "apo_down": lambda c, r, b, e, m, n: sigmoid(b * c) + sigmoid(b * r - b * c),
    "sigmoid_norm": lambda c, r, b, e, m, n: (
        (1 - e) * softplus(b * r / n - b * c / m) + e * softplus(b * c / m - b * r / n)
    ),
    "exo_pair": lambda c, r, b, e, m, n: sum(
        sigmoid(x) * (-softplus(-x) - math.log(p)) for x, p in ((b * (c - r), 1 - e), (b * (r - c), e))
    ),
    "nca_pair": lambda c, r, b, e, m, n: softplus(-b * c) + (softplus(b * c) + softplus(b * r)) / 2,
    "bco_pair": lambda c, r, b, e, m, n: softplus(-b * c) + softplus(b * r),
    "sppo_hard": lambda c, r, b, e, m, n: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "discopop": lambda c, r, b, e, m, n: (
        sigmoid(20 * b * (r - c)) * softplus(b * (r - c)) + sigmoid(20 * b * (c - r)) * math.exp(b * (r - c))
    ),
}
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair")


def family_loss(loss_type, smoothing, beta, logprobs, ref_logprobs, lengths):
    """Losses (B,) and implicit rewards (B, 2) of log-probabilities and lengths (B, 2), chosen and rejected."""
    cfg = dpo_losses.Config(loss_type=loss_type, label_smoothing=smoothing, beta=beta)
    dpo_losses.check_losses(cfg)
    wrong = torch.full_like(logprobs[:, 0], smoothing)
    return dpo_losses.pair_loss(cfg, logprobs, {"ref_logprobs": ref_logprobs, "lengths": lengths, "smoothing": wrong})


@pytest.mark.parametrize("loss_type, smoothing, loss", DPO_TABLE)
def test_dpo_loss_of_each_type_matches_table(loss_type, smoothing, loss):
    lengths = torch.tensor([[10, 5]])
    losses, rewards = family_loss(loss_type, smoothing, 0.1, t([[-9.0, -20.5]]), t([[-10.0, -20.0]]), lengths)
    # the largest, 36.25, is rounded by 4e-6
    check(losses, [loss], PRINTED if loss < 10 else NEAR)
    check(rewards, [[0.1, -0.05]], PRINTED)


@pytest.mark.parametrize(
    "loss_type, smoothing",
    [(name, 0.0) for name in DPO_FORMULAS if name != "exo_pair"] + [(name, 0.2) for name in SMOOTHED],
)
def test_dpo_loss_of_each_type_matches_formula_and_gradient(loss_type, smoothing):
    """In float64, at log-ratios of size 3 and beta 0.3; the gradients of all four inputs by central differences.

    Losses are below 100: slope() adds 1e-9. Third derivatives are below 1, and with h^2 / 6 add less than 1e-9, so
    that 1e-7 is enough for all but discopop, whose sigmoid is 20 times as steep: (20 beta)^3 of its third derivative,
    0.13, times a factor that is below 100, adds 5e-8 to 5e-7. Hinge has a kink: no input is within 1e-3 of it."""
    beta = 0.3
    n = 40
    formula = DPO_FORMULAS[loss_type]
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = (
        normal(n, seed=seed, scale=3, dtype=torch.float64).requires_grad_() for seed in range(4)
    )
    lengths = torch.randint(1, 9, (n, 2), generator=torch.Generator().manual_seed(4))
    chosen_ratios = (policy_chosen - ref_chosen).tolist()
    rejected_ratios = (policy_rejected - ref_rejected).tolist()
    losses = []
    by_chosen = []
    by_rejected = []
    for chosen, rejected, of_both in zip(chosen_ratios, rejected_ratios, lengths.tolist()):
        assert abs(1 - beta * (chosen - rejected)) > 1e-3
        rest = (beta, smoothing, *of_both)
        losses.append(formula(chosen, rejected, *rest))
        by_chosen.append(slope(lambda x, r=rejected, rest=rest: formula(x, r, *rest), chosen))
        by_rejected.append(slope(lambda x, c=chosen, rest=rest: formula(c, x, *rest), rejected))

    logprobs = torch.stack((policy_chosen, policy_rejected), 1)
    ref_logprobs = torch.stack((ref_chosen, ref_rejected), 1)
    got, rewards = family_loss(loss_type, smoothing, beta, logprobs, ref_logprobs, lengths)
    check(got, losses, EXACT)
    check(rewards[:, 0], beta * np.array(chosen_ratios), EXACT)
    check(rewards[:, 1], beta * np.array(rejected_ratios), EXACT)
    got.sum().backward()
    near = dict(atol=1e-6 if loss_type == "discopop" else 1e-7, rtol=0)
    check(policy_chosen.grad, by_chosen, near)
    check(policy_rejected.grad, by_rejected, near)
    check(ref_chosen.grad, -np.array(by_chosen), near)
    check(ref_rejected.grad, -np.array(by_rejected), near)


def test_robust_dpo_undoes_flipped_labels():
    """Of labels of which a share is flipped, its mean is the plain loss of the true ones (arXiv:2403.00409)."""
    flipped_share = 0.3
    better = torch.stack((normal(7, scale=5), torch.zeros(7)), 1)
    ref = torch.stack((normal(7, seed=1, scale=5), torch.zeros(7)), 1)
    lengths = torch.ones(7, 2)
    right, _ = family_loss("robust", flipped_share, 0.5, better, ref, lengths)
    flipped, _ = family_loss("robust", flipped_share, 0.5, better.flip(1), ref.flip(1), lengths)
    margins = (better - ref)[:, 0].tolist()
    mean = (1 - flipped_share) * right + flipped_share * flipped
    check(mean, [softplus(-0.5 * margin) for margin in margins])


@pytest.mark.parametrize(
    "loss_type, smoothing",
    [("IPO", 0.0), ("", 0.0), ("sigmoid", 0.5), ("robust", 0.5), ("robust", 0.7), ("exo_pair", 0.0)]
    + [(name, 0.1) for name in DPO_FORMULAS if name not in SMOOTHED],
)  # fmt: skip
def test_dpo_loss_refuses_what_makes_no_sense(loss_type, smoothing):
    """No such loss; a smoothing that the type has no use for, or needs; labels that are mostly wrong."""
    x = normal(2)
    pair = torch.stack((x, x), 1)
    refusals = [
        lambda: dpo_loss(x, x, x, x, 0.1, loss_type, smoothing),
        lambda: family_loss(loss_type, smoothing, 0.1, pair, pair, torch.ones(2, 2)),
    ]
    for refusal in refusals:
        with pytest.raises(UserError) as error:
            refusal()
        assert isinstance(error.value, SystemExit)
        assert "\n" not in str(error.value)
        assert str(error.value).strip()
        assert loss_type in str(error.value)


def test_dpo_losses_add_up_with_their_weights():
    """MPO: sigmoid, bco_pair and sft at 0.8, 0.2 and 1; the last is no part of it, but dpo.py's sft_coef."""
    cfg = dpo_losses.Config(loss_type="sigmoid,bco_pair,sft", loss_weights="0.8,0.2,1", beta=0.1)
    dpo_losses.check_losses(cfg)
    assert dpo_losses.weights_of(cfg) == {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    micro = {"ref_logprobs": t([[-10.0, -20.0]]), "lengths": t([[10, 5]]), "smoothing": t([0.0])}
    losses, _ = dpo_losses.pair_loss(cfg, t([[-9.0, -20.5]]), micro)
    check(losses, [0.8 * 0.620957 + 0.2 * 1.312856], PRINTED)


@pytest.mark.parametrize(
    "loss_type, loss_weights, message",
    [
        ("sigmoid,ipo", "1", "names 2 losses, loss_weights 1 weights; give one for each"),
        ("sigmoid,ipo", "1,much", "'1,much' are no numbers"),
        ("sigmoid,sofa", "", "'sofa' is not known; use sft, sigmoid, robust, "),
    ],
)
def test_dpo_weights_must_fit_the_losses(loss_type, loss_weights, message):
    with pytest.raises(UserError, match=message):
        dpo_losses.check_losses(dpo_losses.Config(loss_type=loss_type, loss_weights=loss_weights))


# ---- TensorFlow's Adam -----------------------------------------------------------------------------------

ADAM = dict(scratch=False, eval_split="", schedule="constant", lr=1e-3, adam_eps=1e-3, weight_decay=0.0,
            loss_on="response", reduction="token")  # fmt: skip


def adam(style, grads, lr, eps, beta1=0.9, beta2=0.999):
    """How the last of the updates with the gradients `grads` moves a weight, in float64."""
    mean = 0.0
    square = 0.0
    for grad in grads:
        mean = beta1 * mean + (1 - beta1) * grad
        square = beta2 * square + (1 - beta2) * grad**2
    mean_weights = 1 - beta1 ** len(grads)
    square_weights = 1 - beta2 ** len(grads)
    if style == "tf":
        return -lr * math.sqrt(square_weights) / mean_weights * mean / (np.sqrt(square) + eps)
    return -lr * (mean / mean_weights) / (np.sqrt(square / square_weights) + eps)


def response_gradients(model, rows):
    """Of the mean of -log p over all response tokens: one row at a time, in float64, by transformers' model."""
    model.zero_grad()
    total = 0
    n_tokens = 0
    for query, responses in zip(rows["query"], rows["responses"]):
        ids = query + responses[0]
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
        for position in range(len(query), len(ids)):
            total = total - logprobs[position - 1, ids[position]]
            n_tokens += 1
    (total / n_tokens).backward()
    return {hub_name(name): parameter.grad.numpy() for name, parameter in model.named_parameters()}


def hub_name(name):
    """transformers 5 says lm_head in memory."""
    return name.replace("lm_head", "embed_out")


@pytest.mark.parametrize("style", ["tf", "torch"])
def test_two_updates_match_adam(style, pipeline):
    """Every weight after two updates, against gradients of transformers' model and Adam in NumPy.

    The float32 run's gradients are off by d = ROUNDING (the pipeline's) of the largest of the tensor. An update is
    lr m / (sqrt(v) + e) with the corrected m and v; e is eps, for tf at least eps / sqrt(1 - 0.999^2) = 22 eps. As
    |m| <= 1.002 sqrt(v), d in both gradients moves the quotient by at most d / e through m and d / e through v, in
    each of two updates: 4 lr d / e. Storing a weight twice adds 2 u |w|. eps is large because it is what the styles
    differ in: here the other style is off by more than 100 tolerances in every tensor."""
    transformers = pytest.importorskip("transformers")
    cfg = pipeline.config(sft, f"adam_{style}", model=str(pipeline.sft), adam_style=style, **ADAM)
    sft.main(cfg)
    before, after = (load_file(f"{path}/model.safetensors") for path in (pipeline.sft, f"{cfg.out_dir}/final"))
    rows = load_rows(cfg.data, "train", Tokenizer.load(str(pipeline.sft)), 1)
    model = transformers.GPTNeoXForCausalLM.from_pretrained(pipeline.sft, dtype=torch.float64)
    weights = {hub_name(name): weight for name, weight in model.named_parameters()}
    history = []
    for step in range(2):
        history.append(response_gradients(model, rows[batch_indices(len(rows), cfg.batch_size, step, cfg.seed)]))
        with torch.no_grad():
            for name, weight in weights.items():
                weight += torch.from_numpy(adam(style, [grads[name] for grads in history], cfg.lr, cfg.adam_eps))
    e = cfg.adam_eps / (math.sqrt(1 - 0.999**2) if style == "tf" else 1.0)
    wrong_style = "torch" if style == "tf" else "tf"
    for name, weight in weights.items():
        grads = [step[name] for step in history]
        rounding = 2 * 6e-8 * before[name].abs().max().item()
        tolerance = 4 * cfg.lr * ROUNDING * max(np.abs(g).max() for g in grads) / e + rounding
        np.testing.assert_allclose(after[name].double().numpy(), weight.detach().numpy(), rtol=0, atol=tolerance)
        other = sum(adam(wrong_style, grads[:n], cfg.lr, cfg.adam_eps) for n in (1, 2))
        moved = (weight.detach() - before[name].double()).numpy()
        assert np.abs(other - moved).max() > 100 * tolerance, name
    assert len(after) == len(weights)


def test_tf_adam_begins_more_gently(pipeline):
    """The first update is lr g / (|g| + eps) in PyTorch's form and lr g / (|g| + eps / sqrt(0.001)) in TensorFlow's.

    So the first tells g, and with it the second. An error x of the first move is one of (|g| + eps)^2 / eps x / lr in
    g, and so one of less than x / sqrt(0.001) = 32 x in the second. A move is off by u |w|, where the new weight is
    stored, and by some u lr of its own arithmetic, less than as much again: 2 (32 + 1) u |w| in all."""
    moves = {}
    for style in ("torch", "tf"):
        name = f"gentle_{style}"
        cfg = pipeline.config(sft, name, model=str(pipeline.sft), adam_style=style, episodes=8, **ADAM)
        sft.main(cfg)
        before, after = (load_file(f"{path}/model.safetensors") for path in (pipeline.sft, f"{cfg.out_dir}/final"))
        moves[style] = {key: (after[key].double() - before[key].double()).numpy() for key in before}
    for key, torch_move in moves["torch"].items():
        tolerance = 2 * 33 * 6e-8 * np.abs(before[key].numpy()).max()
        assert tolerance < cfg.lr / 100
        x = np.abs(torch_move) / cfg.lr
        assert x.max() < 1
        g = cfg.adam_eps * x / (1 - x)
        expected = np.sign(torch_move) * cfg.lr * g / (g + cfg.adam_eps / math.sqrt(0.001))
        np.testing.assert_allclose(moves["tf"][key], expected, rtol=0, atol=tolerance)
        moved = np.abs(torch_move) > tolerance
        assert moved.any()
        assert (np.abs(moves["tf"][key]) < np.abs(torch_move))[moved].all()


# ---- rows with rankings and soft targets -----------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(pipeline):
    return Tokenizer.load(str(pipeline.data))


def rows_of(tmp_path, tokenizer, rows, *n_responses, **options):
    path = tmp_path / "x_train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(str(path), "train", tokenizer, *n_responses, **options)


def texts(row, tokenizer):
    return [tokenizer.decode(ids) for ids in row["responses"]]


RANKINGS = [[" best", " middle", " a much longer worst one"], [" yes", " no"], [" a", " b", " c", " d", " e"]]


def test_ranked_rows_keep_all_responses(tokenizer, tmp_path):
    data = [{"prompt": f"say {i}:", "responses": ranking} for i, ranking in enumerate(RANKINGS)]
    rows = rows_of(tmp_path, tokenizer, data, 2, ranked=True)
    assert [texts(row, tokenizer) for row in rows] == RANKINGS
    for i, row in enumerate(rows):
        assert tokenizer.decode(row["query"]) == f"say {i}:"
        assert all(ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1] for ids in row["responses"])
        assert row["length"] == len(row["query"]) + max(map(len, row["responses"]))
        assert row["target"] == 1.0


@pytest.mark.parametrize("n", [1, 2])
def test_other_stages_keep_the_best_of_a_ranking(n, tokenizer, tmp_path):
    rows = rows_of(tmp_path, tokenizer, [{"prompt": "say:", "responses": ranking} for ranking in RANKINGS], n)
    assert [texts(row, tokenizer) for row in rows] == [ranking[:n] for ranking in RANKINGS]
    for row in rows:  # of those that are kept
        assert row["length"] == len(row["query"]) + max(map(len, row["responses"]))


@pytest.mark.parametrize("schema", ["responses", "chosen and rejected"])
def test_target_below_a_half_swaps_the_pair(schema, tokenizer, tmp_path):
    def pair(**target):
        if schema == "responses":
            return {"prompt": "say:", "responses": [" one", " two"], **target}
        return {"prompt": "say:", "chosen": " one", "rejected": " two", **target}

    given = [0.3, 0.5, 0.8, 0.0, 1.0, 0.499]
    rows = rows_of(tmp_path, tokenizer, [*(pair(target=p) for p in given), pair()], 2)
    same = [" one", " two"]
    swapped = [" two", " one"]
    assert [texts(row, tokenizer) for row in rows] == [swapped, same, same, swapped, same, swapped, same]
    # 1 - p is rounded once; float32 would leave 6e-8
    assert list(rows["target"]) == pytest.approx([0.7, 0.5, 0.8, 1.0, 1.0, 0.501, 1.0], abs=1e-7)
    best = rows_of(tmp_path, tokenizer, [pair(target=0.3)], 1)  # as a demonstration: the better one
    assert texts(best[0], tokenizer) == [" two"]


NOT_PROBABILITIES = [1.01, -0.2, "high", float("nan"), float("inf"), [0.7]]


@pytest.mark.parametrize(
    "target, others",
    [(target, others) for others in ({}, {"target": 0.7}) for target in NOT_PROBABILITIES]
    + [("0.7", {})],  # (among numbers the reader makes a number of it)
)
def test_bad_target_is_one_line(target, others, tokenizer, tmp_path):
    pair = {"prompt": "say:", "chosen": " one", "rejected": " two"}
    with pytest.raises(UserError, match="line 3: target") as error:
        rows_of(tmp_path, tokenizer, [{**pair, **others}, {**pair, **others}, {**pair, "target": target}], 2)
    assert "\n" not in str(error.value)


# ---- the table of accuracies -----------------------------------------------------------------------------


def test_accuracy_table_matches_loop():
    """Counts are exact; the means of some 200 sigmoids in float32 are right to 1e-6."""
    import datasets

    rng = np.random.default_rng(0)
    n = 240
    margins = rng.normal(0.4, 1.2, n).astype(np.float32)
    margins[:3] = 0.5, -0.5, 0.0  # on the edges of bins; of equal scores neither is higher
    rows = dict(
        batch=[f"batch{i}" for i in rng.integers(2, 5, n)], confidence=rng.integers(0, 10, n).tolist(),
        policies=[("a / b", "b / c")[i] for i in rng.integers(0, 2, n)],
        target=[(0.5, 0.7, 1.0)[i] for i in rng.integers(0, 3, n)],
    )  # fmt: skip
    rows["target"][:3] = [1.0] * 3
    groups = {}
    for i, margin in enumerate(margins.tolist()):
        if rows["target"][i] == 0.5:
            continue
        low = math.floor(abs(margin) / 0.5) * 0.5
        names = ["all", f"batch {rows['batch'][i]}", f"policies {rows['policies'][i]}",
                 f"margin {low:.1f} to {low + 0.5:.1f}"]  # fmt: skip
        if rows["confidence"][i]:
            names.append(f"|confidence - 5| {abs(rows['confidence'][i] - 5)}")
        for name in names:
            groups.setdefault(name, []).append(margin)
    assert len(groups["all"]) < n
    assert len(groups) > 15
    got = accuracy_table(datasets.Dataset.from_dict(rows), torch.from_numpy(margins))
    assert set(got) == set(groups)
    for name, inside in groups.items():
        expected = dict(
            accuracy=np.mean([margin > 0 for margin in inside]),
            expected=np.mean([sigmoid(abs(margin)) for margin in inside]), n=len(inside),
        )  # fmt: skip
        assert got[name] == pytest.approx(expected, abs=1e-6), name


def test_accuracy_of_calibrated_margins_is_what_they_promise():
    """Of margins log 3, a quarter negative: 3 of 4 are right, and sigmoid(log 3) = 3 / 4. A tie changes nothing."""
    import datasets

    margins = math.log(3) * t([1.0, 1.0, -1.0, 1.0, -1.0])
    rows = dict(batch=["x"] * 5, confidence=[9, 1, 8, 0, 9], policies=["a / b"] * 5, target=[1.0, 0.9, 0.6, 1.0, 0.5])
    table = accuracy_table(datasets.Dataset.from_dict(rows), margins)
    pairs = dict(accuracy=0.75, expected=0.75, n=4)
    assert table == {
        "all": pytest.approx(pairs), "batch x": pytest.approx(pairs), "policies a / b": pytest.approx(pairs),
        "margin 1.0 to 1.5": pytest.approx(pairs),
        "|confidence - 5| 4": pytest.approx(dict(accuracy=1.0, expected=0.75, n=2)),
        "|confidence - 5| 3": pytest.approx(dict(accuracy=0.0, expected=0.75, n=1)),
    }  # fmt: skip
