"""T5: transformers' v1.1 judges it, and the prompt read once scores as each response alone.

What both models must do, and the value network, which sees the prompt alone.
"""

import dataclasses
import math

import pytest
import torch
from test_model import (
    EOS,
    FIVE,
    FIVE_PROMPTS,
    FIVE_RESPONSES,
    WEIGHTS,
    B,
    M,
    R,
    S,
    V,
    as_lists,
    candidates,
    check_causal,
    check_gradients,
    chi_square,
    enumerated_probs,
    gradients,
    ragged_batch,
    random_model,
    tiny_responses,
    with_random_padding,
)

import data
from data import Example, make_batch
from model import GPT, GPTConfig, ValueNetwork, next_token_probs, response_logps, sample
from t5 import T5, T5Config, position_bucket

SIZE = {
    "vocab_size": V,
    "layers": 2,
    "heads": 2,
    "width": 8,
    "head_width": 3,
    "mlp_width": 12,
    "eos": EOS,
    "start": V,
}


def random_t5(dtype=torch.float64, seed=0, scale=0.3, **config):
    """A small T5 with every parameter moved, norms too.

    d_kv is not width / heads, so that no scale is right by chance.
    """
    torch.manual_seed(seed)
    model = T5(T5Config(**SIZE | config)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=scale)
    return model


# Layer of a block, our name, theirs; the MLP is the last layer.
PARTS = [
    (0, "attn_norm", "layer_norm"),
    (0, "attn", "SelfAttention"),
    (1, "cross_norm", "layer_norm"),
    (1, "cross", "EncDecAttention"),
]
MLP = [
    ("mlp_norm", "layer_norm"),
    ("wi_0", "DenseReluDense.wi_0"),
    ("wi_1", "DenseReluDense.wi_1"),
    ("wo", "DenseReluDense.wo"),
]


def theirs(model):
    """transformers' T5 v1.1 with the same weights.

    Its norms compute in float32, whatever the weights are: hence the 2e-5 below.
    """
    transformers = pytest.importorskip("transformers")
    c = model.config
    config = transformers.T5Config(
        vocab_size=model.shared.num_embeddings,
        d_model=c.width,
        d_kv=c.head_width,
        d_ff=c.mlp_width,
        num_layers=c.layers,
        num_heads=c.heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=c.start,
        pad_token_id=0,
    )
    other = transformers.T5ForConditionalGeneration(config)
    # Recent versions tie the head all the same.
    other.lm_head = torch.nn.Linear(c.width, c.vocab_size, bias=False)
    state, ours = {}, model.state_dict()
    for name, weight in ours.items():
        new = name.replace(".norm.", ".final_layer_norm.")
        new = new.replace("positions", "block.0.layer.0.SelfAttention.relative_attention_bias")
        last = 2 if name.startswith("decoder") else 1
        for k, old, theirs in (*PARTS, *((last, *part) for part in MLP)):
            if f".{old}." in name:
                new = new.replace("blocks", "block").replace(f".{old}.", f".layer.{k}.{theirs}.")
        state[new] = weight
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        state[name] = ours["shared.weight"]
    result = other.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and not result.missing_keys, result
    return other.to(model.shared.weight.dtype).eval()


def logits_alone(other, start, prompt, response):
    """[len(response), V] by transformers, one prompt and one response."""
    ids = torch.tensor([prompt])
    return other(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        decoder_input_ids=torch.tensor([[start, *response[:-1]]]),
    ).logits[0]


def test_buckets_are_t5s():
    relative = torch.tensor([-200, -64, -32, -16, -12, -8, -7, -1, 0, 1, 7, 8, 16, 64, 128])
    both = [15, 14, 12, 10, 9, 8, 7, 1, 0, 17, 23, 24, 26, 30, 31]
    causal = [31, 26, 21, 16, 12, 8, 7, 1, 0, 0, 0, 0, 0, 0, 0]
    assert position_bucket(relative, True).tolist() == both
    assert position_bucket(relative, False).tolist() == causal


