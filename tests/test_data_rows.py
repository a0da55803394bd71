"""Rows of every schema, what makes up a batch, and which rows make up which step."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from pipeline import ROOT, make_data, write_rows
from safetensors.torch import load_file

import dpo
import rm
from configurator import UserError
from data import batch_indices, collate, load_rows, uniforms
from hub.tokenizer import Tokenizer

POST = {"subreddit": "pets", "title": "a cat", "post": "it slept.", "summary": "a cat slept"}
QUERY = "SUBREDDIT: r/pets\n\nTITLE: a cat\n\nPOST: it slept.\n\nTL;DR:"
INFO = {key: POST[key] for key in ("subreddit", "title", "post")}
ARTICLE = {"article": "it slept.", "post": None, "title": None, "subreddit": None}
TEXTS = [{"text": " one", "policy": "b"}, {"text": " two", "policy": "a"}]
CHAT = [{"role": "user", "content": "hi"}]
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
SYSTEM = {"role": "system", "content": "be brief"}
HUMAN = "\n\nHuman: hi\n\nAssistant:"

# row -> the query's text, the responses' texts without EOS, the best first
SCHEMAS = {
    "post": (POST, QUERY, [" a cat slept"]),
    "post whose summary has its space": ({**POST, "summary": " a cat slept"}, QUERY, [" a cat slept"]),
    "comparison, first": ({"info": INFO, "summaries": TEXTS, "choice": 0}, QUERY, [" one", " two"]),
    "comparison, second": ({"info": INFO, "summaries": TEXTS, "choice": 1}, QUERY, [" two", " one"]),
    "comparison of an article": ({"info": ARTICLE, "summaries": TEXTS, "choice": 0},
                                 "Article:\nit slept.\n\nTL;DR:\n", [" one", " two"]),
    "prompt and completion": ({"prompt": "say it:", "completion": " now"}, "say it:", [" now"]),
    "prompt alone": ({"prompt": "say it:"}, "say it:", []),
    "prompt and pair": ({"prompt": "say it:", "chosen": " now", "rejected": " later"}, "say it:", [" now", " later"]),
    "transcripts": ({"chosen": HUMAN + " yes", "rejected": HUMAN + " no"}, HUMAN, [" yes", " no"]),
    "transcripts that part inside an answer": ({"chosen": HUMAN + " I do", "rejected": HUMAN + " I am not"},
                                               HUMAN, [" I do", " I am not"]),
    "texts with a shared start": ({"chosen": "the cat sat", "rejected": "the cat ran"}, "the cat", [" sat", " ran"]),
    "chats": ({"chosen": [*CHAT, YES], "rejected": [*CHAT, NO]}, HUMAN, [" yes", " no"]),
    "chat prompt": ({"prompt": CHAT, "chosen": [YES], "rejected": [NO]}, HUMAN, [" yes", " no"]),
    "chats that repeat a text prompt": ({"prompt": "hi", "chosen": [*CHAT, YES], "rejected": [*CHAT, NO]},
                                        HUMAN, [" yes", " no"]),
    "chats that repeat a chat prompt": ({"prompt": CHAT, "chosen": [*CHAT, YES], "rejected": [*CHAT, NO]},
                                        HUMAN, [" yes", " no"]),
    "text prompt and chat answers": ({"prompt": "say it:", "chosen": [YES], "rejected": [NO]},
                                     "say it:", [" yes", " no"]),
    "chat completion": ({"prompt": CHAT, "completion": [YES]}, HUMAN, [" yes"]),
    "texts are joined as they are": ({"prompt": "\n\nHuman: hi", "completion": "\n\nAssistant: yes"},
                                     "\n\nHuman: hi", ["\n\nAssistant: yes"]),
    "a prompt with a blank more than the turn": ({"prompt": " hi ", "chosen": [*CHAT, YES], "rejected": [*CHAT, NO]},
                                                 HUMAN, [" yes", " no"]),
    "a chat with a system turn before the prompt's": (
        {"prompt": CHAT, "chosen": [SYSTEM, *CHAT, YES], "rejected": [SYSTEM, *CHAT, NO]},
        "\n\nSystem: be brief" + HUMAN, [" yes", " no"]),
    "a chat without the prompt's system turn": (
        {"prompt": [SYSTEM, *CHAT], "chosen": [*CHAT, YES], "rejected": [*CHAT, NO]},
        "\n\nSystem: be brief" + HUMAN, [" yes", " no"]),
    "a chat and a prompt of the system": (
        {"prompt": [SYSTEM], "chosen": [*CHAT, YES], "rejected": [*CHAT, NO]},
        "\n\nSystem: be brief" + HUMAN, [" yes", " no"]),
    "a chat whose own system turn is shorter": (
        {"prompt": [{**SYSTEM, "content": "be brief, and say no more than you are asked"}, *CHAT],
         "chosen": [SYSTEM, *CHAT, YES], "rejected": [SYSTEM, *CHAT, NO]},
        "\n\nSystem: be brief" + HUMAN, [" yes", " no"]),
    "a prompt that a later turn says again": (
        {"prompt": "yes", "completion": [{**YES, "content": "sure?"}, {**CHAT[0], "content": "yes"}, NO]},
        "yes\n\nAssistant: sure?\n\nHuman: yes\n\nAssistant:", [" no"]),
    "texts that repeat their prompt": ({"prompt": "say it:", "chosen": "say it: now", "rejected": "say it: later"},
                                       "say it:", [" now", " later"]),
    "a text that begins with a word of its prompt": ({"prompt": "The", "completion": "Theory"}, "The", ["Theory"]),
    "columns of other schemas": ({"prompt": "say it:", "completion": " now", "target": "b", "extra": "seen twice",
                                  "summaries": [1], "messages": 3}, "say it:", [" now"]),
}  # fmt: skip
REFUSED = {
    "a question that is no prompt": ({"question": "who?", "completion": " Anna"},
                                     "columns with a value .question, completion. fit no schema"),
    "a question beside a pair": ({"question": "who?", "chosen": "Anna", "rejected": "Al"},
                                 "'question' beside the pair, but no prompt"),
    "a prompt without a value": ({"prompt": None, "completion": " Anna"}, "columns with a value .completion. fit no"),
    "no columns": ({}, "columns with a value .none. fit no schema"),
    "letters for responses": ({"prompt": "a:", "responses": "abc"}, "responses 'abc' is no list"),
    "names for responses": ({"prompt": "a:", "responses": {"x": "1"}}, "responses {'x': '1'} is no list"),
    "a text for messages": ({"messages": "hi there"}, "messages 'hi there' is no chat"),
    "a text beside a long chat": ({"prompt": CHAT, "chosen": "yes", "rejected": [NO, *CHAT, NO]},
                                  "'yes' is a text, and another response a chat of several turns"),
    "a text for summaries": ({"info": INFO, "summaries": "abc", "choice": 0}, "summaries 'abc' is no list"),
    "numbers for summaries": ({"info": INFO, "summaries": [1, 2], "choice": 0}, "1 is no object with texts"),
    "a text for extra": ({"info": INFO, "summaries": TEXTS, "choice": 0, "extra": "x"}, "extra 'x' is no object"),
    "a word for confidence": ({"info": INFO, "summaries": TEXTS, "choice": 0, "extra": {"confidence": "high"}},
                              "confidence 'high' is no number"),
    "a long value": ({"prompt": "a:", "completion": ["x" * 9999]}, "'x{79} is no turn"),
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def tokenizer(toy):
    return Tokenizer.load(str(toy))


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_schema_gives_query_and_responses(name, kind, tokenizer, tmp_path):
    row, query, responses = SCHEMAS[name]
    path = tmp_path / f"rows_train.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        import datasets

        datasets.Dataset.from_list([row]).to_parquet(path)
    parsed = load_rows(str(tmp_path / f"rows_{{split}}.{kind}"), "train", tokenizer, n_responses=len(responses))[0]
    assert tokenizer.decode(parsed["query"]) == query
    assert [tokenizer.decode(ids) for ids in parsed["responses"]] == responses
    assert all(ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1] for ids in parsed["responses"])
    assert parsed["length"] == len(parsed["query"]) + max(map(len, parsed["responses"]), default=0)
    if "comparison" in name:
        assert parsed["policies"] == "a / b"


@pytest.mark.parametrize("name", REFUSED)
def test_rows_of_no_schema_are_refused(name, tokenizer, tmp_path):
    row, message = REFUSED[name]
    source = write_rows(tmp_path / "x.jsonl", [{"prompt": "a", "chosen": " b", "rejected": " c"}, row])
    with pytest.raises(UserError, match=f"x.jsonl .train.: line 2: .*{message}") as error:
        load_rows(source, "train", tokenizer, n_responses=1)
    assert len(str(error.value)) < len(source) + 300


def test_a_response_that_spells_eos_out_ends_there(tokenizer, tmp_path):
    """Once or twice, with a blank or a line after it; in the middle it is text."""
    eos = tokenizer.eos_token
    ends = ["", eos, f"{eos} \n", f"{eos}{eos}", f" {eos}\n{eos}"]
    rows = [{"prompt": "a", "completion": f" b{end}"} for end in ends]
    table = load_rows(write_rows(tmp_path / "x.jsonl", rows), "train", tokenizer, 1)
    plain = tokenizer.encode(" b") + [tokenizer.eos_id]
    blank = tokenizer.encode(" b ") + [tokenizer.eos_id]
    assert [ids for (ids,) in table["responses"]] == [plain, plain, plain, plain, blank]


def comparisons(choices):
    return [{"info": INFO, "summaries": TEXTS, "choice": choice} for choice in choices]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("n_responses", [0, 1, 2])
def test_pairs_that_nobody_could_compare_are_left_out_and_counted(kind, n_responses, tokenizer, tmp_path, capsys):
    """Whoever reads them, and also when the rows come from the cache."""
    rows = comparisons([0, None, 1, None, 0])
    path = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        write_rows(path, rows)
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    for _ in range(2):
        table = load_rows(str(path), "train", tokenizer, n_responses)
        assert capsys.readouterr().out == f"{path} [train]: 2 of 5 rows have choice null: left out\n"
        assert (table["index"][:], table["target"][:]) == ([0, 2, 4], [1.0, 1.0, 1.0])
        texts = [[tokenizer.decode(ids) for ids in responses] for responses in table["responses"]]
        assert texts == [order[:n_responses] for order in ([" one", " two"], [" two", " one"], [" one", " two"])]


def test_a_choice_must_be_there_and_one_must_be_made(tokenizer, tmp_path, capsys):
    unlabelled = {"info": INFO, "summaries": TEXTS}
    for row in (unlabelled, {**unlabelled, "choice": "null"}, {**unlabelled, "choice": float("nan")}):
        path = write_rows(tmp_path / "x.jsonl", [*comparisons([0]), row])
        with pytest.raises(UserError, match="line 2: choice .* of 2 summaries; use 0 or 1"):
            load_rows(path, "train", tokenizer, 2)
    path = write_rows(tmp_path / "x.jsonl", comparisons([None] * 3))
    with pytest.raises(UserError, match="x.jsonl .train.: no row is left; 3 of 3 rows have choice null: left out$"):
        load_rows(path, "train", tokenizer, 2)
    # A column of that name beside another schema's says nothing.
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": "a:", "chosen": " b", "rejected": " c", "choice": None}])
    assert len(load_rows(path, "train", tokenizer, 2)) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("stage", [rm, dpo], ids=["rm", "dpo"])
def test_training_is_as_without_the_pairs_that_nobody_could_compare(stage, pipeline, tmp_path):
    rows = [json.loads(line) for line in (pipeline.data / "comparisons_train.jsonl").read_text().splitlines()]
    gaps = [{**row, "choice": None} for row in rows[:3]]
    states = []
    for name, some in (("whole", rows), ("gaps", gaps[:1] + rows[:9] + gaps[1:] + rows[9:])):
        changes = {"normalize_data": ""} if stage is rm else {}
        data = write_rows(tmp_path / f"{name}.jsonl", some)
        cfg = pipeline.config(stage, f"null_{stage.__name__}_{name}", data=data, eval_split="", **changes)
        stage.main(cfg)
        states.append(load_file(f"{cfg.out_dir}/final/model.safetensors"))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] | states[1])


def test_pairs_serve_as_demonstrations(tokenizer, toy):
    """SFT on comparisons keeps the chosen response alone, and its length."""
    source = f"{toy}/comparisons_{{split}}.jsonl"
    pairs = load_rows(source, "train", tokenizer, 2)
    chosen = load_rows(source, "train", tokenizer, 1)
    for pair, row in zip(pairs, chosen, strict=True):
        assert row["responses"] == pair["responses"][:1]
        assert row["length"] == len(pair["query"]) + len(pair["responses"][0])


def test_queries_need_no_summary(tokenizer, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{**POST, "summary": text} for text in ("a cat", None)])
    assert load_rows(path, "train", tokenizer)["responses"] == [[], []]


def test_tokenizer_of_a_hub_id_fetches_no_weights(toy, monkeypatch):
    asked = []

    def fetch(source, revision, allow_patterns, **others):
        asked.append((source, revision, allow_patterns))
        return str(toy)

    monkeypatch.setattr("hub.fetch.snapshot_download", fetch)
    assert Tokenizer.load("some/model", "step3").eos_id == 0
    assert asked == [("some/model", "step3", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])]


def test_directory_loads_as_a_data_set(tokenizer, tmp_path):
    """A directory in the hub's layout: data/train-00000-of-00001.parquet."""
    import datasets

    datasets.Dataset.from_list([POST] * 3).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    assert len(load_rows(str(tmp_path), "train", tokenizer, 1)) == 3


