"""configurator.configure: dataclass < config files from left to right < --key=value, and nothing silent."""

import difflib
import importlib
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import pytest

from configurator import OTHER_NAMES, Count, Positive, Share, Signed, UserError, configure


@dataclass
class Config:
    out_dir: str = "out/run"  # where the run goes
    learning_rate: float = 3e-6  # peak of the schedule
    batch_size: int = 64  # rows of one update, over all ranks
    total_episodes: int = 1000  # rows of the whole run
    whiten: bool = False  # whiten the rewards
    dropout: float = 0.0  # off, as in the paper


@pytest.fixture
def write(tmp_path):
    def write(text, name="x.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def refusal(argv, cls=Config):
    with pytest.raises(UserError) as error:
        configure(cls, argv)
    message = str(error.value)
    assert message
    assert "\n" not in message
    assert error.value.code not in (0, None)  # the shell sees a failure
    return message


# ---- values ----------------------------------------------------------------------------------------------


def test_no_arguments_give_the_defaults():
    assert configure(Config, []) == Config()


def test_argv_defaults_to_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ppo.py", "--batch_size=7"])
    assert configure(Config) == Config(batch_size=7)


def test_later_sources_win(write):
    first = write("batch_size = 1\nlearning_rate = 1.0\ntotal_episodes = 1", "a.py")
    second = write("batch_size = 2\nlearning_rate = 2.0", "b.py")
    cfg = configure(Config, [first, second, "--batch_size=3"])
    assert (cfg.batch_size, cfg.learning_rate, cfg.total_episodes, cfg.dropout) == (3, 2.0, 1, 0.0)
    assert configure(Config, [second, first]).batch_size == 1


def test_later_of_two_equal_keys_wins():
    assert configure(Config, ["--batch_size=1", "--batch_size=2"]).batch_size == 2


def test_files_and_keys_may_be_mixed(write):
    argv = [write("batch_size = 1", "a.py"), "--whiten", write("total_episodes = 5", "b.py"), "--dropout=0.5"]
    assert configure(Config, argv) == Config(batch_size=1, whiten=True, total_episodes=5, dropout=0.5)


def test_command_line_wins_over_a_file_behind_it(write):
    assert configure(Config, ["--batch_size=3", write("batch_size = 1")]).batch_size == 3


def test_calls_do_not_share_values(write):
    configure(Config, [write("batch_size = 1"), "--out_dir=elsewhere"])
    assert configure(Config, []) == Config()


@pytest.mark.parametrize(
    "text, value", [("1e3", 1000), ("2.0", 2), ("2.5e1", 25), ("1_000_000", 10**6), ("9007199254740991", 2**53 - 1)]
)
def test_int_from_command_line_may_be_written_as_any_whole_number(text, value):
    got = configure(Config, [f"--batch_size={text}"]).batch_size
    assert got == value
    assert type(got) is int


@pytest.mark.parametrize("text", ["1.5", "1e-3", "9007199254740992", "1e300", "1e400", "inf", "nan", "9" * 5000])
def test_number_that_is_not_whole_or_too_large_is_no_int(text):
    assert "'batch_size' takes int from 0" in refusal([f"--batch_size={text}"])


@pytest.mark.parametrize("text, value", [("1e-5", 1e-5), ("2", 2.0), ("0", 0.0), (".25", 0.25)])
def test_float_from_command_line(text, value):
    got = configure(Config, [f"--learning_rate={text}"]).learning_rate
    assert got == value
    assert type(got) is float


def test_int_is_accepted_for_a_float_in_a_file(write):
    got = configure(Config, [write("learning_rate = 1")]).learning_rate
    assert got == 1.0
    assert type(got) is float


@pytest.mark.parametrize(
    "text", ["1e-5", "True", "None", "[1, 2]", "3", "__import__('os')", "a=b", "1 + 1", "'q'", "-x"]
)
def test_string_is_never_evaluated(text):
    assert configure(Config, [f"--out_dir={text}"]).out_dir == text


@pytest.mark.parametrize("key", ["learning_rate", "batch_size", "whiten"])
def test_code_on_the_command_line_is_never_run(key, tmp_path):
    refusal([f"--{key}=__import__('pathlib').Path({str(tmp_path / 'made')!r}).touch() or 1"])
    refusal([f"--{key}=1+1"])
    assert not (tmp_path / "made").exists()


def test_flag_alone_means_true():
    assert configure(Config, ["--whiten"]).whiten is True


@pytest.mark.parametrize("word, value", [("true", True), ("True", True), ("false", False), ("False", False)])
def test_bool_words(word, value, write):
    other = write(f"whiten = {not value}")
    assert configure(Config, [other, f"--whiten={word}"]).whiten is value


def test_hyphens_in_a_key_are_read_as_underscores():
    """As transformers' HfArgumentParser takes them; a value keeps its own."""
    assert configure(Config, ["--batch-size=8", "--out_dir=a-b"]) == Config(batch_size=8, out_dir="a-b")


def test_config_file_may_calculate_from_earlier_names(write):
    text = (
        "batch_size = 8 * 4 * 2\n\n# a comment\ntotal_episodes = 10 * batch_size\nlearning_rate = 3e-6 / 2\n"
    )
    cfg = configure(Config, [write(text + 'out_dir = "out/" + str(batch_size)')])
    assert cfg == Config(batch_size=64, total_episodes=640, learning_rate=1.5e-6, out_dir="out/64")


def test_underscore_names_in_a_file_are_helpers(write):
    cfg = configure(Config, [write("_gpus = 8\nbatch_size = 16 * _gpus")])
    assert cfg == Config(batch_size=128)
    assert "_gpus" in refusal(["--_gpus=8"])


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["learning_rat", "learnign_rate", "lerning_rate"])
def test_unknown_key_names_the_nearest(key, write):
    for argv in ([f"--{key}=1"], [f"--{key}"], [write(f"{key} = 1")]):
        message = refusal(argv)
        assert key in message
        assert "learning_rate" in message
    assert "x.py" in refusal([write(f"{key} = 1")])


