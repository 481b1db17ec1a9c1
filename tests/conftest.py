"""A tiny example that trains in seconds, a tiny language model, and a real Prefect server on loopback."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest
import yaml
from filelock import FileLock


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# Prefect reads these when it is imported, so they are set before any test module is.
HOME = tempfile.mkdtemp(prefix="baton-tests-")
API = f"http://127.0.0.1:{free_port()}/api"
os.environ |= {
    "PREFECT_HOME": HOME, "PREFECT_API_URL": API, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL", "PREFECT_LOGGING_EXTRA_LOGGERS": "baton",
    "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
for key in ("BATON_STORE", "MLFLOW_TRACKING_URI"):
    os.environ.pop(key, None)

REVIEWS = Path(__file__).parents[1] / "data" / "reviews"
TINY = {
    "seed": 3, "iterations": 2,
    "data": {role: f"{role}.jsonl" for role in ("demonstrations", "pairs", "heldout_pairs", "prompts", "heldout_prompts")},
    "base_model": {"vocab_size": 320, "context_length": 160, "layers": 1, "heads": 2, "width": 16},
    "sft": {"epochs": 1, "batch_size": 8, "learning_rate": 5e-3, "completion_only": False},
    "reward_model": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3},
    "rollout": {"batch_size": 8, "max_new_tokens": 10},
    "ppo": {"epochs": 2, "minibatches": 2, "learning_rate": 1e-3, "critic_learning_rate": 1e-3},
    "evaluate": {"every": 2, "judge": "grammar.py:gold"},
    "execution": {"threads": 1, "micro_batch_tokens": 256},
    "tracking": {"enabled": False},  # but where MLflow is what is tested
}


TRACKED = ("--set", "tracking.enabled=true")


LONGEST_FIRST = ("test_work_pools", "test_pool_killed", "test_work_pool", "test_ranks", "test_shards", "test_lease",
                 "test_kill", "test_debugging", "test_package")  # so that none is left for the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: names.get(item.path.stem, len(names)))


def pytest_sessionfinish() -> None:
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def no_heartbeat():
    """Flows that a test runs in its own process have none, whose end takes a second. Commands and workers have theirs."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


@pytest.fixture(scope="session")
def prefect_server():
    """A Prefect server on loopback, as a person would start one; ended with the tests."""
    port = API.split(":")[2].split("/")[0]
    with open(Path(HOME) / "server.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "prefect", "server", "start", "--port", port], stdout=log,
                                  stderr=subprocess.STDOUT)
        try:
            _wait_for(f"{API}/health", server)
            yield API
            _flush_logs()
        finally:
            server.terminate()
            server.wait(30)


def _flush_logs() -> None:
    """Sends what Prefect still holds back while there is a server to send it to."""
    from prefect.logging.handlers import APILogHandler

    APILogHandler().flush()


def _wait_for(url: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(url, timeout=2).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    pytest.fail(f"the Prefect server did not come up: {(Path(HOME) / 'server.log').read_text()[-2000:]}")


def assert_same_bytes(ours, theirs) -> None:
    """Every state of two runs but for the seconds that it took, and every file of their artifacts."""
    for mine, other in zip(ours.states(), theirs.states(), strict=True):
        assert mine.model_copy(update={"seconds": 0}) == other.model_copy(update={"seconds": 0})
        for ref in mine.artifacts.values():
            assert ours.store.manifest(ref).digests() == theirs.store.manifest(ref).digests()


def module_of(file: Path) -> ModuleType:
    """An example's Python file, run as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_{file.stem}_in_tests", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def rewrite(path: Path, change) -> None:
    """Changes a record's values as an attacker or a bug would, and signs it anew."""
    data = json.loads(path.read_text()) | {"sha256": "0" * 64}
    change(data)
    text = json.dumps(data).encode()
    path.unlink()
    path.write_bytes(text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode(), 1))


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """A folder with config and inputs: the first rows of data/reviews, a model of some thousand parameters."""
    return write_example(tmp_path / "tiny")


