"""The `vllm-medusa` command: parse arguments, call the library, print one-line errors.

A subcommand is a function ``add_<name>_parser(subparsers)`` that sets
``run=<function of the parsed arguments>``; ``PARSERS`` lists them all. Imports of
anything heavier than argparse belong inside ``run``, so that ``--help`` is
instant; vLLM is needed by none of the subcommands here.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from vllm_medusa import __version__
from vllm_medusa.cli_heads import add_convert_parser, add_inspect_parser
from vllm_medusa.training.cli import (
    add_calibrate_parser,
    add_distill_parser,
    add_restrict_parser,
    add_train_parser,
)
from vllm_medusa.training.eval_cli import add_eval_parser
from vllm_medusa.training.joint_cli import add_train_joint_parser

# Order of `vllm-medusa --help`.
PARSERS = [
    add_inspect_parser,
    add_convert_parser,
    add_distill_parser,
    add_train_parser,
    add_train_joint_parser,
    add_calibrate_parser,
    add_restrict_parser,
    add_eval_parser,
]

# argparse's own status for wrong usage; a bad checkpoint is wrong usage too.
EXIT_USAGE = 2


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every subcommand."""
    parser = argparse.ArgumentParser(
        prog="vllm-medusa", description="Medusa tree speculation for vLLM."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add_parser in PARSERS:
        add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status: 0, or 2 for bad input."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    arguments = build_parser().parse_args(argv)
    try:
        status: Any = arguments.run(arguments)
    except (ValueError, OSError) as error:
        # Our own messages are one line; other libraries' are not always.
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"vllm-medusa {arguments.command}: {message}", file=sys.stderr)
        return EXIT_USAGE
    return int(status or 0)


if __name__ == "__main__":
    sys.exit(main())
