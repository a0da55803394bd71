"""Models as others publish them, and ours as others read them: values, names and files. The oracle is transformers.

The table of docs/interop.md is a list of cases.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from test_model import (
    OLD_CONFIG,
    SMALL,
    assert_close,
    assert_same_weights,
    hub_model,
    logits_of,
    queries,
    randomise,
    refusal,
    tokens,
    write_directory,
)

from configurator import UserError
from generation import generate
from hub.config import GPTNeoXConfig
from hub.export import export_reward_model
from hub.fetch import find_model
from hub.weights import load_weights
from model import GPTNeoX, ScalarModel
from toy.make_data import make_tokenizer

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
TABLE = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8").split("## Reward models")[0]


# ---------------------------------------------------------------------------- language models of the hub


def read_table():
    """{model: its row, a dict by the names of the columns}"""
    lines = [line.strip("| \n").split(" | ") for line in TABLE.splitlines() if line.startswith("| ")]
    names = lines[0]
    return {cells[0].replace("\\*", ""): dict(zip(names, cells, strict=True)) for cells in lines[1:]}


ROWS = read_table()


def config_of(row):
    """A config.json with the values of a row, as it stands on the hub but for the sizes that only cost time."""
    width, _, heads = row["head width"].partition(" / ")
    config = {
        **OLD_CONFIG,
        "hidden_act": row["hidden_act"],
        "rotary_pct": float(row["rotary_pct"]),
        "rotary_emb_base": 10000,
        "use_parallel_residual": row["use_parallel_residual"] == "true",
        "hidden_size": int(width) if heads else 2 * int(width),
        "num_attention_heads": int(heads or 2),
        "max_position_embeddings": int(row["positions"]),
        "eos_token_id": int(row["eos_token_id"]),
    }
    if row["use_parallel_residual"] == "not said":
        del config["use_parallel_residual"]
    return config


def test_the_table_has_its_rows():
    kinds = [row["here"].split(":")[0] for row in ROWS.values()]
    assert kinds.count("loads") >= 15
    assert kinds.count("refused") >= 3
    assert {row["rotary_pct"] for row in ROWS.values()} == {"0.25", "0.5", "1.0"}


@pytest.mark.parametrize("name", ROWS)
def test_model_of_the_hub(name, tmp_path):
    row = ROWS[name]
    config = config_of(row)
    found = re.fullmatch(r"refused: (\w+) (.*)", row["here"])
    if found:
        key, value = found.groups()
        assert config.get(key) != json.loads(value) or key == "num_attention_heads"
        config[key] = json.loads(value)
        assert key in refusal(write_directory(tmp_path, {}, config))
        return

    assert row["here"] == "loads"
    settings = transformers.GPTNeoXConfig(**config)
    theirs = randomise(transformers.GPTNeoXForCausalLM(settings).eval(), seed=0)
    state = {name.replace("lm_head.", "embed_out."): tensor for name, tensor in theirs.state_dict().items()}
    ours = GPTNeoX.from_pretrained(str(write_directory(tmp_path, state, config)))
    assert ours.config.eos_token_id == int(row["eos_token_id"])
    ids = tokens(2, 40)
    assert_close(logits_of(ours, ids), logits_of(theirs, ids))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh"])
def test_gelu_by_tanh_matches_transformers(activation, tmp_path):
    theirs = hub_model(hidden_act=activation)
    theirs.save_pretrained(tmp_path)
    ours = GPTNeoX.from_pretrained(str(tmp_path))
    ids = tokens(2, 40)
    expected = logits_of(theirs, ids)
    assert_close(logits_of(ours, ids), expected)

    # Were it the exact one, it would be seen.
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    error = (logits_of(GPTNeoX.from_pretrained(str(tmp_path)), ids) - expected).abs().max()
    assert error > 1e-4 * expected.abs().max()


def test_cached_generation_has_the_same_gelu(tmp_path):
    theirs = hub_model(seed=3, hidden_act="gelu_fast")
    theirs.save_pretrained(tmp_path)
    ours = GPTNeoX.from_pretrained(str(tmp_path))
    ids = queries()[:, :5]
    responses = generate(ours, ids, torch.full((4,), 5), 30, 0, None)
    whole = torch.cat([ids, responses], dim=1)
    likeliest = logits_of(theirs, whole)[:, 4:-1].argmax(-1)
    assert torch.equal(responses, likeliest)


def test_activation_is_kept_when_a_model_is_saved(tmp_path):
    config = GPTNeoXConfig(**SMALL, hidden_act="gelu_fast")
    GPTNeoX(config).save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["hidden_act"] == "gelu_fast"
    assert transformers.AutoConfig.from_pretrained(tmp_path).hidden_act == "gelu_fast"


def test_other_activation_is_named(tmp_path):
    message = refusal(write_directory(tmp_path, {}, {**OLD_CONFIG, "hidden_act": "silu"}))
    assert "'silu'" in message and "gelu_fast" in message


@pytest.mark.parametrize("ends, expected", [([7, 2], 7), ([], 0), (None, 0), (5, 5)])
def test_eos_token_id_may_be_a_list(ends, expected, tmp_path):
    write_directory(tmp_path, {}, {**OLD_CONFIG, "eos_token_id": ends})
    assert GPTNeoXConfig.from_directory(str(tmp_path)).eos_token_id == expected


def test_what_transformers_5_saves_in_shards_loads(tmp_path):
    """It writes rope_parameters alone; with the defaults instead of these, logits are off by tens of per cents."""
    theirs = hub_model(rotary_pct=1.0, rotary_emb_base=20000)
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rotary_pct" not in written
    assert written["rope_parameters"]["rope_theta"] == 20000
    ids = tokens(2, 30)
    assert_close(logits_of(GPTNeoX.from_pretrained(str(tmp_path)), ids), logits_of(theirs, ids))


@pytest.mark.parametrize("cls", [GPTNeoX, ScalarModel])
def test_config_json_has_the_names_that_all_readers_know(cls, tmp_path):
    """Those of before transformers 5, as the hub's Pythia has them; rope_parameters is not known to older ones."""
    cls(GPTNeoXConfig(**SMALL, rotary_pct=1.0, rotary_emb_base=20000.0)).save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "config.json").read_text())
    not_ours = {"bos_token_id", "transformers_version", "use_cache"}
    assert OLD_CONFIG.keys() - not_ours <= written.keys()
    assert written["rotary_pct"] == 1.0 and written["rotary_emb_base"] == 20000
    assert not written.keys() & {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "dtype"}
    rope = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert (rope["partial_rotary_factor"], rope["rope_theta"]) == (1.0, 20000)