def test_changed_file_is_read_again(tokenizer, tmp_path):
    for title in ("one", "two"):
        path = write_rows(tmp_path / "x.jsonl", [{**POST, "title": title}])
        assert title in tokenizer.decode(load_rows(path, "train", tokenizer, 1)[0]["query"])


FINGERPRINT = """
import sys
from hub.table import load_rows  # where data.py has it from, without PyTorch
from hub.tokenizer import Tokenizer
path, tokenizer = sys.argv[1:]
print(load_rows(path, "train", Tokenizer.load(tokenizer), 1)._fingerprint)
"""


def test_changed_code_does_not_read_the_old_cache(tokenizer, toy, tmp_path):
    """The cache's key holds the code that reads rows: an edited format takes effect."""
    path = write_rows(tmp_path / "x.jsonl", [POST])
    first = load_rows(path, "train", tokenizer, 1)._fingerprint
    assert load_rows(path, "train", tokenizer, 1)._fingerprint == first

    def fingerprint_of_copy(edited=None):
        """That of the same rows, read by a copy of the code."""
        copy = tmp_path / f"edited {edited}".replace("/", " ")
        for name in ("hub", "config"):
            shutil.copytree(ROOT / name, copy / name)
        shutil.copy(ROOT / "configurator.py", copy)
        if edited is not None:
            with open(copy / edited, "a") as file:
                file.write("# edited\n")
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        command = [sys.executable, "-c", FINGERPRINT, path, toy]
        result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    assert fingerprint_of_copy() == first
    names = ("hub/queries.py", "hub/reader.py", "hub/rows.py", "hub/table.py", "hub/tokenizer.py")
    fingerprints = {fingerprint_of_copy(name) for name in names}
    assert len(fingerprints) == 5 and first not in fingerprints


