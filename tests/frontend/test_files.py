"""The app's files: they type-check and name no registry, and the guide and the examples of settings are true."""

import json
import re
from dataclasses import fields

import pytest

from frontend.app import FRONTEND, alone, npm
from service import ROOT
from settings import Settings, load_environ

GUIDE = (ROOT / "docs" / "frontend.md").read_text(encoding="utf-8")


def test_the_types_are_right() -> None:
    with alone():
        checked = npm("run", "typecheck")
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("right", "wrong"), [('icon: "cube"', 'icon: "a cube"'), ("showRename: true", 'showRename: "yes"')]
)
def test_the_panels_options_are_checked_against_the_published_types(right: str, wrong: str) -> None:
    options = (FRONTEND / "lib" / "options.ts").read_text(encoding="utf-8")
    assert options.count(right) == 1
    copy = FRONTEND / "lib" / "options-of-a-test.ts"
    with alone():
        copy.write_text(options.replace(right, wrong), encoding="utf-8")
        try:
            checked = npm("exec", "tsc", "--", "--noEmit")
        finally:
            copy.unlink()
    assert checked.returncode != 0
    errors = re.findall(r"^(\S+)\(\d+,\d+\): error", checked.stdout, re.MULTILINE)
    assert errors == ["lib/options-of-a-test.ts"]


@pytest.mark.parametrize("folder", ["frontend", "tests/betterauth"])
def test_the_lock_file_names_no_registry_and_fits_the_package(folder: str) -> None:
    lock = json.loads((ROOT / folder / "package-lock.json").read_text(encoding="utf-8"))
    package = json.loads((ROOT / folder / "package.json").read_text(encoding="utf-8"))
    assert [name for name, entry in lock["packages"].items() if "resolved" in entry] == []
    for kind in ("dependencies", "devDependencies"):
        assert lock["packages"][""].get(kind) == package.get(kind)


def test_all_versions_are_exact() -> None:
    package = json.loads((FRONTEND / "package.json").read_text(encoding="utf-8"))
    versions = [*package["dependencies"].values(), *package["devDependencies"].values()]
    assert [version for version in versions if not re.fullmatch(r"\d+\.\d+\.\d+", version)] == []


@pytest.mark.parametrize("ignoring", [".gitignore", ".dockerignore"])
def test_no_file_of_settings_but_the_example_is_committed_or_built_into_an_image(ignoring: str) -> None:
    assert ".env*" in (FRONTEND / ignoring).read_text(encoding="utf-8").splitlines()


# --- settings -----------------------------------------------------------------------------------------------------


def variables(text: str) -> dict[str, str]:
    """Return the variables of an example of settings, those too that are commented out."""
    return dict(re.findall(r"^(?:# )?([A-Z][A-Z0-9_]+)=(.*)$", text, re.MULTILINE))


def unexplained(text: str) -> list[str]:
    """Return the paragraphs of an example of settings that do not begin with a sentence."""
    return [block for block in text.strip().split("\n\n") if not re.match(r"# [A-Z0-9-][^=\n]*(\n|$)", block)]


def test_the_services_example_explains_every_setting_and_changes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    example = ROOT / ".env.example"
    text = example.read_text(encoding="utf-8")
    aliases = {"BETTER_AUTH_JWKS_URL", "BETTER_AUTH_ISSUER"}
    files = {"OPENAI_API_KEY_FILE", "DATABASE_URL_FILE"}
    assert variables(text).keys() == {field.name.upper() for field in fields(Settings)} | aliases | files
    assert unexplained(text) == []
    assert "this release" not in text
    for name in variables(text):
        monkeypatch.delenv(name, raising=False)
    assert Settings.from_environ(load_environ(example)) == Settings()


def test_the_services_example_shows_the_defaults() -> None:
    shown = variables((ROOT / ".env.example").read_text(encoding="utf-8"))
    for field in fields(Settings):
        value = shown[field.name.upper()]
        if value and field.default not in (None, (), ""):
            assert field.metadata["read"](value) == field.default, field.name


def test_the_apps_example_explains_every_variable_that_the_app_reads() -> None:
    text = (FRONTEND / ".env.example").read_text(encoding="utf-8")
    read = set(
        re.findall(r"(?<!process\.)env\.([A-Z_]+)", (FRONTEND / "lib" / "settings.ts").read_text(encoding="utf-8"))
    )
    assert variables(text).keys() == read
    assert unexplained(text) == []


# --- the guide ----------------------------------------------------------------------------------------------------

EXCERPTS = re.findall(r"^\[`(frontend/\S+?)`\].*?\n\n```\w+\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


def test_the_guide_quotes_its_files() -> None:
    assert {name for name, _ in EXCERPTS} >= {f"frontend/{name}" for name in ("lib/auth.ts", "public/plain.html")}


@pytest.mark.parametrize(("name", "excerpt"), EXCERPTS, ids=[name for name, _ in EXCERPTS])
def test_what_the_guide_quotes_is_in_the_file(name: str, excerpt: str) -> None:
    def lines(text: str) -> list[str]:
        return [line.strip() for line in text.splitlines() if line.strip()]

    rest = lines((ROOT / name).read_text(encoding="utf-8"))
    for line in lines(excerpt):
        assert line in rest, f"not in {name}, or not in this order: {line}"
        rest = rest[rest.index(line) + 1 :]


def test_every_file_that_the_guide_and_the_readme_name_is_there() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", GUIDE):
        assert (ROOT / "docs" / link).exists(), link
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", readme):
        assert (ROOT / link).exists(), link
