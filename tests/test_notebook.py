"""The notebook as a document: sections, cells, style."""

import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import nbtools

ROOT = nbtools.NOTEBOOK.parent
SECTIONS = [
    "1. Imports and Setup",
    "2. Dataset Verification",
    "3. Model Setup Test",
    "4. Dataset Class and Data Loading",
    "5. Load Dataset",
    "6. Visualize Dataset",
    "7. Model Setup",
    "8. Loss Function and Metrics",
    "9. Training Function",
    "10. Start Training",
    "11. Visualize Learning Curves",
    "12. Inference on Test Set",
    "13. Map a Scene",
    "14. Export",
]
CELLS = nbformat.read(nbtools.NOTEBOOK, as_version=4).cells
CODE = [cell for cell in CELLS if cell.cell_type == "code"]
PROSE = [cell for cell in CELLS if cell.cell_type == "markdown"]


def ruff(*words: str) -> subprocess.CompletedProcess:
    """Run ruff in the repository's root."""
    return subprocess.run(
        [sys.executable, "-m", "ruff", *words], cwd=ROOT, capture_output=True, text=True
    )


def code_lines(cell: nbformat.NotebookNode) -> list[str]:
    """Lines of a cell that are neither blank nor comments."""
    lines = cell.source.splitlines()
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def heading_level(cell: nbformat.NotebookNode) -> int:
    """1 for a cell that begins with "# ", 2 for "## " and so on; 0 for one without a heading."""
    marks = re.match(r"#{1,6}(?= )", cell.source) if cell.cell_type == "markdown" else None
    return len(marks[0]) if marks else 0


def is_collapsed(cell: nbformat.NotebookNode) -> bool:
    """True for a heading that is stored as collapsed."""
    return bool(cell.metadata.get("jp-MarkdownHeadingCollapsed"))


def folded() -> set[str]:
    """The ids of the cells that JupyterLab does not show on opening."""
    hidden, fold = set(), 0  # fold: level of the collapsed heading that is in force
    for cell in CELLS:
        level = heading_level(cell)
        if level and (not fold or level <= fold):
            fold = level if is_collapsed(cell) else 0
        elif fold:
            hidden.add(cell.id)
    return hidden


def defines(cell: nbformat.NotebookNode) -> bool:
    """True for a cell of imports, functions, classes and constants."""
    return all(map(nbtools.is_definition, ast.parse(cell.source).body))


FOLDED = folded()
ACTIONS = [cell for cell in CODE if not defines(cell) and cell.id != "settings"]
CORE = {  # what stands open beside the settings and what acts
    "augmentations",
    "RooftopDataset",
    "Run",
    "CombinedLoss",
    "outline_of_roofs",
    "count_pixels",
    "pixel_metrics",
    "train_step",
    "update_average",
    "forward_pass",
    "one_pass",
    "training_loop",
    "Predictor",
}
LIMITS = {  # of what a reader meets
    "open cells": 110,
    "open lines": 450,
    "lines of actions": 170,
    "lines of an action": 12,
    "names that actions leave": 45,
    "open definition cells in a row": 6,
    "characters of a line": 88,
    "characters of a line, mean": 50,
    "lines of a definition cell": 40,
    "lines of README": 200,
    "bytes of README": 22_000,
}


def test_stored_clean():
    raw = json.loads(nbtools.NOTEBOOK.read_text(encoding="utf-8"))
    nbformat.validate(raw)
    assert raw["metadata"]["kernelspec"]["name"] == "python3"
    assert all(cell.outputs == [] and cell.execution_count is None for cell in CODE)
    assert len({cell.id for cell in CELLS}) == len(CELLS)


def test_sections_in_order_with_an_opening_paragraph():
    heads = [cell.source for cell in PROSE if cell.source.startswith("## ")]
    assert [head.splitlines()[0][3:] for head in heads] == SECTIONS
    assert all(len(head.split("\n\n")[1]) > 80 for head in heads)


def test_no_heading_level_is_skipped():
    text = "\n".join(cell.source for cell in PROSE)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, flags=re.M)]
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


def test_contents_link_to_the_sections():
    links = re.findall(r"\(#([^)]+)\)", CELLS[0].source)
    heads = {
        line.lstrip("# ").replace(" ", "-")
        for c in PROSE
        for line in c.source.splitlines()
        if line[:1] == "#"
    }
    assert set(links) <= heads and len(links) >= len(SECTIONS)


def test_one_import_cell_and_one_parameters_cell():
    imports = [
        c.id
        for c in CODE
        if any(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.walk(ast.parse(c.source)))
    ]
    assert imports == ["imports"]
    assert [c.id for c in CODE if "parameters" in c.metadata.get("tags", [])] == ["settings"]


@pytest.mark.parametrize("cell", CODE, ids=lambda cell: cell.id)
def test_a_cell_defines_or_acts_and_fits_a_screen(cell):
    kinds = {nbtools.is_definition(node) for node in ast.parse(cell.source).body}
    assert len(kinds) == 1
    limit = LIMITS["lines of a definition cell" if defines(cell) else "lines of an action"]
    long = {"imports", "settings", "config-class-2"}  # lists, a line an entry
    assert cell.id in long or len(code_lines(cell)) <= limit


