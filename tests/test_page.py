"""A run's page: what it shows of each stage, that it stands alone, and that nothing in it is taken for HTML."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pipeline import metrics, write_rows

import dpo
import ppo
from configurator import UserError

pytest.importorskip("matplotlib")
from lab import page  # noqa: E402

CURVES = {
    "sft": ["loss/sft, dashed: eval/loss", "lr", "grad_norm"],
    "rm": ["loss/rm", "train/accuracy", "train/margin", "grad_norm"],
    "ppo": ["objective/scores", "objective/kl", "val/response_length", "val/perplexity", "val/ref_perplexity",
            "val/eos_rate", "policy/entropy_avg", "policy/approxkl_avg", "loss/value_avg"],
    "dpo": ["loss/dpo", "rewards/accuracies", "rewards/margins", "rewards/chosen, dashed: rejected",
            "logps/chosen, dashed: rejected", "grad_norm"],
}  # fmt: skip


class Reader(HTMLParser):
    """A page as a browser reads it."""

    def __init__(self, html):
        super().__init__()
        self.tags = []  # (name, attributes)
        self.rows = []  # of all tables: the texts of their cells
        self.pictures = []  # the texts in each
        self.tokens = []  # (text, style) of those that are coloured
        self.text = ""
        self.open = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.open = tag
        self.tags.append((tag, dict(attributes)))
        if tag == "svg":
            self.pictures.append([])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "span":
            self.tokens.append(("", dict(attributes)["style"]))

    def handle_endtag(self, tag):
        self.open = ""

    def handle_data(self, text):
        self.text += text
        if self.open == "text":
            self.pictures[-1].append(text)
        if self.open in ("td", "th"):
            self.rows[-1][-1] += text.strip()
        if self.open == "span":
            before, style = self.tokens[-1]
            self.tokens[-1] = (before + text, style)


def read(run):
    return Reader(page.page(Path(run)))


def ppo_run(directory, n=3, samples=(), **config):
    """A run's directory as PPO leaves it while it goes on."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"kl_coef": 0.1, "episodes": 40, "batch_size": 8, **config}))
    rows = [{"step": i, "objective/scores": i, "objective/kl": 2.0 * i, "val/response_length": 5.0} for i in range(n)]
    write_rows(directory / "metrics.jsonl", rows)
    write_rows(directory / "samples.jsonl", samples)
    return directory


def sample(step, query, **columns):
    return {"step": step, "query": query, "response": f" answer {step}", "score": 0.5, "kl": 0.25, **columns}


# ---------------------------------------------------------------------------- what the stages write


@pytest.fixture(scope="module")
def runs(pipeline):
    """Stage -> the directory of a finished run."""
    directories = {"sft": pipeline.directory / "sft", "rm": pipeline.directory / "rm"}
    for stage in (ppo, dpo):
        cfg = pipeline.config(stage, f"page_{stage.__name__}")
        stage.main(cfg)
        directories[stage.__name__] = Path(cfg.out_dir)
    return directories


@pytest.fixture(scope="module")
def pages(runs):
    return {stage: page.page(run) for stage, run in runs.items()}


@pytest.mark.parametrize("stage, n_updates", [("sft", 40), ("rm", 2), ("ppo", 2), ("dpo", 2)])
def test_page_shows_a_run_of_each_stage(runs, pages, stage, n_updates):
    run = runs[stage]
    reader = Reader(pages[stage])
    assert f"{stage}: {run}" in reader.text
    assert f"finished: {n_updates} of {n_updates} updates" in reader.text and "not finished" not in reader.text
    drawn = [picture for picture in reader.pictures if not set(picture) & set(page.SPEEDS)]
    assert len(drawn) == len(CURVES[stage])
    for title, texts in zip(CURVES[stage], drawn):
        assert title in texts and "update" in texts

    config = json.loads((run / "config.json").read_text())
    default = {"sft": "128", "rm": "64", "ppo": "512", "dpo": "64"}[stage]
    assert ["batch_size", "8", default] in reader.rows
    names = [row[0] for row in reader.rows]
    assert names.index("lr") < names.index("adam_beta1")  # its value is not the default's
    assert ["adam_beta1", "0.9"] in reader.rows
    for name in config:
        assert names.count(name) == 1


