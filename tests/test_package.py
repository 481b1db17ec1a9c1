"""The package as others install it: built from this checkout, in an environment where nothing of the checkout is found."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "stages", "schemas")


def run(*command: object, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "BATON", "PREFECT"))}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=inherited | more, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Wheel and sdist."""
    folder = tmp_path_factory.mktemp("built")
    for target in ("wheel", "sdist"):
        done = run(sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", folder, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """Its programs: the wheel in an environment of its own, which finds the packages of this one, but not this checkout."""
    folder = tmp_path_factory.mktemp("environment") / "env"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    done = run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", *built.glob("*.whl"), cwd=folder)
    assert done.returncode == 0, done.stderr
    (own,) = (folder / "lib").glob("python*/site-packages")
    Path(own, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files are not read
    return folder / "bin"


def tracked(*folders: str) -> set[str]:
    done = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *folders, cwd=ROOT)
    return {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}


def test_the_wheel_holds_the_packages_and_the_examples_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = next(name for name in names if name.endswith("/METADATA"))
        metadata = archive.read(about).decode()
    there = {name for name in names if ".dist-info/" not in name}
    examples = {name.replace("data/", "flows/examples/", 1) for name in tracked("data")}
    assert there == tracked(*PACKAGES) | examples
    assert {f"{package}/py.typed" for package in PACKAGES} < there
    assert "\nName: baton-ppo\n" in metadata and "\nLicense-Expression: MIT\n" in metadata
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_is_tracked_and_gives_the_same_wheel(built, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    (wheel,) = built.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert there == {name for name in tracked() if not name.startswith(".ci/")} | {"PKG-INFO"}
    done = run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path, cwd=folder)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(tmp_path / wheel.name) as again:
        first, second = ([(file.filename, file.CRC) for file in archive.infolist()] for archive in (ours, again))
    assert first == second


def test_a_packaged_example_trains(installed, tmp_path):
    version = run(installed / "baton", "--version", cwd=tmp_path)
    assert version.stdout == f"baton, version {version_of_the_project()}\n"
    listed = run(installed / "baton", "examples", "--json", cwd=tmp_path)
    names = {row["name"]: row for row in json.loads(listed.stdout)}
    assert set(names) == {path.parent.name for path in ROOT.glob("data/*/config.yaml")}
    assert names["halfcheetah"]["extras"] == ["mujoco"] and names["cartpole"]["about"].startswith("CleanRL's ppo.py")
    copied = run(installed / "baton", "examples", "cartpole", cwd=tmp_path)
    assert copied.stdout == "baton train data/cartpole\n", copied.stderr
    trained = run(installed / "baton", "train", "data/cartpole", "--iterations", 1, "--set", "evaluate.episodes=1",
                  cwd=tmp_path)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    where = run(installed / "python", "-c", "import flows; print(flows.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(installed.parent))
    again = run(installed / "baton", "stage", "gae", "cartpole", "--iteration", 1, cwd=tmp_path)
    assert "reproduced" in again.stdout


def version_of_the_project() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_an_example_goes_nowhere_where_something_is_or_nothing_can_be_written(installed, tmp_path):
    (tmp_path / "data" / "reviews").mkdir(parents=True)
    (tmp_path / "file").touch()
    for arguments, line in {
        ("cartpole", "reviews"): "baton: data/reviews: there already; --to DIR copies elsewhere\n",
        ("reviews", "--to", "file"): "baton: --to file: is no folder\n",
        ("reviews", "--to", "/proc"): "baton: /proc/reviews cannot be written (",
        ("nothing",): "baton: no example nothing; there are arithmetic, calculator,",
    }.items():
        refused = run(installed / "baton", "examples", *arguments, cwd=tmp_path)
        assert refused.returncode == 2 and refused.stderr.startswith(line), refused.stderr
    assert list((tmp_path / "data").rglob("*")) == [tmp_path / "data" / "reviews"]


def test_what_an_example_needs_is_named(installed, tmp_path):
    """smollm2's reward reads VADER, which the extra `rewards` brings."""
    assert run(installed / "baton", "examples", "smollm2", cwd=tmp_path).stdout.splitlines() == [
        "pip install 'baton-ppo[smollm2]'", "python data/smollm2/get_model.py", "baton train data/smollm2"]
    assert run(installed / "baton", "examples", "digits", "reverse", "--to", "mine", cwd=tmp_path).stdout.splitlines() == [
        "python mine/digits/make_inputs.py", "baton train mine/digits", "pip install 'baton-ppo[gguf]'",
        "baton examples smollm2 --to mine", "python mine/smollm2/get_model.py", "baton train mine/reverse"]
    assert (tmp_path / "mine" / "digits" / "make_inputs.py").is_file()
    (tmp_path / "vaderSentiment.py").write_text("raise ModuleNotFoundError(\"No module named 'vaderSentiment'\", "
                                                "name='vaderSentiment')")
    (tmp_path / "data" / "smollm2" / "model.gguf").touch()
    refused = run(installed / "baton", "train", "data/smollm2", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert refused.returncode == 2 and "pip install 'baton-ppo[rewards]'" in refused.stderr, refused.stderr


def test_a_type_checker_finds_the_hints(installed, tmp_path):
    (tmp_path / "use.py").write_text(
        "from flows.views import open_run\nfrom schemas.settings import GAEConfig\n"
        "reveal_type(open_run)\nopen_run(1, \"reviews\")\n"
        "def dial(config: GAEConfig) -> None:\n    reveal_type(config.gae_lambda)\n")
    found = run(sys.executable, "-m", "mypy", "--python-executable", installed / "python", "--follow-imports", "silent",
                "--cache-dir", tmp_path / "cache", "use.py", cwd=tmp_path)
    assert [line.split(": ", 1)[1] for line in found.stdout.splitlines()[:-1]] == [
        'note: Revealed type is "def (store: str, name: str) -> flows.views.run_view.RunView"',
        'error: Argument 1 to "open_run" has incompatible type "int"; expected "str"  [arg-type]',
        'note: Revealed type is "float"'], found.stdout + found.stderr
