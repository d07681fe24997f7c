"""The arrows between the modules point down, as README's map of the code says."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    {"metrics", "progress", "chatkitlogger", "collector", "postgresstrings"},
    {"context", "settings", "keyset", "sockets", "page", "connections", "considerate"},
    {"conversations", "auth", "local", "telemetry"},
    {"failures", "completions", "rows", "users", "sqlite", "sqliteschema", "pool", "postgresschema"},
    {"upkeep", "sqlitethreads", "sqliteupkeep"},
    {"postgresthreads", "postgresupkeep"},
    {"sqliteturns", "sqliteuploads", "postgresturns", "postgresuploads"},
    {"postgres"},
    {"sdk", "openaiclient", "store", "demo", "attachments", "leases"},
    {"outbox", "openitems", "dictation"},
    {"answers", "turn", "bodies", "copying", "history", "files", "provider", "toolservers", "agent"},
    {"agentmodule", "titles", "turns", "hosts"},
    {"runs"},
    {"server", "tour", "streams"},
    {"check"},
    {"app"},
    {"serving"},
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


def test_every_package_that_is_imported_is_asked_for_or_named_with_what_brings_it() -> None:
    ours = set().union(*LAYERS)
    used = set().union(*map(imports, ours)) - ours - sys.stdlib_module_names
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked_for = tomllib.loads(project)["project"]
    direct = {re.match(r"[\w-]+", line)[0] for line in asked_for["dependencies"]}
    optional = asked_for["optional-dependencies"]
    extras = {re.match(r"[\w-]+", line)[0] for line in optional["postgres"] + optional["metrics"]}
    brought = dict(re.findall(r"^# `([\w-]+)` by ([\w-]+)", project, re.MULTILINE))
    distributions = {name: metadata.packages_distributions()[name][0].replace("_", "-") for name in used}
    assert set(distributions.values()) == direct | extras | brought.keys()
    for name, by in brought.items():
        needed = {re.match(r"[\w-]+", line)[0].lower() for line in metadata.requires(by) or ()}
        assert name in needed, f"{by} does not bring {name}"
        assert by in direct


def test_only_the_routes_speak_http() -> None:
    speakers = {module for module in set().union(*LAYERS) if "starlette" in imports(module)}
    assert speakers == {"answers", "app", "bodies", "files", "hosts", "page", "streams", "telemetry"}


def test_only_the_entry_point_looks_up() -> None:
    assert imports("app") & {"commands"} == {"commands"}  # under `if __name__ == "__main__"`
