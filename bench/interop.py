"""Who reads our models, and whose models we read: the last tables of docs/interop.md, run on a CPU.

    python bench/interop.py out/interop ../shared/data/pythia_tokenizer.json [--only=litgpt,peft]

Makes random models of the shape of Pythia-14m with our code, as the stages export them. For each reader a virtual
environment gets the packages pinned below; in it this file runs the function of that name, which reads our models and
gives its logits for one text, or trains from them and saves. Then the environment is removed. Prints for each reader
and model the largest difference from our logits, as a share of the largest of these; exits with 1 if one that should be
small is not. All of it takes about half an hour, 1.5 GB of disk at a time, and PyPI.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent

CONTEXT = "SUBREDDIT: r/pets\n\nTITLE: My cat   sleeps, don't worry.\n\nPOST: Über 12345 days she ran to a lake."
TEXT = f"{CONTEXT}\n\nTL;DR:"
LENGTHS = (10, 20, 30, 40)  # of the texts that get a reward

# What differs from Pythia-14m in the policies. "base" shows which readers overlook rotary_emb_base.
POLICIES = {
    "pythia": {},
    "sequential": {"use_parallel_residual": False, "rotary_pct": 0.5},
    "base": {"rotary_emb_base": 500.0},
}

N_VOCAB = 50304
# No hub, and two threads.
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "PYTHONPATH": ""}

TORCH = "torch==2.13.0"  # as in requirements.txt
TRANSFORMERS = "transformers==5.24.0"
OLD_TRANSFORMERS = "transformers==4.57.6"
LLAMA = "llama-cpp-python==0.3.36"  # Its source on PyPI holds llama.cpp's converter.
READERS = {}  # {name: (function, packages)}, filled by `needs`

# Rounding, unless a reader computes otherwise.
LIMIT = 1e-5
LIMITS = {
    "mlx_lm": 1e-3,  # It takes the approximation of GELU by tanh.
    "llama_cpp": 2e-3,  # It takes GELU from a table of float16.
}
# What a reader gets wrong, though config.json says it.
KNOWN = {
    ("ctranslate2", "base"): "overlooks rotary_emb_base",
    ("llama_cpp", "base_next"): "overlooks rotary_emb_base",
    ("litgpt", "base"): "takes the shape from the name, not from config.json",
}


# ---------------------------------------------------------------------------- ours


def make_models(root, tokenizer_file):
    """Write the policies, the reward model and its export to `root`; and expected.npz, what ours computes."""
    import torch

    from hub.config import GPTNeoXConfig
    from hub.export import export_reward_model
    from hub.tokenizer import Tokenizer
    from model import GPTNeoX, ScalarModel

    tokenizer = Tokenizer(tokenizer_file)
    ids = tokenizer.encode(TEXT)
    expected = {"ids": ids}
    for name, changes in POLICIES.items():
        model = GPTNeoX(GPTNeoXConfig(**changes))
        save(model, root / name, tokenizer)
        expected[name] = run_ours(root / name, GPTNeoX, ids)

    model = ScalarModel(GPTNeoXConfig())
    save(model, root / "reward_model", tokenizer)
    expected["reward"] = rewards(root / "reward_model", ids)
    export_reward_model(root / "reward_model", root / "reward")

    for name in POLICIES:
        logits = torch.from_numpy(expected[name])
        expected[f"{name}_next"] = logits[-1].log_softmax(-1).numpy()
    logprobs = torch.from_numpy(expected["pythia"]).log_softmax(-1)
    n_context = len(tokenizer.encode(CONTEXT))
    places = range(n_context - 1, len(ids) - 1)
    expected["continuation"] = [sum(logprobs[place, ids[place + 1]] for place in places)]
    np.savez(root / "expected.npz", **expected)


def save(model, directory, tokenizer):
    """Draw weights for which attention is far from uniform, and write what a stage writes to final/."""
    import torch

    from hub.companions import write_companions

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=generator)
            elif "embed_in" in name:
                parameter.normal_(0, 1, generator=generator)
            else:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5, generator=generator)
    model.config.eos_token_id = tokenizer.eos_id
    model.save_pretrained(directory)
    write_companions(directory, tokenizer, model.config.max_position_embeddings)


def run_ours(directory, cls, ids):
    import torch

    model = cls.from_pretrained(directory)
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].numpy()


def rewards(directory, ids):
    """(R,): those of the first LENGTHS tokens."""
    from model import ScalarModel

    scores = run_ours(directory, ScalarModel, ids)
    return scores[[length - 1 for length in LENGTHS]]


def run_saved(directory, ids, python):
    """What ours computes from what a reader saved, after the command that our error shows, if it shows one."""
    from configurator import UserError
    from model import GPTNeoX

    if "reward" in directory.name:
        return rewards(directory, ids)
    try:
        return run_ours(directory, GPTNeoX, ids)
    except UserError as error:
        found = re.search(r"(?:convert it|base model): (.*)", str(error))
        if not found:
            raise
        command = found[1].partition(" (of a")[0].replace("python -c", f"{python} -c")
        subprocess.run(command, shell=True, check=True, capture_output=True)
    merged = directory / "merged"
    return run_ours(merged if merged.exists() else directory, GPTNeoX, ids)


# ---------------------------------------------------------------------------- theirs, each in its own environment
# Each returns {name: array}: logits (T, V) of a policy of that name, or what else expected.npz has; any other name is
# that of a directory that it wrote, and what it computes from that model.


def needs(*packages):
    def register(function):
        READERS[function.__name__] = (function, packages)
        return function

    return register


@needs(TRANSFORMERS, TORCH)
def transformers(root, ids):
    """Also as distributed checkpoints hold it: a directory of torch's, and shards that torch consolidated."""
    import torch.distributed.checkpoint as dcp
    import transformers

    found = {name: transformers_logits(root / name, ids) for name in POLICIES}
    found["reward"] = transformers_rewards(root / "reward", ids)

    model = transformers.AutoModelForCausalLM.from_pretrained(root / "sequential")
    state = model.state_dict()
    for name in ("dcp", "consolidated"):
        model.config.save_pretrained(root / name)
        found[name] = found["sequential"]
    dcp.save({"model": state}, checkpoint_id=root / "dcp")
    shards = {name: 1 + number % 2 for number, name in enumerate(state)}
    settings = dict(fqn_to_index_mapping=shards, save_distributed=True, enable_consolidation=True)
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(root / "consolidated", **settings))
    return found


