"""The KL laboratory: three estimators of the KL penalty, in the reward and in the loss, and what each pulls towards.

    python lab/kl.py                         # what has not been run yet; figures and tables into out/lab/kl.md
    python lab/kl.py --jobs=1 --seeds=1      # one process, one seed

Two parts: a policy of three answers, whose gradients are exact, and PPO on the toy. lab/kl.md says what they show.
"""

import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import ppo  # noqa: E402
import sample  # noqa: E402
from configurator import configure  # noqa: E402
from data import Tokenizer  # noqa: E402
from evals import samples  # noqa: E402
from lab import lab, report  # noqa: E402
from model import GPTNeoX  # noqa: E402
from runtime import World, load_model, load_split, stage  # noqa: E402
from variants import kl_estimators  # noqa: E402

BETA = 1.0  # weight of the penalty, in the runs
UPDATES = 20
POSTS = 100  # posts for which both KLs are measured at the end
PENALTIES = [
    ("k1", "reward"),
    ("k2", "reward"),
    ("k3", "reward"),
    ("k1", "loss"),
    ("k2", "loss"),
    ("k3", "loss"),
]
EXACT = [*PENALTIES, ("k1", "weighted_loss"), ("k3", "weighted_loss")]  # in the table of gradients
COLOURS = {"k1": report.BLUE, "k2": report.GREEN, "k3": report.RED}
# Two paths are the same one: the narrow dashes lie on the broad line.
LINES = {"loss": dict(ls="-", lw=3, zorder=3), "reward": dict(ls="--", lw=1.4, zorder=4)}

# ---------------------------------------------------------------------------- a policy of three answers


