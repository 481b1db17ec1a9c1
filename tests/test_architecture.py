"""The import contract, and that every setting, metric and column is documented."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from flows.chains import kind_of
from schemas.control import ControlConfig
from schemas.language import LanguageConfig
from schemas.settings import Settings
from schemas.stages import STAGES

ROOT = Path(__file__).parents[1]


def test_imports_go_from_flows_to_stages_to_schemas():
    linter = Path(sys.executable).parent / "lint-imports"
    out = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout


def test_schemas_import_neither_torch_nor_prefect():
    code = ("import sys, schemas.tables, schemas.artifacts, schemas.config, schemas.metrics\n"
            "assert not {'torch', 'prefect', 'transformers', 'mlflow'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_metric_is_defined_where_it_is_declared():
    for stage in (stage for stages in STAGES.values() for stage in stages.values()):
        for name, field in stage.metrics.model_fields.items():
            assert field.description and len(field.description) > 5, f"{stage.name}/{name}"


def test_every_setting_is_explained():
    def walk(section: type[Settings]):
        for name, field in section.model_fields.items():
            kinds = [k for k in (field.annotation, *getattr(field.annotation, "__args__", ()))
                     if isinstance(k, type) and issubclass(k, Settings)]
            if kinds:
                assert kinds[0].__doc__, name
                walk(kinds[0])
            else:
                assert field.description and len(field.description) > 5, f"{section.__name__}.{name}"

    walk(LanguageConfig)
    walk(ControlConfig)


def modules():
    return [path for part in ("flows", "stages", "schemas") for path in sorted((ROOT / part).rglob("*.py"))]


def test_a_base_name_stands_in_one_room_and_a_package_says_what_it_is_for():
    names = Counter(path.stem for path in modules() if path.stem != "__init__")
    assert [name for name, count in names.items() if count > 1] == []
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


@pytest.mark.parametrize("kind", STAGES)
def test_every_stage_that_is_declared_has_a_task_and_a_call(kind):
    brought = kind_of(kind)
    assert all(callable(brought.task(name)) for name in STAGES[kind])
    assert all(callable(getattr(brought.chain, name)) for name in STAGES[kind])


def test_what_is_documented_is_there():
    """Every file that a document names."""
    for document in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md"):
        for name in re.findall(r"\b(?:flows|stages|schemas|tests)/[\w/]+\.py", document.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{document.name}: {name}"
