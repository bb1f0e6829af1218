"""The floors of the house: imports go down only (CONTRIBUTING.md)."""

import ast

import pytest
from conftest import ROOT

FLOORS = [{"flags", "losses"}, {"compute", "data", "models"}, {"attacks", "local_complexity"}, {"certify"}, {"measure"},
          {"records"}, {"analysis"}, {"train"}, {"sweep", "plot", "remeasure", "benchmarks"}]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FILES = sorted(path for name in FLOOR_OF for path in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [
            node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in {module.split(".")[0] for module in modules} & FLOOR_OF.keys() - {own}:
            assert FLOOR_OF[name] < FLOOR_OF[own], f"{path.name} imports {name}"


def test_every_file_has_a_floor():
    assert {path.stem for path in ROOT.glob("*.py")} <= FLOOR_OF.keys() and len(FILES) > 20