def test_long_rows_are_an_error(tokenizer, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{**POST, "summary": "a " * n} for n in (1, 50, 2)])
    with pytest.raises(UserError, match=r"line 2 has \d+ tokens.*\(1 such rows of 3\)"):
        load_rows(path, "train", tokenizer, 1, max_length=60)
    assert len(load_rows(path, "train", tokenizer, 0, max_length=60)) == 3  # queries alone are short


def test_real_rows_have_the_known_lengths(real_tokenizer, tldr_sample):
    """Query at most 512, query + response at most 562 (SFT), response at most 53 tokens of Pythia's tokenizer."""
    tokenizer = Tokenizer.load(str(real_tokenizer))
    for split, n_rows in (("train", 1362), ("validation", 194)):
        rows = load_rows(f"{tldr_sample}/sft_{{split}}.jsonl", split, tokenizer, 1, max_length=562)
        responses = [responses[0] for responses in rows["responses"]]
        assert len(rows) == n_rows
        assert max(map(len, rows["query"])) <= 512
        assert max(map(len, responses)) <= 53
        assert all(ids[-1] == tokenizer.eos_id for ids in responses)
        assert all(tokenizer.decode(ids).startswith(" ") for ids in responses)

    pairs = load_rows(f"{tldr_sample}/comparisons_{{split}}.jsonl", "train", tokenizer, 2, max_length=638)
    raw = [json.loads(line) for line in (tldr_sample / "comparisons_train.jsonl").read_text().splitlines()]
    for row, pair in list(zip(raw, pairs))[::50]:
        chosen = row["summaries"][row["choice"]]["text"]
        rejected = row["summaries"][1 - row["choice"]]["text"]
        assert [tokenizer.decode(ids) for ids in pair["responses"]] == [chosen, rejected]