def test_unknown_key_is_an_error_even_when_a_known_one_follows(write):
    assert "batchsize" in refusal([write("batchsize = 1\nbatch_size = 2")])
    assert "batchsize" in refusal(["--batchsize=1", "--batch_size=2"])


def test_key_that_is_near_to_none_gets_no_suggestion(write):
    assert refusal(["--zzz=1"]) == "command line: unknown key 'zzz' (--help lists all keys)"
    assert refusal([write("zzz = 1")]).endswith("x.py: unknown key 'zzz' (--help lists all keys)")


# (stage, a name of transformers or TRL, what is meant; empty: nothing in this stage)
TRANSLATED = [
    ("sft", "learning_rate", "lr"), ("sft", "learning-rate", "lr"), ("sft", "output_dir", "out_dir"),
    ("sft", "model_name_or_path", "model"), ("sft", "dataset_name", "data"),
    ("sft", "dataset_train_split", "train_split"),
    ("sft", "dataset_test_split", "eval_split"), ("sft", "num_train_epochs", "episodes = epochs x rows"),
    ("sft", "max_steps", "episodes = steps x batch_size"),
    ("sft", "per_device_train_batch_size", "micro_batch_size, rows"),
    ("sft", "gradient_accumulation_steps", "batch_size, which"), ("sft", "lr_scheduler_type", "schedule"),
    ("sft", "warmup_ratio", "warmup_steps = ratio x updates"), ("sft", "bf16", "dtype=bfloat16"),
    ("sft", "torch_dtype", "dtype"), ("sft", "gradient_checkpointing", "activation_checkpointing"),
    ("sft", "max_seq_length", "max_length"), ("sft", "eval_steps", "eval_every"), ("ppo", "eval_steps", ""),
    ("sft", "save_steps", "save_every"), ("sft", "save_total_limit", "keep_checkpoints"), ("sft", "max_new_tokens", ""),
    ("sft", "completion_only_loss", "loss_on=response"), ("sft", "model_revision", "model=id@revision"),
    ("sft", "resume_from_checkpoint", "out_dir, from which the same command goes on"), ("sft", "beta", ""),
    ("rm", "num_train_epochs", "episodes"), ("dpo", "max_prompt_length", "max_query_tokens"),
    ("dpo", "ref_model", "reference"), ("rm", "ref_model", ""), ("sample", "max_new_tokens", "response_length"),
    ("ppo", "max_new_tokens", "response_length"), ("ppo", "sft_model_path", "model"),
    ("ppo", "reward_model_path", "reward_model"), ("ppo", "total_episodes", "episodes"),
    ("ppo", "num_ppo_epochs", "n_epochs"), ("ppo", "num_train_epochs", "episodes = epochs x rows"),
    ("ppo", "num_mini_batches", "n_minibatches"), ("ppo", "missing_eos_penalty", "missing_eos_score, which replaces"),
    ("ppo", "local_rollout_forward_batch_size", "rollout_micro_batch_size"), ("ppo", "init_kl_coef", "kl_coef"),
    ("variants.grpo", "num_generations", "group_size"), ("variants.grpo", "max_completion_length", "response_length"),
    ("variants.grpo", "num_iterations", "n_epochs"), ("variants.grpo", "epsilon", "cliprange"),
    ("variants.grpo", "beta", "kl_coef"),
]  # fmt: skip


