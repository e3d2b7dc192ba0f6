"""A small GPT, a T5-like encoder-decoder, and a value network.

Both models read a prompt once, and score or sample M responses of it:

    model(prompt_ids, prompt_mask, response_ids)        -> logits [B, M, R, V]
    model.hidden(prompt_ids, prompt_mask, response_ids) -> [B, M, R, D]   what the head reads
    model.encode(prompt_ids, prompt_mask)               -> [B, S, D]      the prompt's own states
    response_logps(model, batch)                        -> [B, M]         log pi(response | prompt)
    sample(model, prompt_ids, prompt_mask, M, ...)      -> response_ids, response_mask [B, M, R]
    ValueNetwork(backbone)(prompt_ids, prompt_mask)     -> [B]            V(x), of the prompt alone

logits[..., t, :] predicts response_ids[..., t]; log pi is a sum over tokens. B prompts, M responses
of each, S prompt tokens, R response tokens, V vocabulary, D width, H heads. Prompts and responses
are padded on the right; what stands in the padding changes nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------- GPT


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
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Output [N, T, D] of x [N, T, D], and the keys and values; past: a cache, or None."""
        N, T, D = x.shape
        qkv = self.c_attn(x).view(N, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [N, H, T, D/H] each
        if past is not None:
            k, v = past.extend(k, v)  # [N, H, S + T, D/H]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(N, T, D)), (k, v)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width)
        D = config.width
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "c_proj": nn.Linear(4 * D, D)})

    def forward(
        self,
        x: Tensor,
        past: "PromptCache | SamplingCache | None" = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As `Attention.forward`."""
        y, keys_values = self.attn(self.ln_1(x), past, mask)
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

    def hidden(self, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor) -> Tensor:
        """States that predict each response token.

        The prompt is read once; each response attends to [prompt, itself].

        Args: prompt_ids, prompt_mask [B, S], at least one real token a row; response_ids [B, M, R].
        Returns: [B, M, R, D]; [..., 0, :] is the last prompt token's state, the same for all M.
        Raises: ValueError where S + R exceeds the context.
        """
        (B, S), (_, M, R) = prompt_ids.shape, response_ids.shape
        if S + R > self.config.context:
            raise ValueError(
                f"prompt and response need {S} + {R} tokens, the model reads {self.config.context}"
            )
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
        for block, (k, v) in zip(self.h, cache):
            y, _ = block(y, PromptCache(k, v, M), mask)
        return self.ln_f(torch.cat([first, y.unflatten(0, (B, M)).to(first.dtype)], 2))

    def head(self, states: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D]."""
        return F.linear(states, self.wte.weight)

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


# ----------------------------------------------------------------------------------------------- T5

BUCKETS, MAX_DISTANCE = 32, 128  # of T5's relative positions


@dataclass
class T5Config:
    """Size of a T5; v1.1 and FLAN large are (32128, 24, 16, 1024, 64, 2816, eos=1, start=0)."""

    vocab_size: int = 512
    layers: int = 2  # of the encoder, and as many of the decoder
    heads: int = 4
    width: int = 128
    head_width: int = 32
    mlp_width: int = 256
    eos: int = 511  # the token that ends a response
    # What the decoder reads first: T5's padding id, or one id more than the vocabulary.
    start: int = 512


def position_bucket(relative: Tensor, bidirectional: bool) -> Tensor:
    """Bucket 0 .. 31 of a relative position, key minus query (T5; Raffel et al. 2020).

    As in T5X and transformers: near positions have a bucket each, far ones share buckets that grow
    with log distance, up to MAX_DISTANCE. An encoder gives half of the buckets to keys after the
    query; to a causal decoder they are all one.

    >>> position_bucket(torch.tensor([-200, -16, -1, 0, 1, 64]), bidirectional=True)
    tensor([15, 10,  1,  0, 17, 30])
    """
    buckets = BUCKETS // 2 if bidirectional else BUCKETS
    distance = relative.abs() if bidirectional else (-relative).clamp_min(0)
    near = buckets // 2
    ratio = (distance.clamp_min(1).float() / near).log() / math.log(MAX_DISTANCE / near)
    far = ratio * (buckets - near)
    bucket = torch.where(distance < near, distance, (near + far.long()).clamp_max(buckets - 1))
    return bucket + buckets * (relative > 0) if bidirectional else bucket


class T5Attention(nn.Module):
    """Multi-head attention without biases; the query's initialisation carries 1 / sqrt(d)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.head_width
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """[N, T, H d] -> [N, H, T, d]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [N, H, T, d] of states [N, T, D]."""
        return self.split(self.k(states)), self.split(self.v(states))

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """x [N, T, D]; mask: bool, or a number that is added to every score [N, H, T, keys]."""
        q, (k, v) = self.split(self.q(x)), keys_values
        if mask.dtype == torch.bool:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        else:
            # Fused attention takes another kernel where the bias needs a gradient: in bfloat16 a
            # policy would differ from a reference of the same weights by tenths of a nat.
            y = (q @ k.transpose(2, 3) + mask).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


class T5Block(nn.Module):
    """Pre-norm: self-attention, a decoder's cross-attention, gated MLP, each added to its input."""

    def __init__(self, config: T5Config, decoder: bool) -> None:
        super().__init__()
        norm = lambda: nn.RMSNorm(config.width, eps=1e-6)
        self.attn_norm, self.attn = norm(), T5Attention(config)
        if decoder:
            self.cross_norm, self.cross = norm(), T5Attention(config)
        self.mlp_norm = norm()
        self.wi_0 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.wi_1 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.wo = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        prompt: tuple[Tensor, Tensor] | None = None,
        prompt_mask: Tensor | None = None,
        past: SamplingCache | None = None,
    ) -> Tensor:
        """x [N, T, D] -> [N, T, D].

        Args: prompt: this layer's cross-attention keys and values [B, H, S, d], which the N / B
            responses of a prompt share; past: the tokens read before.
        """
        y = self.attn_norm(x)
        keys_values = self.attn.keys_values(y)
        x = x + self.attn(y, past.extend(*keys_values) if past else keys_values, mask)
        if prompt is not None:
            # All tokens of a prompt's M responses are queries side by side: nothing is copied.
            (N, T, D), B = x.shape, len(prompt[0])
            y = self.cross_norm(x).reshape(B, N // max(B, 1) * T, D)  # [B, M T, D]
            x = x + self.cross(y, prompt, prompt_mask).view_as(x)
        y = self.mlp_norm(x)
        return x + self.wo(F.gelu(self.wi_0(y), approximate="tanh") * self.wi_1(y))


class T5Stack(nn.Module):
    """Encoder or decoder: blocks, one table of relative positions for all, a norm at the end."""

    def __init__(self, config: T5Config, decoder: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.positions = nn.Embedding(BUCKETS, config.heads)
        self.blocks = nn.ModuleList(T5Block(config, decoder) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)

    def bias(self, T: int) -> Tensor:
        """What attention adds to its scores [1, H, T, T], learned by relative position.

        Ahead of a decoder's query it is -inf.
        """
        place = torch.arange(T, device=self.positions.weight.device)
        relative = place - place[:, None]  # [T query, T key]
        bias = self.positions(position_bucket(relative, not self.decoder)).permute(2, 0, 1)[None]
        return bias.masked_fill(relative > 0, -torch.inf) if self.decoder else bias


class T5(nn.Module):
    """T5 v1.1: RMSNorm, no biases, gated GELU, relative positions, untied head.

    The encoder reads the prompt once.

    >>> size = dict(layers=1, heads=2, width=8, head_width=4, mlp_width=16)
    >>> model = T5(T5Config(vocab_size=11, **size, eos=10, start=11))
    >>> prompt, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool)
    >>> responses = torch.tensor([[[4, 10], [5, 10]]])  # B = 1 prompt, M = 2, R = 2 tokens
    >>> model(prompt, mask, responses).shape
    torch.Size([1, 2, 2, 11])
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        tokens = max(config.vocab_size, config.start + 1)
        self.shared = nn.Embedding(tokens, config.width)  # of encoder and decoder
        self.encoder, self.decoder = T5Stack(config, False), T5Stack(config, True)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        D, H, d = config.width, config.heads, config.head_width
        std = dict(q=(D * d) ** -0.5, o=(H * d) ** -0.5, wo=config.mlp_width**-0.5, shared=1.0)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=std.get(name.split(".")[-2], D**-0.5))

    def encode(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """States [B, S, D] of the prompt's own tokens; the reader masks those of padding."""
        x = self.shared(prompt_ids)
        mask = self.encoder.bias(prompt_ids.shape[1])  # [1, H, S, S]
        # The lowest number is not -inf, which would give nan for a prompt without tokens.
        mask = mask.masked_fill(~prompt_mask[:, None, None], torch.finfo(mask.dtype).min)
        for block in self.encoder.blocks:
            x = block(x, mask)
        return self.encoder.norm(x)

    def hidden(self, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor) -> Tensor:
        """States that predict each response token.

        The decoder reads the start token, and the response without its last token.

        Args: prompt_ids, prompt_mask [B, S], at least one real token a row; response_ids [B, M, R].
        Returns: [B, M, R, D].
        """
        B, M, R = response_ids.shape
        states = self.encode(prompt_ids, prompt_mask)
        start = response_ids.new_full((B, M, 1), self.config.start)
        ids = torch.cat([start, response_ids], -1)[..., :R]  # [B, M, R]
        y = self.shared(ids).flatten(0, 1)  # [B * M, R, D]
        mask = self.decoder.bias(R)
        for block in self.decoder.blocks:
            y = block(y, mask, block.cross.keys_values(states), prompt_mask[:, None, None])
        return self.decoder.norm(y).unflatten(0, (B, M))

    def head(self, states: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D]."""
        return self.lm_head(states)

    def forward(self, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor) -> Tensor:
        """Logits [B, M, R, V]; logits[..., t, :] predicts response_ids[..., t]."""
        return self.head(self.hidden(prompt_ids, prompt_mask, response_ids))

    def decode(
        self, prompt_ids: Tensor, prompt_mask: Tensor, M: int, max_tokens: int
    ) -> tuple[Tensor, Callable[..., Tensor]]:
        """As `GPT.decode`: first logits [B * M, V], step(ids, rows) -> logits [len(rows), V]."""
        states = self.encode(prompt_ids, prompt_mask).repeat_interleave(M, 0)  # [B * M, S, D]
        prompts = [block.cross.keys_values(states) for block in self.decoder.blocks]
        prompt_mask = prompt_mask.repeat_interleave(M, 0)[:, None, None]  # [B * M, 1, 1, S]
        cache = [SamplingCache(k[:, :, :0], v[:, :, :0], 1, max_tokens) for k, v in prompts]
        bias = self.decoder.bias(max_tokens)

        def step(ids: Tensor, rows: Tensor | None = None) -> Tensor:
            nonlocal prompts, prompt_mask
            if rows is not None:
                prompts, prompt_mask = [(k[rows], v[rows]) for k, v in prompts], prompt_mask[rows]
                for past in cache:
                    past.k, past.v = past.k[rows], past.v[rows]
            y, t = self.shared(ids)[:, None], cache[0].length  # [rows, 1, D]
            for block, prompt, past in zip(self.decoder.blocks, prompts, cache):
                y = block(y, bias[:, :, t : t + 1, : t + 1], prompt, prompt_mask, past)
            return self.head(self.decoder.norm(y[:, 0]))

        return step(torch.full((len(states),), self.config.start, device=states.device)), step


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
    mask = batch.response_mask
    states = model.hidden(batch.prompt_ids, batch.prompt_mask, batch.response_ids)
    states = states[mask]  # [n, D], real tokens alone
    logits = model.head(states).float()  # [n, V]
    if allowed is not None:
        place = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)[mask]
        logits = logits.masked_fill(~allowed[place], -torch.inf)
    token_logps = -F.cross_entropy(logits, batch.response_ids[mask], reduction="none")  # [n]
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, token_logps).sum(-1)


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