# ---------------------------------------------------------------------------- reward models


def classifier(n_labels=1):
    config = transformers.GPTNeoXConfig(**SMALL, num_labels=n_labels, pad_token_id=1, eos_token_id=0)
    return randomise(transformers.GPTNeoXForSequenceClassification(config).eval(), seed=5)


def last_scores(ours, ids):
    with torch.no_grad():
        return ours(ids)[:, -1]


def test_sequence_classifier_is_a_reward_model_with_bias_0(tmp_path):
    theirs = classifier()
    theirs.save_pretrained(tmp_path)
    ours = ScalarModel.from_pretrained(str(tmp_path))
    assert ours.score.bias.tolist() == [0.0]
    ids = tokens(3, 20).clamp(min=2)  # neither padding nor EOS
    assert_close(last_scores(ours, ids), logits_of(theirs, ids)[:, 0])

    # What we write has a bias, and is read again.
    ours.save_pretrained(str(tmp_path / "again"))
    assert_same_weights(ScalarModel.from_pretrained(str(tmp_path / "again")), ours)


def test_our_own_head_without_its_bias_is_damaged(tmp_path):
    ScalarModel(GPTNeoXConfig(**SMALL)).save_pretrained(str(tmp_path))
    path = tmp_path / "model.safetensors"
    rest = {name: tensor for name, tensor in load_file(path).items() if name != "score.bias"}
    write_directory(tmp_path, rest, json.loads((tmp_path / "config.json").read_text()))
    assert "missing score.bias" in refusal(tmp_path, ScalarModel)


def test_body_of_a_sequence_classifier_is_read_for_a_new_head(tmp_path):
    theirs = classifier()
    theirs.save_pretrained(tmp_path)
    ours = ScalarModel(GPTNeoXConfig(**SMALL))
    head = ours.score.weight.clone()
    load_weights(ours, str(tmp_path), new_head=True)
    assert torch.equal(ours.score.weight, head)
    assert torch.equal(ours.gpt_neox.embed_in.weight, theirs.gpt_neox.embed_in.weight)


def test_classifier_of_several_labels_is_refused(tmp_path):
    classifier(n_labels=3).save_pretrained(tmp_path)
    message = refusal(tmp_path, ScalarModel)
    assert "score.weight is F32 of shape (3, 64), but a reward model asks for floats of shape (1, 64)" in message