def concatenated(n_rows, batch_size, steps, seed):
    return np.concatenate([batch_indices(n_rows, batch_size, step, seed) for step in steps]).tolist()


def test_each_epoch_is_a_permutation_of_its_own():
    two_epochs = concatenated(10, 4, range(5), seed=1)
    first = two_epochs[:10]
    second = two_epochs[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert concatenated(10, 4, [3], seed=1) == two_epochs[12:16]  # of (seed, step) alone
    assert concatenated(10, 4, range(5), seed=2) != two_epochs


def test_batches_do_not_depend_on_each_other():
    """The same rows come whether a step is reached by a run or by a resumed one, for any batch size."""
    assert concatenated(7, 3, [2], seed=5) == concatenated(7, 1, [6, 7, 8], seed=5)


def test_uniforms_are_a_function_of_their_key():
    draws = uniforms((4, 6), 1, 2)
    assert torch.equal(draws, uniforms((4, 6), 1, 2))
    assert not torch.equal(draws, uniforms((4, 6), 1, 3))
    assert draws.min() >= 0 and draws.max() < 1


def test_collate_aligns_predictions_with_targets():
    ids, select, targets, mask = collate([[11, 12, 13], [21]], [[14, 15], [22, 23, 24]])
    assert ids.tolist() == [[11, 12, 13, 14, 15], [21, 22, 23, 24, 0]]
    assert targets.tolist() == [[14, 15, 0], [22, 23, 24]]
    assert mask.tolist() == [[True, True, False], [True, True, True]]
    # position p predicts the token at p + 1
    for row in range(2):
        for column in range(3):
            if mask[row, column]:
                assert ids[row, select[row, column] + 1] == targets[row, column]
    assert select.max() < ids.shape[1]


def test_import_has_no_side_effects():
    """Importing every module neither parses arguments, starts a process group, touches CUDA, nor writes anything."""
    names = [path.stem for path in ROOT.glob("*.py")]
    for package in ("hub", "distributed", "evals", "variants"):
        names += [f"{package}.{path.stem}" for path in (ROOT / package).glob("[a-z]*.py")]
    assert {"ppo", "hub.weights", "distributed.sharding", "evals.winrate", "variants.grpo"} < set(names)
    code = f"""
import importlib, os, sys
sys.argv = ["x", "--no_such_key=1"]
before = sorted(os.listdir("."))
for name in {sorted(names)}:
    importlib.import_module(name)
import torch
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
assert "datasets" not in sys.modules and "wandb" not in sys.modules
assert sorted(os.listdir(".")) == before
"""
    result = subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
