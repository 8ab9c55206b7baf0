"""Rules that hold for every file: sizes, no global randomness, no output, nothing of a particular machine."""

import ast
import re
import subprocess
from collections.abc import Iterator

import click
import pytest

from stl_offline.cli.advice import PARAMETER
from stl_offline.cli.command import Option
from stl_offline.cli.main import group
from tests.source_tree import REPOSITORY, Module, modules

MOST_LINES = 500

# Generators that are made, not the global one that is read.
NUMPY_GENERATORS = {"Generator", "Philox", "PCG64", "SeedSequence", "default_rng", "BitGenerator"}
# A package that draws from numpy's global generator is called in one place, which seeds it and gives it back as it was.
BORROWER, BORROWING = "stl_offline.evaluation.corruptions", {"get_state", "seed", "set_state"}
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
TORCH_DRAWS |= {"rand_like", "randn_like", "randint_like"}
TENSOR_DRAWS = {"bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_"}

# Pieces are joined here so that this file does not hold what it looks for.
BANNED = {
    "a path of one machine": "|".join(["/wor" + "k/", "/tmp/" + "team", r"/roo" + r"t\b", "/hom" + r"e/\w"]),
    "a package index's host": r"\b" + "|".join([r"pypi\." + "org", "python" + "hosted", r"download\." + "pytorch"]),
    "a debugger call": r"\b(break" + r"point\(\)|set_" + r"trace\()",
    "an unfinished place": r"\b(TO" + "DO|FIX" + "ME|X" + r"XX)\b",
    "how the work was organised": r"\bissues? #?\d|\.\./sha" + "red|sha" + "red/(data|tools|hooks|conformance)",
}


def tracked_files():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY, capture_output=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [REPOSITORY / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def dotted(node: ast.expr) -> str:
    """``np.random.rand`` of an attribute expression; names of other expressions are empty."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def draws_globally(module_name: str, call: ast.Call) -> bool:
    """Does this call read or seed a random generator that it was not handed?"""
    name = dotted(call.func)
    root, _, last = name.rpartition(".")
    given = any(keyword.arg == "generator" for keyword in call.keywords)
    if root in ("np.random", "numpy.random"):
        if module_name == BORROWER and last in BORROWING:
            return False
        return last not in NUMPY_GENERATORS or (last == "default_rng" and not call.args)
    if root == "torch":
        if last in ("manual_seed", "seed"):
            return not module_name.startswith("stl_offline.training.")
        return last in TORCH_DRAWS and not given
    # New weights are drawn from torch's generator, which is seeded before.
    return last in TENSOR_DRAWS and not given and not root.endswith("init")


def test_nothing_reads_a_global_generator():
    wrong = [
        f"{module.place}:{node.lineno} calls {dotted(node.func)}"
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and draws_globally(module.name, node)
    ]
    wrong += [
        f"{module.place}:{item.line} imports Python's random"
        for module in modules().values()
        for item in module.imports
        if item.target.split(".")[0] == "random" or item.target.startswith(("numpy.random", "torch.random"))
    ]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("module", "code", "expected"),
    [
        ("stl_offline.x", "np.random.rand(3)", True),
        ("stl_offline.x", "np.random.default_rng()", True),
        ("stl_offline.x", "np.random.default_rng(seed)", False),
        ("stl_offline.x", "np.random.seed(0)", True),
        (BORROWER, "np.random.seed(0)", False),
        (BORROWER, "np.random.rand(3)", True),
        ("stl_offline.x", "torch.randn(3)", True),
        ("stl_offline.x", "torch.randn(3, generator=g)", False),
        ("stl_offline.x", "torch.manual_seed(0)", True),
        ("stl_offline.training.engine", "torch.manual_seed(0)", False),
        ("stl_offline.x", "torch.randn_like(x)", True),
        ("stl_offline.x", "tensor.exponential_()", True),
        ("stl_offline.x", "x.clone().uniform_()", True),
        ("stl_offline.x", "nn.init.normal_(x)", False),
        ("stl_offline.x", "generator.random(3)", False),
    ],
)
def test_the_rule_on_randomness_sees_what_it_should(module, code, expected):
    assert draws_globally(module, ast.parse(code, mode="eval").body) is expected


def test_files_stay_small():
    sizes = {module.place: len(module.path.read_text().splitlines()) for module in modules().values()}
    tests = (REPOSITORY / "tests").rglob("*.py")
    sizes |= {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in tests}
    large = {place: lines for place, lines in sizes.items() if lines > MOST_LINES}
    assert not large, f"over {MOST_LINES} lines: {large}"


def test_every_module_says_what_it_is():
    silent = [module.place for module in modules().values() if not ast.get_docstring(module.tree)]
    assert not silent, f"no docstring at the top of {silent}"


def test_files_name_no_machine_and_nothing_unfinished():
    found = []
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
            found += [
                f"{path.relative_to(REPOSITORY)}:{number} holds {what}: {match[0]!r}"
                for what, pattern in BANNED.items()
                if (match := re.search(pattern, line))
            ]
    assert not found, found


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string of a module but docstrings, with its line; values within an f-string are left out."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inner |= {id(part) for part in node.values}
            yield node.lineno, "".join(getattr(part, "value", "") or "" for part in node.values if is_text(part))
        elif is_text(node) and id(node) not in inner:
            yield node.lineno, node.value


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def library() -> list[Module]:
    """The modules below the command line."""
    return [module for name, module in modules().items() if not name.startswith("stl_offline.cli")]


def commands(command: click.Command) -> Iterator[click.Command]:
    """All commands below a group."""
    if not isinstance(command, click.Group):
        yield command
        return
    ctx = click.Context(command)
    for name in command.list_commands(ctx):
        yield from commands(command.get_command(ctx, name))


def shown_options() -> list[Option]:
    return [each for one in commands(group) for each in one.params if isinstance(each, Option) and not each.hidden]


def options_named(text: str) -> set[str]:
    """Words of a text that look like options, but for those of whole commands in a document's code block."""
    prose = re.sub(r"^    stl-offline .*$", "", text, flags=re.MULTILINE)
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose))


