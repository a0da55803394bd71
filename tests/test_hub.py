"""Models and data sets by their hub ids, from a server on this machine that answers as the hub does.

huggingface_hub and datasets read the environment when they are imported: what is asked runs in processes of its own.
"""

import hashlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from hub_server import Hub
from huggingface_hub import constants
from pipeline import make_data, metrics, read_rows
from safetensors.torch import load_file

from configurator import UserError
from distributed.sharding import refuse_other_tokenizer
from hub.fetch import find_model, reach_hub
from hub.tokenizer import Tokenizer
from model import GPTNeoX, GPTNeoXConfig, init_weights

ROOT = Path(__file__).resolve().parent.parent
ROWS = [{"prompt": f"say {number}:", "completion": f" {number}"} for number in range(8)]
PROMPTS = [{"prompt": "say one:"}, {"prompt": "say two:"}]
CHATS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
POSTS = [{"subreddit": "pets", "title": "a", "post": "b", "summary": "c"}]
MIXED = [*ROWS, {"prompt": "a", "completion": [{"role": "assistant", "content": "1.50"}]}]
# As in openai/gsm8k
CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
---
Sums.
"""


def parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def sums(train):
    return {"README.md": CARD, "main/train-00000-of-00001.parquet": parquet(train),
            "main/test-00000-of-00001.parquet": parquet(ROWS[:2]),
            "socratic/train-00000-of-00001.parquet": parquet(ROWS[:3])}  # fmt: skip


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    """Directories of two tiny models with the toy's tokenizer."""
    toy = make_data(tmp_path_factory.mktemp("toy"))
    directories = []
    for seed in (1, 2):
        model = GPTNeoX(GPTNeoXConfig(vocab_size=896, hidden_size=32, num_hidden_layers=2))
        init_weights(model, seed)
        directory = tmp_path_factory.mktemp(f"model{seed}")
        model.save_pretrained(directory)
        (directory / "tokenizer.json").write_bytes((toy / "tokenizer.json").read_bytes())
        directories.append(directory)
    return directories


@pytest.fixture(scope="module")
def hub(model_files, tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("hub"))
    first, second = [{path.name: path for path in directory.iterdir()} for directory in model_files]
    others = {"checkpoint-291/model.safetensors": "of another step", "onnx/config.json": "{}", "pytorch_model.bin": "?"}
    hub.add("models", "org/tiny", {**second, **others, "README.md": "a model"})
    for revision in ("step3000", "refs/pr/1"):
        hub.add("models", "org/tiny", first, revision)
    hub.add("datasets", "org/plain", {"data/train-00000-of-00002.parquet": parquet(ROWS[:5]),
                                      "data/train-00001-of-00002.parquet": parquet(ROWS[5:]),
                                      "data/validation-00000-of-00001.parquet": parquet(ROWS[:2])})  # fmt: skip
    hub.add("datasets", "org/sums", sums(ROWS))
    hub.add("datasets", "org/sums", sums(ROWS[:6]), "v1.0")
    hub.add("datasets", "org/folders", {"helpful/train.jsonl": jsonl(ROWS[:3]), "harmless/train.jsonl": jsonl(ROWS)})
    hub.add("datasets", "org/scripted", {"scripted.py": "raise SystemExit", "README.md": "made by a script"})
    converted = {"axis/test/0000.parquet": parquet(ROWS), "comparisons/train/0000.parquet": parquet(ROWS[:4])}
    hub.add("datasets", "org/scripted", converted, "refs/convert/parquet")
    hub.add("datasets", "org/mixed", {"train.jsonl": jsonl(MIXED), "README.md": "texts and chats"})
    hub.add("datasets", "org/chats", {"train.jsonl": jsonl(CHATS)})
    hub.add("datasets", "org/posts", {"data/train.jsonl": jsonl(POSTS), "data/validation.jsonl": jsonl(POSTS)})
    hub.add("datasets", "org/texts", {"train.jsonl": jsonl([{"text": "a b"}])})
    hub.add("datasets", "org/prompts", {"validation.jsonl": jsonl(PROMPTS)})
    hub.add("datasets", "org/arrow", {"train.arrow": "?"})
    locks = {"private": "private", "gated": "gated", "forbidden": 403, "broken": 500}
    for name, lock in locks.items():
        for kind in ("models", "datasets"):
            hub.add(kind, f"org/{name}", {"config.json": "{}", "train.jsonl": jsonl(ROWS)})
            hub.locked[kind, f"org/{name}"] = lock
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where the libraries keep what they have fetched; empty at first."""
    return tmp_path_factory.mktemp("home")


def environment(hub, home, **more):
    unset = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    ours = dict(HF_ENDPOINT=hub.url, HF_HOME=str(home), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    return {**inherited, **ours, "OMP_WAIT_POLICY": "passive", **more}


ASK = """
import hashlib, json, sys
from configurator import UserError
from hub.reader import read_split
from hub.tokenizer import Tokenizer
from hub.fetch import find_model, reach_hub
from model import GPTNeoX

