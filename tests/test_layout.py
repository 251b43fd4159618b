"""The shape of the project: who may import whom, what runs without the HTTP layer, what a wheel holds."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Lower ranks know nothing of higher ones. Parts of equal rank may use each other as long as no circle arises.
RANKS = {
    "errors": 0,
    "types": 1,
    "config": 2,
    "text": 3,
    "kv": 3,
    "scheduler": 3,
    "models": 3,
    "fusion": 3,
    "engine": 4,
    "experts": 4,
    "grammar": 4,
    # Tools over the engine, for notebooks and GPU machines as well; the HTTP layer and these do not know each other.
    "api": 5,
    "demo": 5,
    "evaluation": 5,
    "bench": 5,
    "cli": 6,
    "monitoring": 6,
    "__main__": 7,
}
STRANGERS = {"api": {"demo", "evaluation", "bench"}, "demo": {"api"}, "evaluation": {"api"}, "bench": {"api"}}

# What the HTTP layer and the command line need, and nothing below them.
HTTP_PACKAGES = ("fastapi", "starlette", "pydantic", "uvicorn", "typer", "prometheus_client")
WITHOUT_HTTP = (
    "errors",
    "types",
    "config",
    "text",
    "kv",
    "scheduler",
    "models",
    "fusion",
    "engine",
    "experts",
    "grammar",
    "bench.gpu",
)


def run_python(code: str, *arguments: str, cwd: Path | None = None) -> str:
    """The output of `code` in a fresh interpreter that has only what is installed on its path (not even `cwd`)."""
    command = [sys.executable, "-I", "-c", textwrap.dedent(code), *arguments]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def imported_modules(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of_parts(root: Path) -> dict[str, dict[str, Path]]:
    """For each part of `proxyserve`, the parts that it imports, each with one file that does."""
    package = root / "proxyserve"
    imports: dict[str, dict[str, Path]] = {}
    for path in sorted(package.rglob("*.py")):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        found = imports.setdefault(part, {})
        for module in imported_modules(path):
            head, _, rest = module.partition(".")
            target = rest.partition(".")[0]
            if head == "proxyserve" and target in RANKS and target != part:
                found.setdefault(target, path.relative_to(root))
    return imports


# Imports --------------------------------------------------------------------------------------------------------


def test_every_part_has_a_rank(repository: Path) -> None:
    unknown = sorted(set(imports_of_parts(repository)) - set(RANKS))
    assert not unknown, f"Give {unknown} a rank in RANKS: which parts may import it?"


def test_imports_point_one_way(repository: Path) -> None:
    wrong = [
        f"{path}: {part} imports {target}"
        for part, targets in imports_of_parts(repository).items()
        for target, path in targets.items()
        if RANKS[target] > RANKS.get(part, 0) or target in STRANGERS.get(part, ())
    ]
    assert not wrong, "\n".join(wrong)


def test_parts_of_equal_rank_form_no_circle(repository: Path) -> None:
    graph = {part: set(targets) for part, targets in imports_of_parts(repository).items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_package_itself_imports_no_part(repository: Path) -> None:
    modules = imported_modules(repository / "proxyserve" / "__init__.py")
    assert not [module for module in modules if module.startswith("proxyserve.")]


def test_kernels_know_nothing_of_the_server(repository: Path) -> None:
    for path in (repository / "kernels").rglob("*.py"):
        heads = {module.partition(".")[0] for module in imported_modules(path)}
        assert not heads & {"proxyserve", "transformers", *HTTP_PACKAGES}, path


IMPORT_WITHOUT = """
import importlib, importlib.metadata, json, pkgutil, sys

root, blocked, parts = sys.argv[1], set(json.loads(sys.argv[2])), json.loads(sys.argv[3])
sys.path[:0] = [root, root + "/kernels"]


class Without:
    "A finder as if the blocked packages were not installed."

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

# Nor is the project itself installed where only a checkout lies on a GPU machine.
read_version = importlib.metadata.version

def version(name):
    if name == "proxyserve":
        raise importlib.metadata.PackageNotFoundError(name)
    return read_version(name)

importlib.metadata.version = version

for part in parts:
    module = importlib.import_module(part)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), part + "."):
        importlib.import_module(found.name)
