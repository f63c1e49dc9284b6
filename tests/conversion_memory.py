"""What conversions take: memory over that of the interpreter, and time beside a plain copy of the same bytes.

    python tests/conversion_memory.py --gigabytes 4 --max_shard_size 500MB --directory out/conversions

writes a synthetic checkpoint, converts it one way after the other in a process whose memory is limited (as `ulimit -d` does),
and prints a table. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers as tf
from gguf_files import train_tokenizer, write_gguf
from meta_files import meta_parts
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

from litmini.checkpoints.export import parse_size

SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 8}
LAYER_BYTES, LARGEST = 4 * (4 * 1024**2 + 3 * 1024 * 2816), 4 * 1024 * 2816  # in fp32
WAYS = {
    "litgpt's model.pth, fp32 -> bf16": ("litgpt", "bf16", "convert(litgpt, bf16, torch.bfloat16, shard)"),
    "safetensors, bf16 -> fp32": ("bf16", "fp32", "convert(bf16, fp32, torch.float32, shard)"),
    "adapter merged, fp32 -> bf16": ("fp32", "merged", "export(fp32, merged, adapter, torch.bfloat16, shard)"),
    "pytorch_model.bin shards -> safetensors": ("bin", "of_bin", "convert(bin, of_bin, None, shard)"),
    "Meta, two parts -> safetensors": ("meta", "of_meta", "convert(meta, of_meta, None, shard)"),
    "FP8 in blocks of 128 x 128 -> fp32": ("fp8", "of_fp8", "convert(fp8, of_fp8, torch.float32, shard)"),
    "GGUF, Q8_0 -> fp32": ("a.gguf", "of_gguf", "convert(gguf, of_gguf, torch.float32, shard)"),
}
CHILD = """
import json, resource, sys, threading, time
from pathlib import Path
import torch
from litmini.importers.convert import convert
from litmini.checkpoints.export import export

ways, small, large, shard, limit = json.loads(sys.argv[1])

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

def run(way, place):
    names = ("litgpt", "bf16", "fp32", "merged", "adapter", "bin", "of_bin", "meta", "of_meta", "fp8", "of_fp8", "of_gguf")
    places = {name: Path(place) / name for name in names}
    eval(way, globals() | places | {"gguf": Path(place) / "a.gguf", "shard": shard})

for way in ways:
    run(way, small)  # whatever is imported or set up once is there then
most = status("VmData") + limit
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
done, peak = threading.Event(), 0
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, status("VmRSS"))
thread = threading.Thread(target=watch)
thread.start()
try:
    for way in ways:
        base = peak = status("VmRSS")
        start, used = time.monotonic(), time.process_time()
        run(way, large)
        seconds, used = time.monotonic() - start, time.process_time() - used
        print(json.dumps({"peak": peak - base, "seconds": seconds, "cpu": used}))
finally:
    done.set()
    thread.join()
"""


def write_sources(place: Path, n_layers: int) -> None:
    """One model in every layout that is read, and an adapter over it."""
    place.mkdir()
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=320, **SHAPE, num_hidden_layers=n_layers))
    tokenizer = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    write_gguf(place / "a.gguf", model, tokenizer, pre="gpt-2", quantized=gguf.GGMLQuantizationType.Q8_0)
    for name in ("litgpt", "bin", "meta", "fp8"):
        (place / name).mkdir()
        tokenizer.save(str(place / name / "tokenizer.json"))
        (place / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
        model.config.save_pretrained(place / name)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    torch.save(tensors, place / "litgpt" / "model.pth")
    weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: t for name, t in tensors.items() if weight_map[name] == file}, place / "bin" / file)
    (place / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for i, part in enumerate(meta_parts(model, 2, embedding_dim=1)):
        torch.save(part, place / "meta" / f"consolidated.{i:02d}.pth")
    in_fp8 = {n: t.to(torch.float8_e4m3fn if "_proj" in n else torch.bfloat16) for n, t in tensors.items()}
    scales = {
        f"{n}_scale_inv": torch.ones(t.shape[0] // 128, t.shape[1] // 128) for n, t in tensors.items() if "_proj" in n
    }
    save_file(in_fp8 | scales, place / "fp8" / "model.safetensors")
    config = json.loads((place / "fp8" / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (place / "fp8" / "config.json").write_text(json.dumps(config))
    params = {"dim": 1024, "n_layers": n_layers, "n_heads": 8, "vocab_size": 320, "norm_eps": 1e-6}
    (place / "meta" / "params.json").write_text(json.dumps(params))
    lora = {}
    for name in (name.removesuffix(".weight") for name in tensors if "q_proj" in name or "down_proj" in name):
        rows, columns = tensors[f"{name}.weight"].shape
        lora[f"base_model.model.{name}.lora_A.weight"] = torch.ones(4, columns)
        lora[f"base_model.model.{name}.lora_B.weight"] = torch.ones(rows, 4)
    (place / "adapter").mkdir()
    save_file(lora, place / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(settings))


def size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".bin", ".pth", ".gguf"))


def measure(place: Path, n_layers: int, shard: int, limit: int) -> dict[str, dict[str, Any]]:
    """way -> bytes read and written, peak memory over the interpreter in bytes, seconds, of them on the CPU.

    Args:
        place: an existing, empty directory.
        limit: bytes that a conversion may take beyond what the interpreter has.
    """
    write_sources(place / "small", 1)
    write_sources(place / "large", n_layers)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    words = json.dumps([[way for *_, way in WAYS.values()], str(place / "small"), str(place / "large"), shard, limit])
    done = subprocess.run([sys.executable, "-c", CHILD, words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = dict(zip(WAYS, map(json.loads, done.stdout.splitlines()), strict=True))
    for name, (source, result, _) in WAYS.items():
        found[name] |= {"read": size(place / "large" / source), "written": size(place / "large" / result)}
    return found


def copy_speed(file: Path) -> float:
    """Bytes read and written in a second by `dd`, which waits for the disk at the end as a conversion does."""
    target = file.with_name("copy")
    start = time.monotonic()
    subprocess.run(["dd", f"if={file}", f"of={target}", "bs=4M", "conv=fsync"], check=True, capture_output=True)
    taken = time.monotonic() - start
    speed = 2 * target.stat().st_size / taken
    target.unlink()
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the model in fp32")
    parser.add_argument("--max_shard_size", default="500MB", help="of the result")
    parser.add_argument("--directory", default=None, help="where there is room for seven times the model")
    words = parser.parse_args()
    shard, n_layers = parse_size(words.max_shard_size), max(1, round(words.gigabytes * 1e9 / LAYER_BYTES))
    with tempfile.TemporaryDirectory(dir=words.directory) as directory:
        found = measure(Path(directory), n_layers, shard, 2 * shard)
        copies = [copy_speed(Path(directory) / "large" / "litgpt" / "model.pth") for _ in range(3)]
    print(f"| conversion | read, MB | written, MB, in files of {shard // 10**6} | peak, MB | CPU, s | MB/s |")
    print("|---|---|---|---|---|---|")
    for name, row in found.items():
        speed = (row["read"] + row["written"]) / row["seconds"] / 1e6
        numbers = (
            f"{row['read'] / 1e6:,.0f} | {row['written'] / 1e6:,.0f} | {row['peak'] / 1e6:,.0f} | {row['cpu']:.1f}"
        )
        print(f"| {name} | {numbers} | {speed:,.0f} |")
    print(f"| dd conv=fsync, three times | | | | | {', '.join(f'{speed / 1e6:,.0f}' for speed in copies)} |")


if __name__ == "__main__":
    main()
