"""The installation: one list of dependencies, one set of versions, two commands."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pins() -> dict[str, str]:
    """constraints.txt as canonical name → version; a line that is not exactly ``name==version`` fails."""
    found = {}
    for line in text("constraints.txt").splitlines():
        if line and not line.startswith("#"):
            exact = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
            assert exact, f"{line!r} is no plain pin: no ranges, local versions or addresses"
            name = canonicalize_name(exact[1])
            assert name not in found, f"{name} is pinned twice"
            found[name] = exact[2]
    return found


def recipes() -> dict[str, tuple[list[str], str]]:
    """The Makefile as target → (prerequisites, recipe)."""
    rules = re.findall(r"^([\w$().]+):(?!=) *([^#\n]*)[^\n]*\n((?:\t.*\n)*)", text("Makefile"), flags=re.MULTILINE)
    return {target: (needs.split(), recipe) for target, needs, recipe in rules}


def test_every_dependency_is_pinned_to_a_version_that_pyproject_allows():
    pinned = pins()
    for requirement in REQUIREMENTS:
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{requirement} has no pin"
        assert pinned[name] in requirement.specifier, f"{requirement} is pinned to {pinned[name]}"


@pytest.mark.parametrize(("name", "oldest"), [("torch", "2.11"), ("transformers", "5.17")])
def test_supported_range_starts_at_the_oldest_version_we_run(name, oldest):
    requirement = next(r for r in REQUIREMENTS if r.name == name)
    assert str(requirement.specifier) == f">={oldest}"


def test_constraints_leave_the_accelerator_to_pip():
    assert not [name for name in pins() if re.match(r"nvidia|cuda|triton", name)]


def test_conda_takes_only_python_from_conda_and_the_rest_from_pyproject_and_constraints():
    *from_conda, from_pip = yaml.safe_load(text("environment.yml"))["dependencies"]
    assert from_pip == {"pip": ["-c constraints.txt", "-e .[lab,test]"]}
    assert {"lab", "test"} <= EXTRAS.keys()
    python, pip = from_conda
    assert pip == "pip"
    assert set(SpecifierSet(PROJECT["requires-python"])) <= set(Requirement(python).specifier)


@pytest.mark.parametrize("target", ["demo", "lab", "test", "train", "bench", "proof", "lint"])
def test_make_target_is_documented_and_makes_the_environment_first(target):
    needs, recipe = recipes()[target]
    assert needs == ["$(stamp)"]
    assert recipe.startswith("\t$(python) -m ")
    assert re.search(rf"^{target}: .*## \w", text("Makefile"), flags=re.MULTILINE)


def test_environment_is_remade_when_its_description_changes_and_marked_done_last():
    needs, recipe = recipes()["$(stamp)"]
    assert needs == ["pyproject.toml", "constraints.txt"]
    commands = recipe.strip().splitlines()
    assert commands[0] == "@rm -f $@"
    assert commands[-1].strip() == "@touch $@"
    installs = [c.strip() for c in commands if "install --" in c]
    assert all(" -c constraints.txt " in c for c in installs)
    assert installs[-1].endswith("-e '.[lab,train,test]'")
    assert {"lab", "train", "test"} <= EXTRAS.keys()


def test_readme_shows_the_two_commands_of_a_newcomer_first():
    fenced = "".join(re.findall(r"^```.*?\n(.*?)^```", text("README.md"), flags=re.MULTILINE | re.DOTALL))
    commands = dict.fromkeys(re.findall(r"^ *(make .*?) *(?:#.*)?$", fenced, flags=re.MULTILINE))
    assert list(commands)[:2] == ["make demo", "make test"]


def test_ci_runs_the_readme_test_command():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert [line for line in text(".ci/run").splitlines() if line.startswith("make ")][:2] == ["make lint", "make test"]


WORKS, FAILS = "exit 0", "echo no network >&2; exit 100"


@pytest.mark.parametrize(
    ("chromium", "apt", "browser_test", "code", "ran"),
    [
        (WORKS, FAILS, WORKS, 0, True),
        (WORKS, FAILS, "exit 2", 2, True),
        (None, WORKS, WORKS, 0, True),
        (None, WORKS, "exit 2", 2, True),
        (None, FAILS, WORKS, 0, False),
        (FAILS, FAILS, WORKS, 0, False),
        (None, None, WORKS, 0, False),
    ],
    ids=["there", "there and failing", "installed", "installed and failing", "offline", "it does not start", "not Debian"],
)
def test_ci_runs_the_browser_test_where_there_is_a_browser_and_fails_only_with_that_test(tmp_path, chromium, apt, browser_test, code, ran):
    """.ci/run among stand-ins for make, apt-get, sudo and Chromium; nothing else is on the PATH."""
    scripts = {
        "make": f'echo "make $*"; test "$1" != test-browser || {{ {browser_test}; }}',
        "sudo": 'shift; "$@"',
        "chromium": chromium,
        "apt-get": apt and f'case "$*" in *install*) cp "{tmp_path}/browser" "{tmp_path}/chromium";; esac; {apt}',
        "browser": apt,
    }
    for tool in ("bash", "sh", "dirname", "env", "timeout", "cp"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    for name, script in scripts.items():
        if script:
            (tmp_path / name).write_text(f"#!{shutil.which('bash')}\n{script}\n", encoding="utf-8")
            (tmp_path / name).chmod(0o755)
    done = subprocess.run([ROOT / ".ci" / "run"], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    made = ["make lint", "make test", "make test-notebooks", *["make test-browser"][: int(ran)]]
    assert done.stdout.splitlines() == made and done.returncode == code, done.stderr
    assert ("the browser test is skipped" in done.stderr) != ran


def test_ci_bounds_what_the_browser_takes():
    limits = [int(seconds) for seconds in re.findall(r"(?:debian|timeout -k 10) (\d+)", text(".ci/run"))]
    assert len(limits) == 3 and sum(limits) <= 12 * 60
    assert "timeout -k 10 420 make test-browser" in text(".ci/run") and 'timeout -k 10 "$1" apt-get' in text(".ci/run")


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "environment.yml", "Makefile", ".ci/run"])
def test_installation_names_no_host_and_no_path_of_one_machine(name):
    assert not re.search(r"://|index-url|find-links|/(home|opt|root|tmp|work|Users)/", text(name))


def test_git_ignores_what_the_commands_leave(tmp_path):
    left = [".venv/.installed", "runs/a.ipynb", "dspark.egg-info/PKG-INFO", "build/lib/x", ".pytest_cache/x", ".ruff_cache/x"]
    left += [".hypothesis/x", "dspark/__pycache__/x.pyc", "notebooks/.ipynb_checkpoints/x"]
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text(text(".gitignore"), encoding="utf-8")
    ignored = subprocess.run(["git", "check-ignore", *left, "dspark/draft/drafter.py"], cwd=tmp_path, capture_output=True, text=True)
    assert ignored.stdout.split() == left


def test_licence_file_is_the_licence_that_pyproject_declares():
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in text("LICENSE")
    assert "The dspark authors" in text("LICENSE")
