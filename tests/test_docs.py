"""README, docs/, CHANGELOG and the model cards: what they name is there, and README is one screen."""

import ast
import functools
import importlib
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

import pipelines

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("models/*/README.md")),
]
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which also names what is gone
REFERENCES = [ROOT / "docs" / "equations.md", ROOT / "docs" / "architecture.md"]
OWN = ("pipelines", "training", "benchmarks", "page")


def each(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    """Markdown without its code blocks and code spans, which hold no links."""
    return re.sub(r"`[^`]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """Functions, classes, their methods and module variables that a Python file defines."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(found)


def test_readme_is_one_screen():
    lines = text_of(ROOT / "README.md").splitlines()
    assert len(lines) <= 90
    assert max(len(line) for line in lines if not line.startswith("|")) <= 120


def test_the_newest_change_is_of_this_version():
    assert (
        re.findall(r"^## (\S+)", text_of(ROOT / "CHANGELOG.md"), flags=re.MULTILINE)[0]
        == pipelines.__version__
    )


@each(PAGES)
def test_links_and_pictures_are_there(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(page)))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {link} has no such heading"


def test_every_page_of_docs_is_in_the_index():
    listed = re.findall(r"\]\(([^)\s]+)\)", text_of(ROOT / "docs" / "README.md"))
    assert {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"} <= set(listed)


def test_every_picture_of_a_result_is_shown():
    shown = {
        Path(link).name for page in PAGES for link in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", text_of(page))
    }
    assert {path.name for path in ROOT.glob("benchmarks/results/*.png")} <= shown


@each(CURRENT)
def test_commands_are_there(page):
    text = " ".join(text_of(page).split())
    for module in re.findall(r"(?:python|accelerate launch)(?: --\w+(?: [\w/.]+)?)* -m ([\w.]+\w)", text):
        spec = find_spec(module)
        assert spec is not None, f"{page.name}: -m {module}"
        if spec.submodule_search_locations is not None:  # a package
            assert find_spec(f"{module}.__main__") is not None, f"{page.name}: -m {module}"
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE))
    for target in re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", text_of(page), flags=re.MULTILINE):
        assert "".join(target) in targets, f"{page.name}: make {target}"


@each(CURRENT)
def test_commands_of_evaluate_are_its_own(page):
    from training.evaluate import COMMANDS

    for name in re.findall(r"training\.evaluate ([a-z][a-z-]+)", " ".join(code_of(page).split())):
        assert name in COMMANDS, f"{page.name}: training.evaluate {name}"


def code_of(page: Path) -> str:
    """All code of a page, blocks and spans."""
    return "\n".join(re.findall(r"```.*?```|`[^`]+`", text_of(page), flags=re.DOTALL))


@functools.cache
def settings_of_training() -> frozenset[str]:
    """Every annotated field in training/, and what accelerate and a module's own parsing take."""
    known = {"config", "config_file", "help", "cpu", "num_processes"}
    for path in ROOT.glob("training/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                known.add(node.target.id)
    return frozenset(known)


@each(CURRENT)
def test_settings_of_recipes_are_theirs(page):
    joined = code_of(page).replace("\\\n", " ")
    for line in re.findall(r".*\btraining\.[a-z_]+ .*", joined):
        for flag in re.findall(r"(?<!\w)--([a-z_]+)", line.partition(" #")[0]):
            assert flag.removeprefix("no_") in settings_of_training(), f"{page.name}: --{flag}"


@each([*CURRENT, ROOT / "CHANGELOG.md"])
def test_the_command_line_takes_what_pages_give_it(page):
    """Commands and flags of `python -m pipelines`: the arguments of a Request, or named in pipelines/."""
    from pipelines.drawing.request import ARGUMENTS

    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("pipelines/*.py"))
    lines = re.findall(r"python -m pipelines (?!\.\.\.)(.*)", code_of(page).replace("\\\n", " "))
    lines = [line.partition("  #")[0] for line in lines]
    if page.name == "command_line.md":
        lines += re.findall(r"`(--.+?)`", text_of(page).partition("## make")[0])
    if page.name == "CHANGELOG.md":  # old flags and new
        lines = re.findall(r"`(--.+?)`", text_of(page))
        assert len(lines) >= 14
    for line in lines:
        if command := re.match(r"[a-z]+", line):
            assert f'"{command[0]}"' in sources, f"{page.name}: python -m pipelines {command[0]}"
        for flag in re.findall(r"(?<!\w)--([a-z-]+)", line):
            argument = ARGUMENTS.get(flag.replace("-", "_"))
            known = argument is not None and argument.metadata["kind"] is not None
            named = any(f'"{name}"' in sources for name in (f"--{flag}", flag, flag.replace("-", "_")))
            assert known or flag == "help" or named, f"{page.name}: --{flag}"


@each(CURRENT)
def test_python_is_python_and_imports_what_is_there(page):
    for block in code_blocks(text_of(page), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OWN:
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{page.name}: {node.module} has no {name.name}"


@pytest.fixture(scope="module")
def quick_models(tmp_path_factory):
    """A folder to run the pages' Python in: the shipped models, drawing in two steps, and pictures."""
    home = tmp_path_factory.mktemp("pages")
    shutil.copytree(ROOT / "models", home / "models")  # links out of a model folder are refused
    index = home / "models" / "emoji" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"default_num_inference_steps": 2}))
    (home / "tests").mkdir()
    (home / "tests" / "data").symlink_to(ROOT / "tests" / "data")
    return home


@pytest.mark.parametrize("name", ["README.md", "docs/drawing.md", "docs/guidance.md", "docs/editing.md"])
def test_python_of_a_page_runs(name, quick_models, monkeypatch):
    """From top to bottom, as a reader would paste it; what needs the Hub is left out."""
    monkeypatch.chdir(quick_models)
    blocks = [block for block in code_blocks(text_of(ROOT / name), "python") if "push_to_hub" not in block]
    space: dict = {}
    for block in blocks:
        exec(compile(block, name, "exec"), space)
    saved = re.findall(r'save\("(.+?)"\)', "".join(blocks))
    assert blocks and all((quick_models / file).stat().st_size > 1000 for file in saved)


@each(CURRENT)
def test_named_files_are_there(page):
    """Paths in code spans that begin with a folder of this repository and are no pattern."""
    spans = re.findall(r"`([\w./-]+)(?:: [\w.]+)?`", text_of(page))
    folders = ("pipelines", "training", "page", "benchmarks", "tests", "docs", "models")
    for span in spans:
        if span.partition("/")[0] in folders and "/" in span:
            assert (ROOT / span).exists(), f"{page.name}: {span}"


@pytest.mark.parametrize("page", REFERENCES, ids=lambda page: page.name)
def test_named_functions_are_there(page):
    references = re.findall(r"`([\w/]+\.py): ([\w.]+)`", text_of(page))
    assert len(references) >= 5
    for path, name in references:
        assert (ROOT / path).is_file(), f"{page.name}: {path}"
        assert name in names_in(ROOT / path), f"{page.name}: {path}: {name}"


@each(PAGES)
def test_no_figure_is_of_weights_that_only_a_commit_has(page):
    """Nobody can print such a figure again."""
    assert not re.search(r"\bcommits? [0-9a-f]{7}\b", text_of(page))