def test_the_core_is_open_and_all_other_definitions_are_folded():
    open_names, folded_names = set(), set()
    for cell in CODE:
        names = folded_names if cell.id in FOLDED else open_names
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
    assert open_names == CORE and not folded_names & CORE
    assert not [cell.id for cell in ACTIONS if cell.id in FOLDED]


def test_folds_tags_and_headings_agree():
    """The page without the machinery lacks just what JupyterLab folds, and the folds' headings."""
    heads = {cell.id for cell in CELLS if is_collapsed(cell)}
    tagged = {cell.id for cell in CELLS if "machinery" in cell.metadata.get("tags", [])}
    assert tagged == FOLDED | heads
    assert all(cell.source.startswith("### Code: ") for cell in CELLS if cell.id in heads)
    assert heads == {cell.id for cell in PROSE if cell.source.startswith("### Code: ")}
    raw = json.loads(nbtools.NOTEBOOK.read_text(encoding="utf-8"))
    assert set(raw["metadata"]["colab"]["collapsed_sections"]) == heads


def test_the_report_leaves_out_the_core_and_the_machinery():
    """README's first command removes both, and what is tagged as core is open code with its text."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"remove_cell_tags (\w+)", readme) == ["machinery", "core"]
    core = {cell.id for cell in CELLS if "core" in cell.metadata.get("tags", [])}
    assert not core & FOLDED
    open_definitions = {cell.id for cell in CODE if defines(cell)} - FOLDED
    assert open_definitions <= core
    by_hand = {"loss-run", "metrics-run"}  # checks of the code above them
    assert {cell.id for cell in ACTIONS} & core == by_hand


def test_what_a_reader_meets_is_bounded():
    shown = [cell for cell in CELLS if cell.id not in FOLDED]
    open_code = [cell for cell in shown if cell.cell_type == "code"]
    runs = "".join("d" if defines(cell) else "." for cell in open_code).split(".")
    names = {
        node.id
        for cell in ACTIONS
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    lines = [line for cell in CODE for line in code_lines(cell)]
    readme = (ROOT / "README.md").read_bytes()
    met = {
        "open cells": len(shown),
        "open lines": sum(len(code_lines(cell)) for cell in open_code),
        "lines of actions": sum(len(code_lines(cell)) for cell in ACTIONS),
        "names that actions leave": len(names),
        "open definition cells in a row": max(map(len, runs)),
        "characters of a line": max(map(len, lines)),
        "characters of a line, mean": statistics.mean(map(len, lines)),
        "lines of README": len(readme.splitlines()),
        "bytes of README": len(readme),
    }
    assert {what: n for what, n in met.items() if n > LIMITS[what]} == {}


def test_settings_are_the_first_code_cell():
    assert [cell.id for cell in CODE[:2]] == ["settings", "imports"]


def test_papermill_lists_every_setting(defaults):
    words = [sys.executable, "-m", "papermill", "--help-notebook", str(nbtools.NOTEBOOK)]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert [name for name in defaults if f"  {name}: " not in text] == []
    assert "a label is named like its image" in text  # with what they mean


def test_a_name_of_digits_alone_is_asked_for_as_text(nb, defaults):
    with pytest.raises(
        ValueError, match="images_dir = 2024: .*papermill's -r passes digits as text"
    ):
        nb.make_config(**defaults | {"images_dir": 2024})
    assert nb.make_config(**defaults | {"images_dir": "2024"}).images_dir == "2024"


def test_ruff_lints_and_formats():
    for words in (["check"], ["format", "--check"]):
        result = ruff(*words, "main.ipynb", "tests")
        assert result.returncode == 0, result.stdout


def test_no_definition_reads_a_notebook_variable(tmp_path):
    source = "\n\n".join(cell.source for cell in nbtools.definition_cells())
    (tmp_path / "definitions.py").write_text(source)
    result = ruff("check", "--isolated", "--select", "F821", str(tmp_path / "definitions.py"))
    assert result.returncode == 0, result.stdout


FILTER = r"^ {0,4}\w.*filterwarnings"  # one that lasts longer than a single call


@pytest.mark.parametrize("pattern", ["except:", FILTER, r"^\s*[!%]", "/home/", "/work/"])
def test_forbidden(pattern):
    found = [cell.id for cell in CODE if re.search(pattern, cell.source, flags=re.M)]
    assert not found


def test_readme_lists_every_setting_with_its_default(defaults):
    rows = re.findall(
        r"^\| `(\w+)` \| `([^`]+)` \|",
        Path(ROOT / "README.md").read_text(encoding="utf-8"),
        flags=re.M,
    )
    assert {name: ast.literal_eval(value) for name, value in rows} == defaults


def walk_scope(node: ast.AST) -> list[ast.AST]:
    """The nodes that are not in a comprehension or lambda, which have names of their own."""
    if isinstance(node, ast.ListComp | ast.DictComp | ast.SetComp | ast.GeneratorExp | ast.Lambda):
        return []
    return [node, *(inner for child in ast.iter_child_nodes(node) for inner in walk_scope(child))]


def test_no_cell_overwrites_a_setting(defaults):
    """So that the cell that checks the settings can be run again at any time."""
    written = {
        (cell.id, node.id)
        for cell in CODE
        if not nbtools.is_definition(ast.parse(cell.source).body[0]) and cell.id != "settings"
        for statement in ast.parse(cell.source).body
        for node in walk_scope(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    assert not {(cell, name) for cell, name in written if name in defaults}
