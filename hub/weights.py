"""Weights in the hub's layout: safetensors, of which a process reads only its own rows."""

import glob
import json
import os
import re

import torch
from safetensors import SafetensorError, safe_open

from configurator import UserError, explain, require
from hub.config import read_config
from hub.files import read_json, what_lies_at
from hub.missing import no_model

# Masks and rotary tables that old Pythia files carry along; they hold nothing that was learned.
BUFFERS = re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)")
FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}  # by their names in safetensors


def weight_files(directory):
    """Map each stored tensor's name to its file: by the index if there is one, else all that the files hold."""
    index = os.path.join(directory, "model.safetensors.index.json")
    files = {}
    if not os.path.exists(index):
        for path in whole_model(directory):
            files.update(dict.fromkeys(open_weights(path).keys(), path))
        return files
    incomplete = f"{index}: no weight_map; download it again"
    with explain(incomplete, LookupError, TypeError, AttributeError):
        for name, file in read_json(index)["weight_map"].items():
            files[name] = os.path.join(directory, os.path.basename(file))
    return files


def whole_model(directory):
    """The path of model.safetensors, or those of model-00001-of-0000N.safetensors and so on if all N are there."""
    names = ["model.safetensors"]
    if not os.path.exists(os.path.join(directory, names[0])):
        names = sorted(glob.glob("model-*-of-*.safetensors", root_dir=directory))
        n = len(names)
        whole = [f"model-{number:05}-of-{n:05}.safetensors" for number in range(1, n + 1)]
        if not names or names != whole:
            raise no_model(directory, "model.safetensors")
    return [os.path.join(directory, name) for name in names]


def open_weights(path):
    require(os.path.exists(path), f"{path}: is not there; {what_lies_at(path)}; copy it from where the others are")
    unreadable = f"{path}: cannot be read as safetensors; copy it again (or, after git clone: git lfs pull)"
    with explain(unreadable, OSError, ValueError, SafetensorError):
        return safe_open(path, framework="pt")


@torch.no_grad()
def load_weights(model, directory, new_head=False):
    """Fill `model` from `directory`; a sharded parameter reads only its own rows from the file.

    new_head: take the body alone, from a model of either kind, and leave the head as it is.
    Raises UserError if a tensor is missing, unexpected, mis-shaped or not finite, or a file is unreadable.
    """
    config = read_config(directory)
    wanted = model.state_dict()
    files = weight_files(directory)
    # Where a tensor is stored under both of its names, that of the hub counts, and the other is told.
    hub_last = sorted(files, key=lambda name: name == hub_name(name))
    names = {hub_name(name): name for name in hub_last}
    refuse_names("unexpected", files.keys() - names.values(), model, directory)
    if new_head:
        wanted = body_of(wanted)
        names = body_of(names)
    stored = {name for name in names if not BUFFERS.fullmatch(name)}
    missing = wanted.keys() - stored
    if config.get("architectures") == ["GPTNeoXForSequenceClassification"]:
        missing.discard("score.bias")  # The head of transformers has none.
    refuse_names("missing", missing, model, directory)
    refuse_names("unexpected", stored - wanted.keys(), model, directory)

    handles = {path: open_weights(path) for path in set(files.values())}
    for name, tensor in wanted.items():
        if name not in names:
            copy_rows(tensor, torch.zeros(tensor.shape))
            continue
        path = files[names[name]]
        with explain(f"{path}: has no tensor {name}; the index does not fit its files", SafetensorError):
            source = handles[path].get_slice(names[name])
            shape = tuple(source.get_shape())
            dtype = source.get_dtype()
        found = f"{path}: {name} is {dtype} of shape {shape}"
        asker = "a reward model" if name.startswith("score.") else "config.json"
        asked = f"{asker} asks for floats of shape {tuple(tensor.shape)}"
        require(shape == tensor.shape and dtype in FLOATS.values(), f"{found}, but {asked}")
        local = copy_rows(tensor, source)
        if name == "score.bias":
            local.sub_(config.get("mean_reward", 0.0))
        require(local.isfinite().all(), f"{path}: {name} is not finite everywhere; copy it again")


def hub_name(name):
    """The hub's name of a tensor that has another one in reward models of arXiv:2403.17031, or in memory."""
    name = re.sub(r"^lm_backbone\.", "gpt_neox.", name)
    # transformers 5 has another name in memory than in its files: distributed checkpoints hold the former.
    name = re.sub(r"^lm_head\.", "embed_out.", name)
    return re.sub(r"^scalar_head\.", "score.", name)


def body_of(tensors):
    """Those of the body, whose names GPTNeoX and ScalarModel share."""
    return {name: value for name, value in tensors.items() if name.startswith("gpt_neox.")}


def refuse_names(problem, names, model, directory):
    if names:
        some = ", ".join(sorted(names)[:4])
        which = f"{problem} {some} ({len(names)} in all)"
        raise UserError(f"{directory}: {which}, for a {model.architecture}; is it another model?")


def copy_rows(tensor, source):
    """Copy into `tensor`, or into this rank's shard of it, its rows of the full `source`; return what it holds."""
    start = 0
    local = tensor
    if is_sharded(tensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        place = (tensor.shape, tensor.device_mesh, tensor.placements)
        _, offset = compute_local_shape_and_global_offset(*place)
        start = offset[0]
        local = tensor.to_local()
    n_rows = len(local)
    if n_rows:
        local.copy_(source[start : start + n_rows])
    return local


def write_safetensors(path, tensors):
    """Write float tensors one by one, so that no two sharded ones are ever whole at a time.

    The format: the header's length in 8 bytes; the header, JSON, padded to a multiple of 8; the values.
    """
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end += tensor.numel() * tensor.element_size()
        form = {"dtype": FLOATS[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**form, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            whole = full(tensor).cpu().contiguous()
            file.write(whole.view(-1).view(torch.uint8).numpy())


def full(tensor):
    """The whole of a sharded tensor, on every rank; another tensor as it is."""
    if is_sharded(tensor):
        return tensor.full_tensor()
    return tensor


def is_sharded(tensor):
    """Whether it is a DTensor. (To ask for that class by name takes its import, a third of a second.)"""
    return hasattr(tensor, "full_tensor")
