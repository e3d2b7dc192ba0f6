"""The house: who may import whom, how large a room may be, how a page is laid out."""

import ast
import tokenize

import pytest
from helpers import ROOT, imports, sources

SOURCES = sources()
TESTS = {f"tests.{path.stem}": path for path in sorted((ROOT / "tests").glob("*.py"))}
EVERYTHING = SOURCES | TESTS
TREES = {module: ast.parse(path.read_text()) for module, path in EVERYTHING.items()}
LINES = {module: path.read_text().splitlines() for module, path in EVERYTHING.items()}
IMPORTS = {module: imports(path, SOURCES) for module, path in SOURCES.items()}


def refuse(offenders, rule):
    """Fail with every offender on a line of its own."""
    offenders = list(offenders)
    assert not offenders, f"{len(offenders)} x {rule}:\n  " + "\n  ".join(offenders)


def place(module, node):
    return f"{EVERYTHING[module].relative_to(ROOT)}:{node.lineno}"


# --------------------------------------------------------------------------------- who imports whom

ALLOWED = {
    "lire": "",
    "dro": "",
    "baselines": "",
    "model": "",
    "t5": "model",
    "tasks": "",
    "records": "",
    "formats": "records",
    "containers": "formats records",
    "files": "containers formats records",
    "frontier": "dro",
    "objectives": "lire dro baselines",
    "data": "tasks files records",
}


def room(module):
    return module.partition(".")[0]


def test_the_rooms_of_the_maths_and_the_data_import_what_they_may():
    assert set(ALLOWED) <= set(SOURCES)
    refuse(
        (
            f"{module} imports {other}"
            for module, allowed in ALLOWED.items()
            for other in sorted(IMPORTS[module] - set(allowed.split()))
        ),
        "an import that its room is not for",
    )


def test_the_harness_does_not_know_the_loop_and_only_the_outside_does():
    outside = {"experiments", "exercises"}
    refuse(
        (
            f"{module} imports {other}"
            for module, others in IMPORTS.items()
            for other in sorted(others)
            if (other == "train" or room(other) in outside) and room(module) not in outside
        ),
        "an import from inside out",
    )
    inner = {"data", "model", "objectives"}
    others = {other for other in IMPORTS["train"] if room(other) != "harness"} - inner
    refuse(sorted(others), "an import of train.py from a room that the harness is between")


def test_no_module_imports_itself_over_a_circle():
    circles, done = set(), set()

    def visit(module, path):
        if module in path:
            circles.add(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for other in sorted(IMPORTS[module]):
                visit(other, [*path, module])
            done.add(module)

    for module in SOURCES:
        visit(module, [])
    refuse(sorted(circles), "a circle")


def test_only_objectives_asks_which_objective_runs():
    """`.objective` is looked up in the table, printed or passed on: never compared nor asked."""

    def is_objective(node):
        return isinstance(node, ast.Attribute) and node.attr == "objective"

    def is_question(node):
        if isinstance(node, ast.Match):
            return is_objective(node.subject)
        if isinstance(node, ast.Attribute):  # c.objective.startswith("dro")
            return is_objective(node.value)
        if not isinstance(node, ast.Compare):
            return False
        sides = [node.left, *node.comparators]
        tables = [s for s in sides if isinstance(s, ast.Name) and s.id in ("readers", "OBJECTIVES")]
        return any(map(is_objective, sides)) and not tables

    refuse(
        (
            place(module, node)
            for module, tree in TREES.items()
            for node in ast.walk(tree)
            if module != "objectives" and is_question(node)
        ),
        "a question about .objective: ask a row of OBJECTIVES",
    )


# -------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("module", SOURCES)
def test_no_room_is_larger_than_one_can_read(module):
    most = {"train": 300}.get(module, 500)
    assert len(LINES[module]) <= most, (
        f"{SOURCES[module].name}: {len(LINES[module])} of {most} lines"
    )


BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith)


def depth(statements):
    """Levels of blocks in statements; an elif is as deep as its if."""
    deepest = 0
    for node in statements:
        if isinstance(node, BLOCKS):
            inner = depth(node.body) + 1
            orelse, handlers = getattr(node, "orelse", []), getattr(node, "handlers", [])
            is_elif = (
                isinstance(node, ast.If) and len(orelse) == 1 and isinstance(orelse[0], ast.If)
            )
            inner = max(inner, depth(orelse) + (not is_elif and bool(orelse)))
            inner = max([inner, *(depth(handler.body) + 1 for handler in handlers)])
            inner = max(inner, depth(getattr(node, "finalbody", [])) + 1)
            deepest = max(deepest, inner)
    return deepest


