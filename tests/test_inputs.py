"""What a run is made from: other rows, weights, tokenizers and functions are refused; and what it leaves for others."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipeline import in_update, read_rows, write_rows
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import dpo
import ppo
import rm
import sample
import sft
from configurator import UserError
from data import Tokenizer, uniforms
from distributed.inputs import describe
from generation import sample_token
from hub.rows import chat_text
from variants import ptx

ROWS = [{"prompt": f"say {number % 7}:", "completion": f" {number % 5}"} for number in range(48)]


def train_bpe(path, texts, special, vocab_size=700):
    """A byte-level BPE of its own; `special` are added last, so that EOS is not id 0."""
    library = LibraryTokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(texts, trainer)
    library.add_special_tokens(special)
    library.save(str(path))
    return library


@pytest.fixture
def other(pipeline, tmp_path):
    """A copy of a model's directory with another tokenizer."""

    def copy(directory, name):
        target = tmp_path / name
        shutil.copytree(directory, target)
        texts = [row["post"] for row in read_rows(Path(pipeline.data) / "sft_train.jsonl")]
        train_bpe(target / "tokenizer.json", texts, ["<|endoftext|>"])
        return str(target)

    return copy


def test_models_of_another_tokenizer_are_refused(pipeline, other, tmp_path):
    reward_model = other(pipeline.rm, "rm")
    policy = other(pipeline.sft, "sft")
    out_dir = str(tmp_path / "out")
    wrong = r"tokenizer.json: id \d+ is .* there, and .* in .*; use models of one tokenizer"
    cases = [
        (ppo, pipeline.config(ppo, "x", reward_model=reward_model)),
        (ppo, pipeline.config(ppo, "x", reference=policy)),
        (ppo, pipeline.config(ppo, "x", critic=reward_model)),
        (dpo, pipeline.config(dpo, "x", reference=policy)),
        (sft, pipeline.config(sft, "x", model=str(pipeline.sft), scratch=False, tokenizer=policy)),
        (sample, pipeline.config(sample, "x", reward_model=reward_model)),
        (sample, pipeline.config(sample, "x", reference=policy)),
    ]
    for stage, cfg in cases:
        with pytest.raises(UserError, match=wrong):
            stage.main(replace(cfg, out_dir=out_dir))
        shutil.rmtree(out_dir)


def test_the_same_tokenizer_in_another_file_is_the_same(pipeline, tmp_path):
    """As transformers writes it again: other spaces, another order of keys."""
    reward_model = tmp_path / "rm"
    shutil.copytree(pipeline.rm, reward_model)
    path = reward_model / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True, indent=7))
    cfg = pipeline.config(ppo, "x", reward_model=str(reward_model), episodes=8, out_dir=str(tmp_path / "out"))
    ppo.main(cfg)
    assert (tmp_path / "out" / "final").exists()