print(json.dumps(sorted(blocked & set(sys.modules))))
"""


def test_engine_and_kernels_import_without_http_layer_and_installation(repository: Path) -> None:
    parts = ["proxyserve_kernels", *(f"proxyserve.{part}" for part in WITHOUT_HTTP)]
    output = run_python(IMPORT_WITHOUT, str(repository), json.dumps(HTTP_PACKAGES), json.dumps(parts))
    assert json.loads(output) == []


# The folder `kernels` -------------------------------------------------------------------------------------------
#
# Hugging Face has a package `kernels`, and transformers imports from it whatever is found under that name. A folder
# without an __init__.py on sys.path can be found only as a namespace without code, and only where no real package of
# that name is installed; transformers takes that for "not installed".

FIND_KERNELS = """
import importlib.util, json, sys

sys.path[:0] = sys.argv[1:]
spec = importlib.util.find_spec("kernels")
print(json.dumps(spec and {"origin": spec.origin, "places": [str(place) for place in spec.submodule_search_locations]}))
"""


def test_folder_kernels_is_no_package(repository: Path) -> None:
    assert not (repository / "kernels" / "__init__.py").exists()
    assert [path.name for path in (repository / "kernels").glob("*") if (path / "__init__.py").exists()] == [
        "proxyserve_kernels"
    ]


def test_kernels_is_not_found_here_once_installed(repository: Path, tmp_path: Path) -> None:
    spec = json.loads(run_python(FIND_KERNELS, cwd=tmp_path))
    assert spec is None or not any(Path(place).is_relative_to(repository) for place in spec["places"])


def test_kernels_has_no_code_from_the_root(repository: Path) -> None:
    spec = json.loads(run_python(FIND_KERNELS, str(repository), cwd=repository))
    assert spec is None or spec["origin"] is None or not Path(spec["origin"]).is_relative_to(repository)


def test_a_real_package_kernels_wins_over_the_root(repository: Path, tmp_path: Path) -> None:
    real = tmp_path / "site" / "kernels"
    real.mkdir(parents=True)
    (real / "__init__.py").touch()
    spec = json.loads(run_python(FIND_KERNELS, str(repository), str(real.parent), cwd=repository))
    assert spec["origin"] == str(real / "__init__.py")


@pytest.mark.parametrize("root_on_path", [True, False])
def test_transformers_does_not_take_the_folder_for_the_package(repository: Path, root_on_path: bool) -> None:
    code = """
    import importlib.metadata, json, sys

    sys.path[:0] = sys.argv[1:]
    from transformers.utils.import_utils import is_kernels_available

    try:
        importlib.metadata.version("kernels")
        installed = True
    except importlib.metadata.PackageNotFoundError:
        installed = False
    print(json.dumps([installed, is_kernels_available()]))
    """
    arguments = [str(repository)] if root_on_path else []
    installed, available = json.loads(run_python(code, *arguments, cwd=repository))
    assert installed or not available


# What is installed ----------------------------------------------------------------------------------------------


def test_both_packages_come_from_this_tree(repository: Path, tmp_path: Path) -> None:
    code = "import proxyserve, proxyserve_kernels as k; print(proxyserve.__file__); print(k.__file__)"
    assert run_python(code, cwd=tmp_path).splitlines() == [
        str(repository / "proxyserve" / "__init__.py"),
        str(repository / "kernels" / "proxyserve_kernels" / "__init__.py"),
    ]


def test_constraints_pin_everything_that_is_installed_by_name(repository: Path) -> None:
    pins = {
        canonicalize_name(line.partition("==")[0]): line.partition("==")[2]
        for line in (repository / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    assert all(pins.values())
    assert "+" not in pins["torch"], "a local version would fit one build only"
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["eval"], *extras["dev"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


@pytest.mark.slow
def test_wheel_holds_both_packages_and_their_data(repository: Path, tmp_path: Path) -> None:
    sources = {
        path.relative_to(folder).as_posix(): path
        for folder in (repository, repository / "kernels")
        for package in ("proxyserve", "proxyserve_kernels")
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    # Built from a copy, since building leaves folders behind.
    tree = tmp_path / "tree"
    shutil.copytree(repository / "proxyserve", tree / "proxyserve")
    shutil.copytree(repository / "kernels", tree / "kernels")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, tree)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(tree),
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
    ]
    subprocess.run([*command, "--wheel-dir", str(tmp_path)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        scripts = archive.read(next(name for name in held if name.endswith("entry_points.txt"))).decode()
    assert sorted(sources.keys() - held) == []
    assert {name.partition("/")[0] for name in held} == {
        "proxyserve",
        "proxyserve_kernels",
        next(name.partition("/")[0] for name in held if ".dist-info/" in name),
    }
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)
    assert "proxyserve = proxyserve.cli.main:main" in scripts