@pytest.mark.parametrize("stage, name, meant", TRANSLATED)
def test_name_of_another_library_is_answered_with_ours(stage, name, meant, write):
    cls = importlib.import_module(stage).Config
    key = name.replace("-", "_")
    for argv in ([f"--{name}=1"], [write(f"{key} = 1")]):
        message = refusal(argv, cls)
        words = r" \(--help"
        if meant:
            words = rf"; did you mean {meant}\b"
        assert re.search(f"unknown key '{key}'{words}", message)


STAGES = ["sft", "rm", "ppo", "dpo", "sample", "evals.winrate"]


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_name_stands_for_a_field_that_looks_unlike_it(name):
    keys = {stage: [field.name for field in fields(importlib.import_module(stage).Config)] for stage in STAGES}
    meant = OTHER_NAMES[name]
    ours = re.match(r"\w+", meant).group()
    having = [stage for stage in STAGES if ours in keys[stage]]
    assert having
    for stage in having:
        assert name not in keys[stage]
    # What the nearest names say by themselves needs no entry.
    assert any(difflib.get_close_matches(name, keys[stage]) != [meant] for stage in having)


WRONG_IN_FILE = [
    ("batch_size", "'ten'", "int", "str"), ("batch_size", "1.5", "int", "float"),
    ("batch_size", "2.0", "int", "float"), ("batch_size", "True", "int", "bool"),
    ("learning_rate", "'1e-5'", "float", "str"), ("learning_rate", "True", "float", "bool"),
    ("learning_rate", "None", "float", "None"), ("out_dir", "3", "str", "int"),
    ("whiten", "'yes'", "bool", "str"), ("batch_size", "[1]", "int", "list"),
]


@pytest.mark.parametrize("key, literal, wanted, given", WRONG_IN_FILE)
def test_wrong_type_in_a_file_names_field_and_both_types(key, literal, wanted, given, write):
    message = refusal([write(f"{key} = {literal}")])
    assert key in message
    assert wanted in message
    assert given in message


@pytest.mark.parametrize(
    "key, text, wanted",
    [
        ("batch_size", "ten", "int"), ("batch_size", "1.5", "int"), ("batch_size", "True", "int"),
        ("learning_rate", "fast", "float"), ("learning_rate", "True", "float"), ("whiten", "maybe", "bool"),
        ("whiten", "2", "bool"),
    ],
)
def test_wrong_type_on_the_command_line_names_field_type_and_text(key, text, wanted):
    message = refusal([f"--{key}={text}"])
    assert key in message
    assert wanted in message
    assert text in message


@pytest.mark.parametrize(
    "argument", ["--learning_rate", "--learning_rate=", "--batch_size", "--batch_size=", "--out_dir"]
)
def test_key_without_value_is_named(argument):
    assert argument.strip("-=") in refusal([argument])


@pytest.mark.parametrize(
    "argument", ["--=3", "--", "-learning_rate=1e-5", "learning_rate=1e-5", "--learning_rate 1e-5"]
)
def test_malformed_argument_is_named(argument):
    assert argument.split("=")[0] in refusal([argument])


