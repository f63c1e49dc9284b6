# %% [markdown]
# # A tour of litmini in Python
#
# Cells begin with `# %%`: VS Code, PyCharm, Spyder and Jupyter (with jupytext) run them one by one, and `python docs/tour.py`
# all of them, from the repository's root, in half a minute on a CPU. The test suite runs it.

# %% Load a checkpoint, and ask it
from pathlib import Path

import torch

import litmini
from litmini.config.finetune import DataConfig, FinetuneLoraConfig, LoraConfig
from litmini.config.training import EvalConfig, OptimConfig, TrainConfig

BASE = "checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct"
ORDER = (
    "Write this order as one line of JSON with the keys item, quantity, size and city.\n"
    "Please send 2 large mugs to Oslo. Vera"
)

print("\n--- before training")
model, tokenizer = litmini.load(BASE)
print(litmini.generate(model, tokenizer, ORDER, max_new_tokens=48))

# %% Several prompts in one batch; a stream; where a completion ends
print("\n--- generate and stream")
for answer in litmini.generate(model, tokenizer, ["The capital of Norway?", "3 + 4 =?"], max_new_tokens=16, stop=["."]):
    print(repr(answer))
for piece in litmini.stream(model, tokenizer, "Count to five.", max_new_tokens=16, temperature=0.7, min_p=0.1, seed=1):
    print(piece, end="|", flush=True)
print()

# %% A whole run: the settings are those of scripts/finetune_lora.py, and so is what it prints and writes
print("\n--- finetune")
config = FinetuneLoraConfig(
    checkpoint_dir=BASE,
    out_dir="out/tour",
    data=DataConfig("config_hub/quickstart/train.jsonl", val_fraction=0.03),
    train=TrainConfig(max_steps=12, eval_every=6),
    optim=OptimConfig(lr=1e-3, warmup_steps=2),
    lora=LoraConfig(rank=8),
    eval=EvalConfig(samples=1, max_new_tokens=40),
)
results = litmini.finetune(config)
print(
    f"validation loss {results['val_loss_before']:.3f} -> {results['val_loss_after']:.3f} in {results['steps']} steps"
)

# %% Its result, an adapter in PEFT's format
print("\n--- after training")
model, tokenizer = litmini.load(BASE, adapter_dir=Path(config.out_dir) / "final")
print(litmini.generate(model, tokenizer, ORDER, max_new_tokens=48))

# %% A loop of your own: adapters over the linears that you name, an optimizer over what they train
print("\n--- a loop of your own")
model, tokenizer = litmini.load(BASE)
names = litmini.add_adapters(model, method="lora", rank=4, targets=["q_proj", "v_proj"])
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3)
tokens = torch.tensor([tokenizer.encode("The mugs of Oslo are large, and so are those of Bergen.")])
for _ in range(3):
    loss, count = model(tokens[:, :-1], labels=tokens[:, 1:])  # summed over the targets
    (loss / count).backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"{len(names)} adapters, loss {loss.item() / int(count):.3f}")
litmini.save_adapter(model, "out/tour-adapter", BASE, tokenizer)
