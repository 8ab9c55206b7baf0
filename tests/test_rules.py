"""Rules that hold for every file: sizes, no global randomness, nothing of a particular machine."""

import ast
import re
import subprocess

import pytest

from tests.source_tree import REPOSITORY, modules

MOST_LINES = 500

# Generators that are made, not the global one that is read.
NUMPY_GENERATORS = {"Generator", "Philox", "PCG64", "SeedSequence", "default_rng", "BitGenerator"}
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
TENSOR_DRAWS = {"bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "random_"}

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
        return last not in NUMPY_GENERATORS or (last == "default_rng" and not call.args)
    if root == "torch":
        if last in ("manual_seed", "seed"):
            return not module_name.startswith("stl_offline.training.")
        return last in TORCH_DRAWS and not given
    return last in TENSOR_DRAWS and not given


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
        if item.target.split(".")[0] == "random"
    ]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("module", "code", "expected"),
    [
        ("stl_offline.x", "np.random.rand(3)", True),
        ("stl_offline.x", "np.random.default_rng()", True),
        ("stl_offline.x", "np.random.default_rng(seed)", False),
        ("stl_offline.x", "torch.randn(3)", True),
        ("stl_offline.x", "torch.randn(3, generator=g)", False),
        ("stl_offline.x", "torch.manual_seed(0)", True),
        ("stl_offline.training.engine", "torch.manual_seed(0)", False),
        ("stl_offline.x", "tensor.exponential_()", True),
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
