"""A reward model as transformers, TRL and others read it: GPTNeoXForSequenceClassification, with the same rewards.

    python -m hub.export out/rm_1b/final out/rm_1b_hf

The head of that class has no bias, and in ours the bias holds the normalisation (detail 15). It need not be lost: the
last LayerNorm is read by the head alone, so the bias b of a head with the weight w can move to the bias of that norm:
w . (LN(x) + b w / |w|^2) = w . LN(x) + b. This is exact up to rounding.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch

from configurator import UserError, require
from hub.companions import write_companions
from hub.config import FIXED
from hub.fetch import find_model
from hub.files import move, write_json
from hub.tokenizer import Tokenizer
from hub.weights import write_safetensors
from model import ScalarModel


@torch.no_grad()
def export_reward_model(source, out_dir):
    """Read a reward model of any kind that ScalarModel loads, write a sequence classifier of one label to `out_dir`.

    Returns the bias that was moved. Raises UserError for a head whose weight is 0, which gives the bias alone, and for
    a tokenizer without a padding token, by which transformers finds a row's last token.
    """
    directory = find_model(source)
    out_dir = Path(out_dir).expanduser()
    require(not out_dir.exists(), f"{out_dir} is there already; choose another directory")
    tokenizer = Tokenizer.load(directory)
    others = {text: id for text, id in tokenizer.special.items() if id != tokenizer.eos_id}
    paddings = [id for text, id in others.items() if "pad" in text.lower()]
    require(paddings, f"{tokenizer.path}: no special token is for padding; add one, as <|padding|>")
    model = ScalarModel.from_pretrained(directory)

    weight = model.score.weight[0].double()
    bias = model.score.bias.double()
    shift = bias * weight / weight.dot(weight)
    if not shift.isfinite().all():
        raise UserError(f"{directory}: the head's weight is 0, its score always {bias.item():g}; nothing to export")
    norm = model.gpt_neox.final_layer_norm
    norm.bias.copy_(norm.bias.double() + shift)

    tensors = model.state_dict()
    del tensors["score.bias"]
    values = {
        "architectures": ["GPTNeoXForSequenceClassification"],
        "torch_dtype": "float32",
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "problem_type": "regression",  # otherwise transformers' pipeline gives the sigmoid of a reward
        "pad_token_id": paddings[0],
        **FIXED,
        **asdict(model.config),
        "eos_token_id": tokenizer.eos_id,
    }
    temporary = out_dir.with_name(f"tmp_{out_dir.name}")
    temporary.mkdir(parents=True, exist_ok=True)
    write_json(temporary / "config.json", values)
    write_safetensors(temporary / "model.safetensors", tensors)
    write_companions(temporary, tokenizer, model.config.max_position_embeddings)
    move(temporary, out_dir)
    return bias.item()


if __name__ == "__main__":
    require(len(sys.argv) == 3, "write: python -m hub.export MODEL OUT")
    moved = export_reward_model(*sys.argv[1:])
    print(f"wrote {sys.argv[2]}: the head's bias, {moved:g}, is now in final_layer_norm.bias; the rewards are the same")
