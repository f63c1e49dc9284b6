"""Generation: cached equals uncached, batches equal single prompts, samples come from where they should."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, MistralForCausalLM
from transformers.models.auto import CONFIG_MAPPING

import litmini
from litmini.adapters import LoRALinear
from litmini.cache import KVCache
from litmini.config import UserError
from litmini.generate import decode, generate, generate_batch, sample, stream
from litmini.loss import IGNORE
from litmini.models import llama
from litmini.tokenizer import Tokenizer

CONFIGS = {
    "llama": replace(llama.PRESETS["tiny"], vocab_size=64),
    "window": replace(llama.PRESETS["tiny"], vocab_size=64, window=6, model_type="mistral"),
    "llama3": replace(llama.PRESETS["tiny"], vocab_size=64, rope_scaling=llama.RopeScaling("llama3", 8.0, 1, 4, 16)),
}
PROMPTS = [[5, 9, 33, 1, 60, 7, 7, 21, 2, 18, 40], [12], [3, 50, 27, 8], [0, 0]]


def random_model(name: str) -> llama.Model:
    """Weights that make greedy answers lively: no token is repeated for ever."""
    model = llama.Model(CONFIGS[name]).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    return model


def without_cache(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    tokens = torch.tensor([prompt])
    for _ in range(count):
        tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1)[:, None]), 1)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_greedy_equals_uncached(name):
    model = random_model(name)
    for prompt in PROMPTS[:2]:
        expected = without_cache(model, prompt, 24)
        assert len(set(expected)) > 8  # a test of more than a constant
        assert generate_batch(model, [prompt], 24, []) == [expected]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_ragged_batch_equals_each_prompt_alone(name):
    model = random_model(name)
    alone = [generate_batch(model, [prompt], 16, [])[0] for prompt in PROMPTS]
    assert generate_batch(model, PROMPTS, 16, []) == alone
    assert len({tuple(answer) for answer in alone}) == len(PROMPTS)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_answers_are_those_of_transformers(name):
    model = random_model(name)
    raw = llama.config_to_hf(model.config)
    config = CONFIG_MAPPING[raw["model_type"]](**raw, attn_implementation="eager", eos_token_id=None)
    theirs = (MistralForCausalLM if raw["model_type"] == "mistral" else LlamaForCausalLM)(config).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    longest = max(map(len, PROMPTS))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    answers = theirs.generate(tokens, attention_mask=seen, do_sample=False, max_new_tokens=20, pad_token_id=0)
    assert generate_batch(model, PROMPTS, 20, []) == answers[:, longest:].tolist()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunks", [[9, 9, 2], [1, 19], [7, 1, 1, 1, 10]])
def test_prefill_in_chunks(name, chunks):
    model, tokens = random_model(name), torch.randint(0, 64, (3, 20))
    cache = KVCache(model.config, 3, 20, torch.float32)
    padding = torch.tensor([[0], [4], [11]])
    padded = KVCache(model.config, 3, 20, torch.float32)
    with torch.no_grad():
        expected = model(tokens)
        found = torch.cat([model(part, cache=cache) for part in tokens.split(chunks, 1)], 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        positions = (torch.arange(20) - padding).split(chunks, 1)
        parts = zip(tokens.split(chunks, 1), positions, strict=True)
        found = torch.cat([model(part, p, cache=padded) for part, p in parts], 1)
        for row, start in enumerate(padding.flatten().tolist()):
            alone = model(tokens[row : row + 1, start:])[0]
            torch.testing.assert_close(found[row, start:], alone, rtol=0, atol=2e-5)


def test_an_adapted_head_generates_what_the_merged_one_does():
    model = random_model("llama")
    model.lm_head = LoRALinear(model.lm_head, rank=4, alpha=8)
    nn.init.normal_(model.lm_head.lora_B, std=0.3)
    adapted = generate_batch(model, PROMPTS, 10, [])
    plain, model.lm_head = model.lm_head.base, model.lm_head.merge()
    assert generate_batch(model, PROMPTS, 10, []) == adapted
    model.lm_head = plain
    assert generate_batch(model, PROMPTS, 10, []) != adapted


# Sampling

PROBABILITIES = torch.tensor([[0.05, 0.4, 0.15, 0.3, 0.1]])


def support(**options) -> set[int]:
    """The tokens that turn up in many samples from PROBABILITIES."""
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
    logits = PROBABILITIES.log().expand(2_000, -1)
    return set(sample(logits, generator=torch.Generator().manual_seed(1), **settings).tolist())


def test_support_of_samples():
    assert support() == {0, 1, 2, 3, 4}
    assert support(top_k=1) == {1}
    assert support(top_k=3) == {1, 2, 3}
    assert support(top_k=100) == support(top_p=1.0) == {0, 1, 2, 3, 4}
    assert support(top_p=1e-6) == support(top_p=0.39) == {1}
    assert support(top_p=0.41) == support(top_p=0.69) == {1, 3}
    assert support(top_p=0.71) == {1, 2, 3}
    assert support(top_k=2, top_p=0.6) == {1, 3}  # of what top_k left, 0.4 is 57%
    assert support(top_k=2, top_p=0.55) == {1}
    assert support(temperature=0.0) == {1}
    assert support(temperature=0.05) == {1, 3}
    assert support(temperature=0.5, top_p=0.5) == {1}  # temperature first: squares, 0.16 of 0.285 is 56%


def test_frequencies_follow_the_temperature():
    logits = PROBABILITIES.log().expand(40_000, -1)
    for temperature in (0.5, 1.0, 2.0):
        chosen = sample(logits, temperature, None, None, torch.Generator().manual_seed(2))
        expected = PROBABILITIES[0] ** (1 / temperature)
        frequencies = torch.bincount(chosen, minlength=5) / len(chosen)
        torch.testing.assert_close(frequencies, expected / expected.sum(), rtol=0, atol=0.015)


def test_rows_are_sampled_each_from_its_own_logits():
    logits = torch.full((3, 7), -50.0)
    logits[range(3), [4, 0, 6]] = 50.0
    for options in ((0.0, None, None), (1.0, None, None), (1.0, 2, None), (1.0, None, 0.9)):
        assert sample(logits, *options, torch.Generator()).tolist() == [4, 0, 6]


def test_of_equally_likely_tokens_top_k_keeps_no_more_than_k():
    equal = torch.zeros(500, 6)
    assert sample(equal, 1.0, 1, None, torch.Generator()).unique().numel() == 1
    assert sample(equal, 1.0, 3, None, torch.Generator()).unique().numel() == 3
    many = torch.randint(0, 4, (20, 5_000)).bfloat16()  # as bf16 logits are
    assert torch.equal(sample(many, 1.0, 1, None, torch.Generator()), sample(many, 0.0, None, None, None))


def test_top_k_of_one_is_greedy():
    model = random_model("llama")
    greedy = generate_batch(model, PROMPTS, 12, [])
    assert generate_batch(model, PROMPTS, 12, [], temperature=1.7, top_k=1) == greedy
    assert generate_batch(model, PROMPTS, 12, [], temperature=1.7, top_p=1e-9) == greedy


def test_a_seed_repeats_and_none_does_not():
    model = random_model("llama")

    def answer(seed: int | None) -> list[list[int]]:
        return generate_batch(model, PROMPTS, 12, [], temperature=1.5, seed=seed)

    before = torch.get_rng_state()
    assert answer(7) == answer(7) != answer(8)
    assert answer(None) != answer(None)
    assert torch.equal(torch.get_rng_state(), before)  # training that generates samples stays repeatable


# Ends, limits and errors


class Scripted(nn.Module):
    """A model that says `scripts[row][position]` at each position."""

    def __init__(self, *scripts: list[int], context: int = 64) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_layers=1, n_kv_heads=1, head_dim=2, max_positions=context)
        self.weight = nn.Parameter(torch.zeros(1))
        longest = max(map(len, scripts))
        self.scripts = torch.tensor([[*script, *[0] * (longest - len(script))] for script in scripts])

    def forward(self, tokens, positions=None, documents=None, cache=None, labels=None):
        if labels is not None:
            assert (labels == IGNORE).all()
            return None
        said = self.scripts.gather(1, positions.clamp(max=self.scripts.shape[1] - 1))
        return nn.functional.one_hot(said, 600).float()


def test_a_stop_ends_its_row_only_and_is_not_returned():
    model = Scripted([0, 0, 11, 12, 2, 13, 14], [21, 22, 23, 24, 25, 26, 27], [3, 31, 32, 33])
    prompts = [[1, 1, 1], [1], [1]]
    assert generate_batch(model, prompts, 5, [2, 3]) == [[11, 12], [21, 22, 23, 24, 25], []]
    assert list(decode(model, prompts, 5, [2, 3])) == [
        [11, 21, None],
        [12, 22, None],
        [None, 23, None],
        [None, 24, None],
        [None, 25, None],
    ]
    assert generate_batch(model, prompts, 4, []) == [[11, 12, 2, 13], [21, 22, 23, 24], [3, 31, 32, 33]]


def test_nothing_is_computed_once_all_rows_have_stopped():
    model, calls = Scripted([11, 2, 13], [21, 22, 2]), []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert generate_batch(model, [[1], [1]], 50, [2]) == [[11], [21, 22]]
    assert len(calls) == 3


def test_a_stop_leaves_the_other_rows_of_a_real_model_alone():
    model = random_model("llama")
    whole = generate_batch(model, PROMPTS, 14, [])
    stop = whole[0][3]
    ends = [answer.index(stop) if stop in answer else 14 for answer in whole]
    assert ends[0] <= 3 and max(ends) > 8
    expected = [answer[:end] for answer, end in zip(whole, ends, strict=True)]
    assert generate_batch(model, PROMPTS, 14, [stop]) == expected


def test_as_many_tokens_as_asked_for_or_as_the_context_holds():
    script = list(range(100, 164))
    model = Scripted(script, context=16)
    assert generate_batch(model, [[1]], 1, []) == [[100]]
    assert generate_batch(model, [[1] * 4], 3, []) == [[103, 104, 105]]
    assert generate_batch(model, [[1] * 4], 99, []) == [script[3:15]]  # 4 + 12 fill the context of 16
    assert generate_batch(model, [[1] * 15], 99, []) == [[114]]


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1] * 17], {}, "the prompt has 17 tokens, the model's context 16"),
        ([[1], [1] * 16], {}, "the prompt has 16 tokens, the model's context 16"),
        ([[]], {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([[1], []], {}, "the prompt is empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -0.5}, "temperature is -0.5"),
        ([[1]], {"top_k": 0}, "top_k is 0"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_p": 1.5}, "top_p is 1.5"),
        ([[1]], {"top_p": 0.0, "temperature": -1.0}, "temperature is -1.0.*; top_p is 0.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_impossible_settings_are_errors(prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate_batch(Scripted([5] * 20, context=16), prompts, **{"max_new_tokens": 4, "stop_ids": [], **options})


# Text


@pytest.fixture
def tokenizer(tokenizer_dir) -> Tokenizer:
    return Tokenizer(tokenizer_dir)


def saying(tokenizer: Tokenizer, prompt: str, ids: list[int]) -> Scripted:
    """A model that answers `prompt` with these tokens."""
    return Scripted([0] * (len(tokenizer.encode_prompt(prompt)) - 1) + ids)


def test_generate_gives_text_or_tokens(tokenizer):
    ids = tokenizer.encode("Hello there", special=False)
    stop = tokenizer.stop_ids[0]
    model = saying(tokenizer, "Hi", [*ids, stop, *ids, stop])
    assert generate(model, tokenizer, "Hi") == "Hello there"
    assert generate(model, tokenizer, [{"role": "user", "content": "Hi"}]) == "Hello there"
    assert generate(model, tokenizer, "Hi", return_tokens=True) == ids
    assert generate(model, tokenizer, "Hi", max_new_tokens=2, return_tokens=True) == ids[:2]
    more = generate(model, tokenizer, "Hi", max_new_tokens=len(ids) + 3, ignore_eos=True, return_tokens=True)
    assert more == [*ids, stop, *ids[:2]]


@pytest.mark.parametrize("text", ["a🙂b", "naïve 你好", "🙂🙃", "plain words"])
def test_a_stream_never_shows_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text, special=False)
    assert text == "plain words" or any("\ufffd" in tokenizer.decode(ids[:n]) for n in range(len(ids)))
    model = saying(tokenizer, "Hi", [*ids, tokenizer.stop_ids[0]])
    pieces = list(stream(model, tokenizer, "Hi", max_new_tokens=40))
    assert "".join(pieces) == text == generate(model, tokenizer, "Hi")
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 1


def test_a_stream_that_ends_within_a_character_equals_generate(tokenizer):
    ids = tokenizer.encode("ok 🙂", special=False)[:-1]
    for answer in (ids, [*ids, *tokenizer.encode(" go", special=False)]):
        model = saying(tokenizer, "Hi", [*answer, tokenizer.stop_ids[0]])
        assert "".join(stream(model, tokenizer, "Hi", max_new_tokens=40)) == generate(model, tokenizer, "Hi")


def test_a_stream_comes_while_it_is_made(tokenizer):
    ids = tokenizer.encode("one two three", special=False)
    model, calls = saying(tokenizer, "Hi", ids), []
    model.register_forward_hook(lambda *_: calls.append(1))
    next(stream(model, tokenizer, "Hi", max_new_tokens=len(ids)))
    assert len(calls) == 2  # prefill and one token


def test_a_stream_stops_at_the_same_tokens_and_ignores_them_on_request(tokenizer):
    ids, stop = tokenizer.encode("yes", special=False), tokenizer.stop_ids[0]
    model = saying(tokenizer, "Hi", [*ids, stop, *ids])
    assert "".join(stream(model, tokenizer, "Hi", max_new_tokens=40)) == "yes"
    pieces = stream(model, tokenizer, "Hi", max_new_tokens=2 * len(ids) + 1, stop_ids=[])
    assert "".join(pieces) == "yesyes"  # special tokens are not shown


def test_greedy_from_a_loaded_checkpoint_is_repeatable(tiny_dir):
    model, tokenizer = litmini.load(tiny_dir, dtype="fp32")
    options = {"max_new_tokens": 8, "ignore_eos": True, "return_tokens": True}
    first = litmini.generate(model, tokenizer, "Hello", **options)
    assert len(first) == 8 and first == generate(model, tokenizer, "Hello", **options)
    assert first == without_cache(model, tokenizer.encode_prompt("Hello"), 8)


def in_a_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_litmini_imports_nothing_heavy():
    heavy = ["torch", "lightning", "transformers", "numpy", "tokenizers", "safetensors", "jsonargparse"]
    code = f"import sys, litmini; print([name for name in {heavy} if name in sys.modules])"
    assert in_a_new_process(code) == "[]"


def test_litmini_generate_can_be_called_before_and_after_its_module_is_imported(tiny_dir):
    code = f"""
import litmini
model, tokenizer = litmini.load({str(tiny_dir)!r}, dtype="fp32")
def answer():
    return litmini.generate(model, tokenizer, "Hello", max_new_tokens=3, ignore_eos=True, return_tokens=True)
print(type(litmini.generate).__name__, answer())
print(type(litmini.generate).__name__, answer())  # the call has imported the module
import litmini.generate
from litmini import generate
print(type(generate).__name__, answer())
"""
    lines = [line.split(maxsplit=1) for line in in_a_new_process(code).splitlines()]
    assert [kind for kind, _ in lines] == ["function", "_Callable", "_Callable"]
    assert len({answer for _, answer in lines}) == 1