class PaperConfig(transformers.PretrainedConfig):
    """As in the code of arXiv:2403.17031, whose reward models are published so."""

    def __init__(self, base_model="", base_config=None, hidden_size=768, bias=0.0, **kwargs):
        super().__init__(**kwargs)
        self.base_model = base_model
        self.base_config = base_config
        self.hidden_size = hidden_size
        self.bias = bias


def write_paper_model(directory, bias):
    """A reward model as that code saves it, in pytorch_model.bin; returns the parts that compute it."""
    settings = transformers.GPTNeoXConfig(**SMALL, rotary_pct=0.5)
    body = randomise(transformers.GPTNeoXModel(settings).eval(), seed=2)
    head = torch.nn.Linear(64, 1)
    config = PaperConfig("EleutherAI/pythia-1b-deduped", settings, 64, bias, architectures=["ScalarModel"])
    config.save_pretrained(directory)
    state = {f"lm_backbone.{name}": tensor for name, tensor in body.state_dict().items()}
    state.update({f"scalar_head.{name}": tensor for name, tensor in head.state_dict().items()})
    for layer in range(2):  # as transformers of that time had them
        state[f"lm_backbone.layers.{layer}.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    torch.save(state, directory / "pytorch_model.bin")
    return body, head


def test_reward_model_of_the_paper(tmp_path):
    """Its pickle is converted by the line that the error shows; its mean reward is taken from the head's bias."""
    body, head = write_paper_model(tmp_path, bias=5.25)
    run_command(refusal(tmp_path, ScalarModel))
    ours = ScalarModel.from_pretrained(str(tmp_path))
    ids = tokens(2, 20)
    with torch.no_grad():
        rewards = head(body(ids).last_hidden_state)[..., 0] - 5.25
        assert_close(ours(ids), rewards)

    # It is taken once: what we write from this has no `bias` beside the head's.
    ours.save_pretrained(str(tmp_path / "again"))
    assert_same_weights(ScalarModel.from_pretrained(str(tmp_path / "again")), ours)


@pytest.mark.parametrize("bias", ["high", None, [1], float("nan"), 10**400])
def test_mean_reward_that_is_no_number_is_refused(bias, tmp_path):
    body, head = write_paper_model(tmp_path, bias=0.5)
    state = {f"lm_backbone.{name}": tensor for name, tensor in body.state_dict().items()}
    state.update({f"scalar_head.{name}": tensor for name, tensor in head.state_dict().items()})
    config = json.loads((tmp_path / "config.json").read_text())
    write_directory(tmp_path, {name: tensor.detach() for name, tensor in state.items()}, {**config, "bias": bias})
    assert "bias" in refusal(tmp_path, ScalarModel)


# ---------------------------------------------------------------------------- where there are no safetensors


def run_command(message):
    """Run the line of shell that an error shows, with this Python."""
    command = re.search(r"convert it: (.*)", message)[1]
    command = command.replace("python -c", f"{sys.executable} -c")
    subprocess.run(command, shell=True, check=True, capture_output=True)


@pytest.fixture
def plain(tmp_path):
    """A model's directory, with a name that a shell would take apart."""
    directory = tmp_path / "it's a $model"
    GPTNeoX(GPTNeoXConfig(**SMALL)).save_pretrained(str(directory))
    return directory


def in_shards(directory, write, pattern):
    """Move the weights of `directory` into two files."""
    path = directory / "model.safetensors"
    state = load_file(path)
    path.unlink()
    names = sorted(state)
    for number, part in enumerate((names[:9], names[9:]), 1):
        write({name: state[name] for name in part}, directory / pattern.format(number))


@pytest.mark.parametrize("nested", [False, True])
def test_pickles_in_shards_are_converted_by_the_line_shown(nested, plain):
    before = GPTNeoX.from_pretrained(str(plain))

    def write(state, path):
        torch.save({"model": state} if nested else state, path)

    in_shards(plain, write, "pytorch_model-0000{}-of-00002.bin")
    message = refusal(plain)
    assert "pytorch_model-00001-of-00002.bin" in message and "cannot be read" not in message
    run_command(message)
    assert_same_weights(GPTNeoX.from_pretrained(str(plain)), before)


@pytest.mark.parametrize("folder", [".", "pytorch_model_fsdp_0"])
def test_distributed_checkpoint_is_converted_by_the_line_shown(folder, plain):
    before = GPTNeoX.from_pretrained(str(plain))
    state = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    dcp.save({"model": state}, checkpoint_id=plain / folder)
    message = refusal(plain)
    assert ".distcp" in message
    run_command(message)
    assert_same_weights(GPTNeoX.from_pretrained(str(plain)), before)


def test_distributed_checkpoint_of_transformers_is_converted(tmp_path):
    """The names are those in memory, where transformers 5 calls embed_out lm_head."""
    theirs = hub_model()
    theirs.config.save_pretrained(tmp_path)
    assert "lm_head.weight" in theirs.state_dict()
    dcp.save({"model": theirs.state_dict()}, checkpoint_id=tmp_path)
    run_command(refusal(tmp_path))
    ids = tokens(2, 30)
    assert_close(logits_of(GPTNeoX.from_pretrained(str(tmp_path)), ids), logits_of(theirs, ids))


def test_whole_set_of_shards_needs_no_index(plain):
    before = GPTNeoX.from_pretrained(str(plain))
    in_shards(plain, save_file, "model-0000{}-of-00002.safetensors")
    assert_same_weights(GPTNeoX.from_pretrained(str(plain)), before)
    (plain / "model-00001-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: a part of the shards" in refusal(plain)


def touch(*names):
    def change(directory):
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text("{}")

    return change


WITHOUT = {
    "an adapter": (touch("adapter_config.json", "adapter_model.safetensors"),
                   "adapter_config.json: a LoRA adapter; merge .*AutoPeftModelForCausalLM.*merge_and_unload"),
    "a checkpoint of ours": (touch("checksums.json", "shard-00001-model-00001-of-00002.safetensors"),
                             "checksums.json: a checkpoint; its run's command goes on from it"),
    "a run without final": (touch("metrics.jsonl", "checkpoints/step_2/state.json"),
                            "metrics.jsonl: a run that is not done; its command goes on"),
    "a run with final": (touch("metrics.jsonl", "final/model.safetensors", "step_2/model.safetensors"),
                         "final/model.safetensors, step_2/model.safetensors: give the directory of one"),
    "another name": (touch("consolidated.safetensors"), "consolidated.safetensors: if one of these is the whole"),
    "nothing": (touch(), "lie: config.json$"),
}  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT)
def test_what_lies_there_is_said(case, plain):
    change, words = WITHOUT[case]
    (plain / "model.safetensors").unlink()
    change(plain)
    message = refusal(plain)
    assert "no model.safetensors" in message
    assert re.search(words, message), message


def test_what_lies_there_is_said_without_a_config_json(tmp_path):
    touch("adapter_config.json")(tmp_path)
    assert "no config.json, but adapter_config.json: a LoRA adapter" in refusal(tmp_path)


def test_config_json_of_a_run_is_none_of_a_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"lr": 1e-5, "model": "out/sft"}))
    touch("metrics.jsonl", "final/model.safetensors")(tmp_path)
    assert "no config.json of a model, but final/model.safetensors" in refusal(tmp_path)


