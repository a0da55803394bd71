"""Does this working tree compute the same bits as an earlier commit? Every stage is run by both, and compared.

    python bench/same.py 68a52f0                          # all cases, one process and two: about ten minutes
    python bench/same.py HEAD~3 --cases=ppo --processes=1

The commit is checked out into a temporary directory. Both sides start from the same toy data, SFT model and reward
model (made by the commit), and run the same commands in float32 on the CPU, with as many threads. Compared are

- every tensor of the last checkpoint (weights of all trained models, Adam's moments) and of final/, to the bit;
- metrics.jsonl, samples.jsonl and summary.json, byte for byte.

Keys of rows that one side alone writes are named, and left out. Exits with 1 if anything else differs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"vocab_size": 896, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = ["--sft-train=60", "--sft-validation=21", "--comparisons-train=40", "--comparisons-validation=15"]
# Rows of odd numbers, so that no micro-batch is as large as another.
COMMON = ["--batch_size=8", "--micro_batch_size=3", "--lr=1e-3", "--device=cpu", "--dtype=float32", "--save_every=3"]
PPO = ["--response_length=10", "--rollout_micro_batch_size=3", "--n_minibatches=2", "--samples_every=1"]
EVERYTHING = ["--reward_norm=normalize", "--reward_clip=2.0", "--advantage_clip=1.0", "--critic_steps=2",
              "--critic_lr=2e-3", "--entropy_coef=0.01", "--ptx_coef=0.5", "--max_grad_norm=1.0", "--adam_style=tf",
              "--kl_target=0.5", "--whiten_rewards"]  # fmt: skip

# case: the stage, and what its command line adds
CASES = {
    "sft": ("sft", ["--loss_on=response", "--eval_every=2", "--export_every=3"]),
    "sft, all tokens": ("sft", ["--reduction=token", "--logits_chunk=3", "--schedule=linear", "--warmup_steps=2"]),
    "rm": ("rm", []),
    "rm, all options": ("rm", ["--normalize_std", "--target_clamp=0.1", "--label_noise=0.1", "--adam_style=tf"]),
    "dpo": ("dpo", []),
    "dpo, SFT term": ("dpo", ["--sft_coef=0.5", "--label_smoothing=0.1", "--activation_checkpointing"]),
    "ppo": ("ppo", []),
    "ppo, adaptive KL": ("ppo", ["--kl_target=0.5", "--kl_horizon=100"]),
    "ppo, all options": ("ppo", EVERYTHING),
    "ppo, another end": ("ppo", ["--truncate_token=13", "--truncate_after=2", "--rollout_gather=false"]),
    "ppo, gathered": ("ppo", ["--train_gather", "--logits_chunk=4", "--activation_checkpointing"]),
    "ppo, bfloat16": ("ppo", ["--dtype=bfloat16"]),
    "sample": ("sample", []),
    "sample, best of": ("sample", ["--best_of=3"]),
}


class Side:
    """One tree of the project: it runs commands, and reads what they left."""

    def __init__(self, root, out):
        self.root = root
        self.out = out

    def run(self, script, arguments, processes=1):
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        result = subprocess.run([*command, *script, *arguments], cwd=self.root, env=environment, capture_output=True)
        if result.returncode:
            raise SystemExit(f"{self.root}: {' '.join(script)} {' '.join(arguments)}\n{result.stderr.decode()[-3000:]}")

    def script(self, stage, arguments):
        """Options that left a stage for a variant are run by that variant, in the trees that have it."""
        if arguments is EVERYTHING and (self.root / "variants" / "ppo_max.py").exists():
            return ["-m", "variants.ppo_max"]
        return [f"{stage}.py"]

    def tensors(self, name):
        """Every tensor of the run's last checkpoint and of its final model, by file and name."""
        directory = self.out / name
        found = {}
        checkpoints = sorted(directory.glob("checkpoints/step_*"), key=lambda path: int(path.name[5:]))
        for place in [*checkpoints[-1:], directory / "final"]:
            for path in sorted(place.glob("*.safetensors")):
                shard = path.name.split("-model-")[0]  # of a checkpoint: whose; which file of it does not matter
                for key, tensor in load_file(path).items():
                    found[f"{place.relative_to(directory)} {shard} {key}"] = tensor
        return found

    def lines(self, name, file):
        path = self.out / name / file
        if not path.exists():
            return []
        return path.read_text(encoding="utf-8").splitlines()


