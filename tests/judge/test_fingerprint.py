"""`conformance fingerprint` compiles kernels for GPUs that this machine does not have, and reads their properties."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from triton import knobs

from conformance.cli import main
from conformance.fingerprint import instructions
from conformance.machine_code import unwritten_reads
from unsloth_ref import kernels

ROOT = Path(__file__).parents[2]
# lora_linear and lora_linears launch library products alone; the kernels of lora_mlp are those of swiglu and geglu.
OPERATIONS = [op for op in kernels.__all__ if not op.startswith("lora_")]
# These read one number per row, or few numbers in all.
NUMBERS = {"prepare_kernel", "divided_sum_kernel", "causal_conv_sums_kernel", "group_plan_kernel", "route_kernel"}
LOADS = {
    "nf4_dequantize_kernel": 4,  # the 8 elements that a thread stores at once
    "causal_conv_forward_kernel": 8,  # with 8 channels of several tokens a thread has too many registers
    "causal_conv_backward_kernel": 8,
}
# These write one number per row or column.
SUMS = NUMBERS | {"column_sum_kernel", "layer_norm_sums_kernel", "moe_bias_kernel", "qk_norm_rope_sums_kernel"}
NARROW = SUMS | {"causal_conv_forward_kernel"}
# Bytes of stack per thread on an H200, with Triton 3.6 or 3.9: 64 accumulators of 128 columns each for dk and dv, and
# two floats for each of 16 columns of 16384. Of gated_delta_rule four warps keep a state of 128 x 64 floats, and of
# mamba2_scan up to four products of 64 x 64. These were the fastest tiles nevertheless.
DELTA = {"forward": 88, "backward": 296, "dg": 256, "dqdk": 24}
SPILLS = {
    **{
        (f"gated_delta_rule_{part}_kernel", shape): stack
        for part, stack in DELTA.items()
        for shape in ("qwen-3.5 text-mix-2k", "qwen-3.5 long-2k")
    },
    ("causal_conv_backward_kernel", "lfm-2-1.2b"): 8,
    ("gated_rms_norm_backward_kernel", "mamba-2"): 136,
    **{
        (f"mamba2_scan_{part}_kernel", shape): stack
        for part, stack in {"dx": 64, "dbdc": 40}.items()
        for shape in ("granite-4 text-mix-2k", "nemotron-h long-2k", "falcon-h1 text-mix-2k")
    },
    ("qk_norm_rope_forward_kernel", "gemma-3-4b"): 8,
    **{("packed_attention_dkdv_kernel", f"{documents}-16k-d64"): 72 for documents in ("text-mix", "long")},
    **{("packed_attention_dkdv_kernel", f"{documents}-16k-d128"): 272 for documents in ("text-mix", "long")},
    ("packed_attention_dkdv_kernel", "gpt-oss-16k-d64"): 16,
    ("packed_attention_dq_kernel", "gemma-4-16k-d512"): 24,
    ("rms_norm_backward_kernel", "llama-3.1-405b"): 32,
}


# Runs each line of its input as a command in a child: importing triton and the judge takes as long as most commands.
SERVER = """
import json, os, sys
from conformance import fingerprint
from conformance.cli import main

