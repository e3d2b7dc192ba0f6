"""A small GPT and a value network; scoring and sampling, for the T5 of t5.py too.

Both models read a prompt once, and score or sample M responses of it:

    model(prompt_ids, prompt_mask, response_ids)        -> logits [B, M, R, V]
    model.hidden(prompt_ids, prompt_mask, response_ids, response_mask=None)
                                                        -> [B, M, R, D]   what the head reads
    model.head(states) = states @ model.head_weight.T   -> [..., V]       logits, of a weight [V, D]
    model.encode(prompt_ids, prompt_mask)               -> [B, S, D]      the prompt's own states
    response_logps(model, batch)                        -> [B, M]         log pi(response | prompt)
    sample(model, prompt_ids, prompt_mask, M, ...)      -> response_ids, response_mask [B, M, R]
    ValueNetwork(backbone)(prompt_ids, prompt_mask)     -> [B]            V(x), of the prompt alone

logits[..., t, :] predicts response_ids[..., t]; log pi is a sum over tokens. B prompts, M responses
of each, S prompt tokens, R response tokens, V vocabulary, D width, H heads. Prompts and responses
are padded on the right; what stands in the padding changes nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class GPTConfig:
    """Size of a GPT, by default that of the main job; GPT-2: (50257, 1024, 12, 12, 768, 50256)."""

    vocab_size: int = 512
    context: int = 256  # longest prompt + response, in tokens
    layers: int = 2
    heads: int = 4
    width: int = 128
    eos: int = 511  # the token that ends a response


class Attention(nn.Module):
    """Causal self-attention over [cached prompt, own tokens] (GPT-2; Radford et al. 2019)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(
        self,
        x: Tensor,
        past: "PromptCache | SamplingCache | None" = None,
        mask: Tensor | None = None,
        real: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Output, like x, and the keys and values [N, H, T, D/H].

        Args: x [N, T, D]; past: a cache, or None; mask: who may see whom, None: causal; real: x is
            [n, D], the tokens at these places of [N T] alone, or None.
        """
        qkv, D = self.c_attn(x), x.shape[-1]
        if real is not None:  # padding takes part in attention alone
            qkv = padded(qkv, real, mask.shape[0], mask.shape[2])
        N, T, _ = qkv.shape
        qkv = qkv.view(N, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [N, H, T, D/H] each
        if past is not None:
            k, v = past.extend(k, v)  # [N, H, S + T, D/H]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        y = y.transpose(1, 2).reshape(N, T, D)
        return self.c_proj(y if real is None else y.flatten(0, 1)[real]), (k, v)


def padded(x: Tensor, real: Tensor, N: int, T: int) -> Tensor:
    """[N, T, D] with x [n, D] at the places `real` [n] in [N T], and 0 elsewhere."""
    return x.new_zeros(N * T, x.shape[-1]).index_copy(0, real, x).unflatten(0, (N, T))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width)
        D = config.width
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "c_proj": nn.Linear(4 * D, D)})

    def forward(self, x: Tensor, *where: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As `Attention.forward`."""
        y, keys_values = self.attn(self.ln_1(x), *where)
        x = x + y
        y = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](y), keys_values


class PromptCache:
    """One layer's keys and values of the prompts [B, H, S, D/H], for scoring.

    The M responses of each prompt share them.
    """

    def __init__(self, keys: Tensor, values: Tensor, M: int) -> None:
        self.k, self.v, self.M = keys, values, M

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the responses' own keys and values [B * M, H, T, D/H]."""
        return self._join(self.k, keys), self._join(self.v, values)

    def _join(self, prompt: Tensor, own: Tensor) -> Tensor:
        prompt = prompt[:, None].expand(-1, self.M, -1, -1, -1)  # [B, M, H, S, D/H]
        own = own.unflatten(0, prompt.shape[:2])  # [B, M, H, T, D/H]
        return torch.cat([prompt, own], 3).flatten(0, 1)  # [B * M, H, S + T, D/H]