def test_logits_and_gradients_equal_transformers_response_by_response():
    model, batch = random_t5(), ragged_batch()
    other = theirs(model)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(B, M, R, V, dtype=torch.float64, generator=generator)
    logits = model(batch.prompt_ids, batch.prompt_mask, batch.response_ids)
    assert logits.shape == (B, M, R, V)
    loss = 0
    for i, j, x, y in candidates():
        alone = logits_alone(other, V, x, y)
        torch.testing.assert_close(logits[i, j, : len(y)], alone, rtol=2e-5, atol=2e-5)
        loss = loss + (weights[i, j, : len(y)] * alone).sum()
    ours = gradients(model, (weights * logits)[batch.response_mask].sum())
    loss.backward()
    encoder, decoder = other.encoder.block, other.decoder.block
    expected = {
        "decoder.positions": decoder[0].layer[0].SelfAttention.relative_attention_bias,
        "shared": other.shared,
        "decoder.blocks.1.cross.k": decoder[1].layer[1].EncDecAttention.k,
        "encoder.blocks.0.attn.q": encoder[0].layer[0].SelfAttention.q,
    }
    expected = {f"{name}.weight": part.weight.grad for name, part in expected.items()}
    check_gradients(ours, expected, 1e-4)


def test_logits_equal_transformers_over_long_distances():
    """Positions beyond 128, where buckets are shared."""
    model = random_t5(scale=0.1)
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randint(V, (n,), generator=generator).tolist() for n in (150, 140))
    batch = make_batch([Example("", x, [y], [0.0])], EOS)
    with torch.no_grad():
        ours = model(batch.prompt_ids, batch.prompt_mask, batch.response_ids)[0, 0]
        torch.testing.assert_close(ours, logits_alone(theirs(model), V, x, y), rtol=2e-5, atol=2e-5)


def test_weights_start_with_t5s_deviations():
    torch.manual_seed(0)
    model = T5(T5Config(width=256, heads=4, head_width=32, mlp_width=512))
    D, d, H, mlp = 256, 32, 4, 512
    expected = {
        "q": (D * d) ** -0.5,
        "k": D**-0.5,
        "v": D**-0.5,
        "o": (H * d) ** -0.5,
        "wi_0": D**-0.5,
        "wi_1": D**-0.5,
    }
    expected |= {"wo": mlp**-0.5, "shared": 1.0, "lm_head": D**-0.5}
    for name, p in model.named_parameters():
        kind = name.split(".")[-2]
        if kind in expected:
            assert p.std().item() == pytest.approx(expected[kind], rel=0.03), name
        elif "norm" in kind:
            assert (p == 1).all()
    assert not any("bias" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("seed", [0, 1])
def test_padding_changes_nothing(seed):
    model, batch = random_t5(torch.float32), ragged_batch()
    logps = response_logps(model, batch)
    noisy = response_logps(model, with_random_padding(batch, seed))
    torch.testing.assert_close(noisy, logps, rtol=0, atol=2e-6)
    clean = gradients(model, (WEIGHTS * logps).sum())
    check_gradients(gradients(model, (WEIGHTS * noisy).sum()), clean, 1e-4, 1e-5)


def test_causal_and_blind_to_the_other_candidates():
    check_causal(random_t5())


def test_decoding_with_leaving_rows_gives_the_logits_of_scoring():
    model, (prompts, mask) = random_t5(), FIVE_PROMPTS
    responses = torch.randint(V, (2, 3, 4), generator=torch.Generator().manual_seed(5))
    ids = responses.flatten(0, 1)  # [6, 4]
    with torch.no_grad():
        scored = model(prompts, mask, responses).flatten(0, 1)  # [6, 4, V]
        logits, step = model.decode(prompts, mask, 3, 4)
        torch.testing.assert_close(logits, scored[:, 0])
        kept = torch.arange(6)
        for t, rows in ((1, None), (2, torch.tensor([0, 2, 5])), (3, torch.tensor([1, 2]))):
            kept = kept if rows is None else kept[rows]
            torch.testing.assert_close(step(ids[kept, t - 1], rows), scored[kept, t])


def test_samples_follow_the_scores():
    model = random_t5(torch.float32, vocab_size=5, eos=4, start=5, scale=0.2)
    probs = enumerated_probs(model)
    lists = as_lists(*sample(model, *FIVE_PROMPTS, 10_000, 3, torch.Generator().manual_seed(1)))
    usual = probs > 5e-4  # at least 5 expected
    for i in range(2):
        counts = torch.tensor([lists[i].count(y) for y in FIVE_RESPONSES], dtype=torch.float64)
        expected, n = 10_000 * probs[i], int(usual[i].sum())
        assert ((counts - expected) ** 2 / expected)[usual[i]].sum() < n + 5 * (2 * n) ** 0.5
        assert chi_square(lists[i], probs[1 - i]) > 1000


def test_the_584_responses_of_tiny_sum_to_one():
    task = data.make_task("tiny")
    enc = data.encoding(data.word_ranks(task.vocabulary))
    size = dict(vocab_size=enc.n_vocab, eos=enc.eot_token, start=enc.n_vocab)
    model = random_t5(torch.float32, **size, scale=0.1)
    prompt = enc.encode_ordinary(task.ood[0])
    example = Example("", prompt, tiny_responses(enc, task), [0.0] * 584)
    batch = make_batch([example], enc.eot_token)
    with torch.no_grad():
        logps = response_logps(
            model, batch, data.allowed_tokens(task, enc, task.max_response)
        ).double()
    assert (logps.exp().sum(-1) - 1).abs().max() < 1e-6 and logps.exp().std() > 1e-4


# -------------------------------------------------------------------------------------- both models

MODELS = {
    "gpt": lambda **size: random_model(torch.float32, **size),
    "t5": lambda **size: random_t5(torch.float32, **size),
}
FIVES = {
    "gpt": lambda: random_model(torch.float32, **FIVE),
    "t5": lambda: random_t5(torch.float32, vocab_size=5, eos=4, start=5),
}


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-40, 1e-30, 1e-10])
@pytest.mark.parametrize("kind", FIVES)
def test_tiny_temperatures_are_greedy(kind, temperature):
    model, (prompts, mask) = FIVES[kind](), FIVE_PROMPTS
    allowed = torch.ones(3, 5, dtype=torch.bool)
    for forbidden in ([], [0, 2]):
        allowed[:, forbidden] = False
        options = dict(temperature=temperature, allowed=allowed)
        lists = as_lists(*sample(model, prompts, mask, 2, 3, torch.Generator(), **options))
        for i, row in enumerate(lists):
            y = []
            while len(y) < 3 and 4 not in y:
                ids = torch.tensor([[[*y, 0]]])
                logits = model(prompts[i : i + 1], mask[i : i + 1], ids)[0, 0, -1]
                y.append(logits.masked_fill(~allowed[0], -math.inf).argmax().item())
            assert row == [y, y]