for line in sys.stdin:
    arguments, *files = json.loads(line)
    if not (child := os.fork()):
        for number, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        status = main(["fingerprint", *arguments])
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Fingerprint:
    """`conformance fingerprint`, in children of a process where Triton compiles: in this one it interprets kernels."""

    server: subprocess.Popen[str]
    folder: Path

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command."""
        assert self.server.stdin and self.server.stdout
        files = self.folder / "stdout", self.folder / "stderr"
        print(json.dumps([arguments, *map(str, files)]), file=self.server.stdin, flush=True)
        status = int(self.server.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, *(file.read_text() for file in files))

    def results(self, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
        """Run the command; also returns what it wrote."""
        path = self.folder / "fingerprints.json"
        ran = self(*arguments, "--json", str(path))
        return ran, json.loads(path.read_text())["results"]


@pytest.fixture(scope="module")
def fingerprint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fingerprint]:
    command, environment = [sys.executable, "-c", SERVER], os.environ | {"TRITON_INTERPRET": "0"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        yield Fingerprint(server, tmp_path_factory.mktemp("fingerprints"))


def test_kernels_fit_an_h200_and_move_sixteen_bytes_at_a_time(fingerprint: Fingerprint) -> None:
    ran, found = fingerprint.results(*OPERATIONS, "--target", "sm_90")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert {one["op"] for one in found} == set(OPERATIONS)
    for one in found:
        assert one["problem"] is None, one
        assert one["load"] == LOADS.get(one["kernel"], 16) or one["kernel"] in NUMBERS, one
        assert one["store"] == 16 or one["kernel"] in NARROW, one
        assert one["stack"] <= SPILLS.get((one["kernel"], one["shape"]), 0), one
        assert 0 < one["registers"] <= 255


def test_every_target_and_dtype_compiles(fingerprint: Fingerprint) -> None:
    for dtype in ("float32", "float16"):
        ran, found = fingerprint.results("layer_norm", "--dtype", dtype)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert {one["target"] for one in found} == {"sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"}
        assert {one["dtype"] for one in found} == {dtype}
        assert all(one["registers"] for one in found)
        for one in found:  # a warp of gfx942 has 64 threads: each holds half as much of a tile
            assert one["load"] == 16 or (one["target"] == "gfx942" and dtype == "float16" and one["load"] == 8)


def test_the_instructions_are_those_that_are_disassembled(fingerprint: Fingerprint) -> None:
    assert fingerprint("layer_norm", "--dtype", "float16").returncode == 0  # on all targets, as the test above
    cubins = sorted(Path(knobs.cache.dir).glob("*/layer_norm_*.cubin"), key=lambda path: path.stat().st_size)
    assert len(cubins) >= 5
    for cubin in cubins[:12]:
        command = [knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow", cubin]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        operations = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", code, re.MULTILINE)
        assert instructions(cubin.read_bytes()) == len(operations) - operations.count("NOP") > 0
        assert "NOP" in operations


def test_a_lost_instruction_of_a_real_kernel_is_found(fingerprint: Fingerprint) -> None:
    """Of the uniform registers that one instruction alone writes and that others read."""
    assert fingerprint("mamba2_scan", "--target", "sm_90").returncode == 0  # as the first test
    cubin = max(Path(knobs.cache.dir).glob("*/mamba2_scan_forward_kernel.cubin"), key=lambda path: path.stat().st_size)
    command = [knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow", cubin]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "gdesc[UR" in listing and unwritten_reads(listing) == []
    writers: dict[int, list[str]] = {}
    for line in listing.splitlines():
        if writing := re.search(r"\*/ +(?:@!?UP\d )?(\w\S*) UR(\d+),", line):
            for register in range(2 if re.search(r"\.(64|WIDE)\b", writing[1]) else 1):
                writers.setdefault(int(writing[2]) + register, []).append(line)
    alone = {register: lines[0] for register, lines in writers.items() if len(lines) == 1}
    without = {register: listing.replace(line, "") for register, line in alone.items()}
    read = {register for register in alone if re.search(rf"\bUR{register}\b", without[register])}
    assert len(read) >= 3
    for register in read:
        found = unwritten_reads(without[register])
        assert any(one.startswith(f"UR{register}, which nothing has written") for one in found), alone[register]


def test_an_operation_of_ones_own_is_compiled_for_its_example(fingerprint: Fingerprint) -> None:
    own = ("--reference", "unsloth_ref.kernels:swiglu", "--backend", "unsloth_fast.kernels:swiglu")
    ran = fingerprint(*own, "--example", "gate=randn(3,4096) up=randn(3,4096)", "--target", "sm_90")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "swiglu example\n  gated_forward_kernel" in ran.stdout


def test_the_widest_tiles_fit_in_float32(fingerprint: Fingerprint) -> None:
    """The weight, too, is loaded ahead in the loop of gated_rms_norm over rows of 8192 columns."""
    own = ("--reference", "unsloth_ref.kernels:gated_rms_norm", "--backend", "unsloth_fast.kernels:gated_rms_norm")
    example = ("--example", "x=randn(129,8192) gate=randn(129,8192) weight=randn(8192)", "--dtype", "float32")
    ran = fingerprint(*own, *example, "--target", "sm_90")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "gated_rms_norm_backward_kernel" in ran.stdout


def test_a_kernel_that_is_tuned_is_compiled_without_a_gpu(fingerprint: Fingerprint) -> None:
    own = ("--reference", "tests.judge.strangers.tuned:scaled_tanh", "--backend", "tests.judge.strangers.tuned:right")
    example = ("--example", "x=randn(4,70) factor=0.7", "--grads", "none")
    ran = fingerprint(*own, *example, "--target", "sm_80", "gfx942")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "scaled_tanh example\n  tanh_kernel" in ran.stdout


def test_registers_that_spill_are_seen(fingerprint: Fingerprint) -> None:
    ran, found = fingerprint.results("--backend", "tests.judge.launching.spilling", "--target", "sm_90")
    assert ran.returncode == 0, ran.stderr
    assert {one["kernel"] for one in found} == {"wide_kernel"}
    assert all(one["stack"] > 0 and one["registers"] == 255 for one in found)


def test_a_kernel_that_a_target_cannot_hold_fails_there_alone(fingerprint: Fingerprint) -> None:
    arguments = ("--backend", "tests.judge.launching.crowded", "--target", "sm_80", "sm_90", "--dtype", "float16")
    ran, found = fingerprint.results(*arguments)
    assert ran.returncode == 1
    assert "FAIL product_kernel / sm_80: takes 196608 bytes of shared memory; sm_80 has 166912" in ran.stdout
    assert {one["target"] for one in found if one["problem"]} == {"sm_80"}


def test_drawn_cases_are_shown_that_a_target_cannot_hold(fingerprint: Fingerprint) -> None:
    arguments = ("--backend", "tests.judge.launching.crowded", "--dtype", "float16", "--cases", "2")
    ran, found = fingerprint.results(*arguments, "--target", "sm_80")
    drawn = [one for one in found if "fill=" in one["shape"]]
    assert ran.returncode == 1 and drawn and all(one["problem"] for one in drawn)
    assert f"drawn cases: {len({one['shape'] for one in drawn})} fail, of 2 for each operation\n" in ran.stdout
    ran, found = fingerprint.results(*arguments, "--target", "sm_90")
    assert ran.returncode == 0 and found and not any("fill=" in one["shape"] for one in found)
    assert ran.stdout.endswith("drawn cases: 0 fail, of 2 for each operation\n")


def test_the_error_for_a_kernel_without_a_backward_pass_says_what_helps(fingerprint: Fingerprint) -> None:
    own = ("--reference", "tests.judge.strangers.tuned:scaled_tanh", "--backend", "tests.judge.strangers.tuned:right")
    ran = fingerprint(*own, "--example", "x=randn(4,70) factor=0.7", "--target", "sm_80")
    assert ran.returncode == 2
    assert "has no graph" in ran.stderr and "hint: --grads none judges" in ran.stderr


@pytest.mark.parametrize("operation", ["grouped_gemm", "packed_attention"])
def test_tiles_are_those_for_the_shared_memory_of_the_target(fingerprint: Fingerprint, operation: str) -> None:
    ran, found = fingerprint.results(operation, "--target", "sm_90", "gfx942")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    most = {target: max(one["shared"] for one in found if one["target"] == target) for target in ("sm_90", "gfx942")}
    assert most["gfx942"] <= 64 * 1024 < most["sm_90"]


def test_a_kernel_that_does_not_compile_says_why(fingerprint: Fingerprint) -> None:
    ran = fingerprint("--backend", "tests.judge.launching.odd", "--target", "sm_80")
    assert ran.returncode == 1
    assert "FAIL odd_kernel / sm_80: CompilationError" in ran.stdout
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "seen", "allowed"),
    [
        (("--target", "sm_1"), "target: got 'sm_1'", "sm_80, sm_86, sm_90, sm_100, sm_120, gfx942"),
        (("--backend", "reference", "swiglu"), "backend reference launches no Triton kernel", "swiglu"),
        (("--backend", "tests.judge.launching.insisting"), "got a CPU tensor", "nothing to compile"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: tuple[str, ...], seen: str, allowed: str, fingerprint: Fingerprint
) -> None:
    ran = fingerprint(*arguments)
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1 and ran.stderr.startswith("conformance: ")
    assert seen in ran.stderr and allowed in ran.stderr


def test_wrong_names_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fingerprint", "soup"]) == 2
    assert "operation: got 'soup'; allowed: " in capsys.readouterr().err
    assert main(["fingerprint", "--dtype", "float8"]) == 2
    assert "dtype: got 'float8'; allowed: float32" in capsys.readouterr().err