def test_a_run_does_not_go_on_from_other_rows_or_weights(pipeline, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    model = tmp_path / "model"
    shutil.copytree(pipeline.sft, model)
    options = dict(model=str(model), scratch=False, data=data, episodes=8, max_length=0, out_dir=str(tmp_path / "run"))
    cfg = pipeline.config(sft, "x", **options)
    sft.main(cfg)
    before = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    sft.main(cfg)  # nothing has changed: it says that it is there
    sft.main(replace(cfg, micro_batch_size=2, save_every=5, device="auto"))  # changes no number

    write_rows(tmp_path / "rows.jsonl", [*ROWS[:-1], {**ROWS[-1], "completion": " other"}])
    with pytest.raises(UserError, match="holds a run that began with another train_split; choose another out_dir"):
        sft.main(cfg)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    sft.main(cfg)

    shutil.copy(tmp_path / "run" / "final" / "model.safetensors", model)
    with pytest.raises(UserError, match="holds a run that began with another model; "):
        sft.main(cfg)
    sft.main(replace(cfg, accept_changes=True))
    sft.main(cfg)  # from now on these are the run's own
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == before


def test_a_run_does_not_go_on_with_another_reward(pipeline, tmp_path, capsys):
    cfg = pipeline.config(ppo, "x", reward_model="", episodes=8, out_dir=str(tmp_path / "run"))

    def brevity(queries, responses):
        return [-len(response) for response in responses]

    ppo.main(cfg, score=brevity)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["inputs"]["score"].split(".")[-1].startswith("brevity")
    ppo.main(cfg, score=brevity)
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(UserError, match="began with another score"):
        ppo.main(cfg, score=lambda queries, responses: [1.0 for _ in responses])


class Constant:
    """A score that is an object, with a method that is another."""

    def __init__(self, score):
        self.score = score

    def __call__(self, queries, responses):
        return [self.score for _ in responses]

    def method(self, queries, responses):
        return self(queries, responses)


def constant(score):
    return lambda queries, responses: [score for _ in responses]


def scaled(queries, responses, scale=1.0):
    return [scale * len(response) for response in responses]


def typed_in(score):
    """A function without a source file."""
    return eval(f"lambda queries, responses: [{score} for _ in responses]")


MAKERS = {
    "partial": lambda score: functools.partial(scaled, scale=score),
    "closure": constant,
    "object": Constant,
    "method": lambda score: Constant(score).method,
    "typed in": typed_in,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_function_is_known_by_what_it_holds(kind):
    make = MAKERS[kind]
    assert describe(make(1.0)) == describe(make(1.0)) != describe(make(2.0))
    if kind != "typed in":
        assert describe(make(object())) == describe(make(object()))  # by no address: the next process has another


def test_what_a_run_fills_makes_no_other_function():
    """A cache, say: the same cell of a notebook goes on with its run."""
    cache = {}
    seen = []

    def score(queries, responses):
        seen.extend(responses)
        return [cache.setdefault(response, len(response)) for response in responses]

    before = describe(score)
    score([], ["a", "b"])
    assert describe(score) == before


def test_a_run_does_not_go_on_with_other_answers(pipeline, tmp_path):
    """A column that only the score looks at."""
    rows = [{**row, "answer": "a"} for row in ROWS]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    options = dict(reward_model="", data=data, max_length=0, episodes=8, out_dir=str(tmp_path / "run"))
    cfg = pipeline.config(ppo, "x", **options)

    def right(queries, responses, rows):
        return [float(row["answer"] in response) for row, response in zip(rows, responses)]

    ppo.main(cfg, score=right)
    ppo.main(cfg, score=right)
    write_rows(tmp_path / "rows.jsonl", [*rows[:-1], {**rows[-1], "answer": "b"}])
    with pytest.raises(UserError, match="began with another data;"):
        ppo.main(cfg, score=right)


def test_a_reward_model_of_another_eos_is_refused(pipeline, tmp_path):
    """The same tokens, but another one of them ends a text: the reward would be read where none was learned."""
    for name, model in (("reward_model", pipeline.rm), ("reference", pipeline.sft)):
        directory = tmp_path / name
        shutil.copytree(model, directory)
        (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|padding|>"}))
        cfg = pipeline.config(ppo, "x", out_dir=str(tmp_path / "run"), **{name: str(directory)})
        with pytest.raises(UserError, match=r"tokenizer.json: EOS is '<\|padding\|>' there, and '<\|endoftext\|>' for"):
            ppo.main(cfg)


def test_a_model_without_a_tokenizer_is_told(pipeline, tmp_path, capsys):
    directory = tmp_path / "rm"
    shutil.copytree(pipeline.rm, directory)
    (directory / "tokenizer.json").unlink()
    ppo.main(pipeline.config(ppo, "x", out_dir=str(tmp_path / "run"), reward_model=str(directory)))
    lines = [line for line in capsys.readouterr().out.splitlines() if "no tokenizer.json" in line]
    # The critic starts from it, too.
    taken = f"its ids are taken for those of {pipeline.sft}/tokenizer.json"
    assert lines == [f"{directory}: no tokenizer.json; {taken}"] * 2


def test_a_run_of_before_a_field_was_there_goes_on(pipeline, tmp_path):
    cfg = pipeline.config(sft, "x", out_dir=str(tmp_path / "run"), episodes=8)
    sft.main(cfg)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    del config["too_long"]
    path.write_text(json.dumps(config))
    sft.main(cfg)
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"too_long \('stop' -> 'drop'\)"):
        sft.main(replace(cfg, too_long="drop"))


def test_a_run_does_not_go_on_with_other_rows_beside_its_data(pipeline, tmp_path):
    """Those that the reward is normalised on, and those of PPO-ptx: changed after a crash in the second update."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    cases = {
        "normalize_data": (rm, dict(normalize_data=rows, episodes=24)),
        "ptx_data": (ptx, dict(ptx_data=rows, ptx_coef=0.5, max_length=0, episodes=24, n_epochs=1)),
    }

    def fail():
        raise ZeroDivisionError

    for name, (stage, options) in cases.items():
        write_rows(tmp_path / "rows.jsonl", ROWS)
        cfg = pipeline.config(stage, "x", save_every=1, out_dir=str(tmp_path / name), **options)
        with in_update(cfg, 1, fail), pytest.raises(ZeroDivisionError):
            stage.main(cfg)
        write_rows(tmp_path / "rows.jsonl", ROWS[1:])
        with pytest.raises(UserError, match=f"holds a run that began with another {name}; choose another out_dir"):
            stage.main(cfg)
        write_rows(tmp_path / "rows.jsonl", ROWS)
        stage.main(cfg)
        assert (tmp_path / name / "final").exists()


def test_nothing_is_held_out_of_a_single_file(pipeline, tmp_path, capsys):
    pairs = read_rows(Path(pipeline.data) / "comparisons_train.jsonl")
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    cfg = pipeline.config(rm, "x", data=data, normalize_data="auto", out_dir=str(tmp_path / "a"))
    rm.main(cfg)
    assert "pairs.jsonl: without {split} in its path no rows are held out" in capsys.readouterr().out
    evaluation = json.loads((tmp_path / "a" / "eval.json").read_text())
    assert "eval/accuracy" not in evaluation and evaluation["accuracy"] == {}
    # The chosen responses of these rows have mean reward 0: no other data are asked for.
    assert abs(evaluation["normalize/mean_after"]) < 1e-6

    rm.main(replace(cfg, train_split="train[:75%]", eval_split="train[75%:]", out_dir=str(tmp_path / "b")))
    assert json.loads((tmp_path / "b" / "eval.json").read_text())["accuracy"]["all"]["n"] == len(pairs) // 4


def test_rows_keep_their_place_where_long_ones_are_dropped(pipeline, tmp_path):
    """A function that gets the data's rows gets those of its queries."""
    rows = [{"prompt": f"{'a ' * (90 if number % 3 == 0 else 1)}{number}:", "n": number} for number in range(24)]
    data = write_rows(tmp_path / "x.jsonl", rows)
    options = dict(reward_model="", data=data, max_length=40, too_long="drop", out_dir=str(tmp_path / "run"))
    seen = []

    def score(queries, responses, rows):
        seen.extend((query.split()[-1], row["n"]) for query, row in zip(queries, rows))
        return [0.0] * len(rows)

    ppo.main(pipeline.config(ppo, "x", **options), score=score)
    assert len(seen) == 16 and all(query == f"{n}:" for query, n in seen)
    assert not any(n % 3 == 0 for _, n in seen)


def test_prompts_alone_are_sampled(pipeline, tmp_path, capsys):
    data = write_rows(tmp_path / "x.jsonl", [{"prompt": row["prompt"]} for row in ROWS[:6]])
    cfg = pipeline.config(sample, "x", data=data, out_dir=str(tmp_path / "out"))
    sample.main(cfg)
    rows = read_rows(tmp_path / "out" / "samples.jsonl")
    assert [row["query"] for row in rows] == [row["prompt"] for row in ROWS[:6]]
    assert all("score" in row and "reference" not in row for row in rows)
    assert "6 of 6 rows have no reference: no ROUGE" in capsys.readouterr().out


def test_best_of_needs_a_temperature(pipeline):
    with pytest.raises(UserError, match="best_of draws one response again and again at temperature 0"):
        sample.main(pipeline.config(sample, "x", best_of=3, temperature=0.0, out_dir=""))


def test_a_home_directory_is_expanded(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    cfg = pipeline.config(sft, "x", episodes=8, out_dir="~/runs/a")
    sft.main(cfg)
    assert (tmp_path / "runs" / "a" / "final").exists() and not (tmp_path / "~").exists()


# ---------------------------------------------------------------------------- what others read


@pytest.fixture(scope="module")
def trained(pipeline, tmp_path_factory):
    """A model of a tokenizer whose EOS is <|im_end|>, with an id other than 0, trained to end after two tokens."""
    directory = tmp_path_factory.mktemp("trained")
    texts = [row["prompt"] + row["completion"] for row in ROWS]
    special = ["<|endoftext|>", "<|padding|>", "<|im_end|>"]
    library = train_bpe(directory / "tokenizer.json", texts, special, vocab_size=300)
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    data = write_rows(directory / "x.jsonl", [{"prompt": row["prompt"], "completion": " ok"} for row in ROWS])
    options = dict(tokenizer=str(directory), data=data, episodes=480, lr=1e-2, out_dir=str(directory / "run"))
    sft.main(pipeline.config(sft, "x", **options))
    return directory / "run" / "final", library


def test_transformers_stops_at_the_tokenizers_eos(trained):
    import transformers

    directory, library = trained
    eos_id = library.token_to_id("<|im_end|>")
    assert Tokenizer.load(str(directory)).eos_id == eos_id > 0
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert (tokenizer.eos_token_id, tokenizer.pad_token) == (eos_id, "<|padding|>")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == eos_id
    inputs = tokenizer("say 3:", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert ids.tolist() == [*tokenizer(" ok")["input_ids"], eos_id]


def test_the_chat_template_is_the_format_of_the_rows(trained):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(trained[0])
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi  there\n"},
        {"role": "assistant", "content": "yes"},
        {"role": "tool", "content": "{'a': 1}"},
    ]
    for n_turns in range(1, 5):
        turns = chat[:n_turns]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert text == chat_text(turns) + "\n\nAssistant:"
        assert tokenizer.apply_chat_template(turns, tokenize=False) == chat_text(turns)
    pipe = transformers.pipeline("text-generation", model=str(trained[0]), device="cpu")
    answer = pipe(chat[:2], max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert answer[:2] == chat[:2] and answer[2]["role"] == "assistant"


# ---------------------------------------------------------------------------- the tail of a distribution


def test_unlikely_tokens_are_drawn_as_often_as_they_are_likely():
    """50,254 ids, of which most are so unlikely that a float32 sum of 1 would not move: together they have 2.5e-3."""
    n_ids = 50_254
    n_head = 16
    tail = 2.5e-3
    probs = torch.full((n_ids,), tail / (n_ids - n_head), dtype=torch.float64)  # 5e-8 each, below 2^-24
    probs[:n_head] = (1 - tail) / n_head
    logits = probs.log().float()
    n_draws = 8000
    draws = uniforms((n_draws,), 7)
    tokens = torch.cat([sample_token(logits.expand(len(part), -1), 1.0, part)[0] for part in draws.split(500)])
    in_tail = tokens[tokens >= n_head]
    # A binomial number of n p = 20, deviation 4.5: four of these on either side.
    assert 2 <= len(in_tail) <= 38
    # Float32 could only draw the first id of each step of 2^-24; here neighbours are as likely.
    assert len(set(in_tail.tolist())) == len(in_tail)


def test_no_token_with_a_probability_is_out_of_reach():
    """Each id is drawn by the middle of its own interval, found with float64 sums."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50_254, generator=generator)
    probs = torch.softmax(logits, -1).double()
    ends = probs.cumsum(-1) / probs.sum()
    middles = ends - probs / probs.sum() / 2
    ids = torch.randint(0, 50_254, (2000,), generator=generator)
    drawn = torch.cat([sample_token(logits.expand(len(part), -1), 1.0, middles[part])[0] for part in ids.split(500)])
    assert drawn.tolist() == ids.tolist()


def test_uniforms_have_more_than_24_bits():
    draws = uniforms((100_000,), 3)
    assert draws.dtype == torch.float64 and draws.min() >= 0 and draws.max() < 1
    fine = (draws * 2**24).frac()
    # Uniform below 2^-24, too: mean 1/2, deviation 0.29 / sqrt(n), five of these.
    assert abs(fine.mean().item() - 0.5) < 5 * 0.289 / 100_000**0.5
