"""Generation: cached equals uncached, batches equal single prompts, samples come from where they should."""

import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from numerics import assert_close, ulps
from torch import nn
from transformers import LlamaForCausalLM, MistralForCausalLM
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.auto import CONFIG_MAPPING

import litmini
from litmini.config.generate import SamplingConfig
from litmini.errors import UserError
from litmini.generation.batch import Batch
from litmini.generation.generate import finish_all, generate, stream, stream_text
from litmini.generation.request import Request
from litmini.generation.sampling import Sampler, penalize, probabilities
from litmini.generation.speculative import Draft, DraftModel, PromptLookup
from litmini.methods.lora import LoRALinear
from litmini.models import llama
from litmini.ops.kv_cache import KVCache
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


def generate_batch(
    model: nn.Module, prompts: list[list[int]], count: int, stops: list[int], **options
) -> list[list[int]]:
    requests = [Request(prompt, SamplingConfig(max_new_tokens=count, **options), stops) for prompt in prompts]
    finish_all(model, requests)
    return [request.ids for request in requests]


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
def test_greedy_completions_are_those_of_transformers(name):
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
        assert_close(found, expected)
        positions = (torch.arange(20) - padding).split(chunks, 1)
        parts = zip(tokens.split(chunks, 1), positions, strict=True)
        found = torch.cat([model(part, p, cache=padded) for part, p in parts], 1)
        for row, start in enumerate(padding.flatten().tolist()):
            alone = model(tokens[row : row + 1, start:])[0]
            assert_close(found[row, start:], alone)


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

PROBABILITIES = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])


def support(**options) -> set[int]:
    """The tokens that can turn up in samples from PROBABILITIES."""
    sampling = SamplingConfig(**{"temperature": 1.0, **options})
    (shares,), (index,) = probabilities(PROBABILITIES.log()[None], sampling)
    assert shares.sum() == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    drawn = Sampler([sampling] * 999, [[]] * 999, [generator] * 999).choose(PROBABILITIES.log().expand(999, -1))
    assert set(drawn.tolist()) == set(index[shares > 0].tolist())
    return set(index[shares > 0].tolist())


def test_support_of_samples():
    assert support() == {0, 1, 2, 3, 4}
    assert support(top_k=1) == {1}
    assert support(top_k=3) == {1, 2, 3}
    assert support(top_k=100) == support(top_p=1.0) == support(min_p=0.0) == {0, 1, 2, 3, 4}
    assert support(top_p=1e-6) == support(top_p=0.39) == {1}
    assert support(top_p=0.41) == support(top_p=0.69) == {1, 3}
    assert support(top_p=0.71) == {1, 2, 3}
    assert support(top_k=2, top_p=0.6) == {1, 3}  # of what top_k left, 0.4 is 57%
    assert support(top_k=2, top_p=0.55) == {1}
    assert support(temperature=0.5, top_p=0.5) == {1}  # temperature first: squares, 0.16 of 0.285 is 56%
    assert support(min_p=0.3) == {1, 2, 3}  # 0.3 x 0.4 = 0.12
    assert support(min_p=1.0) == {1}
    assert support(min_p=0.3, temperature=0.5) == {1, 3}  # 0.3 x 0.16 = 0.048: 0.09 stays, 0.0225 does not


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 30, "min_p": 0.05}])
def test_probabilities_are_those_of_transformers(options):
    logits, temperature = 3 * torch.randn(60), 0.7
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(options["top_k"])] if "top_k" in options else []
    warpers += [TopPLogitsWarper(options["top_p"])] if "top_p" in options else []
    warpers += [MinPLogitsWarper(options["min_p"])] if "min_p" in options else []
    theirs = logits[None]
    for warper in warpers:
        theirs = warper(None, theirs)
    (shares,), (index,) = probabilities(logits[None], SamplingConfig(temperature=temperature, **options))
    assert_close(torch.zeros(60).index_copy(0, index, shares), theirs.softmax(-1)[0])
    assert (shares > 0).sum() < 60 or not options


