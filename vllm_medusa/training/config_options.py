"""Command-line options from the fields of a settings class, and settings from the options."""

import argparse
import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from vllm_medusa.training.config import CONFIG_FILE


def add_config_options(parser: argparse.ArgumentParser, config: type) -> None:
    """Add one option per field, and ``--config FILE`` once per parser.

    Fields that are not named on the command line stay unset in the namespace, so that
    ``config_from_options`` can tell them from fields set to their default.
    """
    if not any("--config" in action.option_strings for action in parser._actions):
        parser.add_argument(
            "--config", type=Path, help="settings file that an earlier run wrote; options win"
        )
    group = parser.add_argument_group(config.__name__)
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        name = f"--{field.name.replace('_', '-')}"
        group.add_argument(
            name, default=argparse.SUPPRESS, **_arguments_of(hints[field.name], field.default)
        )


def _arguments_of(hint: Any, default: Any) -> dict[str, Any]:
    # Optional fields; Literal is no union, its arguments are values.
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    text = f"default {default}"
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": typing.get_args(hint), "help": text}
    if typing.get_origin(hint) is tuple:
        return {"nargs": "+", "type": typing.get_args(hint)[0], "help": text}
    return {"type": hint, "help": text}


def given_options(config: type, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of ``config`` that were named on the command line."""
    names = [field.name for field in dataclasses.fields(config)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def config_from_options(config: type, arguments: argparse.Namespace) -> Any:
    """Settings of ``--config`` (or the defaults) with the named options on top."""
    path = getattr(arguments, "config", None)
    base = config.load(path) if path is not None else config()
    return dataclasses.replace(base, **given_options(config, arguments))


def add_engine_args(parser: argparse.ArgumentParser) -> None:
    """Add ``--engine-args`` to a command that starts vLLM."""
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, help="JSON of further vllm.LLM arguments"
    )


def run_config(config: type, arguments: argparse.Namespace) -> Any:
    """Settings from the options, or for ``--resume`` from the folder; they must not disagree."""
    if arguments.resume:
        return kept_config(config, arguments)
    return config_from_options(config, arguments)


def kept_config(config: type, arguments: argparse.Namespace) -> Any:
    """Settings that the run in ``arguments.output`` began with; named options must agree."""
    kept = config.load(arguments.output / CONFIG_FILE)
    for name, value in given_options(config, arguments).items():
        if value != getattr(kept, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is {value}, but the run in {arguments.output} "
                f"began with {getattr(kept, name)}; leave the option out to resume"
            )
    return kept