def test_messages_of_the_library_name_parameters_not_options():
    """The command line turns parameters into its options (cli/advice.py); a Python user has no options."""
    own = {name for option in shown_options() for name in (*option.opts, *option.secondary_opts)}
    wrong = [
        f"{module.place}:{line} names {', '.join(sorted(named))}"
        for module in library()
        for line, text in texts(module.tree)
        if (named := options_named(text) & own)
    ]
    assert not wrong, wrong


def test_the_rule_on_options_sees_what_it_should():
    code = '"""Cites --out."""\nx = f"{a}: raise --max-mb"\ny = "card\\n    stl-offline pack --out x\\n"'
    found = [options_named(text) for _, text in texts(ast.parse(code))]
    assert found == [{"--max-mb"}, set()]


def test_parameters_in_messages_are_options_with_such_values():
    options = shown_options()
    wrong = []
    for module in library():
        for line, text in texts(module.tree):
            for _, name, value in PARAMETER.findall(text):
                own = [option for option in options if option.name == name]
                fits = [option for option in own if takes(option, value.strip("\"'"))]
                if not own or not fits:
                    wrong.append(f"{module.place}:{line} names `{name}={value}`")
    assert not wrong, wrong


def takes(option: Option, value: str) -> bool:
    """Whether the option can be given so: True sets a flag, False needs its opposite, a choice has its values."""
    if not value:  # the parameter alone, or a value that the message fills in
        return True
    if option.is_flag:
        return value == "True" or (value == "False" and bool(option.secondary_opts))
    return not isinstance(option.type, click.Choice) or value in option.type.choices


# Progress is shown where it was asked for, on standard error.
SHOWS = "stl_offline/progress.py"


def shows_something(node: ast.AST) -> bool:
    """Does this node print, or reach for a standard stream?"""
    if isinstance(node, ast.Call):
        return dotted(node.func) in ("print", "pprint.pprint", "warnings.warn")
    return isinstance(node, ast.Attribute) and dotted(node) in (
        *("sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"),
    )


def test_the_library_prints_nothing():
    wrong = [
        f"{module.place}:{node.lineno}: {ast.unparse(node)}"
        for module in library()
        if module.place != SHOWS
        for node in ast.walk(module.tree)
        if shows_something(node)
    ]
    assert not wrong, f"log instead (logging.getLogger(__name__)): {wrong}"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print(x)", True),
        ("print(x, file=log)", True),
        ("sys.stderr.write(x)", True),
        ("sys.stdout", True),
        ("logger.info(x)", False),
        ("printable(x)", False),
    ],
)
def test_the_rule_on_printing_sees_what_it_should(code, expected):
    assert any(map(shows_something, ast.walk(ast.parse(code)))) is expected


def opens_of_images(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls of PIL's `Image.open` that take every format."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in ("Image.open", "PIL.Image.open"):
            yield from [] if any(word.arg == "formats" for word in node.keywords) else [node]


def test_images_are_opened_in_known_formats_alone():
    """PIL has more, among them PostScript, for which it starts Ghostscript."""
    found = [f"{module.path}:{call.lineno}" for module in modules().values() for call in opens_of_images(module.tree)]
    assert not found
    assert list(opens_of_images(ast.parse("Image.open(stream)")))
