"""One flat dataclass + config files + --key=value -> one configuration.

    python ppo.py config/ppo_1b.py --lr=1e-6 --whiten_rewards

Precedence: dataclass defaults < config files from left to right < --key=value. A config file is Python
and is executed, so run only those you trust; each of its assignments must be a field of the stage's
Config (names that begin with an underscore are the file's own). Values on the command line are never
evaluated: the field's type reads them. An unknown key or a wrong type stops the run before it starts.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import re
import sys
from math import inf, ulp
from pathlib import Path
from types import ModuleType
from typing import NewType, get_args

Count, Positive = NewType("Count", int), NewType("Positive", float)
Share, Signed = NewType("Share", float), NewType("Signed", float)
# type of a field: the least value, what all values lie below, and the words for both
LIMITS = {int: (0, 2**53, "int from 0"), Count: (1, 2**53, "int from 1"),
          float: (0, inf, "finite float from 0"), Positive: (ulp(0.0), inf, "finite float above 0"),
          Share: (0, 1, "float from 0 and below 1"), Signed: (-sys.float_info.max, inf, "finite float")}  # fmt: skip


class UserError(SystemExit):
    """Bad input: one line that names the thing and the mend.

    As a SystemExit it ends a script with that line on stderr and exit code 1, with no traceback;
    `str(error)` is the line.
    """

    def __init__(self, line):
        super().__init__(" ".join(line.split()))


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
        own = reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"
        raise UserError(f"{line}: {own}") from None


def configure(Config, argv=None):
    """Build `Config` from its defaults, then config files, then --key=value.

    Config: a dataclass whose fields are bool, str, a Literal of some texts, or a number of a type in LIMITS.
    argv:   arguments; None means sys.argv[1:]. `--flag` alone means True; `--help` prints the fields and exits.
    Raises UserError for an unknown key, a wrong type or an unreadable file.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(describe(Config))
        sys.exit(0)
    values = {field.name: field.default for field in dataclasses.fields(Config)}
    for path in (argument for argument in argv if not argument.startswith("-")):
        values = read_file(Config, path, values)
    for argument in (argument for argument in argv if argument.startswith("-")):
        match = re.fullmatch(r"--([A-Za-z]\w*)(?:=(.*))?", argument, re.DOTALL)
        require(match, f"{argument}: not an option; write --key=value (or --flag)")
        key, text = match.groups()
        values[key] = parse(field_of(Config, key, "command line"), text)
    return Config(**values)


def read_file(Config, path, values):
    """Run a config file on top of `values` (which it can read) and return the new values."""
    names = dict(values)
    with explain(f"config file {path} cannot be read, give a .py file; or is it a value? --key=value", OSError):
        text = Path(path).read_bytes()
    with explain(f"config file {path}: write one `key = value` per line", Exception, SystemExit):
        tree = ast.parse(text, path)
        for node in tree.body[ast.get_docstring(tree) is not None :]:  # `lr: 1e-5` and `lr == 1e-5` are valid Python
            nothing = isinstance(node, ast.Expr) or (isinstance(node, ast.AnnAssign) and not node.value)
            require(not nothing, f"line {node.lineno} sets nothing")
        exec(compile(tree, path, "exec"), names)
    found = {key: value for key, value in names.items() if key[0] != "_" and not isinstance(value, ModuleType)}
    with explain(f"config file {path}", ValueError):
        return values | {key: check(field_of(Config, key, path), value, path) for key, value in found.items()}


def field_of(Config, key, where):
    fields = {field.name: field for field in dataclasses.fields(Config)}
    near = ", ".join(difflib.get_close_matches(key, fields, n=3, cutoff=0.4) or sorted(fields))
    require(key in fields, f"{where}: unknown key '{key}'; did you mean {near}? (--help lists all keys)")
    return fields[key]


def parse(field, text):
    """Read a command-line value by the field's type; text is None for `--flag` alone."""
    if field.type is bool and (text is None or text.lower() in ("true", "false")):
        return text is None or text.lower() == "true"
    require(text is not None, f"--{field.name} needs a value, for example --{field.name}={field.default}")
    value = text
    with contextlib.suppress(ValueError):  # else it stays a text, and is of the wrong type
        value = {int: int, float: float}.get(getattr(field.type, "__supertype__", field.type), str)(text)
    return check(field, value)


def check(field, value, where="command line"):
    """Return `value` if it has the field's type (an int is accepted for a float); else raise UserError."""
    choices = get_args(field.type)
    kind = str if choices else getattr(field.type, "__supertype__", field.type)
    low, high, wanted = LIMITS.get(field.type, (None, None, kind.__name__))
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    takes = f"takes {wanted}, got {type(value).__name__} ({value!r})"
    fits = type(value) is kind and (field.type not in LIMITS or low <= value < high)
    require(fits, f"{where}: '{field.name}' {takes}; write for example {field.default!r}")
    require(not choices or value in choices, f"{where}: '{field.name}' is {value!r}; use one of {', '.join(choices)}")
    return value


def describe(Config):
    """The fields with their defaults and the comments that stand beside them in the source."""
    sources = "".join(inspect.getsource(cls) for cls in reversed(Config.__mro__) if dataclasses.is_dataclass(cls))
    comments = dict(re.findall(r"^\s+(\w+)\s*:.*?\s{2}#\s(.*)$", sources, re.MULTILINE))
    lines = [f"--{f.name}={f.default!r}".ljust(44) + f" {comments.get(f.name, '')}" for f in dataclasses.fields(Config)]
    return "\n".join(["usage: [config/x.py ...] [--key=value ...]", f"{Config.__module__}.{Config.__name__}", *lines])
