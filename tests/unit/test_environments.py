"""The conda environments: each lists what its rules import, with the ranges of pyproject.toml."""

import ast
import re
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sae_core.utils.code_hash import ROOT, files_behind

ENVS = sorted(path.stem for path in (ROOT / "envs").glob("*.yaml"))
BUILDS = {"": "pytorch", "-cpu": "pytorch-cpu", "-cuda": "pytorch-gpu"}
"""Variants of an environment, and the name that each has for torch."""

NAMES = {"markdown_it": "markdown-it-py", "sklearn": "scikit-learn"}
"""Modules that are called otherwise than their packages."""

TOOLS = {"python", "pip"}
OPTIONAL = {"bitsandbytes", "triton"}
"""Imported for `load_in_4bit` alone, whose users install it; and where torch brings it along."""

BROUGHT_ALONG = {
    "markupsafe": "jinja2",
    "httpx2": "huggingface-hub",
    "httpcore2": "huggingface-hub",
}
"""Imported, and a dependency of what is listed."""

NOT_IMPORTED = {
    "gguf": "train",  # transformers reads GGUF files with it
    "jinja2": "publish",  # huggingface_hub renders cards with it
}


def listed(name: str) -> dict[str, str]:
    """What an environment asks for: package to range, under the names that PyPI has."""
    found = {}
    contents = yaml.safe_load((ROOT / f"envs/{name}.yaml").read_text(encoding="utf-8"))
    for entry in contents["dependencies"]:
        for line in entry["pip"] if isinstance(entry, dict) else [entry]:
            requirement = Requirement(line)
            package = "torch" if requirement.name in BUILDS.values() else requirement.name
            found[canonicalize_name(package)] = str(requirement.specifier)
    return found


def scripts_of(family: str) -> set[str]:
    """The scripts of the rules that run in an environment."""
    found = set()
    for file in (ROOT / "workflow/rules").glob("*.smk"):
        for rule in re.split(r"(?m)^(?:rule|checkpoint) ", file.read_text(encoding="utf-8"))[1:]:
            if "    run:\n" in rule:  # Snakemake itself does it, in its own environment
                assert "conda:" not in rule
                continue
            used = re.search(r'conda:\s+(?:with_torch\("|"../../envs/)([\w-]+)', rule)
            assert used, rule
            if used[1] == family:
                found |= set(re.findall(r'code\w*\("(scripts/\w+\.py)"', rule))
    return found


def imported(script: str) -> set[str]:
    """The packages that a script and what it uses of `sae_core` import, not the library's own."""
    names = set()
    for path in files_behind(script):
        for node in ast.walk(ast.parse(path.read_bytes())) if path.suffix == ".py" else ():
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module))
    packages = {name.split(".")[0] for name in names}
    return packages - {"sae_core"} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("family", [name for name in ENVS if "-" not in name])
def test_an_environment_lists_exactly_what_its_rules_import(family: str) -> None:
    scripts = scripts_of(family)
    assert scripts
    names = {NAMES.get(name, name) for script in scripts for name in imported(script)}
    needed = set(map(canonicalize_name, names))
    for name, why in BROUGHT_ALONG.items():
        assert name not in needed or why in needed
    needed -= OPTIONAL | set(BROUGHT_ALONG)
    needed |= {name for name, used_by in NOT_IMPORTED.items() if used_by == family}
    assert set(listed(family)) - TOOLS == needed


def test_the_data_rule_needs_no_torch() -> None:
    assert set(listed("data")) == {"python", "tyro", "markdown-it-py", "mdit-py-plugins"}


@pytest.mark.parametrize("family", ["train", "evaluate"])
def test_the_variants_differ_in_the_build_of_torch(family: str) -> None:
    texts = {
        build: (ROOT / f"envs/{family}{build}.yaml").read_text(encoding="utf-8").splitlines()
        for build in BUILDS
    }
    for build, name in BUILDS.items():
        assert texts[""] == [line.replace(f"- {name} ", "- pytorch ") for line in texts[build]]
        assert f"  - {name} {listed('train')['torch']}" in texts[build]


@pytest.mark.parametrize("name", ENVS)
def test_the_ranges_are_those_of_the_package(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = {"python": str(Requirement(f"python{project['requires-python']}").specifier)}
    for line in project["dependencies"]:
        requirement = Requirement(line)
        ranges[canonicalize_name(requirement.name)] = str(requirement.specifier)
    found = listed(name)
    assert found.pop("pip", "") == ""
    assert found.items() <= ranges.items()