def test_repetition_penalty_is_that_of_transformers():
    logits, tokens = torch.randn(50), [3, 7, 3, 11]
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([tokens]), logits[None].clone())[0]
    seen = torch.zeros(1, 50, dtype=torch.bool).index_fill(1, torch.tensor(tokens), True)
    assert torch.equal(penalize(logits[None], seen, torch.tensor([[1.3]]))[0], theirs)
    model = random_model("llama")
    (plain,) = generate_batch(model, PROMPTS[:1], 40, [])
    (penalized,) = generate_batch(model, PROMPTS[:1], 40, [], repetition_penalty=1e6)
    assert len(set(plain)) < 40 == len(set(penalized) - set(PROMPTS[0]))


def test_frequencies_follow_the_temperature():
    generator = torch.Generator().manual_seed(2)
    for temperature in (0.5, 2.0):
        sampling = SamplingConfig(temperature=temperature)
        sampler = Sampler([sampling] * 4_000, [[]] * 4_000, [generator] * 4_000)
        chosen = sampler.choose(PROBABILITIES.log().expand(4_000, -1))
        expected = PROBABILITIES ** (1 / temperature)
        frequencies = torch.bincount(chosen, minlength=5) / len(chosen)
        torch.testing.assert_close(frequencies, expected / expected.sum(), rtol=0, atol=0.03)


def test_of_equally_likely_tokens_top_k_keeps_no_more_than_k():
    equal = torch.zeros(1, 6)
    assert probabilities(equal, SamplingConfig(temperature=1.0, top_k=3))[1].shape == (1, 3)
    many = torch.randint(0, 4, (1, 5_000)).float()  # as bf16 logits are
    sampler = Sampler([SamplingConfig(temperature=1.0, top_k=1)], [[]], [None])
    assert sampler.choose(many) == many.argmax()


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
    """A model that says `scripts[row][position]` at each position; of several, row n has a prompt that ends in 500 + n."""

    def __init__(self, *scripts: list[int], context: int = 64) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_layers=1, n_kv_heads=1, head_dim=2, max_positions=context, vocab_size=600)
        self.lm_head = nn.Linear(600, 600, bias=False)
        nn.init.eye_(self.lm_head.weight)
        self.scripts = scripts

    def say(self, token: int, position: int) -> int:
        fits = [
            s for i, s in enumerate(self.scripts) if token == 500 + i or token in s[max(0, position - 1) : position]
        ]
        script = fits[0] if fits else self.scripts[0]
        return script[position] if position < len(script) else 0

    def forward(self, tokens, positions=None, documents=None, cache=None):
        pairs = zip(tokens.tolist(), positions.tolist(), strict=True)
        said = [[self.say(t, p) for t, p in zip(*pair, strict=True)] for pair in pairs]
        return self.lm_head(nn.functional.one_hot(torch.tensor(said), 600).float())


def test_a_stop_ends_its_row_only_and_is_not_returned():
    model = Scripted([0, 0, 11, 12, 2, 13, 14], [21, 22, 23, 24, 25, 26, 27], [3, 31, 32, 33])
    prompts = [[1, 1, 500], [501], [502]]
    assert generate_batch(model, prompts, 5, [2, 3]) == [[11, 12], [21, 22, 23, 24, 25], []]
    assert generate_batch(model, prompts, 4, []) == [[11, 12, 2, 13], [21, 22, 23, 24], [3, 31, 32, 33]]