@needs(OLD_TRANSFORMERS, TORCH)
def transformers_4(root, ids):
    """Also as pickles, which it still writes."""
    import transformers

    found = {name: transformers_logits(root / name, ids) for name in POLICIES}
    found["reward"] = transformers_rewards(root / "reward", ids)

    model = transformers.AutoModelForCausalLM.from_pretrained(root / "sequential")
    model.save_pretrained(root / "pickles", safe_serialization=False, max_shard_size="20MB")
    found["pickles"] = found["sequential"]
    return found


def transformers_logits(directory, ids):
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer(TEXT)["input_ids"] == ids
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def transformers_rewards(directory, ids):
    import transformers

    return rewards_of(transformers.AutoModelForSequenceClassification.from_pretrained(directory), ids)


def rewards_of(model, ids):
    import torch

    found = []
    with torch.no_grad():
        for length in LENGTHS:
            found.append(model(torch.tensor([ids[:length]])).logits.item())
    return np.array(found)


@needs("trl==1.16.0", TORCH, TRANSFORMERS, "accelerate==1.15.0", "datasets==5.2.0")
def trl(root, ids):
    """Three updates of the SFT trainer and of the reward trainer, from ours."""
    import datasets
    import trl

    settings = dict(max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False, max_length=64)
    rows = [{"prompt": f"What is {n}?", "completion": f" It is {n}."} for n in range(8)]
    arguments = trl.SFTConfig(root / "sft_by_trl", save_strategy="no", **settings)
    data = datasets.Dataset.from_list(rows)
    trainer = trl.SFTTrainer(str(root / "sequential"), args=arguments, train_dataset=data)
    trainer.train()
    trainer.save_model()

    pairs = [{"prompt": f"What is {n}?", "chosen": f" It is {n}.", "rejected": " No."} for n in range(8)]
    arguments = trl.RewardConfig(root / "reward_by_trl", save_strategy="no", **settings)
    data = datasets.Dataset.from_list(pairs)
    trainer = trl.RewardTrainer(str(root / "reward"), args=arguments, train_dataset=data)
    trainer.train()
    trainer.save_model()
    return {
        "sft_by_trl": transformers_logits(root / "sft_by_trl", ids),
        "reward_by_trl": transformers_rewards(root / "reward_by_trl", ids),
    }


