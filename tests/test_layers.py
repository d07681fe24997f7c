"""The arrows between the modules point down, as README's map of the code says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    {"context", "settings", "keyset", "sockets", "page"},
    {"conversations", "auth", "local"},
    {"failures", "openitems", "sqlite"},
    {"sdk", "store", "demo", "attachments", "dictation"},
    {"turns", "history", "files", "provider", "titles", "toolservers", "agent"},
    {"agentmodule"},
    {"server", "tour"},
    {"check"},
    {"app"},
    {"commands"},
]
"""Each module may import from layers above its own in this list; leaves never meet."""


def imports(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_every_module_has_its_layer() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == set().union(*LAYERS)


@pytest.mark.parametrize("module", sorted(set().union(*LAYERS) - {"app"}))
def test_a_module_imports_only_from_below(module: str) -> None:
    ours = set().union(*LAYERS)
    level = next(level for level, names in enumerate(LAYERS) if module in names)
    below = set().union(*LAYERS[:level])
    assert imports(module) & ours <= below


def test_only_the_routes_speak_http() -> None:
    speakers = {module for module in set().union(*LAYERS) if "starlette" in imports(module)}
    assert speakers == {"app", "files", "page"}


def test_only_the_entry_point_looks_up() -> None:
    assert imports("app") & {"commands"} == {"commands"}  # under `if __name__ == "__main__"`
