"""Kernel tests under compute-sanitizer: accesses out of bounds, races in shared memory, barriers.

    python benchmarks/check_sanitizer.py --out record.json [--tools memcheck racecheck synccheck]

A first run without a tool fills Triton's cache; then all tools run at once, each on its own
process.  Tensors are allocations of their own (PyTorch's cache of memory is off), so that a
kernel that leaves one is seen.  Only this package's kernels are checked.  The exit status is 1
where a tool reports an error or a test fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from records import write_record
from timing import parse_on_gpu

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "synccheck")
# Every kernel, in the cases that leave the most room to go astray: ragged and padded batches,
# sizes around tiles and pages, both widths of masks, products on the tensor cores.
TESTS = {
    "test_tree_attention": (
        "kernel_on_the_cases_of_the_definition", "ragged_batch", "one_to_128_rows",
        "half_precisions", "float8_caches", "who_joins", "part_completes",
        "second_word_around",
    ),
    "test_kv_compaction": (
        "layouts_and_word_sizes", "named_paths", "paths_of_two_words",
        "layers_that_share", "skipped_requests",
    ),
    "test_tree_walk": ("named_trees", "accept_limit", "state_advances", "hidden_state"),
    "test_draft_tree": ("vocabularies_around_groups", "ranks_around"),
    "test_scatter_tree": ("named_trees", "without_tree_slot"),
    "test_best_tree": ("test_heads", "sizes_around", "fixed_slots"),
    "test_lookup": ("small_histories", "lengths_around", "edges_of_blocks"),
    "test_merged_tree": ("stands_once", "heads_spell"),
    "test_float8": ("rows_around", "outputs_around", "columns_around", "rounded_once", "padded"),
    "test_sequential": ("named_paths", "widths_around", "updates_around", "padded_rows"),
}  # fmt: skip
KERNELS = (
    "tree_attention_kernel", "tree_part_kernel", "join_splits_kernel", "_draft_tree_kernel",
    "_top_tokens_kernel", "_compact_kv_kernel", "_lookup_kernel", "_scatter_tree_kernel",
    "_embed_paths_kernel", "_add_update_kernel", "_best_tree_kernel", "_tree_walk_kernel",
    "_float8_product_kernel",
)  # fmt: skip
FIRST_PORT, PORTS = 49152, 50  # of a tool's own; tools that run at once must not share them
SUMMARY = re.compile(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)")
CLEAN = re.compile(r"SUMMARY: 0 (?:errors|hazards displayed)")
MOST_LINES = 40


def pytest_command() -> list[str]:
    """The tests above and no others."""
    chosen = " or ".join(f"({name} and {part})" for name, parts in TESTS.items() for part in parts)
    chosen = f"({chosen}) and not graph and not long and not twin and not bad"
    files = [f"tests/kernels/{name}.py" for name in TESTS]
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files]


def sanitizer_command(tool: str, port: int, sanitizer: str) -> list[str]:
    """One tool around the tests."""
    command = [sanitizer, "--tool", tool, "--target-processes", "application-only"]
    command += ["--port", str(port), "--error-exitcode", "9", "--print-limit", "20"]
    for name in KERNELS:
        command += ["--kernel-name", f"kernel_substring={name}"]
    return command + pytest_command()


def fill_cache() -> str:
    """Run the tests as they are; pytest's last line."""
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    done = subprocess.run([*pytest_command(), *workers], cwd=ROOT, capture_output=True, text=True)
    return (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]


def judge(tool: str, command: list[str], output: str, code: int) -> dict[str, Any]:
    """What a tool said."""
    lines = output.splitlines()
    summaries = SUMMARY.findall(output)
    tests = [line for line in lines if re.search(r"^\d+ (passed|failed|error)", line)]
    return {
        "tool": tool,
        "command": [Path(command[0]).name, *command[1:7]],
        "exit_code": code,
        "summary": summaries[-1] if summaries else None,
        "tests": tests[-1].strip() if tests else None,
        "clean": code == 0 and bool(summaries) and all(map(CLEAN.search, summaries)),
        "first_lines": []
        if code == 0
        else [line for line in lines if line.startswith("=====") or "Error" in line][:MOST_LINES],
    }


def run_tools(tools: list[str], sanitizer: str, seconds: int) -> list[dict[str, Any]]:
    """All tools at once; one that takes longer is ended."""
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    commands = {
        tool: sanitizer_command(tool, FIRST_PORT + index * PORTS, sanitizer)
        for index, tool in enumerate(tools)
    }
    deadline, found = time.monotonic() + seconds, []
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for tool, command in commands.items():
            with Path(folder, tool).open("w") as output:
                running[tool] = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
        for tool, process in running.items():
            try:
                process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            output = Path(folder, tool).read_text(errors="replace")
            found.append(judge(tool, commands[tool], output, process.returncode))
    return found


def main() -> int:
    """Run, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON record to write")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS))
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="program to run")
    parser.add_argument("--seconds", type=int, default=240, help="when to end the tools")
    args = parse_on_gpu(parser)
    begin = time.monotonic()
    plain = fill_cache()
    print(f"{time.monotonic() - begin:.0f} s: without a tool: {plain}", flush=True)
    found = run_tools(args.tools, args.sanitizer, args.seconds)
    for one in found:
        print(f"{one['tool']}: {one['summary']}; {one['tests']}; exit status {one['exit_code']}")
        print("\n".join(one["first_lines"]))
    print(f"{time.monotonic() - begin:.0f} s")
    tests = {name: list(parts) for name, parts in TESTS.items()}
    record = {"benchmark": "sanitizer", "tests": tests, "without_tool": plain, "tools": found}
    write_record(args.out, record)
    return 0 if all(one["clean"] for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
