"""The losses of DPO's family, each from the implicit rewards of a pair, for variants/dpo_losses.py.

    loss(chosen, rejected, smoothing, beta) -> (B,)

chosen, rejected (B,): beta (log policy - log reference), summed over the response. smoothing, a number or (B,): the
probability that the label is wrong, for those that have a use for it.
"""

import torch
import torch.nn.functional as F


def sigmoid(chosen, rejected, smoothing, beta):
    """arXiv:2305.18290 eq. 7; with smoothing: cDPO, or soft labels."""
    margin = chosen - rejected
    right = F.logsigmoid(margin)
    wrong = F.logsigmoid(-margin)
    return -(1 - smoothing) * right - smoothing * wrong


def robust(chosen, rejected, smoothing, beta):
    """The sigmoid loss, unbiased if labels are wrong with that probability. (arXiv:2403.00409)"""
    margin = chosen - rejected
    right = F.logsigmoid(margin)
    wrong = F.logsigmoid(-margin)
    losses = -(1 - smoothing) * right + smoothing * wrong
    return losses / (1 - 2 * smoothing)


def exo_pair(chosen, rejected, smoothing, beta):
    """The reverse KL from the smoothed label to the policy's choice. (arXiv:2402.00856 eq. 16)"""
    margin = chosen - rejected
    right = F.logsigmoid(margin)
    wrong = F.logsigmoid(-margin)
    right_part = right.exp() * (right - torch.log1p(-smoothing))
    wrong_part = wrong.exp() * (wrong - torch.log(smoothing))
    return right_part + wrong_part


def hinge(chosen, rejected, smoothing, beta):
    """arXiv:2309.06657, hinge-norm."""
    margin = chosen - rejected
    return F.relu(1 - margin)


def ipo(chosen, rejected, smoothing, beta):
    """arXiv:2310.12036 eq. 17."""
    margin = chosen - rejected
    return ((margin - 0.5) / beta) ** 2


def nca_pair(chosen, rejected, smoothing, beta):
    """Chosen responses rise, and both fall a little. (arXiv:2402.05369)"""
    rises = F.logsigmoid(chosen)
    falls = F.logsigmoid(-chosen) + F.logsigmoid(-rejected)
    return -rises - 0.5 * falls


def bco_pair(chosen, rejected, smoothing, beta):
    """A classifier of single responses. (arXiv:2404.04656; without its running mean, as in newer versions of TRL)"""
    is_chosen = F.logsigmoid(chosen)
    is_rejected = F.logsigmoid(-rejected)
    return -is_chosen - is_rejected


def sppo_hard(chosen, rejected, smoothing, beta):
    """Implicit rewards of 1/2 and -1/2. (arXiv:2405.00675)"""
    chosen_error = (chosen - 0.5) / beta
    rejected_error = (rejected + 0.5) / beta
    return chosen_error**2 + rejected_error**2


def apo_zero(chosen, rejected, smoothing, beta):
    """Chosen responses become likelier, rejected ones less likely. (arXiv:2408.06266)"""
    chosen_rises = 1 - torch.sigmoid(chosen)
    rejected_falls = torch.sigmoid(rejected)
    return chosen_rises + rejected_falls


def apo_down(chosen, rejected, smoothing, beta):
    """Both become less likely, rejected ones more so. (arXiv:2408.06266)"""
    chosen_falls = torch.sigmoid(chosen)
    margin_rises = 1 - torch.sigmoid(chosen - rejected)
    return chosen_falls + margin_rises


def discopop(chosen, rejected, smoothing, beta):
    """A blend of the logistic and the exponential loss that a language model found. (arXiv:2406.08414)

    Between margins of -0.12 and 0.07 it pushes the margin down; a run begins at 0.
    """
    margin = chosen - rejected
    share = torch.sigmoid(margin / 0.05)
    logistic = -F.logsigmoid(margin)
    exponential = torch.exp(-margin)
    return (1 - share) * logistic + share * exponential


NAMED = (sigmoid, robust, exo_pair, hinge, ipo, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, discopop)
LOSSES = {loss.__name__: loss for loss in NAMED}
