"""The bars of the page: one idea a line, whole sentences beside it, nobody imports upward, nothing is patched.

A reader holds what stands on a line. So it is measured: syntax nodes per line of code, and how often a statement says
several things at once ("knots": a ternary, a comprehension, `a, b = x, y`, a condition used as a value, unpacking).
nanoGPT has 6.6 nodes a line and 9 knots per 100 statements. Lines of code are those that are neither blank nor comment
nor docstring.
"""

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = sorted(ROOT.glob("*.py"))
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
# Contexts and operators are no nodes of their own to a reader.
UNSEEN = (ast.expr_context, ast.operator, ast.cmpop, ast.unaryop, ast.boolop)
NOT_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
            tokenize.ENDMARKER)  # fmt: skip

# Who imports whom: a module may import from its own floor and from those below.
FLOORS = [
    ["config.names"],
    ["configurator"],
    ["hub.files", "config.fields", "hub.config", "hub.missing", "hub.fetch", "hub.weights", "hub.tokenizer",
     "hub.companions", "hub.rows", "hub.queries", "hub.reader", "hub.table", "hub.trackers"],
    ["fast"],
    ["generation"],
    ["data"],
    ["model"],
    ["distributed.processes", "distributed.sharding", "distributed.optimizer", "distributed.checkpoint",
     "distributed.inputs"],
    ["runtime"],
    ["evals.colour", "evals.tables", "evals.scores", "evals.samples", "evals.chat", "evals.winrate",
     "sft", "rm", "ppo", "dpo", "sample"],
]  # fmt: skip


@dataclass
class Page:
    """What was counted in one file."""

    lines: int  # of code
    long_lines: int  # of these, above 100 characters without a comment behind them
    nodes: int
    statements: int
    knots: int
    body_lines: int  # lines of code in functions
    comments: int  # lines in functions that hold a comment alone
    blanks: int  # blank lines in functions


@cache
def read_page(path):
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = source.splitlines()
    docstrings = docstring_lines(tree)
    ends = code_ends(source, lines)
    code = ends.keys() - docstrings
    bodies = set()
    for node in ast.walk(tree):
        if isinstance(node, FUNCTION):
            bodies.update(range(node.body[0].lineno, node.end_lineno + 1))
    bodies -= docstrings
    return Page(
        lines=len(code),
        long_lines=sum(ends[number] > 100 for number in code),
        nodes=sum(not isinstance(node, UNSEEN) for node in ast.walk(tree)),
        statements=sum(is_plain_statement(node) for node in ast.walk(tree)),
        knots=count_knots(tree),
        body_lines=len(code & bodies),
        comments=sum(lines[number - 1].lstrip().startswith("#") for number in bodies),
        blanks=sum(not lines[number - 1].strip() for number in bodies),
    )


def docstring_lines(tree):
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTION)) and ast.get_docstring(node, clean=False) is not None:
            found.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def code_ends(source, lines):
    """{line with code: the column where its code ends}"""
    ends = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in NOT_CODE:
            continue
        for number in range(token.start[0], token.end[0]):
            ends[number] = len(lines[number - 1])
        ends[token.end[0]] = token.end[1]
    return ends


def is_plain_statement(node):
    """Neither an import, a definition or a declared field, nor a docstring."""
    skipped = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.AnnAssign, *FUNCTION)
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return isinstance(node, ast.stmt) and not isinstance(node, skipped) and not is_text


def count_knots(tree):
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    return sum(is_knot(node, above) for node in ast.walk(tree))


def is_knot(node, above):
    """Whether this node says several things at once."""
    nested = (ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.NamedExpr)
    if isinstance(node, nested):
        return True
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.BitOr):
        return True
    if isinstance(node, ast.BinOp):
        return isinstance(node.left, ast.Compare) or isinstance(node.right, ast.Compare)
    if isinstance(node, ast.BoolOp):
        return not is_condition(node, above)
    if isinstance(node, ast.Starred):
        return isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.Dict):
        return None in node.keys
    return isinstance(node, ast.Compare) and len(node.ops) > 1


def is_condition(node, above):
    """Whether `and` or `or` stands where a condition belongs, or is returned."""
    parent = above[node]
    while isinstance(parent, (ast.BoolOp, ast.UnaryOp)):
        node = parent
        parent = above[node]
    if isinstance(parent, (ast.If, ast.While, ast.IfExp, ast.Assert)):
        return parent.test is node
    if isinstance(parent, ast.comprehension):
        return node in parent.ifs
    return isinstance(parent, ast.Return)