def prepare(side, directory):
    """Toy data, and the SFT and reward models that the other stages start from."""
    data = directory / "data"
    side.run(["toy/make_data.py"], [str(data), "--seed=0", *SIZES])
    (data / "config.json").write_text(json.dumps(SHAPE))
    posts = f"--data={data}/sft_{{split}}.jsonl"
    pairs = f"--data={data}/comparisons_{{split}}.jsonl"
    references = f"--normalize_data={data}/sft_{{split}}.jsonl"
    small = [*COMMON[:2], *COMMON[3:5]]
    # 40 updates: enough that the policy sometimes ends its response
    scratch = ["--scratch", f"--model={data}", "--loss_on=response", "--episodes=320", "--lr=5e-3"]
    side.run(["sft.py"], [*small, *scratch, posts, f"--out_dir={directory}/sft"])
    start = [f"--model={directory}/sft/final"]
    side.run(["rm.py"], [*small, *start, pairs, references, "--episodes=64", "--lr=1e-3", f"--out_dir={directory}/rm"])
    reward_model = [f"--reward_model={directory}/rm/final"]
    measured = ["--response_length=10", "--device=cpu", "--micro_batch_size=3", f"--reference={directory}/sft/final"]
    return {
        "sft": [*COMMON, posts, "--scratch", f"--model={data}"],
        "rm": [*COMMON, pairs, references, *start],
        "dpo": [*COMMON, pairs, *start],
        "ppo": [*COMMON, *PPO, posts, *start, *reward_model],
        "sample": [posts, *start, *reward_model, *measured],
    }


def compare(ours, theirs, name):
    """What differs between two runs of the same name: a list of sentences."""
    differences = []
    left = ours.tensors(name)
    right = theirs.tensors(name)
    for key in sorted(left.keys() ^ right.keys()):
        differences.append(f"{key}: on one side alone")
    for key in sorted(left.keys() & right.keys()):
        if not torch.equal(left[key], right[key]):
            apart = (left[key].double() - right[key].double()).abs().max().item()
            differences.append(f"{key}: apart by {apart:.1e}")
    for file in ("summary.json", "eval.json"):
        if ours.lines(name, file) != theirs.lines(name, file):
            differences.append(f"{file}: not the same bytes")
    for file in ("metrics.jsonl", "samples.jsonl"):
        differences += compare_rows(file, ours.lines(name, file), theirs.lines(name, file))
    return differences


def compare_rows(file, ours, theirs):
    if ours == theirs:
        return []
    differences = []
    if len(ours) != len(theirs):
        differences.append(f"{file}: {len(ours)} and {len(theirs)} rows")
    for number, (left, right) in enumerate(zip(map(json.loads, ours), map(json.loads, theirs), strict=False)):
        place = f"{file}, row {number}"
        alone = left.keys() ^ right.keys()
        if alone:
            print(f"    {place}: {', '.join(sorted(alone))} on one side alone")
        shared = [key for key in left if key not in alone]
        if shared != [key for key in right if key not in alone]:
            differences.append(f"{place}: keys in another order")
        for key in shared:
            if json.dumps(left[key]) != json.dumps(right[key]):
                differences.append(f"{place}: {key} {left[key]} and {right[key]}")
    return differences


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rev", help="the commit to compare with")
    parser.add_argument("--cases", default="", help="those whose name begins with this")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--directory", help="where both work; the commit's runs that lie there are not run again")
    args = parser.parse_args()
    directory = Path(args.directory or tempfile.mkdtemp(prefix="same-")).resolve()
    theirs = Side(directory / "tree", directory / "theirs")
    ours = Side(ROOT, directory / "ours")
    if not theirs.root.exists():
        subprocess.run(["git", "clone", "--quiet", "--no-checkout", ROOT, theirs.root], check=True)
        subprocess.run(["git", "checkout", "--quiet", "--detach", args.rev], cwd=theirs.root, check=True)
    arguments = prepare(theirs, directory)
    shutil.rmtree(ours.out, ignore_errors=True)
    different = 0
    for case, (stage, options) in CASES.items():
        if not case.startswith(args.cases):
            continue
        for processes in map(int, args.processes.split(",")):
            name = f"{case}-{processes}".replace(" ", "_").replace(",", "")
            episodes = [f"--episodes={8 * args.updates}"] * (stage != "sample")
            for side in (theirs, ours):
                if (side.out / name).exists():
                    continue
                out_dir = f"--out_dir={side.out}/{name}"
                command = [*arguments[stage], *episodes, *options, out_dir]
                side.run(side.script(stage, options), command, processes)
            found = compare(ours, theirs, name)
            n_tensors = len(ours.tensors(name))
            n_rows = len(ours.lines(name, "metrics.jsonl"))
            verdict = "DIFFERENT" if found else "the same"
            print(f"{case}, {processes} process(es): {n_tensors} tensors, {n_rows} rows: {verdict}", flush=True)
            for sentence in found[:8]:
                print(f"    {sentence}")
            different += bool(found)
    print(f"{different} cases differ; what was compared is in {directory}")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