def test_nothing_is_computed_once_all_rows_have_stopped():
    model, calls = Scripted([11, 2, 13], [21, 22, 2]), []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert generate_batch(model, [[500], [501]], 50, [2]) == [[11], [21, 22]]
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
        ([[1], []], {}, "the prompt is empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -0.5}, "temperature is -0.5"),
        ([[1]], {"top_k": 0}, "top_k is 0"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_p": 1.5}, "top_p is 1.5"),
        ([[1]], {"top_p": 0.0, "temperature": -1.0}, "temperature is -1.0, top_p is 0.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"min_p": 1.1}, "min_p is 1.1"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ([[1]], {"stop": ["a", ""]}, "stop is"),
    ],
)
def test_impossible_settings_are_errors(prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate_batch(Scripted([5] * 20, context=16), prompts, options.pop("max_new_tokens", 4), [], **options)


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
    pieces = list(stream(model, tokenizer, "Hi"))
    assert "".join(pieces) == text == generate(model, tokenizer, "Hi")
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 1


def test_a_stream_that_ends_within_a_character_equals_generate(tokenizer):
    ids = tokenizer.encode("ok 🙂", special=False)[:-1]
    for answer in (ids, [*ids, *tokenizer.encode(" go", special=False)]):
        model = saying(tokenizer, "Hi", [*answer, tokenizer.stop_ids[0]])
        assert "".join(stream(model, tokenizer, "Hi")) == generate(model, tokenizer, "Hi")


def test_a_stream_comes_while_it_is_made(tokenizer):
    ids = tokenizer.encode("one two three", special=False)
    model, calls = saying(tokenizer, "Hi", ids), []
    model.register_forward_hook(lambda *_: calls.append(1))
    next(stream(model, tokenizer, "Hi", max_new_tokens=len(ids)))
    assert len(calls) == 1  # the prompt gives the first token


def test_a_stream_stops_at_the_same_tokens_and_ignores_them_on_request(tokenizer):
    ids, stop = tokenizer.encode("yes", special=False), tokenizer.stop_ids[0]
    model = saying(tokenizer, "Hi", [*ids, stop, *ids])
    assert "".join(stream(model, tokenizer, "Hi")) == "yes"
    pieces = stream(model, tokenizer, "Hi", max_new_tokens=2 * len(ids) + 1, ignore_eos=True)
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
    heavy = ["torch", "lightning_fabric", "transformers", "numpy", "tokenizers", "safetensors", "jsonargparse"]
    code = f"import sys, litmini; print([name for name in {heavy} if name in sys.modules])"
    assert in_a_new_process(code) == "[]"


# Speculative decoding


def drafted(model: nn.Module, prompt: list[int], count: int, draft: Draft, stops: list[int] | None = None) -> list[int]:
    request = Request(prompt, SamplingConfig(max_new_tokens=count), stops or [])
    batch = Batch(model, draft)
    batch.add([request])
    while batch.requests:
        batch.step()
    return request.ids


class Guesses:
    """Guesses right, wrong, or half right, in turn."""

    def __init__(self, truth: list[int]) -> None:
        self.truth, self.calls = truth, 0

    def begin(self, capacity: int) -> None:
        self.calls = 0

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        self.calls += 1
        right = self.truth[len(tokens) :][:4]
        wrong = [(t + 1) % 64 for t in right]
        return [right, wrong, right[:2] + wrong[2:]][self.calls % 3][:limit]


@pytest.mark.parametrize("name", CONFIGS)
def test_drafted_tokens_are_those_of_plain_greedy_decoding(name):
    model, other = random_model(name), random_model(name)
    for prompt in (PROMPTS[0], PROMPTS[2] * 3):
        (plain,) = generate_batch(model, [prompt], 50, [])
        assert drafted(model, prompt, 50, PromptLookup(5)) == plain
        assert drafted(model, prompt, 50, DraftModel(model, 4)) == plain
        assert drafted(model, prompt, 50, DraftModel(other, 4)) == plain
        guesses = Guesses(prompt + plain)
        assert drafted(model, prompt, 50, guesses) == plain
        assert guesses.calls < 32
        assert drafted(model, prompt, 50, DraftModel(model, 4), [plain[20]]) == plain[: plain.index(plain[20])]


def test_a_right_draft_saves_forwards():
    model, calls = random_model("llama"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    drafted(model, PROMPTS[0], 41, Guesses([]))
    alone = len(calls)
    calls.clear()
    (plain,) = generate_batch(model, PROMPTS[:1], 41, [])
    calls.clear()
    drafted(model, PROMPTS[0], 41, Guesses(PROMPTS[0] + plain))
    assert alone == 41 and len(calls) < 26


def test_prompt_lookup_finds_the_latest_occurrence():
    lookup = PromptLookup(3)
    assert lookup.propose([1, 2, 3, 4, 5, 9, 1, 2, 7, 8, 6, 1, 2], 10) == [7, 8, 6]
    assert lookup.propose([1, 2, 3, 4, 5, 1, 2], 2) == [3, 4]
    assert lookup.propose([1, 2, 3, 9, 2, 5, 1, 2], 10) == [3, 9, 2]  # two tokens, not one
    assert lookup.propose([1, 2, 3], 10) == lookup.propose([1], 10) == lookup.propose([1, 2, 3, 1, 2], 0) == []


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"repetition_penalty": 1.2}])
def test_a_draft_is_for_plain_greedy_decoding(options):
    with pytest.raises(UserError, match="temperature 0 and without repetition penalty"):
        Batch(random_model("llama"), PromptLookup(3)).add([Request([1], SamplingConfig(**options), [])])
    requests = [Request([1], SamplingConfig(), []) for _ in range(2)]
    with pytest.raises(UserError, match="one prompt at a time"):
        Batch(random_model("llama"), PromptLookup(3)).add(requests)


