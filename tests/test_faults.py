"""Killed, out of disk, out of memory, fed with NaN: a run ends with one line, and goes on from where it was."""

import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pipeline import EVERYTHING, ROOT, arguments, in_update, metrics, nan_in
from safetensors.torch import load_file
from tqdm import tqdm

import ppo
import sft
from configurator import UserError
from data import Tokenizer, load_rows
from runtime import Signals

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
WRITTEN = ("metrics.jsonl", "final/model.safetensors")


def start(stage, cfg, n=0, **options):
    """Start a script as a user would, under torchrun if n > 0."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n else []
    command = [sys.executable, *launch, f"{stage}.py", *arguments(cfg)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # as many threads as here, for another number rounds differently; under torchrun one each
    return subprocess.Popen(command, cwd=ROOT, env=ENV if n else dict(os.environ), **pipes, **options)


def wait_for_rows(cfg, n):
    """Return once metrics.jsonl has n rows."""
    path = Path(cfg.out_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < n:
        assert time.monotonic() < deadline, f"no {n} rows in {path}"
        time.sleep(0.01)


def written(cfg):
    return [(Path(cfg.out_dir) / name).read_bytes() for name in WRITTEN]


def checkpoints(cfg):
    return sorted(path.name for path in (Path(cfg.out_dir) / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(pipeline):
    """An SFT run of five updates with a checkpoint after each second one and the last, left alone."""
    cfg = pipeline.config(sft, "whole", episodes=40, save_every=2, keep_checkpoints=3, eval_split="")
    sft.main(cfg)
    assert checkpoints(cfg) == ["step_2", "step_4", "step_5"]
    return cfg


@pytest.fixture
def broken(pipeline, whole, tmp_path):
    """A copy of that run as if it had been killed in its last update, in a place of its own."""
    copy = pipeline.directory / "broken"
    shutil.copytree(whole.out_dir, copy, dirs_exist_ok=True)
    shutil.rmtree(copy / "final")
    shutil.rmtree(copy / "checkpoints" / "step_5")
    options = dict(episodes=40, save_every=2, keep_checkpoints=3, eval_split="")
    yield pipeline.config(sft, "broken", **options, accept_changes=True)
    shutil.rmtree(copy)


# ---------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(pipeline, number):
    """Exit code 0, a line that says how to go on, and in the end the bytes of a run that was left alone."""
    alone = pipeline.config(sft, f"alone_{number}", episodes=800, eval_split="")
    stopped = pipeline.config(sft, f"stopped_{number}", episodes=800, eval_split="")
    process = start("sft", stopped)
    wait_for_rows(stopped, 2)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    step = len(metrics(stopped))
    assert f"stopped after update {step}; the same command goes on from there" in output
    assert 2 <= step < 100
    assert checkpoints(stopped) == [f"step_{step}"]
    sft.main(stopped)
    sft.main(alone)
    assert written(stopped) == written(alone)


def test_one_signal_that_comes_twice_is_one(pipeline):
    """A scheduler sends SIGTERM to every process, and torchrun passes its own on."""
    cfg = pipeline.config(sft, "twice", episodes=80_000, eval_split="")
    process = start("sft", cfg)
    wait_for_rows(cfg, 2)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped after update" in output
    assert checkpoints(cfg) == [f"step_{len(metrics(cfg))}"]


def test_a_run_whose_output_nobody_reads_any_more_is_saved(pipeline):
    """`| tee log`: Ctrl-C ends tee as well."""
    cfg = pipeline.config(sft, "tee", episodes=80_000, eval_split="")
    process = start("sft", cfg)
    wait_for_rows(cfg, 2)
    process.send_signal(signal.SIGSTOP)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.wait(timeout=60)
    assert checkpoints(cfg) == [f"step_{len(metrics(cfg))}"]


def test_a_second_ctrl_c_ends_at_once(pipeline):
    """Inside an update that would take minutes."""
    cfg = pipeline.config(ppo, "impatient", reward_model="")
    score = "lambda *texts: print('scoring', flush=True) or time.sleep(600)"
    code = f"import ppo, time; ppo.main(ppo.{cfg!r}, score={score})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True)
    assert any(line == "scoring\n" for line in process.stdout)  # reads up to that line
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)  # the first one waits for the update
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0


def test_handlers_are_given_back(pipeline):
    before = [signal.getsignal(number) for number in Signals.numbers]
    sft.main(pipeline.config(sft, "handlers", eval_split=""))
    assert [signal.getsignal(number) for number in Signals.numbers] == before


def test_a_rank_that_is_killed_ends_the_job(pipeline):
    cfg = pipeline.config(sft, "dead_rank", episodes=80_000, eval_split="")
    process = start("sft", cfg, 2)
    wait_for_rows(cfg, 2)
    ranks = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"RANK="):
                ranks[int(variable.removeprefix(b"RANK="))] = int(pid)
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL) received by PID" in errors


def test_a_rank_that_fails_ends_the_job_with_its_traceback(pipeline, tmp_path):
    cfg = pipeline.config(ppo, "failing_rank", reward_model="")
    score = "lambda queries, responses: [1 / (1 - int(os.environ['RANK']))] * len(queries)"
    (tmp_path / "fail.py").write_text(f"import os, ppo\nppo.main(ppo.{cfg!r}, score={score})\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = {**ENV, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([*command, tmp_path / "fail.py"], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "ZeroDivisionError" in result.stderr


# ---------------------------------------------------------------------------- checkpoints


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def shard(directory):
    return min(directory.glob("*.safetensors"))


def tensors(directory):
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


DAMAGES = {
    "truncated": lambda d: os.truncate(shard(d), shard(d).stat().st_size // 2),
    "a bit of a weight": lambda d: flip(shard(d), -1000),
    "a bit of the header": lambda d: flip(shard(d), 20),
    "no weights": lambda d: shard(d).unlink(),
    "empty weights": lambda d: shard(d).write_bytes(b""),
    "one file too many": lambda d: shutil.copy(shard(d), d / "shard-00002-model-00001-of-00002.safetensors"),
    "garbage state": lambda d: (d / "state.json").write_bytes(b"\xff{"),
    "another step": lambda d: (d / "state.json").write_text((d / "state.json").read_text().replace("4", "3", 1)),
    "no state": lambda d: (d / "state.json").unlink(),
    "no checksums": lambda d: (d / "checksums.json").unlink(),
    "checksums of something else": lambda d: (d / "checksums.json").write_text("[]"),
    "nothing": lambda d: [path.unlink() for path in d.iterdir()],
    "a file that cannot be read": lambda d: (d / "notes").mkdir(),  # root may read all files, but no directory
    "a file in its place": lambda d: (shutil.rmtree(d), d.write_text("")),
    "a dead link": lambda d: (shutil.rmtree(d), d.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(whole, broken, damage, capsys):
    DAMAGES[damage](Path(broken.out_dir) / "checkpoints" / "step_4")
    sft.main(broken)
    output = capsys.readouterr().out
    assert f"passed over {broken.out_dir}/checkpoints/step_4: " in output
    assert f"resumed from {broken.out_dir}/checkpoints/step_2" in output
    assert written(broken) == written(whole)
    assert checkpoints(broken) == ["bad_step_4", "step_2", "step_4", "step_5"]
    for name in ("final", "checkpoints/step_5"):
        shutil.rmtree(Path(broken.out_dir) / name)
    sft.main(broken)  # the damaged one has been replaced
    assert f"resumed from {broken.out_dir}/checkpoints/step_4" in capsys.readouterr().out


def test_damaged_checkpoints_do_not_count_among_those_kept(broken):
    """Two are kept, two are damaged, a third one comes between: it stays, and so does the one it began from."""
    directory = Path(broken.out_dir) / "checkpoints"
    shutil.copytree(directory / "step_4", directory / "step_5")
    for step in (4, 5):
        os.truncate(shard(directory / f"step_{step}"), 100)
    broken.save_every = 3
    broken.keep_checkpoints = 2
    (Path(broken.out_dir) / "tmp_final").write_text("in the way: the model cannot be written")
    with pytest.raises(UserError, match="tmp_final"):
        sft.main(broken)
    assert checkpoints(broken) == ["bad_step_4", "bad_step_5", "step_3", "step_5"]


def test_a_log_that_was_emptied_is_not_filled_up(broken):
    """Cutting it to the size that it had would make it longer, with NULs."""
    os.truncate(Path(broken.out_dir) / "metrics.jsonl", 0)
    sft.main(broken)
    assert [row["step"] for row in metrics(broken)] == [4]


def test_a_shorter_run_keeps_what_it_has(broken, capsys):
    """Four updates are done and checkpointed; the configuration now asks for three."""
    broken.episodes = 24
    sft.main(broken)
    assert f"resumed from {broken.out_dir}/checkpoints/step_4" in capsys.readouterr().out
    assert [row["step"] for row in metrics(broken)] == [0, 1, 2, 3]
    assert (Path(broken.out_dir) / "final").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_update(pipeline, number):
    """SIGTERM lets the run end as it would have, Ctrl-C ends it at once."""
    cfg = pipeline.config(sft, f"late_{number}")
    sent = []

    def inputs(*args):
        if not torch.is_grad_enabled() and not sent:  # at the first rows of the evaluation
            sent.append(number)
            os.kill(os.getpid(), number)
        return sft.model_inputs(*args)

    if number == signal.SIGTERM:
        sft.main(cfg, inputs)
    else:
        with pytest.raises(KeyboardInterrupt):
            sft.main(cfg, inputs)
    assert sent == [number]
    assert [row["step"] for row in metrics(cfg)][:2] == [0, 1]
    assert (Path(cfg.out_dir) / "final").exists() == (number == signal.SIGTERM)


def test_other_names_among_the_checkpoints_stay(whole, broken, capsys):
    directory = Path(broken.out_dir) / "checkpoints"
    for name in ("step_1.bak", "step_04", "step_4_good", "step_"):
        (directory / name).mkdir()
    (directory / "step_2").rename(Path(broken.out_dir) / "elsewhere")
    (directory / "step_2").symlink_to("../elsewhere")  # it cannot be pruned, which must not end the run
    broken.keep_checkpoints = 1
    sft.main(broken)
    assert f"resumed from {directory}/step_4" in capsys.readouterr().out
    assert written(broken) == written(whole)
    assert checkpoints(broken) == sorted(["step_1.bak", "step_04", "step_4_good", "step_", "step_2", "step_5"])


def test_without_a_whole_checkpoint_nothing_is_lost(broken):
    """Starting anew would take the rows out of metrics.jsonl: that is for the user to say."""
    for step in (2, 4):
        os.truncate(shard(Path(broken.out_dir) / "checkpoints" / f"step_{step}"), 100)
    before = (Path(broken.out_dir) / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="checkpoints: none can be read; remove them all"):
        sft.main(broken)
    assert (Path(broken.out_dir) / "metrics.jsonl").read_bytes() == before


def test_a_half_written_checkpoint_is_no_checkpoint(whole, broken, capsys):
    """Of a job of more processes that was killed while it saved: its files must not get into the next one."""
    directory = Path(broken.out_dir) / "checkpoints"
    (directory / "step_4").rename(directory / "tmp_4")
    shutil.copy(shard(directory / "tmp_4"), directory / "tmp_4" / "shard-00007-model-00001-of-00002.safetensors")
    (directory / "tmp_3").mkdir()  # of a run that a signal stopped and torchrun then killed
    sft.main(broken)
    assert f"resumed from {directory}/step_2" in capsys.readouterr().out
    assert written(broken) == written(whole)
    assert checkpoints(broken) == ["step_2", "step_4", "step_5"]
    assert len(list((directory / "step_4").glob("*.safetensors"))) == len(list((directory / "step_5").glob("*.safet*")))


def test_a_checkpoint_of_another_model_is_one_line(pipeline, broken):
    shape = json.loads((pipeline.data / "config.json").read_text())
    (Path(broken.out_dir) / "wider").mkdir()
    (Path(broken.out_dir) / "wider" / "config.json").write_text(json.dumps({**shape, "hidden_size": 64}))
    broken.model = str(Path(broken.out_dir) / "wider")
    broken.tokenizer = str(pipeline.data)
    with pytest.raises(UserError, match=f"out_dir {broken.out_dir}: .*64.*32|32.*64") as error:
        sft.main(broken)
    assert "\n" not in str(error.value)


def test_checkpoints_hold_no_pickle(whole):
    directory = Path(whole.out_dir) / "checkpoints" / "step_4"
    others = {path.name for path in directory.iterdir() if path.suffix != ".safetensors"}
    assert others == {"state.json", "checksums.json"}
    assert {name.split(".")[0] for name in tensors(directory)} == {"model", "exp_avg", "exp_avg_sq", "step"}


def test_a_checkpoint_is_written_in_parts(whole):
    """What is in one file is in CPU memory twice while it is written."""
    sizes = [len(load_file(path)) for path in (Path(whole.out_dir) / "checkpoints" / "step_4").glob("*.safetensors")]
    assert max(sizes) == 32
    assert len(sizes) == -(-sum(sizes) // 32) > 2


def test_chosen_checkpoints_are_kept(pipeline):
    cfg = pipeline.config(sft, "keep", episodes=72, save_every=1, keep_every=4, eval_split="")
    sft.main(cfg)
    assert checkpoints(cfg) == ["step_4", "step_8", "step_9"]


@pytest.mark.parametrize(
    "name, options", [("rm", {}), ("dpo", {}), ("variants.ppo_max", dict(EVERYTHING, critic_steps=1))]
)
def test_every_stage_can_be_stopped(pipeline, name, options, capsys):
    """By a signal in the second of four updates."""
    stage = importlib.import_module(name)
    alone = pipeline.config(stage, f"{name}_alone", episodes=32, **options)
    stopped = pipeline.config(stage, f"{name}_stopped", episodes=32, **options)
    stage.main(alone)
    with in_update(stopped, 1, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        stage.main(stopped)
    assert "stopped after update 2" in capsys.readouterr().out
    assert len(metrics(stopped)) == 2
    stage.main(stopped)
    assert written(stopped) == written(alone)


# ---------------------------------------------------------------------------- disk and memory


def test_a_full_disk_leaves_the_previous_checkpoint(whole, broken):
    """No file may grow beyond 50,000 bytes: a shard of a checkpoint is larger."""
    shutil.rmtree(Path(broken.out_dir) / "checkpoints" / "step_4")
    limit = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))
    process = start("sft", broken, **limit)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert re.search(f"out_dir {broken.out_dir}: .*File too large.*run the same command again", errors)
    assert checkpoints(broken) in (["step_2"], ["step_2", "tmp_4"])


def test_a_full_disk_leaves_the_configuration(whole, broken):
    process = start("sft", broken, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "File too large" in errors
    broken.accept_changes = False
    sft.main(broken)
    assert written(broken) == written(whole)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_out_of_memory_names_the_fields_to_lower(pipeline, where):
    def token_loss(cfg, new_logprobs, micro):
        if where == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")
        return torch.empty(2**55)

    with pytest.raises(UserError, match=r"out of memory: .*lower micro_batch_size \(3\) or rollout_micro_batch_size"):
        ppo.main(pipeline.config(ppo, f"memory_{where}"), token_loss=token_loss)


@pytest.mark.parametrize("error", [OSError(2, "no such file"), MemoryError("mine"), RuntimeError("CUDA out of memory")])
def test_what_a_score_raises_passes_as_it_is(pipeline, error):
    def score(queries, responses):
        raise error

    with pytest.raises(type(error)) as caught:
        ppo.main(pipeline.config(ppo, "score_raises"), score)
    assert caught.value is error
    assert not tqdm._instances  # no bar is drawn behind the traceback


def test_a_score_that_gives_no_numbers_is_told(pipeline):
    for found in (None, ["a"] * 3):
        with pytest.raises(UserError, match="score gave no list of numbers; return one for each text: "):
            ppo.main(pipeline.config(ppo, "score_gives_nothing"), lambda queries, responses, found=found: found)


def test_other_errors_keep_their_traceback(pipeline):
    def inputs(rows, loss_on, device):
        return torch.ones(3) @ torch.ones(4)

    with pytest.raises(RuntimeError, match="size") as error:
        sft.main(pipeline.config(sft, "a_bug"), inputs)
    assert error.traceback[-1].name == "inputs"


# ---------------------------------------------------------------------------- numbers that are not finite


def test_the_rows_of_a_non_finite_loss_are_named(pipeline):
    """Update 1, second of the three micro-batches of 3, 3 and 2 rows."""
    cfg = pipeline.config(sft, "bad_rows", save_every=1, eval_split="")
    seen = []

    def inputs(rows, *args):
        seen.append(rows["query"])
        return sft.model_inputs(rows, *args)

    with nan_in({4}), pytest.raises(UserError, match="step 1, rank 0: .*nan") as error:
        sft.main(cfg, inputs)
    named = json.loads(str(error.value).split("not finite: ")[1].split("]")[0] + "]")
    rows = load_rows(cfg.data, "train", Tokenizer.load(str(pipeline.data)), n_responses=1)
    assert len(named) == 3
    assert sorted(map(str, rows[named]["query"])) == sorted(map(str, seen[4]))
    assert checkpoints(cfg) == ["step_1"]  # of the update before


def test_a_non_finite_update_can_be_skipped(pipeline):
    """The weights and the moments stay; the row says so; the next update is as if nothing had been."""
    cfg = pipeline.config(sft, "skip", on_nonfinite="skip", save_every=1, keep_every=1, eval_split="", episodes=24)
    with nan_in({3, 4, 5}):
        sft.main(cfg)
    rows = metrics(cfg)
    assert [row["skipped"] for row in rows] == [0, 1, 0]
    assert rows[1]["loss/sft"] is None
    assert rows[1]["grad_norm"] is None
    assert rows[2]["loss/sft"] < rows[0]["loss/sft"]
    one, two, three = (tensors(Path(cfg.out_dir) / "checkpoints" / f"step_{n}") for n in (1, 2, 3))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(two["step.model.embed_out.weight"], three["step.model.embed_out.weight"])


def test_ppo_counts_each_skipped_step(pipeline):
    """Two of the eight steps of an update, the first and the third: each minibatch has two micro-batches."""
    cfg = pipeline.config(ppo, "skip_ppo", on_nonfinite="skip", episodes=8, n_minibatches=2, eval_split="")
    with nan_in({0, 4}):
        ppo.main(cfg)
    assert metrics(cfg)[0]["skipped"] == 2
    weights = load_file(Path(cfg.out_dir) / "final" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_score_that_is_not_finite_stops_before_the_update(pipeline):
    def score(queries, responses):
        return [float("nan") if i == 1 else 0.0 for i in range(len(queries))]

    cfg = pipeline.config(ppo, "nan_score", reward_model="", on_nonfinite="skip")
    with pytest.raises(UserError, match=r"step 0: scores of the batch's rows \[\d, \d, \d\] are not finite"):
        ppo.main(cfg, score=score)
    assert not (Path(cfg.out_dir) / "metrics.jsonl").exists()


def test_an_error_of_the_users_function_is_left_as_it_is(pipeline):
    def score(queries, responses):
        Path("/no/such/file").read_text()

    cfg = pipeline.config(ppo, "own_error", reward_model="")
    with pytest.raises(FileNotFoundError, match="/no/such/file"):
        ppo.main(cfg, score=score)


# ---------------------------------------------------------------------------- the directory


def test_another_configuration_can_be_accepted(pipeline, broken):
    changed = pipeline.config(sft, "broken", episodes=40, save_every=2, eval_split="", micro_batch_size=8, lr=1e-4)
    # The micro-batch changes no number, and may be another.
    with pytest.raises(UserError, match=r"configuration: lr \(0.001 -> 0.0001\); .*--accept_changes"):
        sft.main(changed)
    changed.accept_changes = True
    sft.main(changed)
    now = json.loads((Path(changed.out_dir) / "config.json").read_text())
    assert now["lr"] == 1e-4
    assert "accept_changes" not in now
    changed.accept_changes = False
    sft.main(changed)  # from now on it is the run's own


def test_two_runs_do_not_share_a_directory(pipeline):
    cfg = pipeline.config(sft, "busy", episodes=80_000, eval_split="")
    first = start("sft", cfg)
    wait_for_rows(cfg, 2)
    second = start("sft", cfg)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"{cfg.out_dir}: another run is there; stop it" in errors
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert [row["step"] for row in metrics(cfg)] == list(range(len(metrics(cfg))))


def test_processes_that_survive_torchrun_keep_the_directory(pipeline):
    cfg = pipeline.config(sft, "orphans", episodes=80_000, eval_split="")
    process = start("sft", cfg, 2)
    wait_for_rows(cfg, 2)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    _, errors = start("sft", cfg, 2).communicate(timeout=120)
    alive = [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    for pid in alive:
        os.kill(int(pid), signal.SIGKILL)
    process.communicate(timeout=60)
    assert len(alive) == 2
    assert f"{cfg.out_dir}: another run is there; stop it" in errors


def test_a_fixed_kl_coefficient_can_be_changed(pipeline):
    cfg = pipeline.config(ppo, "coefficient", episodes=16, eval_split="", save_every=1)
    ppo.main(cfg)
    for name in ("final", "checkpoints/step_2"):
        shutil.rmtree(Path(cfg.out_dir) / name)
    cfg.kl_coef = 0.5
    cfg.accept_changes = True
    ppo.main(cfg)
    assert [row["objective/kl_coef"] for row in metrics(cfg)] == [0.05, 0.5]


def test_torchrun_passes_a_signal_on(pipeline):
    """torchrun itself ends with an error then; its processes have saved, and the same command goes on."""
    cfg = pipeline.config(sft, "forwarded", episodes=80_000, eval_split="")
    process = start("sft", cfg, 2)
    wait_for_rows(cfg, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    step = len(metrics(cfg))
    assert f"stopped after update {step}; the same command goes on" in output
    assert checkpoints(cfg) == [f"step_{step}"]
