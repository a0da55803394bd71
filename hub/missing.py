"""What lies where a model was looked for, and the command that makes it one."""

import glob
import re
import shlex

from configurator import UserError
from hub.files import what_lies_at

# For users to run: a pickle can hold any program, so none is opened here. HERE stands for the directory.
CONVERT = """(cd HERE && python -c "import glob, torch, safetensors.torch as s;
[s.save_file({k: v.contiguous().clone() for k, v in w.get('model', w).items()},
f[8:-3] + 'safetensors', {'format': 'pt'})
for f in glob.glob('pytorch_model*.bin') for w in [torch.load(f, weights_only=True)]]")"""
GATHER = """(cd HERE && python -c "from torch.distributed.checkpoint import format_utils as f;
f.dcp_to_torch_save('%s', 'pytorch_model.bin')")"""
MERGE = """python -c "import sys; from peft import AutoPeftModelForCausalLM as M;
M.from_pretrained(sys.argv[1]).merge_and_unload().save_pretrained(sys.argv[2])" HERE HERE/merged
(of a reward model: AutoPeftModelForSequenceClassification, and num_labels=1 after sys.argv[1])"""
FSDP = "pytorch_model_fsdp_0"  # accelerate's folder

# A pattern of names: what that is, and what to do. The first that fits is said.
CLUES = {
    "*/model*.safetensors": "give the directory of one of these models",
    "adapter_config.json": f"a LoRA adapter; merge it into its base model: {MERGE}",
    "pytorch_model*.bin": f"a pickle, which is not opened here; convert it: {CONVERT}",
    "*.distcp": f"a distributed checkpoint; convert it: {GATHER % '.'} && {CONVERT}",
    f"{FSDP}/*.distcp": f"a distributed checkpoint; convert it: {GATHER % FSDP} && {CONVERT}",
    "checksums.json": "a checkpoint; its run's command goes on from it, to write final/",
    "metrics.jsonl": "a run that is not done; its command goes on, to write final/",
    "model-*-of-*.safetensors": "a part of the shards; copy the others too",
    "*.safetensors": "if one of these is the whole model, call it model.safetensors",
}


def no_model(directory, wanted):
    """A UserError: `directory` does not hold `wanted`. It says what lies there, and the way from that to a model."""
    missing = f"{directory}: no {wanted}"
    for pattern, text in CLUES.items():
        found = sorted(glob.glob(pattern, root_dir=directory))
        if found:
            some = ", ".join(found[:3])
            text = text.replace("HERE", shlex.quote(str(directory)))
            return UserError(f"{missing}, but {some}: {text}")

    cached = re.search(r"models--([^/]+)/snapshots/(\w+)", str(directory))  # what the hub's library fetched
    if cached:
        name = cached[1].replace("--", "/")
        fetch = f"hf download {name} --revision {cached[2]} --local-dir {name}"
        convert = CONVERT.replace("HERE", name)
        return UserError(f"{missing} came from the hub; if it has only a .bin, convert that: {fetch} && {convert}")
    return UserError(f"{missing}; {what_lies_at(directory)}")