def test_page_shows_the_numbers_of_a_run(runs, pages):
    last = metrics(runs["ppo"])[-1]
    text = Reader(pages["ppo"]).text
    assert f"objective/kl {last['objective/kl']:.4g}; signature of over-optimisation: too early to say" in text
    rows = [json.loads(line) for line in (runs["ppo"] / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:
        shown = "".join(piece for piece, _ in row["token_kl"])
        assert f"update 0 {shown} score {row['score']:.4g}, kl {row['kl']:.4g}" in text
        assert row["query"] in text

    written = json.loads((runs["rm"] / "eval.json").read_text())
    found = Reader(pages["rm"]).rows
    assert ["eval/loss", f"{written['eval/loss']:.4g}"] in found
    for group, row in written["accuracy"].items():
        assert [group, f"{row['accuracy']:.4g}", f"{row['expected']:.4g}", str(row["n"])] in found


def test_page_is_one_file_without_references(pages):
    for html in pages.values():
        tags = Reader(html).tags
        assert not {"script", "link", "img", "iframe", "object", "base", "a"} & {tag for tag, _ in tags}
        for _, attributes in tags:
            for name, value in attributes.items():
                inside = name.startswith("xmlns") or value is None or "//" not in value
                assert inside and not name.startswith("on")
                if name in ("href", "xlink:href", "src"):
                    assert value.startswith("#")
        assert html.count("url(") == html.count("url(#") and "@import" not in html
        policy = [attributes["content"] for tag, attributes in tags if "http-equiv" in attributes]
        assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_same_run_gives_the_same_page(runs, pages):
    assert page.page(runs["sft"]) == pages["sft"]


# ---------------------------------------------------------------------------- what a run may hold


def test_texts_of_a_run_are_escaped(tmp_path):
    bold = "<b>bold</b> & more"
    samples = [sample(0, bold, response=bold), sample(0, "q", token_kl=[[bold, 1.0]])]
    run = ppo_run(tmp_path / "<b>run", samples=samples, model=bold, mine=bold)
    (run / "eval.json").write_text(json.dumps({bold: bold, "accuracy": {bold: {"accuracy": bold, "n": 1}}}))
    (run / "samples").mkdir()
    write_rows(run / "samples" / "samples.jsonl", [{"query": bold, "response": bold, "reference": bold, "score": bold}])
    reader = read(run)
    assert "b" not in {tag for tag, _ in reader.tags}
    assert reader.text.count("/<b>run") == 2  # the title and the heading
    assert reader.text.count(bold) == 15
    assert [bold, bold] in reader.rows and [bold, bold, "", "1"] in reader.rows
    assert ["mine", repr(bold), "''"] in reader.rows  # no field of the stage


def test_tokens_are_coloured_by_their_numbers(tmp_path):
    tokens = [[" up", 3.0], [" down", -1.5], [" same", 0.0], ["<EOS>", 30.0]]
    run = ppo_run(tmp_path, samples=[sample(0, "q", token_kl=tokens), sample(10, "r")])
    blue = "background: rgb(0 114 178 / {})"
    orange = "background: rgb(230 120 0 / {})"
    reader = read(run)
    legend = reader.tokens[:7]
    assert legend[0] == (" -3 ", orange.format("0.60")) and legend[6] == (" 3 ", blue.format("0.60"))
    assert reader.tokens[7:] == [
        (" up", blue.format("0.60")),
        (" down", orange.format("0.30")),
        (" same", orange.format("0.00")),
        ("<EOS>", blue.format("0.60")),
    ]
    assert "update 0  up down same<EOS> score 0.5" in reader.text and "answer 10" in reader.text
    without = read(ppo_run(tmp_path, samples=[sample(0, "q")]))
    assert without.tokens == [] and "Colours" not in without.text


def test_answers_to_a_query_stand_together_and_first(tmp_path):
    samples = [sample(i, f"query {i}") for i in range(40)]
    samples += [sample(i, "again") for i in (40, 50)]
    text = read(ppo_run(tmp_path, samples=samples)).text
    assert "13 of 41 queries" in text
    places = [text.index(part) for part in ("again", "answer 40", "answer 50", "query 0", "answer 0", "query 39")]
    assert places == sorted(places)
    assert text.count("score 0.5") == 14


def test_samples_of_sample_py_meet_their_references(tmp_path):
    run = ppo_run(tmp_path)
    (run / "samples").mkdir()
    row = {"query": "q", "response": " ours", "reference": " theirs", "tokens": 2, "kl": -1.25, "reference_score": 2.0}
    write_rows(run / "samples" / "samples.jsonl", [row])
    assert "response  ours kl -1.25\nreference  theirs score 2\n" in read(run).text


def test_page_of_a_run_that_goes_on(tmp_path):
    run = ppo_run(tmp_path)
    assert "not finished: 3 of 5 updates at 2" in read(run).text
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"step": 3, "obj')
    (run / "samples.jsonl").write_text('{"step": 0, "que')
    assert "not finished: 3 of 5 updates at 2" in read(run).text

    (run / "timing.jsonl").write_text('{"step": 0, "seconds": 2.5, "tokens_per_second": 1e4}\n')
    titles = [set(texts) & {"seconds", "tokens_per_second", "objective/kl"} for texts in read(run).pictures]
    assert titles == [set(), {"objective/kl"}, set(), {"seconds"}, {"tokens_per_second"}]
    for text in ("", None):
        for name in ("metrics.jsonl", "samples.jsonl"):
            if text is None:
                (run / name).unlink()
            else:
                (run / name).write_text(text)
        reader = read(run)
        assert "not finished: 0 of 5 updates" in reader.text and reader.pictures == []
        assert ["kl_coef", "0.1", "0.05"] in reader.rows


def test_skipped_steps_are_gaps(tmp_path):
    run = ppo_run(tmp_path, n=0)
    kl = [1.0, None, 3.0, float("nan"), 5.0, None, None]
    other = {"objective/scores": None, "val/response_length": 5.0}
    write_rows(run / "metrics.jsonl", [{"step": i, "objective/kl": x, **other} for i, x in enumerate(kl)])
    reader = read(run)
    assert "not finished: 7 of 5 updates" in reader.text and len(reader.pictures) == 3


@pytest.mark.parametrize(
    "name, text, line",
    [
        ("config.json", None, "config.json: is not there; in "),
        ("config.json", "{", "config.json: cannot be read as JSON; check it or copy it again: JSONDecodeError"),
        ("config.json", "[]", "config.json: holds a list, not a JSON object"),
        ("config.json", '{"hidden_size": 8}', "config.json: of no training stage; give the directory of a"),
        ("config.json", '{"kl_coef": "a"}', "config.json: Config: 'kl_coef' takes finite float from 0, got str"),
        ("metrics.jsonl", '{"step": 0}\n{"st\n{"step": 2}\n', "metrics.jsonl: line 2 is damaged, remove it"),
        ("metrics.jsonl", '{"step": 0}\n', "no metrics of ppo, sft, rm, dpo"),
        ("timing.jsonl", '{"step": 0, "seconds": "a"}\n', "'seconds' is not a number in every row; mend the file"),
        ("samples.jsonl", "{}\n", "samples.jsonl: line 1 is no update's"),
        ("samples.jsonl", '{"step": 0}\n', "samples.jsonl: line 1: 'response' is None, not a text"),
        ("samples.jsonl", json.dumps(sample(0, None)), "samples.jsonl: line 1: 'query' is None, not a text"),
        ("samples.jsonl", json.dumps(sample(0, "", token_kl=[3])), "line 1: token_kl is no list of [text, number]"),
        ("samples.jsonl", json.dumps(sample(0, "", token_kl=[["a", None]])), "line 1: token_kl is no list of"),
        ("samples/samples.jsonl", "{}\n{", "samples/samples.jsonl: line 2 is not a JSON object"),
        ("eval.json", "{", "eval.json: cannot be read as JSON"),
        ("eval.json", '{"accuracy": {"all": 1}}', "eval.json: its accuracy is no table"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, name, text, line):
    run = ppo_run(tmp_path)
    (run / "samples").mkdir()
    if text is None:
        (run / name).unlink()
    else:
        (run / name).write_text(text)
    with pytest.raises(UserError) as error:
        page.main([str(run)])
    assert line in str(error.value) and "\n" not in str(error.value)
    assert not (run / "report.html").exists()


def test_command_writes_the_page(tmp_path, capsys):
    run = ppo_run(tmp_path / "run", samples=[sample(0, "half a pair \ud800")])
    page.main([str(run)])
    assert capsys.readouterr().out == f"wrote {run}/report.html\n"
    assert "half a pair ?" in (run / "report.html").read_text(encoding="utf-8")
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    with pytest.raises(UserError, match="report.html cannot be written"):
        page.main([str(run)])
    with pytest.raises(UserError, match="nowhere/config.json: is not there"):
        page.main([str(tmp_path / "nowhere")])
