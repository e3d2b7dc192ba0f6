"""A small T5-like encoder-decoder: the encoder reads a prompt once for all its M responses.

It is used as model.GPT is: hidden, head, head_weight, encode, decode, and the functions of
model.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import SamplingCache

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

    def hidden(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        response_ids: Tensor,
        response_mask: Tensor | None = None,
    ) -> Tensor:
        """States that predict each response token.

        The decoder reads the start token, and the response without its last token.

        Args: prompt_ids, prompt_mask [B, S], at least one real token a row; response_ids [B, M, R];
            response_mask: not read, padding is computed like the rest.
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

    @property
    def head_weight(self) -> Tensor:
        """[V, D]"""
        return self.lm_head.weight

    def head(self, states: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D]."""
        return F.linear(states, self.head_weight)

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