def imports(path):
    """The project's modules that a file imports, by name; inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in names if file_of(name).exists()}


def file_of(module):
    return ROOT / f"{module.replace('.', '/')}.py"


def all_that_is_imported(by):
    """These files and what they import, directly or not."""
    found = set()
    waiting = list(by)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [file_of(name) for name in imports(path)]
    return sorted(found)


CORE = all_that_is_imported(TOP_LEVEL)
STAGES = [ROOT / name for name in ("sft.py", "rm.py", "ppo.py", "dpo.py", "sample.py")]
VARIANTS = sorted(path for path in ROOT.glob("variants/*.py") if path.name != "__init__.py")
EVALS = [ROOT / "evals" / name for name in ("winrate.py", "chat.py", "report_card.py", "passk.py")]


def relative(path):
    return str(path.relative_to(ROOT))


def count_lines(paths):
    return sum(read_page(path).lines for path in paths)


@pytest.mark.parametrize("path", [*CORE, *VARIANTS, *EVALS], ids=relative)
def test_a_line_says_one_thing(path):
    page = read_page(path)
    if page.lines < 30:
        return  # a single comprehension would decide
    assert page.nodes / page.lines <= 7.5
    assert 100 * page.knots / page.statements <= 20
    assert page.long_lines / page.lines <= 0.03


def test_comments_and_blank_lines_part_the_steps():
    pages = [read_page(path) for path in TOP_LEVEL]
    body_lines = sum(page.body_lines for page in pages)
    assert 100 * sum(page.comments for page in pages) / body_lines >= 6
    assert 100 * sum(page.blanks for page in pages) / body_lines >= 8


def test_the_house_stays_small():
    """hub/ is counted apart: how other people's files look is no small thing, and no reader of a stage needs it."""
    hub = [path for path in CORE if path.parent.name == "hub"]
    assert count_lines(TOP_LEVEL) <= 1500
    assert count_lines(hub) <= 1220
    assert count_lines(CORE) - count_lines(hub) <= 2490
    for path in STAGES:
        without_hub = [module for module in all_that_is_imported([path]) if module not in hub]
        assert count_lines(without_hub) <= 2000, f"{relative(path)}, with all that it imports"
    for path in VARIANTS:
        assert read_page(path).lines <= 60, f"{relative(path)}: a variant is only its difference"


def test_nobody_imports_upward():
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in CORE]
    assert sorted(modules) == sorted(floor_of.keys() - {"evals.chat", "evals.winrate"})
    for name, floor in floor_of.items():
        upward = [other for other in imports(file_of(name)) if floor_of[other] > floor]
        assert not upward, f"{name} imports {upward}"


def test_nothing_replaces_a_function_of_the_core():
    """Doors, arguments and PyTorch's own hooks take the place of patches."""
    patch = re.compile(r"mock\.patch|monkeypatch")
    for folder in ("lab", "bench", "evals", "toy", "variants"):
        for path in (ROOT / folder).glob("*.py"):
            assert not patch.search(path.read_text(encoding="utf-8")), relative(path)
    # In tests monkeypatch stands for the outside world alone: the environment, devices, the network, missing packages.
    modules = "|".join(name.split(".")[-1] for names in FLOORS for name in names)
    core_patch = re.compile(rf"""\.setattr\((\"({modules})\.|({modules})[,.])""")
    outside = ("pick_device", "snapshot_download", "_get_fused_kernels_supported_devices")
    for path in (ROOT / "tests").glob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            is_patch = core_patch.search(line) and not any(name in line for name in outside)
            assert not is_patch, f"{relative(path)}: {line.strip()}"


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 2200


def test_the_readme_counts_the_lines_that_are_there():
    """Its table of what to read; a row may name several files or folders."""
    rows = re.findall(r"^\| (`.*`) \| (\d+) \| \d+ \|", README, re.MULTILINE)
    assert len(rows) > 10
    for names, count in rows:
        paths = []
        for name in re.findall(r"`(.*?)`", names):
            paths += [path for path in CORE if relative(path).startswith(name)]
        assert count_lines(paths) == int(count), names
    said = re.search(r"the top level has ([\d,]+), PPO with all that it imports ([\d,]+), everything ([\d,]+)", README)
    there = [TOP_LEVEL, all_that_is_imported([ROOT / "ppo.py"]), CORE]
    assert [int(number.replace(",", "")) for number in said.groups()] == [count_lines(paths) for paths in there]


def test_the_readme_shows_the_variant_that_is_there():
    shown = re.search(r"docstring and imports:\n\n```python\n(.*?)```", README, re.DOTALL)[1]
    source = (ROOT / "variants" / "rloo.py").read_text(encoding="utf-8")
    body = source[source.index("@dataclass") : source.index('if __name__ == "__main__"')]
    assert shown.split("\n") == re.sub("\n\n+", "\n\n", body.strip() + "\n").split("\n")
