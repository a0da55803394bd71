"""What the documents name is there: paths, links, functions, tests, and the options of the commands that they show."""

import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bench", "config", "distributed", "docs", "evals", "hub", "lab", "notebooks", "tests", "toy", "variants")
STARTERS = ("python", "torchrun", "make")  # words that begin a command
STAGES = ("sft", "rm", "ppo", "dpo")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

DOCUMENTS = list(ROOT.glob("*.md"))
for folder in FOLDERS:
    DOCUMENTS += ROOT.glob(f"{folder}/**/*.md")
TESTS = set()
for path in ROOT.glob("tests/test_*.py"):
    TESTS.update(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


# ---------------------------------------------------------------------------- what a document says


def prose(document):
    return FENCED.sub("", document.read_text(encoding="utf-8"))


def quotes(document):
    """What stands between backticks in the prose, with line breaks as spaces."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(document))]


def shell_lines(document):
    """The words of each line of shell, in fenced blocks and in the prose."""
    texts = [code for code in quotes(document) if code.startswith(STARTERS) and " " in code]
    for language, text in FENCED.findall(document.read_text(encoding="utf-8")):
        if language == "sh":
            texts.append(text)

    lines = []
    for text in texts:
        text = text.replace("\\\n", " ")
        text = re.sub(r"(^|\s)#.*", "", text)  # comments
        for name, value in re.findall(r'^(\w+)="(.*)"$', text, re.MULTILINE):
            text = text.replace(f"${name} ", f"{value} ")
        # Another variable stands for anything.
        text = re.sub(r"\$\w+", "*", text)
        for line in re.split(r"\n|;|&&", text):
            lines.append(shlex.split(line))
    return lines


def is_path(word):
    if " " in word:
        return False
    if word.endswith((".py", ".md", ".ipynb", ".txt")):
        return True
    return "/" in word and word.split("/")[0] in FOLDERS


def exists(path, document):
    """From the root or from the document's folder; a path may have a *."""
    return any(list(place.glob(path.rstrip("/"))) for place in (ROOT, document.parent))


def anchors(document):
    """By which GitHub's links find the headings."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE):
        words = re.sub(r"[^\w -]", "", heading)
        found.add(words.lower().replace(" ", "-"))
    return found


# ---------------------------------------------------------------------------- commands


def script_of(words):
    """The file that a command starts, by its path or its module's name, and the words behind it."""
    words = [word for word in words[1:] if word != "-m"]
    while words[0].startswith("--"):  # an option of torchrun
        words = words[1:]
    script = words[0]
    if not script.endswith(".py"):
        script = script.replace(".", "/") + ".py"
    return script, words[1:]


def known_options(script, arguments):
    """The options that a script takes: those that it gives to argparse, and the fields of its Config."""
    source = (ROOT / script).read_text(encoding="utf-8")
    known = {"help", *re.findall(r'"--([\w-]+)"', source)}
    modules = [word for word in arguments if word in STAGES]  # bench/plan.py takes those of this stage, too
    if "\nclass Config" in source:
        modules.append(script.removesuffix(".py").replace("/", "."))
    if script == "sample.py" and "--judge=" in " ".join(arguments):
        modules = ["evals.winrate"]
    if script == "sample.py" and "--scorer=" in " ".join(arguments):
        modules = ["evals.passk"]
    for module in modules:
        known.update(field.name for field in fields(importlib.import_module(module).Config))
    return known


# ---------------------------------------------------------------------------- tests


@each_document
def test_paths_exist(document):
    words = []
    for line in shell_lines(document):
        words += line
    for code in quotes(document):
        words += code.split("; ")
    for word in words:
        path, _, names = word.partition(":")
        if not is_path(path):
            continue
        assert exists(path, document), path
        # `data.py:parse_row, load_rows` names functions of the file.
        for name in re.findall(r"\w+", names):
            definition = re.compile(rf"(^|def |class |self\.){name}\b", re.MULTILINE)
            source = (ROOT / path).read_text(encoding="utf-8")
            assert definition.search(source) is not None, f"{path} has no {name}"


@each_document
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@each_document
def test_commands_fit_the_scripts(document):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in shell_lines(document):
        while line and line[0] not in STARTERS:  # `do`, NAME=value
            line = line[1:]
        if not line:
            continue
        if line[0] == "make":
            assert f"\n{line[1]}: " in makefile, line
            continue
        script, arguments = script_of(line)
        if not (ROOT / script).exists():
            assert not is_path(script) or "/" not in script, line  # pytest, or a * of a loop
            continue
        options = {word.split("=")[0].removeprefix("--") for word in arguments if word.startswith("--")}
        assert options <= known_options(script, arguments), line


@each_document
def test_tests_exist(document):
    names = set()
    for code in quotes(document):
        names.update(re.findall(r"\btest_\w+\b(?!\.py)", code))
    assert names <= TESTS


def test_each_detail_has_its_row():
    """With its first test, and with how many more there are."""
    row = re.compile(r"^\| (\d+)\*? .* `(test_\w+)`(?: and (\d) more)? \|$", re.MULTILINE)
    numbers = []
    for number, first, more in row.findall(prose(ROOT / "docs" / "paper.md")):
        prefix = f"test_detail_{int(number):02}_"
        tests = sorted(name for name in TESTS if name.startswith(prefix))
        assert first == tests[0]
        assert int(more or 0) == len(tests) - 1
        numbers.append(int(number))
    assert numbers == list(range(1, 26))