def test_the_head_computes_the_logits_of_the_last_position_of_a_prompt_only():
    model, rows = random_model("llama"), []
    model.lm_head.register_forward_hook(lambda module, args, logits: rows.append(tuple(logits.shape[:2])))
    batch = Batch(model, chunk=8)
    batch.add([Request(list(range(3, 3 + n)), SamplingConfig(max_new_tokens=3), []) for n in (20, 5)])
    assert rows == [(2, 0), (2, 0), (2, 1)] and [len(request.ids) for request in batch.requests] == [1, 1]
    batch.step()
    assert rows[3:] == [(2, 1)] and not model.lm_head._forward_pre_hooks


# Joining and leaving, memory


def test_decoding_leaves_global_switches_alone():
    """A batch, which the server drives in a thread of its own, never sets them; commands, in one thread, set them back."""
    model, switches, before = random_model("llama").bfloat16(), [], torch.backends.mkldnn.enabled
    model.register_forward_pre_hook(lambda *_: switches.append(torch.backends.mkldnn.enabled))
    batch = Batch(model)
    batch.add([Request(PROMPTS[0], SamplingConfig(max_new_tokens=3), [])])
    while batch.requests:
        batch.step()
    assert set(switches) == {before}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_batch(model, PROMPTS[:1], 3, [])
    assert switches[-3:] == [before, False, False] and torch.backends.mkldnn.enabled == before


@pytest.mark.parametrize("name", CONFIGS)
def test_requests_that_come_and_go_are_those_of_each_prompt_alone(name):
    model = random_model(name)
    counts = [12, 30, 5, 18]
    alone = [generate_batch(model, [p], n, [])[0] for p, n in zip(PROMPTS, counts, strict=True)]
    requests = [Request(p, SamplingConfig(max_new_tokens=n), []) for p, n in zip(PROMPTS, counts, strict=True)]
    batch = Batch(model)
    joins = {0: requests[:1], 4: requests[1:3], 15: requests[3:]}
    for step in range(60):
        if step in joins:
            batch.add(joins[step])
        if batch.requests:
            batch.step()
    assert [r.ids for r in requests] == alone
    assert {r.finish for r in requests} == {"length"} and batch.cache is None


