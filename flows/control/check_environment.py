"""What is checked of a control task before its run is made: that its environment can be made, and acted in."""

from __future__ import annotations

from collections.abc import Mapping

from flows.control.environments import look_at
from flows.runs.functions import check_function, load_function
from flows.runs.inputs import Checked, Files
from flows.runs.rows import Rows
from schemas.control import ControlConfig
from schemas.errors import ConfigError


def check(config: ControlConfig, files: Files) -> Checked:
    """Raises `ConfigError` if the environment cannot be made, or is not one that a policy here can act in."""
    function = None
    if "environment" in files:
        check_function(config.environment.id, files["environment"])
        function = load_function(config.environment.id, files["environment"])
    spaces = look_at(config.environment, function, config.execution.environment_timeout)
    if spaces.image and config.policy.normalize_observations:
        raise ConfigError("policy.normalize_observations: the observations are pictures, whose numbers are divided by 255; "
                          "set it to false")
    return Checked()


def check_new(config: ControlConfig, files: Files, data: Mapping[str, Rows]) -> None:
    """Functions that a run did not have when it was made. Raises `ConfigError`."""
    for role, paths in files.items():
        check_function(config.functions[role], paths)