class SamplingCache:
    """The same, with room for the tokens to come, written in place: nothing is copied."""

    def __init__(self, keys: Tensor, values: Tensor, M: int, max_tokens: int) -> None:
        self.length = keys.shape[2]
        room = (0, 0, 0, max_tokens)
        self.k = F.pad(keys, room).repeat_interleave(M, 0)  # [B * M, H, S + R, D/H]
        self.v = F.pad(values, room).repeat_interleave(M, 0)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next tokens' keys and values [B * M, H, T, D/H]; returns all so far."""
        end = self.length + keys.shape[2]
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = keys, values
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class GPT(nn.Module):
    """GPT-2: pre-norm blocks, learned positions, tanh GELU, head tied to the embedding.

    Published weights fit it: parameter names are GPT-2's, without the `transformer.` prefix, and
    its Conv1D weights are stored transposed.

    >>> model = GPT(GPTConfig(vocab_size=11, context=16, layers=1, heads=2, width=8, eos=10))
    >>> prompt, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool)
    >>> responses = torch.tensor([[[4, 10], [5, 10]]])  # B = 1 prompt, M = 2, R = 2 tokens
    >>> model(prompt, mask, responses).shape
    torch.Size([1, 2, 2, 11])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        # GPT-2's 0.02 at GPT-2's width; more in a narrow model, which learns to copy far sooner.
        std = 0.02 * (768 / config.width) ** 0.5
        # Residual projections start smaller, so that the sum over layers keeps its size.
        residual_std = std / (2 * config.layers) ** 0.5
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=residual_std if name.endswith("c_proj.weight") else std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def read_prompt(self, prompt_ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """States of the prompt before the last norm [B, S, D]; each layer's (keys, values)."""
        x = self.wte(prompt_ids) + self.wpe.weight[: prompt_ids.shape[1]]  # [B, S, D]
        cache = []
        # Padding stands on the right, so a causal mask already hides it from real tokens.
        for block in self.h:
            x, keys_values = block(x)
            cache.append(keys_values)
        return x, cache

    def encode(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """States [B, S, D] of the prompt's own tokens; the reader masks those of padding."""
        return self.ln_f(self.read_prompt(prompt_ids)[0])

    def hidden(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        response_ids: Tensor,
        response_mask: Tensor | None = None,
    ) -> Tensor:
        """States that predict each response token.

        The prompt is read once; each response attends to [prompt, itself].

        Args: prompt_ids, prompt_mask [B, S], at least one real token a row; response_ids [B, M, R];
            response_mask [B, M, R]: spares the work on padding, whose states then mean nothing.
        Returns: [B, M, R, D]; [..., 0, :] is the last prompt token's state, the same for all M.
        Raises: ValueError where S + R exceeds the context.
        """
        (B, S), (_, M, R) = prompt_ids.shape, response_ids.shape
        if S + R > self.config.context:
            raise ValueError(
                f"prompt and response need {S} + {R} tokens, the model reads {self.config.context}"
            )
        real = None
        if response_mask is not None:
            real = response_mask[..., 1:].flatten().nonzero()[:, 0]  # [n]: a token follows
        x, cache = self.read_prompt(prompt_ids)
        length = prompt_mask.sum(1)  # [B]
        first = x[torch.arange(B, device=x.device), length - 1]  # [B, D]
        first = first[:, None, None].expand(B, M, 1, -1)  # [B, M, 1, D]
        if R <= 1:
            return self.ln_f(first)[:, :, :R]
        T = R - 1  # the last token predicts nothing, so it need not be read
        causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        seen = [prompt_mask[:, None].expand(B, T, S), causal.expand(B, T, T)]
        mask = torch.cat(seen, -1)[:, None, None]  # [B, 1, 1, T, S + T]
        mask = mask.expand(B, M, 1, T, S + T).flatten(0, 1)  # [B * M, 1, T, S + T]
        place = torch.arange(T, device=x.device)
        positions = length[:, None] + place  # [B, T], padding not counted
        y = self.wte(response_ids[..., :-1]) + self.wpe(positions)[:, None]  # [B, M, T, D]
        y = y.flatten(0, 1)  # [B * M, T, D]
        if real is not None:
            y = y.flatten(0, 1)[real]  # [n, D]
        for block, (k, v) in zip(self.h, cache):
            y, _ = block(y, PromptCache(k, v, M), mask, real)
        y = y if real is None else padded(y, real, B * M, T)
        return self.ln_f(torch.cat([first, y.unflatten(0, (B, M)).to(first.dtype)], 2))

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the embedding's own."""
        return self.wte.weight

    def head(self, states: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D]."""
        return F.linear(states, self.head_weight)

    def forward(self, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor) -> Tensor:
        """Logits [B, M, R, V]; logits[..., t, :] predicts response_ids[..., t]."""
        return self.head(self.hidden(prompt_ids, prompt_mask, response_ids))

    def decode(
        self, prompt_ids: Tensor, prompt_mask: Tensor, M: int, max_tokens: int
    ) -> tuple[Tensor, Callable[..., Tensor]]:
        """Open a decoding session for M responses a prompt.

        Returns: the first logits [B * M, V], and step(ids, rows) -> logits [len(rows), V], which
            reads one token more of the responses `rows` (indices into those of the last call; the
            others are over and leave the cache).
        Raises: ValueError where S + max_tokens exceeds the context.
        """
        B, S = prompt_ids.shape
        if S + max_tokens > self.config.context:
            raise ValueError(
                f"prompt and response need {S} + {max_tokens} tokens, "
                f"the model reads {self.config.context}"
            )
        x, cache = self.read_prompt(prompt_ids)
        cache = [SamplingCache(k, v, M, max_tokens) for k, v in cache]
        position = prompt_mask.sum(1)  # [B]
        first = x[torch.arange(B, device=x.device), position - 1]  # [B, D]
        position = position.repeat_interleave(M)  # [B * M]
        mask = F.pad(prompt_mask, (0, max_tokens), value=True)  # [B, S + R]
        mask = mask.repeat_interleave(M, 0)[:, None, None]  # [B * M, 1, 1, S + R]

        def step(ids: Tensor, rows: Tensor | None = None) -> Tensor:
            nonlocal position, mask
            if rows is not None:
                position, mask = position[rows], mask[rows]
                for past in cache:
                    past.k, past.v = past.k[rows], past.v[rows]
            y = (self.wte(ids) + self.wpe(position))[:, None]  # [rows, 1, D]
            position = position + 1
            for block, past in zip(self.h, cache):
                y, _ = block(y, past, mask[..., : past.length + 1])
            return self.head(self.ln_f(y[:, 0]))

        return self.head(self.ln_f(first)).repeat_interleave(M, 0), step


# ----------------------------------------------------------------- value network, scoring, sampling


class ValueNetwork(nn.Module):
    """V(x) of DRO: a linear head on the mean of the prompt's states, padding left out.

    It never sees a response. The head starts at zero, so V starts at 0, the mean of the normalised
    rewards.

    >>> size = GPTConfig(vocab_size=11, context=16, layers=1, heads=2, width=8, eos=10)
    >>> prompt_ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    >>> prompt_mask = torch.tensor([[True, True, True], [True, True, False]])
    >>> ValueNetwork(GPT(size))(prompt_ids, prompt_mask)
    tensor([0., 0.], grad_fn=<SelectBackward0>)
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.value_head = nn.Linear(backbone.config.width, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """V [B], float32, in units of the reward, of prompts [B, S]."""
        states = self.backbone.encode(prompt_ids, prompt_mask).float()
        total = torch.where(prompt_mask[..., None], states, 0.0).sum(1)  # [B, D]
        return self.value_head(total / prompt_mask.sum(1, keepdim=True)).float()[:, 0]


def response_logps(model: nn.Module, batch: Any, allowed: Tensor | None = None) -> Tensor:
    """log pi(y | x) = sum_t log pi(y_t | x, y_<t) of every response, EOS included where it has one.

    Args: model: see the top of this file;
        batch: has prompt_ids, prompt_mask [B, S], response_ids, response_mask [B, M, R];
        allowed: [R', V] bool with R' >= R, the tokens possible at each place (the rest have
        probability 0), or None.
    Returns: [B, M] float32, natural logs; 0 for an empty candidate slot, also where R = 0.
    """
    mask, ids = batch.response_mask, batch.response_ids
    real = mask.flatten().nonzero()[:, 0]  # [n] real tokens; a GPU is waited for, so it comes first
    states = model.hidden(batch.prompt_ids, batch.prompt_mask, ids, mask).flatten(0, 2)[real]
    rows = None if allowed is None else (allowed, real % mask.shape[-1])
    logps = token_logps(model, states, ids.flatten()[real], rows)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logps).sum(-1)


def token_logps(
    model: nn.Module, states: Tensor, ids: Tensor, allowed: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """log pi(token) = log softmax(head(state))[id] of every token.

    Args: states [n, D]; ids [n]; allowed: rows [R, V] bool, the rest have probability 0, and which
        of them is a token's [n]; or None.
    Returns: [n] float32, also under autocast.
    """
    # D tokens at least: a chunk has as many logits then as the head has weights, and adding up the
    # weights' gradients, which every chunk has of its own, stays the smaller work.
    size = max(MOST_LOGITS // model.config.vocab_size, states.shape[-1])
    if len(ids) > size:
        dtype = model.head(states[:0]).dtype  # bfloat16 under autocast
        weight = model.head_weight.to(dtype)
        return ChunkedLogps.apply(states.to(dtype), weight, ids, size, allowed)
    logits = model.head(states).float()  # [n, V]
    if allowed:
        rows, row = allowed
        logits = logits.masked_fill(~rows[row], -torch.inf)
    return -F.cross_entropy(logits, ids, reduction="none")


MOST_LOGITS = 2**21  # at a time, 8 MB in float32: they stay in a processor's cache


class ChunkedLogps(torch.autograd.Function):
    """log softmax(states @ weight.T)[ids], where the logits of one chunk of tokens exist at a time.

    With a large vocabulary the logits of all tokens would be most of the memory. Both passes make
    those of a chunk anew:

        log pi(token) = log softmax(logits)[id]
        d log pi(token) / d logits = onehot(id) - P    P = softmax(logits)

    There is no second derivative: `out=` refuses one.
    """

    @staticmethod
    def chunks(states: Tensor, weight: Tensor, size: int, allowed: Any) -> Iterator[tuple]:
        """Which tokens, their logits [size, V], and room for as many in float32."""
        logits = weight.new_empty(size, len(weight))  # all chunks have the same room
        room = torch.empty_like(logits, dtype=torch.float32)
        for start in range(0, len(states), size):
            here = slice(start, start + size)
            own = logits[: len(states[here])]
            torch.mm(states[here], weight.T, out=own)
            if allowed:
                rows, row = allowed
                own.masked_fill_(~rows[row[here]], -torch.inf)
            yield here, own, room[: len(own)]

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, ids: Tensor, size: int, allowed: Any = None
    ) -> Tensor:
        """Of states [n, D], weight [V, D]; size: tokens of a chunk; the rest as `token_logps`."""
        ctx.save_for_backward(states, weight, ids)
        ctx.size, ctx.allowed = size, allowed
        logps = torch.empty(len(ids), dtype=torch.float32, device=ids.device)
        for here, logits, room in ChunkedLogps.chunks(states, weight, size, allowed):
            log_P = torch.log_softmax(logits, -1, torch.float32, out=room)
            logps[here] = log_P.gather(-1, ids[here, None])[:, 0]
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of states [n, D] and weight [V, D], of which each chunk adds its own."""
        states, weight, ids = ctx.saved_tensors
        grad_states = torch.empty_like(states)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for here, logits, room in ChunkedLogps.chunks(states, weight, ctx.size, ctx.allowed):
            P, g = torch.softmax(logits, -1, torch.float32, out=room), grad[here, None]
            slope = P.mul_(-g).scatter_add_(-1, ids[here, None], g).to(weight.dtype)  # [size, V]
            torch.mm(slope, weight, out=grad_states[here])
            grad_weight += slope.T @ states[here]
        return grad_states, grad_weight, None, None, None


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    M: int,
    max_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw M responses of every prompt, token by token. The prompt's cache serves all M.

    Args: prompt_ids, prompt_mask [B, S]; generator: of the model's device; temperature > 0 divides
        the logits, below 1e-30 as 1e-30 does: the likeliest token; top_k: keep the k likeliest
        tokens (0: all); top_p: keep the fewest tokens whose probabilities reach p (1: all);
        allowed: [max_tokens, V] bool, the tokens possible at each place, or None.
    Returns: response_ids, response_mask [B, M, R], R <= max_tokens. EOS is inside the mask; a
        response that never reached it has none, and what follows an EOS is EOS, outside the mask.
        [B, M, 0] where B, M or max_tokens is 0.
    Raises: ValueError where temperature <= 0 or nan, top_k < 0, top_p is not in (0, 1], or prompt
        and response are longer than a GPT's context.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    _check_cut(top_k, top_p)
    temperature = max(temperature, 1e-30)  # logits over less would overflow float32
    eos, B = model.config.eos, len(prompt_ids)
    if 0 in (B, M, max_tokens):
        nothing = torch.zeros(B, M, 0, dtype=torch.long, device=prompt_ids.device)
        return nothing, nothing.bool()
    logits, step = model.decode(prompt_ids, prompt_mask, M, max_tokens)
    ids = torch.full((B * M, max_tokens), eos, device=logits.device)
    mask = torch.zeros(B * M, max_tokens, dtype=torch.bool, device=logits.device)
    alive = torch.arange(B * M, device=logits.device)  # the responses that `logits` belongs to
    for t in range(max_tokens):
        here = None if allowed is None else allowed[t]
        probs = next_token_probs(logits.float() / temperature, top_k, top_p, here)
        cdf = probs.double().cumsum(-1)  # [alive, V]; a token whose probability is 0 is never drawn
        u = torch.rand(len(cdf), 1, dtype=torch.float64, generator=generator, device=cdf.device)
        token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0]
        going = ~(ids[alive, t - 1] == eos) if t else torch.ones_like(token, dtype=torch.bool)
        token = token.masked_fill(~going, eos)
        ids[alive, t], mask[alive, t] = token, going
        going = token != eos
        left = int(going.sum())
        if left == 0 or t + 1 == max_tokens:
            break
        rows = None
        if left <= 0.75 * len(alive):  # finished responses leave, a quarter of them at a time
            rows = going.nonzero()[:, 0]
            alive, token = alive[rows], token[rows]
        logits = step(token, rows)
    return tuple(x[:, : t + 1].unflatten(0, (B, M)) for x in (ids, mask))


def _check_cut(top_k: int, top_p: float) -> None:
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"expected top_k >= 0 and 0 < top_p <= 1, got {top_k} and {top_p}")


def next_token_probs(
    logits: Tensor, top_k: int = 0, top_p: float = 1.0, allowed: Tensor | None = None
) -> Tensor:
    """softmax [N, V] of logits [N, V], cut to the tokens that may be drawn.

    Those are the allowed ones [V], of these the top_k likeliest, of these the nucleus top_p. What
    is cut is 0; the rest is not normalised anew. ValueError where top_k < 0 or top_p is not in
    (0, 1].
    """
    _check_cut(top_k, top_p)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if top_k:
        kept = logits.topk(min(top_k, logits.shape[-1])).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, index = probs.sort(descending=True)
        cut = ordered.cumsum(-1) - ordered >= top_p  # the likelier tokens hold p already
        cut[:, 0] = False  # the likeliest is always kept
        probs = probs.masked_fill(torch.zeros_like(cut).scatter(-1, index, cut), 0.0)
    return probs
