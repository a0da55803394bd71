"""One flat dataclass + config files + --key=value -> one configuration.

    python ppo.py config/ppo_1b.py --lr=1e-6 --whiten_rewards

Precedence: dataclass defaults < config files from left to right < --key=value. A config file is Python
and is executed, so run only those you trust; each of its assignments must be a field of the stage's
Config (names that begin with an underscore are the file's own). Values on the command line are never
evaluated: the field's type reads them. An unknown key or a wrong type stops the run before it starts.
Hyphens in keys are read as underscores.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import re
import sys
from dataclasses import dataclass
from math import inf, ulp
from pathlib import Path
from types import ModuleType
from typing import NewType, get_args

from config.names import OTHER_NAMES


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes: low <= value < high. `words` says the same in messages."""

    low: float
    high: float
    words: str


Count = NewType("Count", int)
Positive = NewType("Positive", float)
Share = NewType("Share", float)
Signed = NewType("Signed", float)

RANGES = {
    int: Range(0, 2**53, "int from 0"),
    Count: Range(1, 2**53, "int from 1"),
    float: Range(0, inf, "finite float from 0"),
    Positive: Range(ulp(0.0), inf, "finite float above 0"),
    Share: Range(0, 1, "float from 0 and below 1"),
    Signed: Range(-sys.float_info.max, inf, "finite float"),
}


class UserError(SystemExit):
    """Bad input: one line that names the thing and the mend.

    As a SystemExit it ends a script with "error: " and that line on stderr and exit code 1, with no traceback;
    `str(error)` is the line.
    """

    def __init__(self, line):
        super().__init__(" ".join(line.split()))
        self.code = f"error: {self}"


def require(holds, *line):
    """Raise a UserError of the parts `line` unless the condition holds."""
    if not holds:
        raise UserError(" ".join(line))


@contextlib.contextmanager
def explain(line, *errors):
    """Turn errors of these kinds into a UserError: `line`, and the error's own first line."""
    try:
        yield
    except errors as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        if not isinstance(error, UserError):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"{line}: {reason}") from None


def configure(Config, argv=None):
    """Build `Config` from its defaults, then config files, then --key=value.

    Config: a dataclass whose fields are bool, str, a Literal of some texts, or a number of a type in RANGES.
    argv:   arguments; None means sys.argv[1:]. `--flag` alone means True; `--help` prints the fields and exits.
    Raises UserError for an unknown key, a wrong type or an unreadable file.
    """
    if argv is None:
        argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print(describe(Config))
        sys.exit(0)

    for before, argument in zip(["", *argv], argv):
        check_form(before, argument)

    values = {field.name: field.default for field in dataclasses.fields(Config)}
    # Options win over files, wherever they stand.
    for argument in sorted(argv, key=lambda argument: argument.startswith("-")):
        read = read_option if argument.startswith("-") else read_file
        values.update(read(Config, argument, values))
    return Config(**values)


def check_form(before, argument):
    """Raise a UserError for what is neither an option nor a .py file: a value after a space, dashes left out."""
    form = "--key=value, --flag or config/x.py"
    if re.fullmatch("--[^=]+", before):
        form = f"{before}={argument}"
    elif "=" in argument:
        form = "--" + argument.lstrip("-")
    fits = argument.startswith("--") or argument.endswith(".py")
    require(fits, f"command line: {argument!r} is neither an option nor a .py file; write {form}")


def read_file(Config, path, values):
    """Run a config file, which can read the `values` so far; return what holds after it: {field: value}."""
    names = dict(values)
    with explain(f"config file {path} cannot be read", OSError):
        text = Path(path).read_bytes()
    with explain(f"config file {path}: write one `key = value` per line", Exception, SystemExit):
        tree = ast.parse(text, path)
        # `lr: 1e-5` and `lr == 1e-5` are valid Python, too.
        body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
        for node in body:
            has_no_value = isinstance(node, ast.AnnAssign) and node.value is None
            if has_no_value or isinstance(node, ast.Expr):
                raise UserError(f"line {node.lineno} sets nothing")
        exec(compile(tree, path, "exec"), names)

    found = {}
    for key, value in names.items():
        # Names with an underscore, and modules, are the file's own.
        if not key.startswith("_") and not isinstance(value, ModuleType):
            with explain(f"config file {path}", ValueError):
                found[key] = check(field_of(Config, key, path), value, path)
    return found