@needs("peft==0.21.2", TORCH, TRANSFORMERS, "accelerate==1.15.0")
def peft(root, ids):
    """Adapters with random weights: merged into the model, and left beside it."""
    import peft
    import torch
    import transformers

    settings = dict(r=4, init_lora_weights=False)
    policy = transformers.AutoModelForCausalLM.from_pretrained(root / "sequential")
    policy = peft.get_peft_model(policy, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        logits = policy(torch.tensor([ids])).logits[0].numpy()
    policy.save_pretrained(root / "adapter")
    policy.merge_and_unload().save_pretrained(root / "merged")

    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(root / "reward")
    classifier = peft.get_peft_model(classifier, peft.LoraConfig(task_type="SEQ_CLS", **settings)).eval()
    scores = rewards_of(classifier, ids)
    classifier.merge_and_unload().save_pretrained(root / "reward_merged")
    return {"adapter": logits, "merged": logits, "reward_merged": scores}


@needs("ctranslate2==4.8.5", TORCH, OLD_TRANSFORMERS)
def ctranslate2(root, ids):
    """With transformers 5 its converter ends in: 'GPTNeoXConfig' object has no attribute 'rotary_pct'."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    found = {}
    for name in POLICIES:
        converted = str(root / f"{name}_ct2")
        TransformersConverter(str(root / name)).convert(converted)
        generator = ctranslate2.Generator(converted, intra_threads=2)
        found[name] = np.array(generator.forward_batch([ids]))[0]
    return found


@needs("litgpt==0.5.13", TORCH)
def litgpt(root, ids):
    """It knows models by their names: others than Pythia's need an entry in its config.py."""
    import torch
    from litgpt import GPT, Config, Tokenizer
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    found = {}
    for name in ("pythia", "base"):
        directory = root / f"{name}_litgpt"
        shutil.copytree(root / name, directory)
        convert_hf_checkpoint(directory, model_name="pythia-14m")
        assert Tokenizer(directory).encode(TEXT).tolist() == ids
        model = GPT(Config.from_file(directory / "model_config.yaml"))
        model.load_state_dict(torch.load(directory / "lit_model.pth", weights_only=True))
        with torch.no_grad():
            found[name] = model(torch.tensor([ids]))[0].numpy()
    return found


@needs("transformer-lens==4.3.0", TORCH)
def transformer_lens(root, ids):
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    found = {}
    for name in POLICIES:
        model = TransformerBridge.boot_transformers(str(root / name), device="cpu")
        with torch.no_grad():
            found[name] = model(torch.tensor([ids]))[0].numpy()
    return found


@needs("mlx-lm==0.32.2", "mlx[cpu]==0.32.4", TRANSFORMERS)
def mlx_lm(root, ids):
    import mlx.core as mx
    import mlx_lm

    mx.set_default_device(mx.cpu)
    found = {}
    for name in POLICIES:
        model, tokenizer = mlx_lm.load(str(root / name))
        assert tokenizer.encode(TEXT) == ids
        found[name] = np.array(model(mx.array([ids]))[0].astype(mx.float32))
    return found


@needs("lm_eval==0.4.13", TORCH, TRANSFORMERS, "accelerate==1.15.0")
def lm_eval(root, ids):
    """The log-likelihood of a continuation, which its tasks are made of."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(root / "pythia"), device="cpu", dtype="float32", batch_size=1)
    continuation = TEXT.removeprefix(CONTEXT)
    request = Instance("loglikelihood", {}, (CONTEXT, continuation), 0)
    logprob, _ = model.loglikelihood([request])[0]
    return {"continuation": np.array([logprob])}


@needs("onnxruntime==1.32.0", "onnx==1.23.2", "onnxscript==0.7.2", TORCH, TRANSFORMERS)
def onnx(root, ids):
    """transformers' model, exported by torch and run by onnxruntime on a text of another length."""
    import onnxruntime
    import torch
    import transformers

    found = {}
    for name in POLICIES:
        path = root / f"{name}.onnx"
        model = transformers.AutoModelForCausalLM.from_pretrained(root / name, use_cache=False).eval()
        length = torch.export.Dim("length", min=2, max=2048)
        example = (torch.tensor([ids[:9]]),)
        torch.onnx.export(model, example, path, input_names=["ids"], dynamic_shapes=({1: length},), dynamo=True)
        session = onnxruntime.InferenceSession(path)
        found[name] = session.run(None, {session.get_inputs()[0].name: [ids]})[0][0]
    return found


@needs("xllamacpp==2026.10.11549", "sentencepiece==0.2.1", TORCH, OLD_TRANSFORMERS)
def llama_cpp(root, ids):
    """convert_hf_to_gguf.py, and the log-probabilities of the next token.

    The converter knows tokenizers by a hash of some ids. Pythia's is one; a tokenizer of one's own, as toy/ makes it,
    ends in "BPE pre-tokenizer was not recognized".
    """
    import xllamacpp

    source = root / "llama_source"
    download = ["pip", "download", "--quiet", "--no-deps", "--no-binary=llama-cpp-python", "--dest", source, LLAMA]
    subprocess.run([sys.executable, "-m", *download], check=True)
    archive = next(source.glob("*.tar.gz"))
    with tarfile.open(archive) as file:
        file.extractall(source, filter="data")
    converter = next(source.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py"))

    found = {}
    for name in POLICIES:
        path = root / f"{name}.gguf"
        command = [sys.executable, converter, root / name, "--outtype=f32", "--outfile", path]
        subprocess.run(command, check=True, capture_output=True)
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = 256
        settings.n_parallel = 1
        settings.cpuparams.n_threads = 2
        server = xllamacpp.Server(settings)
        request = {"prompt": ids, "max_tokens": 1, "temperature": 0, "n_probs": N_VOCAB, "logprobs": N_VOCAB}
        tokens = server.handle_completions(request)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        tokens.sort(key=lambda token: token["id"])
        found[f"{name}_next"] = np.array([token["logprob"] for token in tokens])
    return found


# ---------------------------------------------------------------------------- the table


def run_reader(name, root, tokenizer_file):
    """Let a reader run in an environment of its own; {model: largest difference, or the line that says what failed}."""
    directory = root / name
    shutil.rmtree(directory, ignore_errors=True)
    make_models(directory, tokenizer_file)
    environment = root / "environment"
    venv.create(environment, with_pip=True, clear=True)
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", *READERS[name][1]]
    read = [python, __file__, "--read", name, directory]
    for command in (install, read):
        done = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=ENVIRONMENT)
        if done.returncode != 0:
            return {"": done.stderr.strip().splitlines()[-1]}

    expected = dict(np.load(directory / "expected.npz"))
    ids = expected["ids"].tolist()
    differences = {}
    for model, theirs in np.load(directory / "found.npz").items():
        try:
            ours = expected[model] if model in expected else run_saved(directory / model, ids, python)
            differences[model] = np.abs(ours - theirs).max() / np.abs(ours).max()
        except (Exception, SystemExit) as error:
            differences[model] = str(error).splitlines()[0]
    shutil.rmtree(environment)
    return differences


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("tokenizer", type=Path, help="Pythia's tokenizer.json")
    parser.add_argument("--only", default=",".join(READERS), help="names of readers, with commas")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    root = arguments.out_dir.resolve()

    n_wrong = 0
    for name in arguments.only.split(","):
        differences = run_reader(name, root, str(arguments.tokenizer.resolve()))
        for model, difference in differences.items():
            note = KNOWN.get((name, model), "")
            if isinstance(difference, str):
                shown = difference
                is_good = False
            else:
                shown = f"{difference:.1e}"
                is_good = difference <= LIMITS.get(name, LIMIT)
            if not is_good and not note:
                note = "WRONG"
                n_wrong += 1
            print(f"{READERS[name][1][0]:26} {model:16} {shown} {note}", flush=True)
    sys.exit(n_wrong > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        name = sys.argv[2]
        directory = Path(sys.argv[3])
        ids = np.load(directory / "expected.npz")["ids"].tolist()
        function = READERS[name][0]
        np.savez(directory / "found.npz", **function(directory, ids))
    else:
        main()
