"""Command lines, config files, and how mistakes in either reach the user."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from litmini.cli import command, parse
from litmini.config.classify import FinetuneClassifierConfig
from litmini.config.distill import FinetuneDistillConfig
from litmini.config.finetune import (
    FinetuneConfig,
    FinetuneDoraConfig,
    FinetuneFullConfig,
    FinetuneIa3Config,
    FinetuneLoraConfig,
    FinetuneQloraConfig,
    LoraConfig,
)
from litmini.config.grpo import FinetuneGrpoConfig
from litmini.config.preference import FinetunePreferenceConfig, FinetuneRewardConfig
from litmini.distributed.processes import Interrupted
from litmini.errors import UserError
from litmini.files import existing_file
from litmini.runs.directory import plain
from litmini.system import is_disk_full

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
NEEDED = ["--checkpoint_dir", "ck", "--out_dir", "out", "--data.path", "d.jsonl"]


def lora(*words: str) -> FinetuneLoraConfig:
    return parse(FinetuneLoraConfig, "doc", argv=words)


def fails(capsys, *words: str, config_class: type = FinetuneLoraConfig, positional: tuple[str, ...] = ()) -> str:
    """The one paragraph on stderr of a command line that is refused."""
    with pytest.raises(SystemExit) as exit_:
        parse(config_class, "doc", argv=words, positional=positional)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "Traceback" not in err
    return err


@pytest.fixture
def file(tmp_path):
    def write(text: str | bytes, name: str = "c.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


BASE = "checkpoint_dir: ck\nout_dir: out\ndata: {path: d.jsonl}\n"


def test_defaults_then_file_then_command_line_in_any_order(file):
    path = file(BASE + "lora: {rank: 4}\noptim: {lr: 1e-3}\n")
    assert lora(*NEEDED).lora.rank == 16
    assert lora("--config", path).lora.rank == 4
    for words in (
        ["--config", path, "--lora.rank", "2"],
        ["--lora.rank", "2", "--config", path],
        ["--lora.rank=2", f"--config={path}"],
        ["--seed", "1", f"--config={path}", "--lora.rank", "2"],
    ):
        config = lora(*words)
        assert (config.lora.rank, config.lora.alpha, config.optim.lr) == (2, 32.0, 1e-3), words


def test_a_later_file_wins_over_an_earlier_one(file):
    first, second = file(BASE + "seed: 1\ndevices: 2\n"), file("seed: 2\n", "d.yaml")
    config = lora("--config", first, "--config", second)
    assert (config.seed, config.devices) == (2, 2)


@pytest.mark.parametrize(
    ("written", "paths"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("[a.jsonl, hub:org/name@v1:test]", ["a.jsonl", "hub:org/name@v1:test"]),
        ("/x/a [1].jsonl", ["/x/a [1].jsonl"]),
        ("123", ["123"]),
        ("mein ordner/a: b.jsonl", ["mein ordner/a: b.jsonl"]),
    ],
)
def test_one_data_path_or_several(file, written, paths):
    config = lora(*NEEDED, "--data.path", written)
    assert config.data.paths == paths
    again = lora("--config", file(yaml.safe_dump(plain(config))))
    assert again == config


@pytest.mark.parametrize(
    ("line", "found", "near"),
    [
        ("sead: 3", "sead", "seed"),
        ("data: {max_sequ_len: 3}", "data.max_sequ_len", "data.max_seq_len"),
        ("trian: {max_steps: 3}", "trian.max_steps", "train.max_steps"),
        ("max_steps: 3", "max_steps", "train.max_steps"),
        ("lora: {rnk: 3}", "lora.rnk", "lora.rank"),
    ],
)
def test_an_unknown_key_in_a_file_names_the_nearest(file, capsys, line, found, near):
    assert f"unknown setting '{found}': did you mean '{near}'?" in fails(capsys, *NEEDED, "--config", file(line))


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("sead", "seed"),
        ("data.max_sequ_len", "data.max_seq_len"),
        ("rank", "lora.rank"),
        ("max_steps", "train.max_steps"),
        ("lora.lr", "optim.lr"),
        ("conf", None),  # no abbreviations: what they stand for changes with each new setting
        ("zzzz", None),
    ],
)
def test_an_unknown_key_on_the_command_line_names_the_nearest(capsys, key, near):
    for words in ([f"--{key}", "3"], [f"--{key}=3"]):
        error = fails(capsys, *NEEDED, *words)
        assert f"unknown setting '{key}': " + (f"did you mean '{near}'?" if near else "see --help") in error


def test_all_unknown_keys_are_named_at_once(capsys):
    error = fails(capsys, *NEEDED, "--sead", "3", "--lora.rnk", "4")
    assert "'seed'" in error and "'lora.rank'" in error


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.max_steps", "1.5", "a whole number or null"),
        ("lora.rank", "many", "a whole number"),
        ("optim.lr", "fast", "a number"),
        ("data.pack", "maybe", "true or false"),
        ("precision", "fp16", "32-true or bf16-true or bf16-mixed"),
        ("data.train_on", "user", "assistant or last or all"),
        ("lora.targets", "q_proj", "a list such as '[a, b]'"),
        ("optim.betas", "3", "two numbers"),
    ],
)
def test_a_wrong_value_says_what_is_expected(file, capsys, key, value, expected):
    message = f"error: {key} is {value}; expected {expected}"
    assert fails(capsys, *NEEDED, f"--{key}", value).startswith(message)
    text = json.dumps({key.split(".")[0]: {key.split(".")[1]: value} if "." in key else value})
    assert fails(capsys, *NEEDED, "--config", file(text)).startswith(message)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.path", "[]"),
        ("data.weights", "[1.0, 1.0]"),
        ("data.weights", "[-1.0]"),
        ("optim.lr", "-1.0"),
        ("optim.betas", "[2.0, 0.9]"),
        ("optim.warmup_steps", "-1"),
        ("optim.weight_decay", "-1.0"),
        ("optim.max_grad_norm", "0.0"),
        ("lora.rank", "0"),
        ("lora.alpha", "0.0"),
        ("lora.dropout", "1.0"),
        ("eval.samples", "-1"),
        ("eval.max_new_tokens", "0"),
        ("devices", "0"),
        ("num_nodes", "-1"),
        ("seed", "-1"),
        ("seed", str(2**70)),
        ("show_masks", "-1"),
        ("out_dir", "''"),
    ],
)
def test_a_value_out_of_range_is_named(capsys, key, value):
    shown = value if key.startswith("data") else value.replace("[", "(").replace("]", ")")
    error = fails(capsys, *NEEDED, f"--{key}={value.strip(chr(39))}")
    assert error == f"error: out of range: {key} is {shown}. See --help.\n"


def test_a_group_is_not_a_setting(capsys):
    assert "lora is a group of settings, expected lora.rank, lora.alpha" in fails(capsys, *NEEDED, "--lora", "high")


def test_what_is_missing_is_named(capsys):
    error = fails(capsys, "--data.path", "d")
    assert "checkpoint_dir" in error and "out_dir" in error and "data.path" not in error
    assert "--lora.rank: expected one argument" in fails(capsys, *NEEDED, "--lora.rank")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("checkpoint_dir: [x\nout: {", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        ("", "holds no settings"),
        ("- a\n- b\n", "holds no settings"),
        ("just words", "holds no settings"),
    ],
)
def test_a_broken_config_file_is_named(file, capsys, content, expected):
    path = file(content)
    error = fails(capsys, *NEEDED, "--config", path)
    assert path in error and expected in error


def test_a_missing_config_file_names_those_beside_it(file, tmp_path, capsys):
    file("a: 1", "quickstart.yaml")
    assert "holds quickstart.yaml" in fails(capsys, "--config", str(tmp_path / "quikstart.yaml"))
    assert "is a directory" in fails(capsys, "--config", str(tmp_path))
    with pytest.raises(UserError, match="is empty or missing"):
        existing_file(str(tmp_path / "no/x"), "file")


def test_print_config_can_be_fed_back(file, capsys):
    words = [*NEEDED, "--lora.targets", "[q_proj, v_proj]", "--optim.betas", "[0.8, 0.9]", "--resume", "auto"]
    with pytest.raises(SystemExit) as exit_:
        lora(*words, "--train.max_steps", "7", "--data.chat_template", "ü ß.jinja", "--print_config")
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    again = lora("--config", file(printed))
    assert again == lora(*words, "--train.max_steps", "7", "--data.chat_template", "ü ß.jinja")
    assert again.optim.betas == (0.8, 0.9)


def test_a_runs_config_file_is_its_settings(file):
    config = lora(*NEEDED, "--optim.betas", "[0.8, 0.9]", "--download_from", "[a/b, 'pypi:c']", "--data.val_path", "v")
    assert lora("--config", file(yaml.safe_dump(plain(config), sort_keys=False))) == config


@pytest.mark.parametrize(
    ("value", "expected"), [("false", False), ("true", True), ("auto", "auto"), ("out/x/step-000004", None), ("5", "5")]
)
def test_resume_is_a_switch_or_a_directory(value, expected):
    assert lora(*NEEDED, "--resume", value).resume == (value if expected is None else expected)


def test_a_switch_needs_no_value():
    assert lora(*NEEDED, "--compile", "--seed=3").compile is True and lora("--resume", *NEEDED).resume is True
    assert lora(*NEEDED, "--compile", "auto").compile == "auto"
    for words in (["--dry_run", *NEEDED], [*NEEDED, "--dry_run"], [*NEEDED, "--dry_run", "true"]):
        assert lora(*words).dry_run is True
    assert lora(*NEEDED, "--dry_run", "false", "--data.pack", "false").data.pack is False


@pytest.mark.parametrize("prompt", ["", "-", "-5 degrees", "5", "{a: 1}", "a: b # c", "true", "1\n  2 ", '"q"', "x=y"])
def test_text_stays_as_it_was_typed(prompt):
    generate = script("generate").GenerateConfig
    assert parse(generate, "doc", argv=["--checkpoint_dir", "x", "--prompt", prompt]).prompt == prompt
    assert parse(generate, "doc", argv=[f"--prompt={prompt}", "--checkpoint_dir=x"]).prompt == prompt


def script(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_positional_arguments_stand_anywhere():
    convert, get = script("convert_to_hf").ConvertConfig, script("download").DownloadConfig
    for words in (
        ["ck", "--out_dir", "o"],
        ["--out_dir", "o", "ck"],
        ["--out_dir=o", "ck"],
        ["--checkpoint=ck", "--out_dir=o"],
    ):
        config = parse(convert, "doc", argv=words, positional=("checkpoint",))
        assert (config.checkpoint, config.out_dir) == ("ck", "o"), words
    words = ["--out_dir", "o", "a/b", "--revision", "main"]
    assert parse(get, "doc", argv=words, positional=("source",)) == get("a/b", "o", "main")


def test_words_too_many_are_an_error(capsys):
    convert = script("convert_to_hf").ConvertConfig
    error = fails(capsys, "ck", "more", "--out_dir", "o", config_class=convert, positional=("checkpoint",))
    assert "unexpected arguments: more" in error
    assert "unexpected arguments: d.jsonl" in fails(capsys, *NEEDED, "d.jsonl")


@pytest.mark.parametrize("path", sorted((ROOT / "config_hub").glob("*.yaml")), ids=lambda p: p.name)
def test_config_hub(path):
    assert len(path.read_text().splitlines()) <= 25
    kinds = {
        "full": FinetuneFullConfig,
        "qlora": FinetuneQloraConfig,
        "dora": FinetuneDoraConfig,
        "ia3": FinetuneIa3Config,
        "preference": FinetunePreferenceConfig,
        "reward": FinetuneRewardConfig,
        "grpo": FinetuneGrpoConfig,
        "distill": FinetuneDistillConfig,
        "classifier": FinetuneClassifierConfig,
    }
    config_class = kinds.get(path.stem.rpartition("_")[2], FinetuneLoraConfig)
    config = parse(config_class, "doc", argv=["--config", str(path)])
    assert isinstance(config, FinetuneConfig) and (ROOT / config.data.path).is_file()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_help_is_light_and_complete(path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(path)!r}, '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as e:\n    assert e.code == 0\n"
        "heavy = {'torch', 'lightning_fabric', 'numpy', 'tokenizers', 'safetensors', 'matplotlib'} & sys.modules.keys()\n"
        "print('HEAVY', *heavy)"
    )
    environment = {**os.environ, "COLUMNS": "1000"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == "HEAVY"
    assert (script(path.stem).__doc__ or "").strip() in shown.stdout
    listed = re.split(r"\n  (?=--)", shown.stdout.partition("options:")[2])
    assert len(listed) > 4
    for option in listed[1:]:
        assert not re.match(r"--\S+ \S+\s+(\(|$)", option), f"no help: {option}"


def run(main, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["x", *NEEDED])
    with pytest.raises(SystemExit) as exit_:
        command(main, FinetuneConfig, "doc")
    return exit_.value.code


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (UserError("do this"), 1, "error: do this\n"),
        (OSError(28, "No space left on device"), 1, "error: the disk is full"),
        (OSError(27, "File too large"), 1, "error: the disk is full"),
        (RuntimeError("write failed: No space left on device (os error 28)"), 1, "error: the disk is full"),
        (PermissionError(13, "Permission denied", "/a/b"), 1, "error: Permission denied: /a/b\n"),
        (NotADirectoryError(20, "Not a directory", "/a/b"), 1, "error: Not a directory: /a/b\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted.\n"),
        (Interrupted(["SIGINT"], "saved it"), 130, "\ninterrupted: saved it\n"),
        (Interrupted(["SIGTERM"], "saved it"), 143, "\nSIGTERM: saved it\n"),
    ],
)
def test_errors_end_in_a_line_and_a_status(monkeypatch, capsys, error, status, expected):
    def main(config):
        raise error

    assert run(main, monkeypatch) == status
    assert capsys.readouterr().err.startswith(expected)


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", *NEEDED])
    with pytest.raises(ZeroDivisionError):
        command(lambda config: 1 / 0, FinetuneConfig, "doc")
    assert not is_disk_full(ZeroDivisionError())


def test_success_is_status_zero(monkeypatch):
    assert run(lambda config: None, monkeypatch) == 0


def test_a_reader_that_has_gone_is_no_traceback(tmp_path):
    code = (
        "from dataclasses import dataclass\nfrom litmini.cli import command\n"
        "@dataclass\nclass C:\n    x: int = 0\n"
        "def main(c):\n    for _ in range(100_000): print('line')\n"
        "command(main, C, 'doc')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


LINES = (
    "from dataclasses import dataclass\nfrom litmini.cli import command\n"
    "@dataclass\nclass C:\n    x: int = 0\n"
    "def main(c):\n{}\ncommand(main, C, 'doc')"
)
posix = pytest.mark.skipif(os.name != "posix", reason="descriptors")


@posix
@pytest.mark.parametrize("redirection", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_file_of_ours(tmp_path, redirection):
    """What is opened first would get the number of the closed one, and with it what torch and C libraries print there."""
    main = "    f = open('file', 'w'); import os, sys; print('lost', file=sys.stderr); os.write(2, b'lost'); f.write('kept')"
    (tmp_path / "x.py").write_text(LINES.format(main))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(f"{sys.executable} x.py {redirection}", shell=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "kept"


@posix
def test_a_closed_input_is_an_error(tiny_dir, tmp_path):
    for command_line in (f"generate.py --checkpoint_dir {tiny_dir} --prompt -", f"chat.py --checkpoint_dir {tiny_dir}"):
        words = f"{sys.executable} {ROOT}/scripts/{command_line} <&-"
        done = subprocess.run(
            words, shell=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(
            "error: standard input is closed"
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_an_output_that_is_full_is_one_error(tmp_path):
    (tmp_path / "x.py").write_text(LINES.format("    print('x')"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "x.py"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
        )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "error: the disk is full" in done.stderr


@posix
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_run_outlives_the_reader_of_its_output(tiny_dir, tmp_path, stream):
    words = ["--checkpoint_dir", tiny_dir, "--out_dir", tmp_path / "run", "--eval.samples", 0, "--train.max_steps", 3]
    words += ["--data.path", ROOT / "config_hub/quickstart/train.jsonl", "--data.max_seq_len", 128]
    command_line = [sys.executable, ROOT / "scripts/finetune_lora.py", *words]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: subprocess.PIPE}
    process = subprocess.Popen(
        [str(word) for word in command_line], env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes
    )
    getattr(process, stream).close()
    assert process.wait() == 0
    assert (tmp_path / "run/final/adapter_model.safetensors").is_file() and (tmp_path / "run/report.html").is_file()


@posix
@pytest.mark.parametrize("reaction", ["pass", "raise ImportError('broken')", "raise"])
def test_ctrl_c_during_an_import_ends_the_command(tmp_path, reaction):
    """Packages swallow it, or turn it into another error."""
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(5)\n"
        f"except BaseException:\n    {reaction}\n"
    )
    (tmp_path / "x.py").write_text(LINES.format("    import slow; print('went on')"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "x.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted.\n")


@pytest.mark.parametrize("level", ["1", "2"])
def test_without_docstrings_and_asserts(tiny_dir, level):
    """python -OO"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONOPTIMIZE": level}
    for words in (["--help"], ["--checkpoint_dir", str(tiny_dir), "--prompt", "hi", "--max_new_tokens", "2"]):
        command_line = [sys.executable, str(ROOT / "scripts/generate.py"), *words]
        done = subprocess.run(command_line, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN multiplies no bf16 here")
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="measured with Linux's /proc")
def test_code_for_matmuls_of_many_shapes_takes_little_memory():
    """Micro-batches that are not packed bring new shapes in each step. 849 and 1,109 MiB where this was written."""
    code = """
import torch
from dataclasses import dataclass
from pathlib import Path
from litmini.cli import command

@dataclass
class Nothing:
    seed: int = 0

def main(config):
    a, b = torch.ones(2400, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
    for rows in range(1, 2401):
        a[:rows] @ b
    print(Path("/proc/self/statm").read_text().split()[1])

command(main, Nothing, "")
"""
    pages = {}
    for capacity in ("", "1024"):
        environment = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": capacity}
        if not capacity:
            del environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        pages[capacity] = int(done.stdout)
    assert pages[""] < 0.9 * pages["1024"], pages


def test_a_group_may_be_null(tmp_path):
    """`--lora null` leaves adapters out; a later `--lora.rank 4` asks for them again."""
    words = ["--checkpoint_dir", "a", "--data.path", "b", "--out_dir", "c"]
    assert parse(FinetuneClassifierConfig, None, words).lora == LoraConfig()
    assert parse(FinetuneClassifierConfig, None, [*words, "--lora", "null"]).lora is None
    assert parse(FinetuneClassifierConfig, None, [*words, "--lora.rank", "4", "--lora", "null"]).lora is None
    again = parse(FinetuneClassifierConfig, None, [*words, "--lora", "null", "--lora.rank", "4"]).lora
    assert again is not None and again.rank == 4
    file = tmp_path / "config.yaml"
    file.write_text("lora: null\n")
    assert parse(FinetuneClassifierConfig, None, [*words, "--config", str(file)]).lora is None
    with pytest.raises(SystemExit):
        parse(FinetuneClassifierConfig, None, [*words, "--quantize", "null"])