IMPOSSIBLE = [
    *({"temperature": value} for value in (0.0, -1.0, -1e-45, math.nan, -math.inf)),
    {"top_k": -1},
    *({"top_p": value} for value in (0.0, -0.5, 1.5, math.nan)),
]


@pytest.mark.parametrize("options", IMPOSSIBLE)
@pytest.mark.parametrize("kind", FIVES)
def test_impossible_options_of_sampling_are_refused(kind, options):
    name = next(iter(options))
    for max_tokens in (3, 0):
        with pytest.raises(ValueError, match=name):
            sample(FIVES[kind](), *FIVE_PROMPTS, 2, max_tokens, torch.Generator(), **options)
    if name != "temperature":
        with pytest.raises(ValueError, match=name):
            next_token_probs(torch.zeros(2, 5), **options)


@pytest.mark.parametrize(
    "B, M, R", [(2, 3, 0), (2, 0, 5), (0, 3, 5), (0, 3, 1), (2, 0, 0), (0, 3, 0), (0, 0, 0)]
)
@pytest.mark.parametrize("kind", MODELS)
def test_no_prompts_responses_or_tokens_give_empty_results(kind, B, M, R):
    model, prompts = MODELS[kind](), torch.ones(B, S, dtype=torch.long)
    prompt_mask = torch.arange(S) < torch.tensor([[7], [4]])[:B]
    responses = torch.ones(B, M, R, dtype=torch.long)
    ids, mask = sample(model, prompts, prompt_mask, M, R, torch.Generator())
    assert ids.shape == mask.shape == (B, M, 0)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert model.hidden(prompts, prompt_mask, responses).shape == (B, M, R, 8)
    assert model(prompts, prompt_mask, responses).shape == (B, M, R, V)
    batch = data.Batch(prompts, prompt_mask, responses, responses.bool(), None, None)
    for allowed in (None, torch.ones(R, V, dtype=torch.bool)):
        logps = response_logps(model, batch, allowed)
        assert torch.equal(logps, torch.zeros(B, M))
        logps.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_tokens_in_chunks_score_as_all_at_once(kind, some, monkeypatch):
    """Also where other tokens are allowed at each place, as with a vocabulary that is too large."""
    model, batch, allowed = MODELS[kind](), ragged_batch(), None
    if some:
        allowed = torch.rand(R, V, generator=torch.Generator().manual_seed(0)) < 0.7
        for ids in batch.response_ids.flatten(0, 1):
            allowed[range(R), ids] = True
    whole = response_logps(model, batch, allowed)
    expected = gradients(model, (WEIGHTS * whole).sum())
    monkeypatch.setattr("model.MOST_LOGITS", 1)
    logps = response_logps(model, batch, allowed)
    torch.testing.assert_close(logps, whole, rtol=1e-6, atol=1e-6)
    check_gradients(gradients(model, (WEIGHTS * logps).sum()), expected, 1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_policy_scores_as_a_reference_of_the_same_weights_to_the_last_bit(kind, autocast):
    """Whether gradients are on or off, and whether the weights take any."""
    policy, reference = MODELS[kind](), MODELS[kind]().requires_grad_(False)
    batch = ragged_batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logps, frozen = response_logps(policy, batch), response_logps(reference, batch)
        with torch.no_grad():
            off = response_logps(policy, batch)
    assert logps.requires_grad and not frozen.requires_grad
    assert torch.equal(logps, off) and torch.equal(logps, frozen)


def test_a_prompt_without_tokens_gives_numbers_and_leaves_the_others_as_they_are():
    model, batch = random_t5(torch.float32), ragged_batch()
    logps = response_logps(model, batch)
    batch.prompt_mask[0] = False
    without = response_logps(model, batch)
    assert without.isfinite().all() and torch.equal(without[1], logps[1])
    assert all(grad.isfinite().all() for grad in gradients(model, without.sum()).values())


# -------------------------------------------------------------------------------- the value network

BACKBONES = {
    "gpt": lambda: GPT(GPTConfig(vocab_size=V, context=13, layers=2, heads=2, width=8, eos=EOS)),
    "t5": lambda: T5(T5Config(**SIZE)),
}


def random_value(kind, seed=0):
    torch.manual_seed(seed)
    value = ValueNetwork(BACKBONES[kind]())
    with torch.no_grad():
        for p in value.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return value


@pytest.mark.parametrize("kind", BACKBONES)
def test_the_value_is_a_linear_head_on_the_mean_state_of_the_prompt_alone(kind):
    value, batch = random_value(kind), ragged_batch()
    values = value(batch.prompt_ids, batch.prompt_mask)
    assert values.shape == (B,)
    for i, n in enumerate((7, 4)):
        prompt = batch.prompt_ids[i : i + 1, :n], batch.prompt_mask[i : i + 1, :n]
        states = value.backbone.encode(*prompt)[0]
        expected = states.mean(0) @ value.value_head.weight[0] + value.value_head.bias[0]
        torch.testing.assert_close(values[i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BACKBONES)
def test_the_value_never_sees_padding(kind):
    value, batch = random_value(kind), ragged_batch()
    noisy = with_random_padding(batch, 2)
    assert not torch.equal(noisy.prompt_ids, batch.prompt_ids)
    expected = value(batch.prompt_ids, batch.prompt_mask)
    values = value(noisy.prompt_ids, noisy.prompt_mask)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    longer = [torch.nn.functional.pad(x, (0, 3)) for x in (batch.prompt_ids, batch.prompt_mask)]
    torch.testing.assert_close(value(*longer), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", BACKBONES)
def test_the_value_starts_at_zero_and_its_head_is_what_learns_first(kind):
    value, batch = ValueNetwork(BACKBONES[kind]()), ragged_batch()
    values = value(batch.prompt_ids, batch.prompt_mask)
    assert torch.equal(values, torch.zeros(B))
    (values - 1).square().sum().backward()
    assert value.value_head.weight.grad.abs().sum() > 0


def test_scoring_leaves_the_batch_as_it_was():
    batch = ragged_batch()
    response_logps(random_t5(torch.float32), batch)
    for field in dataclasses.fields(batch):
        kept = getattr(ragged_batch(), field.name)
        assert kept is None or torch.equal(getattr(batch, field.name), kept)