def ask(kind, source, split="train"):
    if kind == "rows":
        return [row for _, row in read_split(source, split)]
    if kind == "ids":
        return Tokenizer.load(source).encode("a cat")
    weights = GPTNeoX.from_pretrained(source).embed_out.weight
    return hashlib.sha256(weights.detach().numpy()).hexdigest()

for case in json.loads(sys.argv[1]):
    try:
        answer = ask(*case)
    except UserError as error:
        answer = f"error: {error}"
    print(json.dumps(answer))
"""


def ask(hub, home, cases, **more):
    """{a case: its answer}; a case is what to ask for, a source, and a split of it."""
    command = [sys.executable, "-c", ASK, json.dumps([case.split(maxsplit=2) for case in cases])]
    run = subprocess.run(command, cwd=ROOT, env=environment(hub, home, **more), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return dict(zip(cases, map(json.loads, run.stdout.splitlines()), strict=True))


ROWS_OF = {
    "rows org/plain": ROWS,
    "rows org/plain validation": ROWS[:2],
    "rows org/plain train[:3]": ROWS[:3],
    "rows org/plain train+validation": ROWS + ROWS[:2],
    "rows org/sums:main": ROWS,
    "rows org/sums:socratic": ROWS[:3],
    "rows org/sums:main@v1.0": ROWS[:6],
    "rows org/folders:helpful": ROWS[:3],
    "rows org/scripted:comparisons@refs/convert/parquet": ROWS[:4],
    "rows org/mixed": MIXED,
    "rows org/chats": CHATS,
    "rows org/posts validation": POSTS,
    "rows org/texts": [{"text": "a b"}],
}
NOT_GIVEN = "{url} does not give it, and it is not in the cache: LocalEntryNotFoundError:"
CONFIGS = "its configurations are main, socratic; name one of them:"
ERRORS = {
    "model org/tiny@step4": "{url}/org/tiny has no revision 'step4'",
    "ids org/tiny@step4": "{url}/org/tiny has no revision 'step4'",
    "model org/none": "{url} has no model org/none, or a private one; run `hf auth login`",
    "model org/private": "{url} has no model org/private, or a private one; run `hf auth login`",
    "model org/gated": "ask for access on {url}/org/gated, and run `hf auth login`",
    "model org/forbidden": f"{NOT_GIVEN} 403 Forbidden",
    "model org/broken": f"{NOT_GIVEN} Server error '500",
    "rows org/none": "{url} has no dataset org/none, or a private one; run `hf auth login`",
    "rows org/private": "{url} has no dataset org/private, or a private one; run `hf auth login`",
    "rows org/gated": "ask for access on {url}/datasets/org/gated, and run `hf auth login`",
    "rows org/forbidden": f"{NOT_GIVEN} 403 Forbidden",
    "rows org/broken": f"{NOT_GIVEN} Server error '500",
    "rows org/sums": f"{CONFIGS} org/sums:main",
    "rows org/sums:mian": f"{CONFIGS} org/sums:main",
    "rows org/sums@v1.0": f"{CONFIGS} org/sums:main@v1.0",
    "rows org/sums:main@v2.0": "{url}/datasets/org/sums has no revision 'v2.0'",
    "rows org/sums:main validation": "has no split 'validation', but train, test; use one of these",
    "rows org/scripted": "made by scripted.py, which is not run here; try the hub's copy, "
                         "org/scripted:CONFIGURATION@refs/convert/parquet",
    "rows org/scripted@refs/convert/parquet": "configurations are axis, comparisons; name one of them: "
                                              "org/scripted:axis@refs/convert/parquet",
    "rows org/arrow": "train.arrow: its kind is not known; use one of .jsonl",
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(hub, home):
    models = ["ids org/tiny", "model org/tiny", "model org/tiny@step3000", "model org/tiny@refs/pr/1"]
    answers = ask(hub, home, [*models, *ROWS_OF, *ERRORS])
    for name in ("org/tiny", "org/sums"):
        answers[f"sent of {name}"] = hub.sent(name)
    return answers


def test_models_come_by_name_and_revision(hub, answers, model_files):
    stored = [load_file(directory / "model.safetensors")["embed_out.weight"] for directory in model_files]
    digests = [hashlib.sha256(weights.numpy()).hexdigest() for weights in stored]
    assert [answers["model org/tiny@step3000"], answers["model org/tiny"]] == digests
    assert answers["model org/tiny@refs/pr/1"] == digests[0]
    library = tokenizers.Tokenizer.from_file(str(model_files[0] / "tokenizer.json"))
    assert answers["ids org/tiny"] == library.encode("a cat").ids


def test_only_files_of_the_model_itself_are_fetched(answers):
    assert answers["sent of org/tiny"] == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("case", ROWS_OF)
def test_rows_come_by_configuration_revision_and_split(case, answers):
    assert answers[case] == ROWS_OF[case]


def test_files_of_other_splits_are_not_fetched(answers):
    parts = {"README.md", "main/train-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"}
    assert answers["sent of org/sums"] == parts


@pytest.mark.parametrize("case", ERRORS)
def test_what_the_hub_refuses_is_told_in_one_true_line(case, hub, answers):
    assert answers[case].startswith("error: ") and ERRORS[case].format(url=hub.url) in answers[case]


def test_a_broken_hub_is_not_asked_again_and_again(hub, answers):
    asked = [path for _, path in hub.requests if "org/broken" in path]
    assert asked == ["/api/models/org/broken/revision/main", "/api/datasets/org/broken/revision/main"]


def test_without_the_hub_the_cache_serves_the_same_revisions_alone(hub, home, answers):
    cached = ["model org/tiny", "model org/tiny@step3000", *ROWS_OF]
    others = ["model org/tiny@step5", "rows org/sums:main@v2.0", "rows org/sums:main test"]
    offline = ask(hub, home, cached + others, HF_HUB_OFFLINE="1")
    for case in cached:
        assert offline[case] == answers[case]
    # Neither another revision's, nor what files happen to be there.
    for case in others:
        assert "offline mode is enabled" in offline[case]


def test_a_hub_that_never_answers_is_given_up(home, answers, monkeypatch):
    """As in a network that drops what is sent to it."""
    reach_hub.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        assert os.path.exists(os.path.join(find_model("org/tiny"), "model.safetensors"))
        with pytest.raises(UserError, match=f"{url} does not give it, and it is not in the cache: ReadTimeout: "):
            find_model("org/tiny@step4")


def run_stage(hub, home, launcher, *arguments, **more):
    command = [sys.executable, *launcher, *arguments, "--device=cpu", "--dtype=float32"]
    run = subprocess.run(command, cwd=ROOT, env=environment(hub, home, **more), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run


def test_stages_run_from_the_hub_and_then_without_it(hub, home, model_files, tmp_path):
    """Two processes fetch into an empty cache; one without a network gets the same numbers of it."""
    home = tmp_path / "home"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    sft = ["sft.py", "--model=org/tiny", "--data=org/sums:main", "--eval_split=test", "--batch_size=4", "--lr=1e-3"]
    online = tmp_path / "online"
    run_stage(hub, home, torchrun, *sft, f"--out_dir={online}")
    offline = tmp_path / "offline"
    run_stage(hub, home, [], *sft, f"--out_dir={offline}", HF_HUB_OFFLINE="1")
    rows = metrics(online)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row, other in zip(rows, metrics(offline), strict=True):
        assert row == pytest.approx(other, rel=1e-5)

    samples = tmp_path / "samples"
    prompts = ["--data=org/prompts", "--response_length=4", f"--out_dir={samples}"]
    run_stage(hub, home, [], "sample.py", f"--model={online}/final", *prompts)
    assert [row["query"] for row in read_rows(samples / "samples.jsonl")] == [row["prompt"] for row in PROMPTS]


def test_padding_behind_the_last_id_makes_no_other_tokenizer(model_files, tmp_path):
    """As in TRL's models, whose [PAD] a reward model may lack: no text is encoded to it, and it is never drawn."""
    plain = Tokenizer.load(str(model_files[0]))
    library = tokenizers.Tokenizer.from_file(plain.path)
    for added, meaning in {"[PAD]": "nothing", "<|user|>": "a turn"}.items():
        library.add_special_tokens([added])
        (tmp_path / meaning).mkdir()
        library.save(str(tmp_path / meaning / "tokenizer.json"))
    padded = Tokenizer.load(str(tmp_path / "nothing"))
    assert library.token_to_id("[PAD]") == padded.special["[PAD]"] == padded.n_vocab == plain.n_vocab
    assert padded.encode("a [PAD] b") == plain.encode("a [PAD] b")
    for directory, tokenizer in [(tmp_path / "nothing", plain), (model_files[0], padded)]:
        refuse_other_tokenizer(directory, tokenizer, may_learn=False)

    # Any other token may be part of a response.
    with_turns = Tokenizer.load(str(tmp_path / "a turn"))
    with pytest.raises(UserError, match=r"tokenizer.json: id \d+ is None there"):
        refuse_other_tokenizer(model_files[0], with_turns, may_learn=False)
