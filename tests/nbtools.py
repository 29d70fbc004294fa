"""Load main.ipynb's definitions as a module, or run the whole notebook in a real kernel."""

import ast
import linecache
import sys
from pathlib import Path
from types import ModuleType

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "main.ipynb"


def is_definition(node: ast.stmt) -> bool:
    """True for imports, functions, classes and UPPER_CASE constants."""
    if isinstance(node, ast.Assign):
        return all(isinstance(target, ast.Name) and target.id.isupper() for target in node.targets)
    return isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom)


def definition_cells(path: Path = NOTEBOOK) -> list[nbformat.NotebookNode]:
    """The code cells that only define."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return [cell for cell in cells if all(map(is_definition, ast.parse(cell.source).body))]


def settings(path: Path = NOTEBOOK) -> dict:
    """The settings and their defaults, as the parameters cell states them."""
    cells = nbformat.read(path, as_version=4).cells
    (source,) = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(source).body}


def load(path: Path = NOTEBOOK, name: str = "rooftop_notebook") -> ModuleType:
    """Execute the definition cells alone, as a module that pickling and tracebacks can find."""
    module = sys.modules[name] = ModuleType(name)
    for cell in definition_cells(path):
        file = f"<{Path(path).name}, cell {cell.id}>"
        linecache.cache[file] = (
            len(cell.source),
            None,
            cell.source.splitlines(keepends=True),
            file,
        )
        exec(compile(cell.source, file, "exec"), module.__dict__)
    return module


def run(path: Path, cwd: Path, twice: bool = False, **settings: object) -> nbformat.NotebookNode:
    """Execute the notebook in a kernel in folder cwd, settings injected as papermill does; maybe each cell twice."""
    notebook = nbformat.read(path, as_version=4)
    cells = []
    for cell in notebook.cells:
        cells += [cell, nbformat.from_dict(cell | {"id": f"{cell.id}-again"})] if twice else [cell]
        if "parameters" in cell.metadata.get("tags", []):
            lines = [f"{name} = {value!r}" for name, value in settings.items()]
            cells.append(nbformat.v4.new_code_cell("\n".join(lines)))
    notebook.cells = cells
    options = {"timeout": None, "iopub_timeout": 60}  # outputs that come late are not lost
    NotebookClient(notebook, resources={"metadata": {"path": str(cwd)}}, **options).execute()
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    """All that an executed notebook printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream")