def write_example(folder: Path) -> Path:
    folder.mkdir(parents=True)
    shutil.copy(REVIEWS / "grammar.py", folder)
    for role, rows in (("demonstrations", 48), ("pairs", 24), ("heldout_pairs", 12), ("prompts", 12),
                       ("heldout_prompts", 6)):
        lines = (REVIEWS / f"{role}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{role}.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(TINY))
    return folder


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that one of the processes of a test run makes, and each has as a copy of its own."""
    together = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    original = together / f"{name}-original"
    with FileLock(f"{original}.lock"):
        if not (done := original.with_suffix(".done")).exists():
            make(original)
            done.touch()
    return shutil.copytree(original, factory.mktemp(name) / name, symlinks=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, prefect_server):
    """The tiny example, trained once by the shipped command: (its folder, its store). On this process's Prefect server."""
    from flows.cli.main import run_command

    folder = write_example(tmp_path_factory.mktemp("trained") / "tiny")
    store = folder.parent / "store"
    assert run_command(["train", str(folder), "--store", str(store), "--quiet", *TRACKED]) == 0
    return folder, store


@pytest.fixture(scope="session")
def controlled(tmp_path_factory, prefect_server):
    """Three control tasks, trained once by the shipped command: (their folders' parent, their store)."""
    from control import RUNS, write_control

    from flows.cli.main import run_command

    def make(place: Path) -> None:
        for name, sections in RUNS.items():
            folder = write_control(place / name, **sections)
            assert run_command(["train", str(folder), "--store", str(place / "store"), "--quiet"]) == 0

    place = made_once(tmp_path_factory, "controlled", make)
    return place, place / "store"


EVERY_CHOICE = (
    "kl.target=0.01", "kl.horizon=100", "reward.normalize=standardize", "reward.center_on_demonstrations=true",
    "reward.clip=2", "reward.missing_eos=subtract", "reward.overlong_buffer=4", "gae.critic_lambda=1",
    "gae.length_adaptive_alpha=0.5", "gae.truncation=bootstrap", "gae.whiten_rewards=true",
    "gae.whiten_unbiased=false", "ppo.dual_clip=3", "ppo.value_coef=0.1", "ppo.entropy_coef=0.01",
    "ppo.loss_aggregation=sequence", "ppo.schedule=cosine", "ppo.schedule_iterations=8", "ppo.warmup_iterations=1",
    "ppo.critic_warmup=1", "ppo.recompute_old_logprobs=true", "ppo.importance_cap=1.0001", "ppo.ptx_coef=0.5",
    "ppo.ptx_batch_size=4", "rollout.precision=bfloat16")
NO_CRITIC = ("gae.estimator=grpo", "rollout.responses_per_prompt=4", "kl.placement=loss", "kl.estimator=k3",
             "data.pretraining=pretraining.jsonl", "ppo.ptx_coef=0.1")
VARIANTS = {"every_choice": EVERY_CHOICE, "no_critic": NO_CRITIC}


@pytest.fixture(scope="session")
def variants(trained, tmp_path_factory):
    """The tiny example with settings that are off by default, trained beside the plain one: (its folder, its store)."""
    from flows.cli.main import run_command

    def make(place: Path) -> None:
        folder, store = (shutil.copytree(there, place / there.name) for there in trained)
        (folder / "pretraining.jsonl").write_text('{"text": "The soup was warm."}\n{"text": "A fine evening, and late."}\n')
        for run, settings in VARIANTS.items():
            options = [option for setting in settings for option in ("--set", setting)]
            assert run_command(["train", str(folder), "--run", run, "--store", str(store), "--quiet", *options]) == 0

    place = made_once(tmp_path_factory, "variants", make)
    return place / "tiny", place / "store"


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A Prefect server with everything deployed, and a worker; both may be killed."""
    from pool import running_pool

    with running_pool(tmp_path_factory.mktemp("pool")) as pool:
        yield pool


@pytest.fixture
def copied(trained, tmp_path):
    """The trained example in a store of its own, which a test may change: (its folder, its store)."""
    folder, store = trained
    shutil.copytree(store, tmp_path / "store")
    return folder, tmp_path / "store"


@pytest.fixture(scope="session")
def tiny_model():
    """An untrained GPT-2 of two layers and its tokenizer, in evaluation mode."""
    return make_tiny_model()


def make_tiny_model():
    from schemas.language import BaseModelConfig
    from stages.base_model import base_model

    rows = [json.loads(line) for line in (REVIEWS / "demonstrations.jsonl").read_text(encoding="utf-8").splitlines()[:40]]
    config = BaseModelConfig(vocab_size=320, context_length=64, layers=2, heads=2, width=16)
    model = base_model(rows, config, seed=5)
    model.module.eval()
    return model


def save_tiny_model(folder: Path) -> None:
    """The tiny model as a folder that a config may name."""
    model = make_tiny_model()
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_critic(tiny_model):
    """A critic with a random head, of the tiny model's shape."""
    import torch
    from transformers import GPT2ForSequenceClassification

    from stages.ops.language_model import LanguageModel

    config = tiny_model.module.config
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return LanguageModel(GPT2ForSequenceClassification(config).eval(), tiny_model.tokenizer)


@pytest.fixture(scope="session")
def rollouts(tiny_model):
    """Nine responses of unlike lengths to prompts of unlike lengths."""
    from schemas.language import RolloutConfig
    from stages.ops.sampling import ModelSampler
    from stages.rollout import rollout

    prompts = ["The soup", "The film The Salt Road", "A night at Villa Rosa", "My copy", "The choir at Saint Agnes",
               "The pancakes at the Blue Lamp", "Our", "The quartet", "The umbrella from Norden"]
    return rollout(ModelSampler(tiny_model), prompts, np.arange(9), RolloutConfig(max_new_tokens=12, temperature=0.8),
                   seed=11)
