"""Rules of this code base that a linter does not know: sizes, directions, seams."""

import ast
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vllm_medusa", "triton_kernels")

MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 60
MOST_KERNEL_LINES = 120  # a kernel is one function by nature

# One place, in two files: what a cluster needs beside the rest.
SEAMS = tuple(f"vllm_medusa/{name}_seams.py" for name in ("vllm", "cluster", "cpu"))

# Modules that are usable where neither is installed, or run before they may be imported.
WITHOUT_TORCH_OR_VLLM = ("", "config", "plugin", "tree", "tree_presets", "demo.bootstrap")
# Prefixes of what training may use besides itself.
USED_BY_TRAINING = ("config", "provenance", "head", "checkpoint", "tree")

BUILT_IN_MARKS = {"parametrize", "skip", "skipif", "xfail", "usefixtures", "filterwarnings"}
PLUGIN_MARKS = {"timeout"}  # pytest-timeout


def python_files(*folders: str) -> list[Path]:
    """Return the Python files below ``folders`` of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def label(path: Path) -> str:
    """Return a path relative to the repository, for messages and test names."""
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    """Parse one file."""
    return ast.parse(path.read_text(), filename=str(path))


def module_name(path: Path) -> str:
    """Return the name under which a file of the packages is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "triton_kernels":
        parts = ("vllm_medusa", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = python_files(*PACKAGES)
MODULES = {module_name(path): path for path in SOURCES}


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything a file imports, nested imports too.

    ``from a.b import c`` yields ``a.b.c``; whether c is a module is for the caller.
    """
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Return the modules of this repository that a file imports."""
    found = set()
    for _, name in imported_names(path):
        candidate = name
        while candidate and candidate not in MODULES:
            candidate = candidate.rpartition(".")[0]
        # `vllm_medusa` alone is the version, which every module may read.
        if candidate and candidate != "vllm_medusa":
            found.add(candidate)
    return found - {module_name(path)}


def below(name: str, folder: str) -> bool:
    """Tell whether a module is the package ``vllm_medusa.<folder>`` or inside it."""
    return f"{name}.".startswith(f"vllm_medusa.{folder}.")


# -- sizes --------------------------------------------------------------------


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines below its docstring.

    The signature with its shape lines and the docstring are what one should not
    save on.
    """
    has_docstring = ast.get_docstring(function, clean=False) is not None
    first = function.body[0]
    start = first.end_lineno if has_docstring else first.lineno - 1
    return function.end_lineno - start


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_sizes(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MOST_FILE_LINES, f"{label(path)} has {lines} lines; split it by nouns"
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = body_lines(node)
        kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        limit = MOST_KERNEL_LINES if kernel else MOST_FUNCTION_LINES
        assert length <= limit, f"{label(path)}:{node.lineno} {node.name}: {length} lines of code"


# -- directions -----------------------------------------------------------------


def test_kernels_stand_alone():
    for path in python_files("triton_kernels"):
        strangers = {
            name
            for _, name in imported_names(path)
            if name.split(".")[0] in ("vllm", "vllm_medusa") and not below(name, "triton_kernels")
        }
        assert not strangers, f"{label(path)} imports {sorted(strangers)}"


def test_only_the_command_line_imports_training():
    for name, path in MODULES.items():
        if not below(name, "training") and not name.startswith("vllm_medusa.cli"):
            users = {used for used in own_imports(path) if below(used, "training")}
            assert not users, f"{label(path)} imports {sorted(users)}"


def test_training_uses_only_what_lies_below_it():
    for name, path in MODULES.items():
        if below(name, "training"):
            others = {
                used
                for used in own_imports(path)
                if not below(used, "training")
                and not used.removeprefix("vllm_medusa.").startswith(USED_BY_TRAINING)
            }
            assert not others, f"{label(path)} imports {sorted(others)}"


def test_nothing_imports_the_command_line():
    for name, path in MODULES.items():
        if not name.startswith("vllm_medusa.cli"):
            users = {used for used in own_imports(path) if used.startswith("vllm_medusa.cli")}
            assert not users, f"{label(path)} imports {sorted(users)}"


def test_demo_and_package_know_nothing_of_each_other():
    for name, path in MODULES.items():
        inside = below(name, "demo")
        crossing = {used for used in own_imports(path) if below(used, "demo") != inside}
        assert not crossing, f"{label(path)} imports {sorted(crossing)}"


def test_imports_have_no_cycle():
    graph = {name: own_imports(path) for name, path in MODULES.items()}
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            cycle = " -> ".join((*trail[trail.index(name) :], name))
            raise AssertionError(f"import cycle: {cycle}")
        if name not in finished:
            for used in sorted(graph[name]):
                visit(used, (*trail, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


def test_heads_and_checkpoints_do_not_import_vllm():
    for name, path in MODULES.items():
        if name.removeprefix("vllm_medusa.").startswith(
            ("head", "checkpoint", "tree_pre", "tree.")
        ):
            users = {used for _, used in imported_names(path) if used.split(".")[0] == "vllm"}
            assert not users, f"{label(path)} imports {sorted(users)}"


@pytest.mark.parametrize("module", WITHOUT_TORCH_OR_VLLM, ids=lambda name: name or "package")
def test_cheap_modules_import_neither_torch_nor_vllm(module):
    name = f"vllm_medusa.{module}".rstrip(".")
    script = (
        f"import sys; import {name}; "
        "print(sorted({'torch', 'vllm', 'triton'} & set(sys.modules)))"
    )
    done = run_python(script)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# -- vLLM's private names ---------------------------------------------------------


def private_part(dotted: str) -> bool:
    """Tell whether a part of a dotted name is private."""
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def private_vllm_names(path: Path) -> list[str]:
    """List the private vLLM names that a file imports or reaches through an import."""
    found, bound = [], set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for alias in node.names:
                dotted = f"{module}.{alias.name}" if module else alias.name
                if dotted.split(".")[0] != "vllm" or getattr(node, "level", 0):
                    continue
                bound.add((alias.asname or alias.name).split(".")[0])
                if private_part(dotted):
                    found.append(f"{node.lineno}: {dotted}")
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute) and private_part(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in bound:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_private_vllm_names_are_touched_in_one_place(path):
    if label(path) not in SEAMS:
        assert private_vllm_names(path) == [], f"move them into one of {', '.join(SEAMS)}"


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("from vllm import _custom_ops", 1),
        ("from vllm.v1.engine import core\ncore.Engine._step()", 1),
        ("import vllm\nvllm.config._x = 1", 1),
        ("from vllm.config import VllmConfig\nself._mine = VllmConfig.__name__", 0),
    ],
)
def test_the_seam_rule_itself(tmp_path, source, count):
    path = tmp_path / "sample.py"
    path.write_text(source)
    assert len(private_vllm_names(path)) == count


# -- the name triton_kernels --------------------------------------------------------


def run_python(script: str) -> subprocess.CompletedProcess:
    """Run a script as `python -c` does from the repository's root."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_bare_triton_kernels_refuses_to_load():
    done = run_python("import triton_kernels")
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "vllm_medusa.triton_kernels" in done.stderr


@pytest.mark.vllm
def test_vllm_does_not_take_our_kernels_for_its_own():
    script = (
        "import sys\n"
        "from vllm.utils.import_utils import import_triton_kernels\n"
        "import_triton_kernels()\n"
        "found = sys.modules.get('triton_kernels')\n"
        "print('FOUND', getattr(found, '__name__', None))\n"
    )
    done = run_python(script)
    assert done.returncode == 0, done.stderr
    assert "FOUND triton_kernels" not in done.stdout, done.stdout


def test_no_top_level_triton_kernels_is_installed(monkeypatch):
    import setuptools

    captured = {}
    monkeypatch.setattr(setuptools, "setup", captured.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    assert "triton_kernels" not in captured["packages"]
    assert captured["package_dir"]["vllm_medusa.triton_kernels"] == "triton_kernels"
    folders = {module_name(path / "__init__.py") for path in package_folders()}
    assert folders == set(captured["packages"])


def package_folders() -> Iterator[Path]:
    """Yield every folder that is a Python package of ours."""
    for path in SOURCES:
        if path.name == "__init__.py":
            yield path.parent


# -- tests and leftovers --------------------------------------------------------------


def marks(path: Path) -> set[str]:
    """Return the names of the pytest marks that a file uses."""
    return {
        node.attr
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark"
    }


def test_marks_are_registered(pytestconfig):
    registered = {line.split(":")[0].split("(")[0] for line in pytestconfig.getini("markers")}
    for path in python_files("tests"):
        unknown = marks(path) - registered - BUILT_IN_MARKS - PLUGIN_MARKS
        assert not unknown, f"{label(path)} uses unregistered marks {sorted(unknown)}"


def test_skipped_tests_say_why():
    silent = re.compile(r"pytest\.mark\.(?:skip|xfail|skipif)\b(?!\()|pytest\.skip\(\)")
    for path in python_files("tests"):
        if path != Path(__file__).resolve():
            assert not silent.search(path.read_text()), f"{label(path)} skips without a reason"
            for node in ast.walk(parse(path)):
                if isinstance(node, ast.Call) and re.fullmatch(
                    r"pytest\.mark\.(skip|skipif|xfail)", ast.unparse(node.func)
                ):
                    named = {keyword.arg for keyword in node.keywords}
                    assert "reason" in named, f"{label(path)}:{node.lineno} gives no reason"


def test_nothing_is_left_unfinished():
    leftovers = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b|NotImplemented" + "Error")
    for path in python_files(*PACKAGES, "tests", "benchmarks"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert not leftovers.search(line), f"{label(path)}:{number}: {line.strip()}"