def test_depth_is_counted_in_blocks():
    deep = "for i in x:\n  if i:\n    with i:\n      pass\n  elif i:\n    pass\n  else:\n    y = 1"
    assert depth(ast.parse(deep).body) == 3 and depth(ast.parse("x = 1").body) == 0
    assert depth(ast.parse("try:\n  pass\nexcept E:\n  if x:\n    pass").body) == 2
    chain = "if a:\n  pass\nelif b:\n  pass\nelif c:\n  pass"
    assert depth(ast.parse(chain).body) == 1


def test_the_loop_fits_on_a_screen_and_is_flat():
    (loop,) = (node for node in TREES["train"].body if getattr(node, "name", "") == "train_policy")
    assert loop.end_lineno - loop.lineno + 1 <= 45
    assert depth(loop.body) <= 3


# ------------------------------------------------------------------------------------------- layout


def comments(module):
    """(line number, comment, the line it stands on) of a file."""
    with open(EVERYTHING[module], "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string, token.line


def where(module, number):
    return f"{EVERYTHING[module].relative_to(ROOT)}:{number}"


def test_no_line_is_longer_than_100_characters():
    refuse(
        (
            f"{where(module, number)}: {len(line)}"
            for module, lines in LINES.items()
            for number, line in enumerate(lines, 1)
            if len(line) > 100
        ),
        "a line of more than 100 characters",
    )


def test_no_line_is_kept_from_the_formatter():
    refuse(
        (
            where(module, number)
            for module in EVERYTHING
            for number, comment, _ in comments(module)
            if comment.replace(" ", "").startswith(("#fmt:", "#yapf:"))
        ),
        "a line that is not formatted",
    )


def test_no_comment_hangs_on_a_closing_bracket():
    refuse(
        (
            f"{where(module, number)}: {line.strip()}"
            for module in EVERYTHING
            for number, _, line in comments(module)
            if line.lstrip().startswith((")", "]", "}"))
        ),
        "a comment behind a closing bracket: it belongs above what it is about",
    )


def test_parameters_of_one_letter_are_shapes():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)

    def parameters(node):
        given = node.args
        named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        return [parameter for parameter in named if parameter]

    def is_allowed(name, module):
        letters = "BMSRVDNHTLGKcx" + ("qkvt" if module in ("model", "t5") else "")
        return len(name) > 1 or not name.isalpha() or name in letters

    refuse(
        (
            f"{place(module, parameter)}: {parameter.arg}"
            for module, tree in TREES.items()
            for node in ast.walk(tree)
            if isinstance(node, functions)
            for parameter in parameters(node)
            if not is_allowed(parameter.arg, module)
        ),
        "a parameter of one letter",
    )


def test_no_condition_stands_inside_a_conditional_expression():
    refuse(
        (
            place(module, node)
            for module, tree in TREES.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.IfExp)
            and any(isinstance(inner, ast.IfExp) for inner in ast.walk(node) if inner is not node)
        ),
        "nested conditional expressions",
    )


def test_nothing_is_multiplied_by_zero():
    def is_zero(node):
        return (
            isinstance(node, ast.Constant) and type(node.value) in (int, float) and not node.value
        )

    def is_product(node):
        return isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Mult)

    def factors(node):
        return (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)

    refuse(
        (
            place(module, node)
            for module, tree in TREES.items()
            for node in ast.walk(tree)
            if is_product(node) and any(map(is_zero, factors(node)))
        ),
        "a product with 0: nan times 0 is nan",
    )


def public_functions(tree):
    """(function, is it a method) of a module: no nested ones, nothing that begins with one _."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from ((inner, True) for inner in node.body if isinstance(inner, ast.FunctionDef))
        elif isinstance(node, ast.FunctionDef):
            yield node, False


def test_public_functions_have_type_hints():
    offenders = []
    for module in SOURCES:
        for function, is_method in public_functions(TREES[module]):
            name = function.name
            if name.startswith("_") and not name.startswith("__"):
                continue
            given = function.args
            named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            missing = [x.arg for x in named if x and not x.annotation]
            missing = missing[1:] if is_method and missing[:1] in (["self"], ["cls"]) else missing
            missing += ["return"] * (not function.returns)
            if missing:
                offenders.append(f"{place(module, function)}: {name}: {', '.join(missing)}")
    refuse(offenders, "a public function without hints")