SPELLED = [
    (["--learning_rate", "1e-5"], "'1e-5'", "--learning_rate=1e-5"),
    (["--dropout", "-1"], "'-1'", "--dropout=-1"),
    (["--whiten", "True"], "'True'", "--whiten=True"),
    (["--batch_size=3", "--out_dir", "out/lr=1"], "'out/lr=1'", "--out_dir=out/lr=1"),
    (["learning_rate=1e-5"], "'learning_rate=1e-5'", "--learning_rate=1e-5"),
    (["--batch_size=3", "whiten=True"], "'whiten=True'", "--whiten=True"),
    (["-learning_rate=1e-5"], "'-learning_rate=1e-5'", "--learning_rate=1e-5"),
    (["-whiten"], "'-whiten'", "--key=value, --flag or config/x.py"),
    (["config/ppo_1b"], "'config/ppo_1b'", "--key=value, --flag or config/x.py"),
    ([""], "''", "--key=value, --flag or config/x.py"),
]


@pytest.mark.parametrize("argv, wrong, right", SPELLED)
def test_another_spelling_is_answered_with_the_right_one(argv, wrong, right):
    assert refusal(argv) == f"command line: {wrong} is neither an option nor a .py file; write {right}"


def test_value_after_a_space_is_not_run_as_a_config_file(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"__import__('pathlib').Path({str(tmp_path / 'made')!r}).touch()")
    assert f"write --out_dir={rows}" in refusal(["--out_dir", str(rows)])
    assert not (tmp_path / "made").exists()


def test_config_file_may_follow_a_flag(write):
    assert configure(Config, ["--whiten", write("batch_size = 1")]) == Config(whiten=True, batch_size=1)


def test_missing_config_file_is_named(tmp_path):
    assert "nothing_here.py" in refusal([str(tmp_path / "nothing_here.py")])


def test_directory_as_config_file_is_refused(tmp_path):
    assert tmp_path.name in refusal([str(tmp_path)])


@pytest.mark.parametrize(
    "text", ["batch_size = = 3", "batch_size = (", "  batch_size = 1\n x = 2", "batch_size = 3\x00"]
)
def test_syntax_error_names_the_config_file(text, write):
    assert "x.py" in refusal([write("total_episodes = 1\n" + text)])


@pytest.mark.parametrize("text", ["batch_size = 1 // 0", "batch_size = undefined", "raise ValueError('no')"])
def test_error_in_a_config_file_names_the_file(text, write):
    assert "x.py" in refusal([write(text)])


@pytest.mark.parametrize(
    "line", ["learning_rate: 1e-5", "learning_rate == 1e-5", '{"learning_rate": 1e-5}', "learning_rate"]
)
def test_line_that_sets_nothing_is_refused(line, write):
    """YAML, JSON and == are valid Python; ignored, they would train with the default."""
    assert "x.py" in refusal([write(line)])


def test_docstring_of_a_config_file_is_fine(write):
    assert configure(Config, [write('"""Launch: python ppo.py x.py"""\nbatch_size = 2')]).batch_size == 2


def test_failed_configuration_changes_no_default():
    refusal(["--batch_size=9", "--nonsense=1"])
    assert Config() == Config(batch_size=64)