def test_missing_directory_tells_what_lies_beside_it(tmp_path):
    touch("sft/metrics.jsonl")(tmp_path)
    message = refusal(tmp_path / "sft" / "final")
    assert re.search(r"no directory or file of that name .*sft lie: metrics.jsonl", message)
    assert "hub" not in message


# ---------------------------------------------------------------------------- revisions


@pytest.fixture
def asked(monkeypatch):
    """What is asked of the hub, which answers with a directory of another name."""
    calls = []

    def fetch(source, revision, allow_patterns, **others):
        calls.append((source, revision))
        return "/fetched"

    monkeypatch.setattr("hub.fetch.snapshot_download", fetch)
    return calls


@pytest.mark.parametrize("source, name, revision", [
    ("EleutherAI/pythia-14m", "EleutherAI/pythia-14m", "main"),
    ("EleutherAI/pythia-14m@step3000", "EleutherAI/pythia-14m", "step3000"),
    ("EleutherAI/pythia-14m@refs/pr/1", "EleutherAI/pythia-14m", "refs/pr/1"),
])  # fmt: skip
def test_revision_stands_behind_an_at_sign(source, name, revision, asked):
    assert find_model(source) == "/fetched"
    assert asked == [(name, revision)]


def test_directory_with_an_at_sign_is_itself(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs@home/final").mkdir(parents=True)
    assert find_model("runs@home/final") == "runs@home/final"
    assert asked == []


def test_home_directory_is_expanded(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "final").mkdir()
    assert find_model("~/final") == str(tmp_path / "final")
    assert asked == []


@pytest.mark.parametrize("source", ["out/sft/final", "./final", "/nowhere/final", "~/nowhere"])
def test_path_is_not_asked_of_the_hub(source, asked):
    with pytest.raises(UserError, match="no directory or file of that name"):
        find_model(source)
    assert asked == []


def test_hub_model_without_safetensors_names_the_way(tmp_path):
    """As the hub's library lays out its cache."""
    directory = tmp_path / "models--cleanrl--EleutherAI_pythia-1b-deduped__reward__tldr" / "snapshots" / "e9ae69b"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(OLD_CONFIG))
    message = refusal(directory)
    assert "no model.safetensors came from the hub" in message
    name = "cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr"
    assert f"hf download {name} --revision e9ae69b --local-dir {name} && (cd {name} && python -c" in message


