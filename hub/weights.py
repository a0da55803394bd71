"""Models in the hub's layout: config.json, and safetensors of which a process reads only its own rows."""

import os
import re

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from configurator import explain, require
from hub.files import read_json

# Masks and rotary tables that old Pythia files carry along; they hold nothing that was learned.
BUFFERS = re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)")
# what config.json may say of what is not a choice here
FIXED = dict(model_type="gpt_neox", hidden_act="gelu", attention_bias=True, tie_word_embeddings=False)


def find_model(source, revision="main", patterns=("*.json", "*.safetensors")):
    """A directory as it is; anything else is a hub id, whose files that fit `patterns` are fetched."""
    if os.path.isdir(source):
        return source
    with explain(f"model {source!r}: no directory (is that stage trained?), nor to be had from the hub", Exception):
        return snapshot_download(source, revision=revision, allow_patterns=list(patterns))


def read_config(directory):
    """The values of `directory`/config.json, under the names that GPT-NeoX models had before transformers 5."""
    path = os.path.join(directory, "config.json")
    values = read_json(path)
    for name, value in FIXED.items():
        found = values.get(name, value)
        require(found == value, f"{path}: {name} = {found!r} is not supported, only {value!r}")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    plain = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) == "default"
    require(plain, f"{path}: rope scaling {rope!r} is not supported; use a model without it")
    if "partial_rotary_factor" in rope:
        values["rotary_pct"] = rope["partial_rotary_factor"]
    if "rope_theta" in rope:
        values["rotary_emb_base"] = rope["rope_theta"]
    return values


def weight_files(directory):
    """Map each stored tensor's name to its file: by the index if there is one, else all of model.safetensors."""
    index = os.path.join(directory, "model.safetensors.index.json")
    if os.path.exists(index):
        with explain(f"{index}: no weight_map; download it again", LookupError, TypeError, AttributeError):
            names = read_json(index)["weight_map"].items()
            return {name: os.path.join(directory, os.path.basename(file)) for name, file in names}
    single = os.path.join(directory, "model.safetensors")
    return dict.fromkeys(open_weights(single).keys(), single)


def open_weights(path):
    with explain(f"{path}: cannot be read as safetensors; copy it again", OSError, ValueError, SafetensorError):
        return safe_open(path, framework="pt")


@torch.no_grad()
def load_weights(model, directory, new_head=False):
    """Fill `model` from `directory`; a sharded parameter reads only its own rows from the file.

    new_head: take the body alone, from a model of either kind, and leave the head as it is.
    Raises UserError if a tensor is missing, unexpected, mis-shaped or not finite, or a file is unreadable.
    """
    prefix = "gpt_neox." if new_head else ""
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}
    files = {name: path for name, path in weight_files(directory).items() if name.startswith(prefix)}
    stored = {name for name in files if not BUFFERS.fullmatch(name)}
    refuse_names("missing", wanted.keys() - stored, model, directory)
    refuse_names("unexpected", stored - wanted.keys(), model, directory)

    handles = {path: open_weights(path) for path in set(files.values())}
    for name, tensor in wanted.items():
        path = files[name]
        with explain(f"{path}: has no tensor {name}; the index does not fit its files", SafetensorError):
            source = handles[path].get_slice(name)
            shape = tuple(source.get_shape())
            dtype = source.get_dtype()
        fits = shape == tensor.shape and dtype in ("F16", "BF16", "F32")
        asked = f"but config.json asks for floats of shape {tuple(tensor.shape)}"
        require(fits, f"{path}: {name} is {dtype} of shape {shape}, {asked}")
        local = copy_rows(tensor, source)
        require(local.isfinite().all(), f"{path}: {name} is not finite everywhere; copy it again")


def refuse_names(problem, names, model, directory):
    some = f"{', '.join(sorted(names)[:4])} ({len(names)} in all)"
    require(not names, f"{directory}: {problem} {some}, for a {model.architecture}; is it another model?")


def copy_rows(tensor, source):
    """Copy into `tensor`, or into this rank's shard of it, its rows of the full `source`; return what it holds."""
    start = 0
    local = tensor
    if isinstance(tensor, DTensor):
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        start = offset[0]
        local = tensor.to_local()
    if local.numel():
        local.copy_(source[start : start + len(local)])
    return local


def full(tensor):
    """The whole of a sharded tensor, on every rank; another tensor as it is."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor
