"""GPT: a prompt read once scores as it does alone; what is sampled follows what is scored."""

import itertools
import math

import pytest
import torch
from helpers import Memory
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model as models
from data import Example, make_batch
from model import GPT, GPTConfig, next_token_probs, response_logps, sample

B, M, R, S, V = 2, 3, 5, 7, 11
EOS = V - 1
WEIGHTS = torch.tensor([[1.0, -2.0, 3.0], [-5.0, 7.0, 11.0]])  # of the log-probs [B, M]


def random_model(dtype=torch.float64, seed=0, scale=0.3, **config):
    """A small GPT with every parameter random.

    Biases and norms too, so that none of them can be forgotten unseen.
    """
    torch.manual_seed(seed)
    size = dict(vocab_size=V, context=13, layers=2, heads=2, width=8, eos=EOS)
    model = GPT(GPTConfig(**size | config)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=scale)
    return model


def ragged_examples():
    """B = 2, M = 3, R = 5, S = 7: prompts of 7 and 4, responses of 5, 2, 1 and 3, 5.

    The last is truncated (no EOS), and one candidate slot is empty.
    """
    return [
        Example("", [1, 2, 3, 4, 5, 6, 7], [[8, 9, 3, 3, EOS], [0, EOS], [EOS]], [1.0, 2.0, 3.0]),
        Example("", [9, 0, 5, 2], [[7, 7, EOS], [4, 1, 6, 2, 9]], [1.0, 2.0]),
    ]


def ragged_batch():
    batch = make_batch(ragged_examples(), EOS)
    assert batch.prompt_ids.shape == (B, S) and batch.response_ids.shape == (B, M, R)
    return batch


def with_random_padding(batch, seed):
    generator = torch.Generator().manual_seed(seed)

    def noise(ids, mask):
        return torch.where(mask, ids, torch.randint(V, ids.shape, generator=generator))

    return data.Batch(
        noise(batch.prompt_ids, batch.prompt_mask),
        batch.prompt_mask,
        noise(batch.response_ids, batch.response_mask),
        batch.response_mask,
        batch.candidate_mask,
        batch.rewards,
    )


def plain_logits(model, ids):
    """[L, V]: one sequence read by one full causal pass, with the attention written out."""
    L, D, H = len(ids), model.config.width, model.config.heads
    heads = lambda x: x.view(L, H, D // H).transpose(0, 1)  # [H, L, D/H]
    ahead = torch.ones(L, L).triu(1).bool()
    x = model.wte.weight[ids] + model.wpe.weight[:L]
    for block in model.h:
        q, k, v = map(heads, block.attn.c_attn(block.ln_1(x)).split(D, -1))
        scores = q @ k.transpose(1, 2) / math.sqrt(D // H)
        weights = scores.masked_fill(ahead, -math.inf).softmax(-1)  # [H, L, L]
        x = x + block.attn.c_proj((weights @ v).transpose(0, 1).reshape(L, D))
        h = block.mlp["c_fc"](block.ln_2(x))
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + block.mlp["c_proj"](h)
    return model.ln_f(x) @ model.wte.weight.T


def logits_alone(model, prompt, response):
    """[len(response), V] by `plain_logits` of prompt + response."""
    return plain_logits(model, torch.tensor(prompt + response))[len(prompt) - 1 : -1]


def logps_alone(model, prompt, response):
    logps = logits_alone(model, prompt, response).log_softmax(-1)  # [len(response), V]
    return logps[range(len(response)), response].sum()


def candidates():
    """(i, j, prompt, response) of every real candidate."""
    return [
        (i, j, e.prompt_ids, y)
        for i, e in enumerate(ragged_examples())
        for j, y in enumerate(e.response_ids)
    ]


def gradients(model, value):
    """Those of all parameters, by name."""
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def check_gradients(found, expected, rtol, atol=None):
    """Both by name; atol: rtol where it is not given."""
    for name, value in expected.items():
        message = lambda text, name=name: f"{name}: {text}"
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol or rtol, msg=message)


# -------------------------------------------------------------------------- the prompt is read once


def test_logits_equal_those_of_every_response_alone():
    model, batch = random_model(), ragged_batch()
    logits = model(batch.prompt_ids, batch.prompt_mask, batch.response_ids)
    assert logits.shape == (B, M, R, V)
    for i, j, x, y in candidates():
        own = logits[i, j, : len(y)]
        torch.testing.assert_close(own, logits_alone(model, x, y), rtol=1e-10, atol=1e-10)
        # The same model, B = M = 1 and nothing padded.
        one = make_batch([Example("", x, [y], [0.0])], EOS)
        alone = model(one.prompt_ids, one.prompt_mask, one.response_ids)[0, 0]
        torch.testing.assert_close(own, alone, rtol=1e-10, atol=1e-10)


def test_gradients_equal_those_of_every_response_alone():
    model, batch = random_model(), ragged_batch()
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(B, M, R, V, dtype=torch.float64, generator=generator)
    logits = model(batch.prompt_ids, batch.prompt_mask, batch.response_ids)
    once = gradients(model, (weights * logits)[batch.response_mask].sum())
    alone = [
        (weights[i, j, : len(y)] * logits_alone(model, x, y)).sum() for i, j, x, y in candidates()
    ]
    check_gradients(once, gradients(model, sum(alone)), 1e-9)


def test_logps_and_their_gradients_equal_those_of_every_response_alone():
    model, batch = random_model(torch.float32), ragged_batch()
    logps = response_logps(model, batch)
    assert logps.shape == (B, M) and logps.dtype == torch.float32
    assert logps[1, 2] == 0  # the empty slot
    for i, j, x, y in candidates():
        torch.testing.assert_close(logps[i, j], logps_alone(model, x, y), rtol=1e-5, atol=1e-5)
    once = gradients(model, (WEIGHTS * logps).sum())
    alone = [WEIGHTS[i, j] * logps_alone(model, x, y) for i, j, x, y in candidates()]
    check_gradients(once, gradients(model, sum(alone)), 1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_padding_changes_nothing(seed):
    model, batch = random_model(torch.float32), ragged_batch()
    noisy = with_random_padding(batch, seed)
    assert not torch.equal(noisy.prompt_ids, batch.prompt_ids)
    assert not torch.equal(noisy.response_ids, batch.response_ids)
    logps, noisy_logps = response_logps(model, batch), response_logps(model, noisy)
    torch.testing.assert_close(noisy_logps, logps, rtol=0, atol=1e-6)
    clean = gradients(model, (WEIGHTS * logps).sum())
    check_gradients(gradients(model, (WEIGHTS * noisy_logps).sum()), clean, 1e-5)
    more = Example("", [1] * 8, [[1] * 5] * 4, [0.0] * 4)
    longer = make_batch([*ragged_examples(), more], EOS)  # more padding: S = 8, M = 4
    torch.testing.assert_close(response_logps(model, longer)[:B, :M], logps, rtol=0, atol=1e-5)


def test_prompt_states_and_the_first_prediction():
    model, batch = random_model(), ragged_batch()
    states = model.encode(batch.prompt_ids, batch.prompt_mask)
    hidden = model.hidden(batch.prompt_ids, batch.prompt_mask, batch.response_ids)
    assert states.shape == (B, S, 8) and hidden.shape == (B, M, R, 8)
    for i, e in enumerate(ragged_examples()):
        n, expected = len(e.prompt_ids), plain_logits(model, torch.tensor(e.prompt_ids))
        logits = states[i, :n] @ model.wte.weight.T
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
        for j in range(M):  # the last real prompt token predicts the first token of every response
            torch.testing.assert_close(hidden[i, j, 0], states[i, n - 1], rtol=1e-10, atol=1e-10)


def test_scoring_and_sampling_leave_the_batch_as_it_was():
    model, batch = random_model(torch.float32), ragged_batch()
    response_logps(model, batch)
    sample(model, batch.prompt_ids, batch.prompt_mask, M, R, torch.Generator())
    for name, value in vars(ragged_batch()).items():
        assert value is None or torch.equal(getattr(batch, name), value), name


def check_causal(model):
    """A token changes the logits that follow it in its own response, and nothing else.

    A prompt token changes all logits of its own prompt's responses.
    """
    batch = ragged_batch()
    score = lambda prompts, responses: model(prompts, batch.prompt_mask, responses)
    logits = score(batch.prompt_ids, batch.response_ids)
    for t in range(R):
        changed = batch.response_ids.clone()
        changed[0, 1, t] = (changed[0, 1, t] + 1) % V
        same = (score(batch.prompt_ids, changed) - logits).abs().amax(-1) < 1e-12
        expected = torch.ones(B, M, R, dtype=torch.bool)
        expected[0, 1, t + 1 :] = False
        assert torch.equal(same, expected), t
    for s in range(S):
        changed = batch.prompt_ids.clone()
        changed[0, s] = (changed[0, s] + 1) % V
        differs = (score(changed, batch.response_ids) - logits).abs().amax(-1) > 1e-6
        assert differs[0].all() and not differs[1].any(), s


def test_causal_and_blind_to_the_other_candidates():
    check_causal(random_model())


def test_positions_continue_the_true_length_of_the_prompt():
    """A prompt of 3 padded to 7 and a response of 5 read the positions 0 to 6.

    These are 3 tokens and 4: the last is only predicted.
    """
    model, response = random_model(), [4, 5, 6, 7, EOS]
    examples = [Example("", [1] * S, [[1]], [0.0]), Example("", [1, 2, 3], [response], [0.0])]
    batch = make_batch(examples, EOS)
    logits = model(batch.prompt_ids, batch.prompt_mask, batch.response_ids)
    read = gradients(model, (logits[1] ** 2).sum())["wpe.weight"].abs().sum(-1) > 0
    assert read.tolist() == [True] * 7 + [False] * 6
    # The last position of all, which only the response reads, moves its last prediction.
    with torch.no_grad():
        model.wpe.weight[6] += torch.arange(8.0)
    moved = model(batch.prompt_ids, batch.prompt_mask, batch.response_ids) - logits
    assert (moved[1, 0].abs().amax(-1) > 1e-6).tolist() == [False] * 4 + [True]


# --------------------------------------------------------------------------- what a log-prob counts


def test_uniform_model_counts_every_response_token_once():
    """All weights zero: every token has probability 1 / V.

    So log pi = -(tokens, EOS included) log V.
    """
    model, batch = random_model(torch.float32), ragged_batch()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    expected = -math.log(V) * torch.tensor([[5.0, 2.0, 1.0], [3.0, 5.0, 0.0]])
    torch.testing.assert_close(response_logps(model, batch), expected, rtol=1e-6, atol=1e-6)


def test_every_plausible_wrong_sum_disagrees():
    model, x, y = random_model(torch.float32), [9, 0, 5, 2], [7, 7, EOS]
    logps = response_logps(model, make_batch([Example("", x, [y], [0.0])], EOS)).item()
    token = logits_alone(model, x, y).log_softmax(-1)[range(3), y]  # [3]
    everything = plain_logits(model, torch.tensor(x + y)).log_softmax(-1)  # [7, V]
    assert logps == pytest.approx(token.sum().item(), abs=1e-5)
    restarted = logps_alone(model, x, y[:1]) + logps_alone(model, x, y[1:])
    wrong = {
        "first token dropped": token[1:].sum(),
        "EOS dropped": token[:-1].sum(),
        "EOS counted twice": token.sum() + token[-1],
        "EOS predicted once more after itself": token.sum() + everything[-1, EOS],
        "mean for sum": token.mean(),
        "prompt tokens in the sum": token.sum() + everything[range(3), x[1:]].sum(),
        "the last prompt token in the sum": token.sum() + everything[2, x[3]],
        "a token judged by its own logits": everything[range(4, 7), y].sum(),
        "a token judged by those before the last": everything[range(2, 5), y].sum(),
        "without positions after the prompt": restarted,
    }
    for name, value in wrong.items():
        assert abs(value.item() - logps) > 1e-2, name


@pytest.mark.parametrize("most", [models.MOST_LOGITS, 1])
def test_allowed_tokens_share_all_the_probability(monkeypatch, most):
    """Also in chunks of 8 tokens, of 16."""
    in_chunks(monkeypatch, most)
    model, batch = random_model(torch.float32), ragged_batch()
    allowed = torch.zeros(R + 2, V, dtype=torch.bool)  # longer than the batch, as a task's is
    allowed[0, [7, 8, 0, 4, EOS]] = True
    allowed[1:, torch.arange(V) != 5] = True
    logps = response_logps(model, batch, allowed)
    for i, j, x, y in candidates():
        logits = logits_alone(model, x, y).masked_fill(~allowed[: len(y)], -math.inf)
        expected = logits.log_softmax(-1)[range(len(y)), y].sum()
        torch.testing.assert_close(logps[i, j], expected, rtol=1e-5, atol=1e-5)
    assert (logps > response_logps(model, batch))[batch.candidate_mask].all()
    allowed[0, 8] = False  # the first token of candidate (0, 0)
    assert response_logps(model, batch, allowed)[0, 0] == -math.inf


def tiny_responses(enc, task):
    """The 8 + 64 + 512 = 584 responses of the task tiny, as token ids."""
    words = [enc.encode_single_token(" " + word) for word in task.words]
    chosen = [itertools.product(words, repeat=count) for count in (1, 2, 3)]
    return [[*ids, enc.eot_token] for lists in chosen for ids in lists]


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_the_584_responses_of_tiny_sum_to_one(scale):
    """As initialised, and with every weight moved.

    float64 logits to 1e-12, response_logps' float32 to 1e-6.
    """
    task = data.make_task("tiny")
    enc = data.encoding(data.word_ranks(task.vocabulary))
    responses = tiny_responses(enc, task)
    assert len(responses) == 8 + 64 + 512 == 584
    size = dict(vocab_size=enc.n_vocab, context=32, width=16, eos=enc.eot_token)
    model = random_model(scale=scale, **size)
    prompts = [enc.encode_ordinary(split[0]) for split in (task.heldout, task.ood)]
    batch = make_batch([Example("", x, responses, [0.0] * 584) for x in prompts], enc.eot_token)
    allowed = data.allowed_tokens(task, enc, task.max_response)
    with torch.no_grad():
        logps = response_logps(model.float(), batch, allowed)
        assert (logps.double().exp().sum(-1) - 1).abs().max() < 1e-6
        logits = model.double()(batch.prompt_ids, batch.prompt_mask, batch.response_ids)
    ids, masked = batch.response_ids[..., None], logits.masked_fill(~allowed, -math.inf)
    logps = masked.log_softmax(-1).gather(-1, ids)[..., 0]  # [B, M, R]
    logps = logps.masked_fill(~batch.response_mask, 0).sum(-1)
    assert (logps.exp().sum(-1) - 1).abs().max() < 1e-12
    if scale:
        assert logps.exp().std() > 1e-4  # far from the uniform that would sum to one by itself


# ----------------------------------------------------------------------------------------- sampling


FIVE = dict(vocab_size=5, eos=4, context=8, scale=0.5)
FIVE_PROMPTS = (
    torch.tensor([[1, 2, 3], [3, 0, 4]]),
    torch.tensor([[True, True, True], [True, True, False]]),
)
# every response of at most 3 of 5 tokens: 1 + 4 + 16 that end with EOS, 64 truncated
FIVE_RESPONSES = [
    [*ids, *end]
    for count, end in ((0, [4]), (1, [4]), (2, [4]), (3, []))
    for ids in itertools.product(range(4), repeat=count)
]


def as_lists(ids, mask):
    """[B][M] lists of the real tokens."""
    lengths = mask.sum(-1).tolist()
    return [[y[:n] for y, n in zip(*pair)] for pair in zip(ids.tolist(), lengths)]


def enumerated_probs(model, prompts=FIVE_PROMPTS):
    """[B, 85]: the probability of every response, by scoring them."""
    rows = [
        Example("", x[: int(n)].tolist(), FIVE_RESPONSES, [0.0] * 85)
        for x, n in zip(prompts[0], prompts[1].sum(1))
    ]
    with torch.no_grad():
        return response_logps(model, make_batch(rows, 4)).double().exp()


def chi_square(lists, probs):
    counts = torch.tensor([lists.count(y) for y in FIVE_RESPONSES], dtype=torch.float64)
    assert counts.sum() == len(lists)
    expected = len(lists) * probs
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("push, leaving", [(0.0, [False, False]), (2.0, [True, True])])
def test_samples_follow_the_scores(push, leaving):
    """Chi-square over all 85 responses (84 degrees of freedom: mean 84, deviation 13).

    Pushed towards EOS, over a quarter of the responses end at the first token and again at the
    second, and leave the cache.
    """
    model = random_model(torch.float32, **FIVE)
    with torch.no_grad():
        model.ln_f.bias += push * model.wte.weight[4]
    probs, left, decode = enumerated_probs(model), [], model.decode
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)

    def watched(*args):
        logits, step = decode(*args)
        return logits, lambda ids, rows: (left.append(rows is not None), step(ids, rows))[1]

    model.decode = watched
    lists = as_lists(*sample(model, *FIVE_PROMPTS, 10_000, 3, torch.Generator().manual_seed(1)))
    assert left == leaving
    for i in range(2):
        assert chi_square(lists[i], probs[i]) < 84 + 5 * 13
        # The test would see another prompt's distribution.
        assert chi_square(lists[i], probs[1 - i]) > 1000


def test_samples_repeat_under_the_same_generator_and_only_then():
    model = random_model(torch.float32, **FIVE)
    draw = lambda seed: sample(model, *FIVE_PROMPTS, 50, 3, torch.Generator().manual_seed(seed))
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(draw(7), draw(7)))
    assert not torch.equal(draw(7)[0], draw(8)[0])
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


def test_what_stands_after_eos_and_where_it_is_missing():
    model = random_model(torch.float32, **FIVE)
    ids, mask = sample(model, *FIVE_PROMPTS, 200, 3, torch.Generator().manual_seed(0))
    assert ids.shape == mask.shape == (2, 200, 3)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert (ids[~mask] == 4).all()
    lists = sum(as_lists(ids, mask), [])
    for y in lists:
        assert (y[-1] == 4) == (4 in y) and y.count(4) <= 1 and (4 in y or len(y) == 3)
    assert {len(y) for y in lists} == {1, 2, 3} and any(4 not in y for y in lists)
    assert torch.equal(mask, mask.cummin(-1).values.bool())  # no holes
    # EOS for certain: R is the longest response drawn, not max_tokens.
    with torch.no_grad():
        model.ln_f.bias += 50 * model.wte.weight[4]
    ids, mask = sample(model, *FIVE_PROMPTS, 3, 3, torch.Generator())
    assert ids.tolist() == [[[4]] * 3] * 2 and mask.all()


def test_temperature_divides_the_logits():
    model = random_model(torch.float32, **FIVE)
    generator = torch.Generator().manual_seed(2)
    lists = as_lists(*sample(model, *FIVE_PROMPTS, 6000, 3, generator, temperature=0.5))
    at_one = enumerated_probs(model)
    # logits = ln_f(x) @ wte.T, so twice the last norm is half the temperature.
    with torch.no_grad():
        model.ln_f.weight *= 2
        model.ln_f.bias *= 2
    at_half = enumerated_probs(model)
    for i in range(2):
        expected = 6000 * at_half[i]
        often = expected > 5
        counts = torch.tensor([lists[i].count(y) for y in FIVE_RESPONSES], dtype=torch.float64)
        distance, freedom = ((counts - expected) ** 2 / expected)[often].sum(), often.sum()
        assert distance < freedom + 5 * (2 * freedom) ** 0.5
        assert (counts / 6000 - at_one[i]).abs().max() > 0.05


@pytest.mark.parametrize("options", [{"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-9}])
def test_greedy_limits(options):
    model = random_model(torch.float32, **FIVE)
    lists = as_lists(*sample(model, *FIVE_PROMPTS, 2, 4, torch.Generator(), **options))
    for x, n, row in zip(FIVE_PROMPTS[0].tolist(), (3, 2), lists):
        y = []
        while len(y) < 4 and 4 not in y:
            y.append(plain_logits(model, torch.tensor(x[:n] + y))[-1].argmax().item())
        assert row == [y, y]


def test_next_token_probs_by_hand():
    rows = [[0.1, 0.4, 0.2, 0.3], [0.25, 0.05, 0.6, 0.1]]
    two = [[0, 4 / 7, 0, 3 / 7], [25 / 85, 0, 60 / 85, 0]]
    logits = torch.tensor(rows).log() + torch.tensor([[3.0], [-5.0]])

    def check(probs, expected):
        expected = torch.tensor(expected, dtype=torch.float32)
        torch.testing.assert_close(probs, expected, rtol=1e-5, atol=1e-6)

    def cut(**options):
        probs = next_token_probs(logits, **options)
        return probs / probs.sum(-1, keepdim=True)

    check(next_token_probs(logits), rows)
    check(cut(top_k=2), two)
    check(cut(top_k=9), rows)
    check(cut(top_p=0.65), two)  # .4 + .3 and .6 + .25 are the first to reach it
    check(cut(top_p=0.55), [[0, 4 / 7, 0, 3 / 7], [0, 0, 1, 0]])
    check(cut(top_p=0.35), [[0, 1, 0, 0], [0, 0, 1, 0]])
    check(cut(top_p=0.93), [[0.1, 0.4, 0.2, 0.3], [25 / 95, 0, 60 / 95, 10 / 95]])
    halves = next_token_probs(torch.zeros(1, 4), top_p=0.5)
    assert (halves > 0).sum() == 2  # two quarters reach a half
    check(cut(top_k=3, top_p=0.7), two)  # p of what top_k left: 4/9 + 3/9; 60/95 + 25/95
    allowed = torch.tensor([True, False, True, False])
    check(cut(allowed=allowed), [[1 / 3, 0, 2 / 3, 0], [25 / 85, 0, 60 / 85, 0]])
    allowed = torch.tensor([True, True, False, True])
    check(cut(allowed=allowed, top_k=1), [[0, 1, 0, 0], [1, 0, 0, 0]])


@pytest.mark.parametrize(
    "options, possible", [({"top_k": 2}, 2), ({"top_p": 0.5}, None), ({"allowed": True}, 3)]
)
def test_samples_stay_inside_what_is_possible(options, possible):
    """Every token drawn is one that next_token_probs gives a share.

    For the first token the shares are right, too.
    """
    model = random_model(torch.float32, **FIVE)
    if "allowed" in options:
        rows = [[True, False, True, True, False]] * 2 + [[False, True, False, False, True]]
        options = {"allowed": torch.tensor(rows)}
    generator = torch.Generator().manual_seed(3)
    lists = as_lists(*sample(model, *FIVE_PROMPTS, 4000, 3, generator, **options))

    def probs_after(ids, place):
        here = dict(options)
        if "allowed" in options:
            here["allowed"] = options["allowed"][place]
        return next_token_probs(plain_logits(model, torch.tensor(ids))[-1:], **here)[0]

    for x, n, row in zip(FIVE_PROMPTS[0].tolist(), (3, 2), lists):
        for y in {tuple(y) for y in row}:
            for t in range(len(y)):
                assert probs_after(x[:n] + list(y[:t]), t)[y[t]] > 0
        probs = probs_after(x[:n], 0)
        assert possible is None or (probs > 0).sum() == possible
        shares = torch.tensor([sum(y[0] == v for y in row) for v in range(5)]) / len(row)
        expected = (probs / probs.sum()).detach()
        torch.testing.assert_close(shares, expected, rtol=0, atol=5 * 0.5 / 4000**0.5)


@pytest.mark.parametrize("end, expected", [(0.0, 1), (1 - 2**-53, 3)])
def test_the_ends_of_the_uniform_draw_never_pick_an_impossible_token(monkeypatch, end, expected):
    draw = lambda *size, **options: torch.full(size, end, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", draw)
    allowed = torch.tensor([[False, True, False, True, False]] * 3)
    ids, _ = sample(random_model(torch.float32, **FIVE), *FIVE_PROMPTS, 7, 3, None, allowed=allowed)
    assert (ids == expected).all()


def test_decoding_step_by_step_gives_the_scoring_logits():
    """Also after responses have left the cache, some of them twice, and in another order."""
    model, batch = random_model(), ragged_batch()
    expected = model(batch.prompt_ids, batch.prompt_mask, batch.response_ids)
    expected = expected.flatten(0, 1)  # [B * M, R, V]
    ids, alive = batch.response_ids.flatten(0, 1), torch.arange(B * M)
    leaving = {1: [5, 0, 3, 2], 3: [2, 1]}  # before step t these rows of the last call stay
    with torch.no_grad():
        logits, step = model.decode(batch.prompt_ids, batch.prompt_mask, M, R)
        torch.testing.assert_close(logits, expected[:, 0], rtol=1e-10, atol=1e-10)
        for t in range(R - 1):
            rows = torch.tensor(leaving[t]) if t in leaving else None
            alive = alive if rows is None else alive[rows]
            logits = step(ids[alive, t], rows)
            torch.testing.assert_close(logits, expected[alive, t + 1], rtol=1e-10, atol=1e-10)
    assert alive.tolist() == [3, 0]


# ---------------------------------------------------------------------------------- GPT-2 and edges


def test_logits_equal_transformers_gpt2():
    why = "transformers is the oracle here: pip install transformers"
    transformers = pytest.importorskip("transformers", reason=why)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V,
        n_positions=13,
        n_embd=8,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    oracle = transformers.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for p in oracle.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)  # biases and norms too
    model = GPT(GPTConfig(vocab_size=V, context=13, layers=2, heads=2, width=8, eos=EOS)).double()
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # of Conv1D
    weights = dict(oracle.transformer.named_parameters())
    model.load_state_dict(
        {name: p.T if name.endswith(turned) else p for name, p in weights.items()}
    )
    batch = ragged_batch()
    check = lambda logits, expected: torch.testing.assert_close(
        logits, expected, rtol=1e-6, atol=1e-6
    )
    with torch.no_grad():
        logits = model(batch.prompt_ids, batch.prompt_mask, batch.response_ids)
        for i, j, x, y in candidates():
            ids = torch.tensor([x + y])
            theirs = oracle(ids).logits[0]  # [len(x) + len(y), V]
            check(plain_logits(model, ids[0]), theirs)
            check(model.head(model.encode(ids, None))[0], theirs)
            check(logits[i, j, : len(y)], theirs[len(x) - 1 : -1])


SIZES = [
    ([3], [[EOS]]),
    ([3], [[4, EOS]]),
    ([1, 2, 3], [[EOS]]),
    ([3], [[4], [5], [EOS]]),
    ([3] * 8, [[4] * 5]),
]


@pytest.mark.parametrize("prompt, responses", SIZES)
def test_smallest_and_largest_sizes(prompt, responses):
    """S = 1, R = 1, M = 1, each alone and together, and S + R = the whole context."""
    model = random_model()
    batch = make_batch([Example("", prompt, responses, [0.0] * len(responses))], EOS)
    prompts, (_, count, length) = (batch.prompt_ids, batch.prompt_mask), batch.response_ids.shape
    scored = model(*prompts, batch.response_ids)[0]
    first, _ = model.decode(*prompts, count, length)
    for j, y in enumerate(responses):
        expected = logits_alone(model, prompt, y)
        torch.testing.assert_close(scored[j, : len(y)], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(first[j], expected[0], rtol=1e-10, atol=1e-10)
    ids, mask = sample(model, *prompts, count, length, torch.Generator())
    assert ids.shape[:2] == (1, count) and mask[..., 0].all()


def test_longer_than_the_context_is_refused():
    model = random_model()
    ones = lambda *size: torch.ones(*size, dtype=torch.long)
    with pytest.raises(ValueError, match="8 [+] 6 tokens.* 13"):
        model(ones(1, 8), ones(1, 8).bool(), ones(1, 1, 6))
    with pytest.raises(ValueError, match="8 [+] 6 tokens.* 13"):
        sample(model, ones(1, 8), ones(1, 8).bool(), 1, 6, torch.Generator())


def test_bfloat16_autocast_scores_in_float32():
    model, batch = random_model(torch.float32), ragged_batch()
    exact = response_logps(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        logps = response_logps(model, batch)
        ids, _ = sample(model, batch.prompt_ids, batch.prompt_mask, M, R, torch.Generator())
    assert logps.dtype == torch.float32 and ids.shape[:2] == (B, M)
    assert not torch.equal(logps, exact)
    length = batch.response_mask.sum(-1)
    # bfloat16 keeps 8 bits: some hundredths of a nat a token.
    assert ((logps - exact).abs() <= 0.05 * length).all()
    # The weights are in bfloat16, the log-softmax still is not.
    assert response_logps(model.bfloat16(), batch).dtype == torch.float32


def test_real_tokens_are_counted_before_there_is_work_to_wait_for():
    """A GPU tells how many there are when it has done all that it was given before."""
    model, batch, counts, products = random_model(torch.float32), ragged_batch(), [], []

    class Order(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            packet, place = function.overloadpacket, len(counts) + len(products)
            by_mask = packet is torch.ops.aten.index and args[1][0].dtype == torch.bool
            if packet is torch.ops.aten.nonzero or by_mask:
                counts.append(place)
            if packet in (torch.ops.aten.mm, torch.ops.aten.addmm):
                products.append(place)
            return function(*args, **(kwargs or {}))

    with Order():
        response_logps(model, batch)
    assert len(counts) == 2 and len(products) > 8 and max(counts) < min(products)


# ----------------------------------------------------------------------- logits of a few at a time


def in_chunks(monkeypatch, most=1):
    """Chunks of `most` logits, and of as many tokens as the model is wide at least."""
    monkeypatch.setattr(models, "MOST_LOGITS", most)


def test_chunks_are_of_so_many_logits_and_not_below_the_width(monkeypatch):
    """16 real tokens, in a model of width 8; none of them where they fit at once."""
    model, batch, sizes = random_model(torch.float32), ragged_batch(), []
    apply = models.ChunkedLogps.apply
    noted = lambda *given: sizes.append(given[3]) or apply(*given)
    monkeypatch.setattr(models.ChunkedLogps, "apply", noted)
    for allowed in (None, torch.arange(V).expand(R, V) != 5):
        in_chunks(monkeypatch, 2**40)
        expected = response_logps(model, batch, allowed)
        for most in (1, 12 * V, 16 * V):
            in_chunks(monkeypatch, most)
            logps = response_logps(model, batch, allowed)
            torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-6)
    assert sizes == [8, 12] * 2


@pytest.mark.parametrize("count, scale", [(16, 1.0), (17, 1.0), (19, 1.0), (19, 100.0)])
def test_tokens_in_chunks_score_and_learn_as_a_log_softmax(monkeypatch, count, scale):
    """Also the last chunk, of one or three; also where logits are in the hundreds."""
    n, generator = count, torch.Generator().manual_seed(0)
    model = random_model(torch.float32)
    states = scale * torch.randn(n, 8, generator=generator)
    ids, weights = torch.randint(V, (n,), generator=generator), torch.linspace(-1, 2, n)
    in_chunks(monkeypatch)
    states.requires_grad_()
    logps = models.token_logps(model, states, ids)
    found = torch.autograd.grad((weights * logps).sum(), [states, model.wte.weight])
    exact = [x.detach().double().requires_grad_() for x in (states, model.wte.weight)]
    expected = (exact[0] @ exact[1].T).log_softmax(-1)[torch.arange(n), ids]
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-6 * scale)
    for one, other in zip(found, torch.autograd.grad((weights * expected).sum(), exact)):
        assert (one - other).norm() < 5e-6 * other.norm()


def test_chunks_refuse_a_second_derivative_and_have_a_first_one_more_than_once(monkeypatch):
    """A second derivative that is silently 0 would be worse than none."""
    in_chunks(monkeypatch)
    model, states = random_model(torch.float32), torch.randn(19, 8, requires_grad=True)
    logps = models.token_logps(model, states, torch.arange(19) % V)
    once, again = (torch.autograd.grad(logps.sum(), states, retain_graph=True) for _ in range(2))
    assert torch.equal(once[0], again[0])
    with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
        torch.autograd.grad(logps.sum(), states, create_graph=True)


@pytest.mark.parametrize("learns", ["states", "weight"])
def test_in_chunks_the_head_may_be_frozen_and_so_may_what_it_reads(monkeypatch, learns):
    model, states = random_model(torch.float32), torch.randn(19, 8)
    model.requires_grad_(False)
    one = (states if learns == "states" else model.wte.weight).requires_grad_()
    gradient = lambda: torch.autograd.grad(models.token_logps(model, states, ids).sum(), one)[0]
    ids = torch.arange(19) % V
    expected = gradient()
    in_chunks(monkeypatch)
    torch.testing.assert_close(gradient(), expected, rtol=1e-5, atol=1e-6)


def test_logits_of_one_chunk_exist_at_a_time(monkeypatch):
    """5 MB of logits of 1,280 tokens; in chunks of 8 tokens as many as the head has weights."""
    n, V, D = 1280, 1000, 8
    model = GPT(GPTConfig(vocab_size=V, layers=1, heads=1, width=D))
    states, ids = torch.randn(n, D, requires_grad=True), torch.randint(V, (n,))

    def memory():
        with Memory() as memory:
            models.token_logps(model, states, ids).sum().backward()
        states.grad = model.wte.weight.grad = None
        return memory

    whole = memory()
    assert whole.largest == 4 * n * V and whole.most > 2 * whole.largest
    in_chunks(monkeypatch)
    chunks = memory()
    assert chunks.largest == 4 * n * D and chunks.most < 3 * chunks.largest + 8 * 4 * V * D


def test_chunks_in_bfloat16_add_their_gradients_up_in_float32(monkeypatch):
    """Each chunk's own is of 8 bits, as that of all tokens; a sum of a hundred would be worse."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, layers=1, heads=1, width=8))
    states, ids = torch.randn(800, 8), torch.randint(64, (800,))

    def gradient(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logps = models.token_logps(model, states, ids)
        assert logps.dtype == torch.float32
        return torch.autograd.grad(logps.mean(), model.wte.weight)[0]

    exact, whole = gradient(False), gradient(True)
    in_chunks(monkeypatch)
    assert torch.allclose(gradient(False), exact, atol=1e-6)
    error, of_whole = ((x - exact).norm() for x in (gradient(True), whole))
    assert 0.5 * of_whole < error < 1.5 * of_whole


def test_initialisation_is_gpt2s_at_gpt2s_width():
    """Deviation 0.02 at width 768, and over sqrt(2 L) for what is added to the residual stream.

    Biases are 0, norms 1.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=768, heads=12, layers=2))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / math.sqrt(2 * 2) if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std().item() / expected - 1) < 0.01, name
            assert abs(p.mean().item()) < 0.01 * expected, name
        else:
            assert (p == (1 if ".weight" in name else 0)).all(), name


def test_initial_loss_is_near_log_v():
    torch.manual_seed(0)
    config = GPTConfig()
    model = GPT(config)
    ids = torch.randint(config.vocab_size, (16, 2, 40))
    ones = lambda *shape: torch.ones(shape, dtype=torch.bool)
    batch = data.Batch(ids[:, 0], ones(16, 40), ids[:, 1:, :20], ones(16, 1, 20), None, None)
    loss = -response_logps(model, batch).mean().item() / 20
    assert abs(loss - math.log(config.vocab_size)) < 0.3


def test_gpt2_has_its_published_number_of_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig(50257, 1024, 12, 12, 768, 50256))
    count = sum(p.numel() for p in model.parameters())
    L, D = 12, 768
    assert count == 124_439_808
    assert count == (50257 + 1024) * D + L * (12 * D**2 + 13 * D) + 2 * D