def test_a_request_that_is_given_up_leaves_the_others_alone():
    model = random_model("llama")
    alone = [generate_batch(model, [p], 20, [])[0] for p in PROMPTS]
    requests = [Request(p, SamplingConfig(max_new_tokens=20), []) for p in PROMPTS]
    batch = Batch(model)
    batch.add(requests)
    for _ in range(4):
        batch.step()
    requests[1].end("stop")
    batch.drop()
    assert len(batch.requests) == 3
    while batch.requests:
        batch.step()
    assert [r.ids for r in requests] == [alone[0], alone[1][:5], *alone[2:]]


def test_the_cache_is_as_large_as_needed():
    """Not as the model's context; and layers with a window have room for the window and a chunk only."""
    sizes = {}
    for name in ("llama", "window"):
        model = random_model(name)
        batch = Batch(model, chunk=8)
        (expected,) = [without_cache(model, PROMPTS[0] * 3, 20)]
        request = Request(PROMPTS[0] * 3, SamplingConfig(max_new_tokens=20), [])
        batch.add([request])
        sizes[name] = batch.cache[0].keys.shape[2]
        while batch.requests:
            batch.step()
        assert request.ids == expected
    assert sizes == {"llama": 33 + 20 + 1, "window": 6 + 8 - 1 + 1}


# Stop strings, log-probabilities


@pytest.mark.parametrize(
    ("stop", "shown", "finish"),
    [
        (["tea"], "Two large mugs of ", "stop"),
        (["of tea and", "rge"], "Two la", "stop"),
        ([" tea and more"], "Two large mugs of tea", "length"),
        (["Two"], "", "stop"),
        (["\n"], "Two large mugs of tea", "length"),
    ],
)
def test_stop_strings_that_span_tokens(tokenizer, stop, shown, finish):
    ids = tokenizer.encode("Two large mugs of tea", special=False)
    assert len(ids) > 6
    sampling = SamplingConfig(max_new_tokens=len(ids), stop=stop)
    request = Request(tokenizer.encode_prompt("Hi"), sampling, tokenizer.stop_ids, tokenizer)
    pieces = list(stream_text(saying(tokenizer, "Hi", ids), request))
    assert "".join(pieces) == request.text == shown
    assert request.finish == finish
    if finish == "stop" and shown:
        assert len(request.ids) < len(ids) or stop == ["tea"]


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not(tokenizer):
    ids = tokenizer.encode("ab abc done", special=False)
    sampling = SamplingConfig(max_new_tokens=len(ids), stop=["abd", "abcd"])
    request = Request(tokenizer.encode_prompt("Hi"), sampling, [], tokenizer)
    pieces = list(stream_text(saying(tokenizer, "Hi", ids), request))
    assert "".join(pieces) == "ab abc done" and not any(piece.endswith(("ab", "abc")) for piece in pieces)


def test_log_probabilities_are_the_models_own():
    model = random_model("llama")
    plain, sampled = (Request(PROMPTS[0], SamplingConfig(max_new_tokens=9, logprobs=3, **o), []) for o in ({}, SHARP))
    finish_all(model, [plain, sampled])
    for request in (plain, sampled):
        tokens = torch.tensor([[*PROMPTS[0], *request.ids]])
        logits = model(tokens)[0].detach()
        logs = logits.log_softmax(-1)[len(PROMPTS[0]) - 1 : -1]
        for found, expected, token in zip(request.logprobs, logs, request.ids, strict=True):
            assert found.token == token
            assert found.logprob == pytest.approx(float(expected[token]), abs=ulps(scale=logits))
            best = expected.topk(3)
            assert [i for i, _ in found.top] == best.indices.tolist()
            assert [v for _, v in found.top] == pytest.approx(best.values.tolist(), abs=ulps(scale=logits))
    assert plain.ids != sampled.ids


SHARP = {"temperature": 1.5, "top_k": 20, "seed": 3}
