"""The rules of the house: which way imports run, no circles, and nothing too long to read."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipelines", "training", "page")
LONGEST_FILE, LONGEST_BODY = 500, 80
LONGER_FILES = {"pipelines/components/conditional_unet.py": 700}

# What each room may import besides itself; "training" is the commands at the top of that folder
ALLOWED = {
    "pipelines/chain": set(),
    "pipelines/folders": {"pipelines/chain", "pipelines/folders"},
    "pipelines/components": {"pipelines/chain", "pipelines/folders"},
    "pipelines/drawing": {"pipelines/chain", "pipelines/folders", "pipelines/components"},
    "pipelines/coding": {
        "pipelines", "pipelines/chain", "pipelines/folders", "pipelines/components", "pipelines/drawing",
    },
    "training/data": set(),
    "training/run": {"training/data"},
    "training/objectives": {"training/data", "training/run"},
    "training/evaluation": {"training/data", "training/run", "training/objectives"},
}  # fmt: skip


def files() -> list[Path]:
    return [ROOT / "app.py", *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(path: Path) -> str:
    return path.parent.relative_to(ROOT).as_posix()


def target_files(path: Path, node: ast.AST) -> set[Path]:
    """The files of ours that an import statement loads, without the packages' __init__ on the way there."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
        module = ".".join(part for part in (base, node.module) if part)
        names = [f"{module}.{alias.name}" for alias in node.names]
    else:
        return set()
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] not in (*PACKAGES, "app"):
            continue
        place, short = ROOT.joinpath(*parts), ROOT.joinpath(*parts[:-1])  # a module, or a name in one
        for candidate in (place.with_suffix(".py"), place / "__init__.py", short.with_suffix(".py")):
            if candidate.is_file():
                found.add(candidate)
                break
        else:
            if (short / "__init__.py").is_file():
                found.add(short / "__init__.py")
    return found - {path}


@cache
def imports_of(path: Path) -> set[Path]:
    """Everything of ours that a file imports, wherever in it the import stands."""
    return {target for node in ast.walk(tree_of(path)) for target in target_files(path, node)}


def find_circle(graph: dict[Path, set[Path]]) -> list[Path]:
    """The files of one circle of imports in their order, or []."""
    done: set[Path] = set()
    for start in graph:
        way: list[Path] = []
        todo = [(start, False)]
        while todo:
            path, leaving = todo.pop()
            if leaving:
                done.add(way.pop())
            elif path in way:
                return [*way[way.index(path) :], path]
            elif path not in done:
                way.append(path)
                todo.append((path, True))
                todo += [(target, False) for target in sorted(graph.get(path, set()))]
    return []


def test_a_circle_is_found() -> None:
    a, b, c = Path("a"), Path("b"), Path("c")
    assert find_circle({a: {b}, b: {c}, c: {b}}) == [b, c, b]
    assert find_circle({a: {b, c}, b: {c}, c: set()}) == []


def test_no_import_circle() -> None:
    circle = find_circle({path: imports_of(path) for path in files()})
    assert not circle, " -> ".join(str(path.relative_to(ROOT)) for path in circle)


def test_imports_run_down() -> None:
    wrong = []
    for path in files():
        room = room_of(path)
        for target in imports_of(path):
            other = room_of(target)
            if room.startswith("pipelines") and not other.startswith("pipelines"):
                wrong.append((path, target))  # all it takes to draw
            elif room == "page" and other.startswith("training"):
                wrong.append((path, target))
            elif room in ALLOWED and other != room:
                own_package = other.split("/")[0] == room.split("/")[0]
                if own_package and other not in ALLOWED[room]:
                    wrong.append((path, target))
    shown = [f"{a.relative_to(ROOT)} imports {b.relative_to(ROOT)}" for a, b in wrong]
    assert not wrong, "\n".join(sorted(shown))


# what the command line reads before torch; what they import late is below them, and no file below imports them
LATE = ("pipelines/__main__.py", "pipelines/family.py")


def test_no_import_of_ours_hides_in_a_function() -> None:
    hidden = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files()
        if path.relative_to(ROOT).as_posix() not in LATE
        for function in ast.walk(tree_of(path))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom) and target_files(path, node)
    ]
    assert not hidden, "\n".join(sorted(set(hidden)))


def length_of_body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and its docstring."""
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        return (function.end_lineno or 0) - (first.end_lineno or 0)
    return (function.end_lineno or 0) - first.lineno + 1


def test_the_length_of_a_body() -> None:
    function = ast.parse('def f(\n    a,\n):\n    """Two\n    lines."""\n    b = a\n\n    return b\n').body[0]
    assert isinstance(function, ast.FunctionDef) and length_of_body(function) == 3
    function = ast.parse("def f(a):\n    b = a\n    return b\n").body[0]
    assert isinstance(function, ast.FunctionDef) and length_of_body(function) == 2


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_too_long(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGER_FILES.get(name, LONGEST_FILE)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert length_of_body(node) <= LONGEST_BODY, node.name
