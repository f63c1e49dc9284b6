"""Run the numeric tests as other CPUs would: with their instruction sets, and with one and two threads.

python tests/instruction_sets.py                   # each setting, all tests that compare numbers; some minutes each
python tests/instruction_sets.py "ATen AVX2"       # this setting alone
python tests/instruction_sets.py --short           # two settings, the tests of families, adapters, generation and loss

Prints, for each setting, the tests that failed and how much of its tolerance the closest test used (`numerics.py`). Exit
status 1 if one failed. A setting above what the CPU has changes nothing.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parent
SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "as it is, two threads": {"OMP_NUM_THREADS": "2"},
    "ATen without vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "ATen AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "ATen AVX-512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "oneDNN AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "oneDNN AVX-512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "oneDNN AVX-512 BF16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
    "all AVX2, two threads": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "COMPATIBLE",
        "OMP_NUM_THREADS": "2",
    },
}
SHORT = ("all AVX2, two threads", "ATen without vectors")
SHORT_FILES = [
    "models/test_llama",
    "models/test_gemma2",
    "models/test_qwen3",
    "models/test_mixtral",
    "methods/test_lora",
]
SHORT_FILES += ["methods/test_methods", "generation/test_generate", "ops/test_cross_entropy", "ops/test_attention"]
SHORT_FILES += ["ops/test_norms"]


def numeric_tests() -> list[str]:
    """The files whose tests compare numbers."""
    return [
        str(f) for f in sorted(TESTS.rglob("test_*.py")) if re.search(r"from (numerics|parity) import", f.read_text())
    ]


CHECK = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), sep=', ')"


def in_effect(setting: dict[str, str]) -> str | None:
    """ATen's instruction set and number of threads of a process with this setting; None: others than it names."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **setting}
    shown = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment, check=True)
    isa, threads = shown.stdout.strip().split(", ")
    if isa != setting.get("ATEN_CPU_CAPABILITY", isa).upper() or threads != setting.get("OMP_NUM_THREADS", "1"):
        return None
    return f"{isa}, {threads}"


def run(setting: dict[str, str], files: list[str], log: Path) -> tuple[list[str], str, dict[str, float]]:
    """Failed tests, pytest's last line, and for each test the largest share of its tolerance."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **setting, "LITMINI_NUMERICS_LOG": str(log)}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(log.with_suffix(""))  # its cache does not ask for the instruction set
    command = [
        sys.executable,
        "-m",
        "pytest",
        *files,
        "-m",
        "not real",
        "-rfE",
        "-n",
        "1" if "OMP_NUM_THREADS" in setting else "2",
    ]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent)
    used: dict[str, float] = defaultdict(float)
    for line in log.read_text().splitlines() if log.exists() else []:
        name, share = json.loads(line)
        used[name] = max(used[name], share)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if result.returncode and not failed:
        failed = [result.stdout[-2000:] + result.stderr[-2000:]]
    return failed, (result.stdout.strip().splitlines() or [""])[-1], used


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="what runs in .ci/run")
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"one of: {', '.join(SETTINGS)}")
    options = parser.parse_args()
    if unknown := set(options.settings) - SETTINGS.keys():
        parser.error(f"no such setting: {', '.join(unknown)}")
    files = [str(TESTS / f"{name}.py") for name in SHORT_FILES] if options.short else numeric_tests()
    print(
        "| setting | ATen, threads | outcome | largest share of a tolerance | test |\n|---|---|---|---|---|", flush=True
    )
    any_failed = False
    with tempfile.TemporaryDirectory() as directory:
        for number, name in enumerate(options.settings or (SHORT if options.short else SETTINGS)):
            if (now := in_effect(SETTINGS[name])) is None:
                print(f"| {name} | | this CPU cannot imitate it | | |", flush=True)
                continue
            failed, outcome, used = run(SETTINGS[name], files, Path(directory) / f"{number}.jsonl")
            closest = max(used, key=lambda test: used[test], default="none")
            share, test = f"{used[closest]:.2f}", closest.removeprefix("tests/")
            print(f"| {name} | {now} | {outcome} | {share} | {test} |", flush=True)
            print(*failed, sep="\n", end="\n" if failed else "", file=sys.stderr, flush=True)
            any_failed |= bool(failed)
    return int(any_failed)


if __name__ == "__main__":
    sys.exit(main())