def read_option(Config, argument, values):
    """--key=value, or --flag alone -> {key: value}."""
    match = re.fullmatch(r"--([A-Za-z][\w-]*)(?:=(.*))?", argument, re.DOTALL)
    require(match, f"{argument}: not an option; write --key=value (or --flag)")
    key, text = match.groups()
    field = field_of(Config, key.replace("-", "_"), "command line")
    return {field.name: parse(field, text)}


def field_of(Config, key, where):
    """The field named `key`; an unknown key is an error that names what may be meant."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    if key in fields:
        return fields[key]

    near = difflib.get_close_matches(key, fields)
    meant = OTHER_NAMES.get(key, " or ".join(near))

    line = f"{where}: unknown key '{key}'"
    # What the other name stands for may be a field of other stages alone.
    if re.match(r"\w*", meant)[0] in fields:
        line += f"; did you mean {meant}?"
    raise UserError(f"{line} (--help lists all keys)")


def parse(field, text):
    """Read a command-line value by the field's type; text is None for `--flag` alone."""
    if field.type is bool and (text is None or text.lower() in ("true", "false")):
        return text is None or text.lower() == "true"
    example = f"--{field.name}={field.default}"
    require(text is not None, f"--{field.name} needs a value, for example {example}")

    value = text
    if kind_of(field) in (int, float):
        # What is no number stays a text, which `check` then refuses by name.
        with contextlib.suppress(ValueError):
            value = float(text)
            # An int may be written as 1e4; a float holds every int that is in range.
            if kind_of(field) is int and value.is_integer():
                value = int(value)
    return check(field, value)


def kind_of(field):
    """The Python type of a field's values."""
    if get_args(field.type):  # a Literal of some texts
        return str
    return getattr(field.type, "__supertype__", field.type)


def check(field, value, where="command line"):
    """Return `value` if it has the field's type (an int is accepted for a float); else raise UserError."""
    kind = kind_of(field)
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)

    fits = type(value) is kind
    words = kind.__name__
    if field.type in RANGES:
        limits = RANGES[field.type]
        fits = fits and limits.low <= value < limits.high
        words = limits.words
    wrong = f"takes {words}, got {type(value).__name__} ({value!r}); write for example {field.default!r}"
    require(fits, f"{where}: '{field.name}' {wrong}")

    choices = get_args(field.type)
    if choices and value not in choices:
        raise UserError(f"{where}: '{field.name}' is {value!r}; use one of {', '.join(choices)}")
    return value


def describe(Config):
    """What --help prints: a launch line, and the fields in groups, with their defaults, choices and comments."""
    # Headings and comments stand in the source; a field stays in the group of the class that has it first.
    line = re.compile(r"^ +(?:# -+ (.*)|(\w+) *:.*?(?:  # (.*))?)$", re.MULTILINE)
    headings = {}
    comments = {}
    for cls in reversed(Config.__mro__[:-1]):
        heading = "of this script"
        for title, name, comment in line.findall(inspect.getsource(cls)):
            heading = title or heading
            headings.setdefault(name, heading)
            comments[name] = comment or comments.get(name, "")

    groups = {}
    for field in dataclasses.fields(Config):
        option = f"--{field.name}={field.default!r}"
        words = comments[field.name]
        if get_args(field.type):
            words = f"[{' | '.join(get_args(field.type))}] {words}"
        group = groups.setdefault(headings[field.name], [])
        group.append(f"  {option:44} {words}".rstrip())

    page = ["usage: [config/x.py ...] [--key=value ...]"]
    page += re.findall(r"^ +python .*", inspect.getmodule(Config).__doc__ or "", re.MULTILINE)[:1]
    for heading, lines in groups.items():
        page += ["", heading, *lines]
    return "\n".join(page)