def exact_gradient(cfg, logits, ref_logits, scores):
    """The mean gradient (V,) of an update's loss, for a policy of V answers of one token each.

    Each answer is a row of the batch that counts as much as it is likely: the mean over all samples, without sampling.
    """
    logprobs = logits.log_softmax(0)[:, None]  # (B, R) = (V, 1)
    ref_logprobs = ref_logits.log_softmax(0)[:, None]
    old = logprobs.detach()
    all_count = torch.ones_like(old, dtype=torch.bool)
    batch = {
        "logprobs": old,
        "ref_logprobs": ref_logprobs,
        "kl": old - ref_logprobs,
        "scores": scores,
        "values": torch.zeros_like(old),
        "mask": all_count,
        "mask_p1": all_count,
    }

    batch = kl_estimators.advantages(cfg, batch, {})
    batch["weights"] = old.exp()
    loss, _ = ppo.actor_loss(cfg, kl_estimators.token_loss, logprobs, batch, total_weight=1.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


def exact_config(estimator, where, beta):
    """Without whitening the advantage of an answer is its reward."""
    return kl_estimators.Config(kl_estimator=estimator, kl_in=where, kl_coef=beta, whiten_advantages=False)


def path(cfg, logits, ref_logits, scores, lr=0.5, steps=600):
    """Gradient descent by `exact_gradient`: the probabilities (steps, V) on its way."""
    logits = logits.clone().requires_grad_()
    points = []
    for _ in range(steps):
        points.append(logits.detach().softmax(0))
        gradient = exact_gradient(cfg, logits, ref_logits, scores)
        with torch.no_grad():
            logits -= lr * gradient
    return torch.stack(points)


def best_policies(ref, scores, beta):
    """What maximises mean score - beta KL(policy || ref), and mean score - beta KL(ref || policy): two times (V,)."""
    reverse = (ref.log() + scores / beta).softmax(0)
    # The second has p_i (s_i - mean score) = beta (p_i - ref_i): p_i = beta ref_i / (c - s_i), and they sum to 1.
    low = scores.max()
    high = low + beta * len(ref)
    for _ in range(100):
        middle = (low + high) / 2
        if (beta * ref / (middle - scores)).sum() > 1:
            low = middle
        else:
            high = middle
    return reverse, beta * ref / (high - scores)


def simplex(points):
    """Probabilities (n, 3) as points of a triangle, (n, 2): the corners are the three answers."""
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
    return np.asarray(points) @ corners


# The reference, the scores of its three answers and the penalty's weight, and a policy far from the reference.
REF = torch.tensor([0.05, 0.15, 0.8], dtype=torch.float64)
SCORES = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
WEIGHT = 0.5
FAR = torch.tensor([0.6, 0.38, 0.02], dtype=torch.float64)


def triangle_figure(rows):
    """Where gradient descent goes by each estimator: without scores from a policy far away, with scores from REF."""
    figure, axes = report.panels(2, 3.1)
    draw_paths(axes[0], FAR, torch.zeros_like(REF), 1.0)
    draw_paths(axes[1], REF, SCORES, WEIGHT)
    axes[0].set_title("no scores: the penalty alone", fontsize=9, pad=14)
    axes[1].set_title("scores 1, 0.5 and 0; beta 0.5", fontsize=9, pad=14)
    best = best_policies(REF, SCORES, WEIGHT)
    for policy, marker, divergence in zip(best, "*P", ("KL(policy || ref)", "KL(ref || policy)")):
        draw_point(axes[1], policy, marker, 10, f"best with\n{divergence}")
    add_legend(figure, axes[1])
    return figure


def add_legend(figure, axis):
    lines, labels = axis.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right center", fontsize=8, frameon=False)


def draw_paths(axis, start, scores, beta):
    """Each estimator's path through the triangle of policies; its end is a point."""
    border = simplex(np.eye(3)[[0, 1, 2, 0]])
    axis.plot(*border.T, color="0.7", lw=1)
    for estimator, where in PENALTIES:
        cfg = exact_config(estimator, where, beta)
        points = simplex(path(cfg, start.log(), REF.log(), scores))
        line = dict(color=COLOURS[estimator], **LINES[where])
        axis.plot(*points.T, label=f"{estimator} in the {where}", **line)
        axis.plot(*points[-1], "o", ms=2 + 2 * line["lw"], **line)
    draw_point(axis, start, "x", 7, "start")
    draw_point(axis, REF, "s", 9, "reference")
    for number, corner in enumerate(simplex(np.eye(3)), 1):
        up = 5 if number == 3 else -12
        place = dict(xytext=(0, up), textcoords="offset points", ha="center")
        axis.annotate(f"answer {number}", corner, fontsize=8, **place)
    axis.set_aspect("equal")
    axis.axis("off")


def draw_point(axis, policy, marker, size, label):
    x, y = simplex(policy)
    axis.plot(x, y, marker, color="k", ms=size, mfc="none" if marker == "s" else "k", ls="", zorder=5, label=label)


def gradients_table(rows):
    """The gradients of a policy with logits 0.5, -0.2, 0.1 and a reference of 0.2, 0.5, 0.3."""
    logits = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    no_scores = torch.zeros_like(reference)
    yield "penalty", "by the first logit", "by the second", "by the third"
    for estimator, where in EXACT:
        cfg = exact_config(estimator, where, beta=1.0)
        cells = [f"{estimator} in the {where.replace('_', ' ')}"]
        for slope in exact_gradient(cfg, logits, reference, no_scores).tolist():
            cells.append(f"{round(slope, 6) + 0.0:.6f}")  # no minus before a zero
        yield cells


# ---------------------------------------------------------------------------- PPO on the toy


def run(seed, name, estimator="k1", where="reward", beta=BETA):
    """PPO with this penalty: its curves, and both KLs of the policy that it ends with."""
    argv = [f"--kl_estimator={estimator}", f"--kl_in={where}", f"--kl_coef={beta}"]
    argv += ["--whiten_advantages=false", f"--episodes={UPDATES * lab.BATCH}"]
    curves = lab.policy(seed, f"kl-{name}", argv, script=kl_estimators)
    both = {}
    final = lab.place(f"kl-{name}", seed) / "final"
    argv = [f"--model={final}", f"--reference={lab.place('sft', seed)}/final", "--response_length=24", "--device=cpu"]
    argv += [lab.data(seed, "sft"), f"--split=validation[:{POSTS}]", f"--seed={seed}"]
    measure_both(configure(sample.Config, argv), both)
    curves.update(both)
    return curves


@stage
def measure_both(cfg, both):
    """KL(policy || reference) by the policy's samples, and KL(reference || policy) by the reference's, go to `both`."""
    world = World(cfg)
    tokenizer = Tokenizer.load(cfg.model)
    policy = load_model(cfg, world, tokenizer, GPTNeoX, cfg.model)
    reference = load_model(cfg, world, tokenizer, GPTNeoX, cfg.reference)
    queries = load_split(cfg, world, tokenizer, cfg.data, cfg.split, n_responses=0)["query"]
    for name, sampler, other in (("reverse", policy, reference), ("forward", reference, policy)):
        responses = samples.sample(cfg, world, tokenizer, sampler, queries)
        ratios = samples.ratio_function(cfg, world, tokenizer, sampler, other)
        sums = samples.measure(cfg, world, functools.partial(summed, ratios), queries, responses)
        both[f"{name}_kl"] = float(np.mean(sums))


def summed(ratios, queries, responses):
    return ratios(queries, responses).sum(1)


ARMS = {"no penalty": functools.partial(run, name="none", beta=0.0)}
for estimator, where in PENALTIES:
    if (estimator, where) == ("k2", "reward"):
        continue  # the triangle says enough of it
    options = dict(name=f"{estimator}-{where}", estimator=estimator, where=where)
    ARMS[f"{estimator} in the {where}"] = functools.partial(run, **options)


def runs_figure(rows):
    """KL and gold over updates, means of the seeds; in the loss: broad lines, in the reward: dashes."""
    figure, axes = report.panels(2, 3.4)
    for arm in ARMS:
        found = report.select(rows, "kl", arm)
        if not found:
            continue
        for axis, name in zip(axes, ("kl", "gold")):
            curves = [report.smooth(row[name]) for row in found]
            axis.plot(np.mean(curves, axis=0), label=arm, **style_of(arm))
            axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set(title="KL(policy || SFT), nats", xlabel="update")
    axes[1].set(title="gold", xlabel="update")
    add_legend(figure, axes[0])
    return figure


def style_of(arm):
    if arm == "no penalty":
        return dict(color="k", ls=":", lw=1.6)
    estimator, where = arm.split(" in the ")
    return dict(color=COLOURS[estimator], **LINES[where])


def runs_table(rows):
    yield "penalty", "KL(policy \\|\\| SFT), end", "KL(SFT \\|\\| policy), end", "score, last five", "gold, last five"
    for arm in ARMS:
        found = report.select(rows, "kl", arm)
        if not found:
            continue
        cells = [arm]
        for name in ("reverse_kl", "forward_kl", "proxy", "gold"):
            ends = [np.mean(row[name]) if "kl" in name else report.end(row[name]) for row in found]
            cells.append(report.mean_and_seeds(ends))
        yield cells


# name: figure, table, needs; as report.ALL
PARTS = {
    "kl_triangle": (triangle_figure, gradients_table, []),
    "kl_runs": (runs_figure, runs_table, ["kl: no penalty", "kl: k1 in the reward"]),
}


if __name__ == "__main__":
    lab.run_page("kl", ARMS, PARTS, __doc__)