# ---- help ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["--batch_size=3", "--help"]])
def test_help_shows_every_field_with_comment_and_default(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        configure(Config, argv)
    assert stop.value.code in (0, None)
    assert not isinstance(stop.value, UserError)
    lines = capsys.readouterr().out.splitlines()
    expected = {
        "out_dir": ("out/run", "where the run goes"),
        "learning_rate": ("3e-06", "peak of the schedule"),
        "batch_size": ("64", "rows of one update, over all ranks"),
        "total_episodes": ("1000", "rows of the whole run"),
        "whiten": ("False", "whiten the rewards"),
        "dropout": ("0.0", "off, as in the paper"),
    }
    for key, words in expected.items():
        assert any(key in line and all(w in line for w in words) for line in lines), key


@dataclass
class Child(Config):
    n_epochs: int = 4  # passes over each batch
    batch_size: int = 512  # episodes of one update


def test_help_shows_inherited_fields_with_the_comment_that_holds(capsys):
    with pytest.raises(SystemExit):
        configure(Child, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    for words in [
        ("n_epochs", "4", "passes over each batch"), ("learning_rate", "3e-06", "peak of the schedule"),
        ("batch_size", "512", "episodes of one update"),
    ]:
        assert any(all(w in line for w in words) for line in lines), words


@dataclass
class Grouped:
    # ---- the run
    out_dir: str = "out/run"  # where the run goes
    # ---- batch
    batch_size: int = 64  # rows of one update

    # ---- optimizer
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rate


@dataclass
class Stage(Grouped):
    # ---- loss
    beta: float = 0.1  # weight; 0: none
    # ---- batch
    n_epochs: int = 4
    # ---- results
    out_dir: str = ""  # empty: only print


@dataclass
class Variant(Stage):
    kind: Literal["a"] = "a"


def test_help_has_groups_in_the_order_of_the_source_and_choices(capsys):
    """An inherited group goes on, and a field stays where its base has it."""
    with pytest.raises(SystemExit):
        configure(Variant, ["--help"])
    lines = [re.sub(" +", " ", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        "", "the run", " --out_dir='' empty: only print",
        "", "batch", " --batch_size=64 rows of one update", " --n_epochs=4",
        "", "optimizer", " --schedule='cosine' [cosine | constant] of the learning rate",
        "", "loss", " --beta=0.1 weight; 0: none",
        "", "of this script", " --kind='a' [a]",
    ]  # fmt: skip


LAUNCHES = {
    "sft": "python sft.py config/toy_sft.py ", "rm": "python rm.py config/toy_rm.py ",
    "ppo": "python ppo.py config/toy_ppo.py ", "dpo": "python dpo.py config/toy_dpo.py ",
    "sample": "python sample.py --model=", "evals.winrate": "python sample.py --judge=",
    "evals.report_card": "python -m evals.report_card --reward_model=", "evals.passk": "python sample.py config/sums_",
    "variants.grpo": "python -m variants.grpo config/toy_ppo.py ",
}  # fmt: skip
for _path in (Path(__file__).parent.parent / "variants").glob("*.py"):
    if "\nclass Config(" in _path.read_text():
        LAUNCHES.setdefault(f"variants.{_path.stem}", f"python -m variants.{_path.stem} ")


@pytest.mark.parametrize("stage", LAUNCHES)
def test_help_of_a_stage_shows_its_launch_line_and_all_choices(stage, capsys):
    cls = importlib.import_module(stage).Config
    with pytest.raises(SystemExit):
        configure(cls, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].strip().startswith(LAUNCHES[stage].strip())
    for field in fields(cls):
        (line,) = [line for line in lines if line.startswith(f"  --{field.name}=")]
        if get_args(field.type):
            assert f"[{' | '.join(get_args(field.type))}]" in line


def test_user_error_is_a_quiet_exit():
    """One line for the user in place of a traceback."""
    error = UserError("no such file")
    assert isinstance(error, SystemExit)
    assert str(error) == "no such file"


def test_configure_reads_no_environment_and_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCH_SIZE", "9")
    assert configure(Config, []).batch_size == 64
    assert os.listdir(tmp_path) == []


@dataclass
class Numbers:
    whole: int = 0
    count: Count = 1
    real: float = 0.0
    positive: Positive = 1.0
    share: Share = 0.0
    signed: Signed = 0.0


BOUNDS = {"whole": ("0", "-1"), "count": ("1", "0"), "real": ("0", "-1e-9"), "positive": ("1e-300", "0"),
          "share": ("0.999", "1"), "signed": ("-1e300", "nan")}  # fmt: skip


@pytest.mark.parametrize("key", BOUNDS)
def test_each_type_of_number_has_its_bounds(key):
    inside, outside = BOUNDS[key]
    assert getattr(configure(Numbers, [f"--{key}={inside}"]), key) == float(inside)
    for text in (outside, "inf", "-inf"):
        with pytest.raises(UserError, match=f"'{key}' takes (int|finite float|float) ?"):
            configure(Numbers, [f"--{key}={text}"])


CONFIG_FILES = sorted((Path(__file__).parent.parent / "config").glob("[a-z]*_*.py"))
CONFIG_FILES += sorted((Path(__file__).parent.parent / "lab" / "config").glob("*.py"))


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_config_files_fit_the_stage_that_their_first_line_starts(path):
    """A script is launched by its file, a variant as a module: `-m variants.NAME`."""
    launch = path.read_text().splitlines()[0]
    script, variant = re.search(r" (?:(\w+)\.py|-m (variants\.\w+)) (?:lab/)?config/", launch).groups()
    stage = importlib.import_module(script or variant)
    assert path.name in launch
    assert configure(stage.Config, [str(path)]) != stage.Config()