# ---------------------------------------------------------------------------- our reward model, for others


@pytest.fixture
def reward_model(tmp_path):
    """A reward model of ours with its tokenizer, and a bias far from 0."""
    tokenizer = make_tokenizer()
    size = len(tokenizer["model"]["vocab"]) + 20
    ours = randomise(ScalarModel(GPTNeoXConfig(**{**SMALL, "vocab_size": size})), seed=7)
    with torch.no_grad():
        ours.score.bias.fill_(-4.75)
    directory = tmp_path / "rm"
    ours.save_pretrained(str(directory))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


def test_exported_reward_model_has_the_same_rewards(reward_model, tmp_path):
    """At the EOS token of rows of several lengths, padded on the right."""
    moved = export_reward_model(str(reward_model), str(tmp_path / "hf"))
    assert moved == -4.75
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written.keys() >= {"rotary_pct", "rotary_emb_base"} and "rope_parameters" not in written
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert type(theirs) is transformers.GPTNeoXForSequenceClassification
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.pad_token_id == theirs.config.pad_token_id != tokenizer.eos_token_id == theirs.config.eos_token_id

    texts = [text + tokenizer.eos_token for text in ("TL;DR: my cat slept.", "a", "the dog and the cat and the dog")]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) == 3
    scores = logits_of(theirs.eval(), batch["input_ids"])[:, 0]
    ours = ScalarModel.from_pretrained(str(reward_model))
    with torch.no_grad():
        rewards = ours(batch["input_ids"], lengths[:, None] - 1)[:, 0]
    assert (scores - rewards).abs().max() <= 1e-5 * 4.75
    assert rewards.std() > 0.1

    # Ours reads it too; and a pipeline gives rewards, no sigmoid of them.
    again = last_scores(ScalarModel.from_pretrained(str(tmp_path / "hf")), batch["input_ids"][:1, : lengths[0]])
    assert_close(again, rewards[:1])
    pipeline = transformers.pipeline("text-classification", model=theirs, tokenizer=tokenizer)
    assert pipeline(texts[0])[0]["score"] == pytest.approx(rewards[0].item(), abs=1e-4)


def test_others_read_a_reward_model_that_is_not_exported_wrongly(reward_model):
    """What docs/interop.md warns of."""
    _, info = transformers.AutoModelForCausalLM.from_pretrained(reward_model, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    _, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        reward_model, num_labels=1, output_loading_info=True
    )
    assert info["unexpected_keys"] == {"score.bias"}


def test_export_refuses_what_it_cannot_say(reward_model, tmp_path):
    with pytest.raises(UserError, match="rm is there already"):
        export_reward_model(str(reward_model), str(reward_model))
    flat = ScalarModel.from_pretrained(str(reward_model))
    with torch.no_grad():
        flat.score.weight.zero_()
    flat.save_pretrained(str(reward_model))
    with pytest.raises(UserError, match="weight is 0, its score always -4.75"):
        export_reward_model(str(reward_model), str(tmp_path / "hf"))
    tokenizer = json.loads((reward_model / "tokenizer.json").read_text().replace("<|padding|>", "<|other|>"))
    (reward_model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="no special token is for padding"):
        export_reward_model(str(reward_model), str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


def test_export_is_a_command(reward_model, tmp_path):
    command = [sys.executable, "-m", "hub.export", str(reward_model), str(tmp_path / "hf")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "-4.75" in result.stdout
    assert (tmp_path / "hf" / "model.safetensors").exists()
    again = subprocess.run(command[:-1], cwd=ROOT, env=env, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.strip() == "error: write: python -m hub.export MODEL OUT"
