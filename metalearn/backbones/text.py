"""Networks for texts without pretraining: hashed n-grams, and a small transformer.

Legend of shapes: B texts, L tokens, D features, H heads.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metalearn.backbones.base import Backbone, FreezableBackbone
from metalearn.backbones.layers import masked_mean
from metalearn.backbones.normalisation import Normaliser
from metalearn.backbones.transformer import init_transformer, transformer
from metalearn.config.fields import at_least, between
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.types import InputSpec, Params, Tokenizer


@dataclasses.dataclass(frozen=True)
class HashedTokens:
    """Splits texts into parts, and numbers them by a hash: 1 to `vocabulary` - 1.

    Of a text, the first `length` tokens are used.
    """

    vocabulary: int
    length: int
    split: Callable[[str], Iterable[str]]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return tokens, int64 [I, L], padded with 0 to the longest text."""
        rows = [torch.zeros(1, dtype=torch.int64)]
        for text in texts:
            parts = itertools.islice(self.split(text), self.length)
            numbers = [1 + zlib.crc32(part.encode()) % (self.vocabulary - 1) for part in parts]
            rows.append(torch.tensor(numbers, dtype=torch.int64))
        return pad_sequence(rows, batch_first=True)[1:]


def character_ngrams(text: str, size: int) -> list[str]:
    """Return all n-grams of the characters of a text in lower case, with a space on both sides."""
    text = f" {' '.join(text.lower().split())} "
    return [text[at : at + size] for at in range(max(1, len(text) - size + 1))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BagOfNGrams(FreezableBackbone):
    """The square roots of the counts of hashed character n-grams, times a weight each, with norm 1.

    `features` is the number of hash values D, and `length` the largest number of n-grams of a text;
    those after it are left out. The weights are 1 before training.
    """

    input_kinds: ClassVar[tuple[str, ...]] = ("tokens",)
    normalises: ClassVar[bool] = False

    ngram: int = at_least(1)
    features: int = at_least(2)
    length: int = at_least(1)

    def tokenizer(self) -> Tokenizer:
        return HashedTokens(
            self.features + 1, self.length, lambda text: character_ngrams(text, self.ngram)
        )

    def init(self, inputs: InputSpec, key: Tensor) -> tuple[Params, Params]:
        return {"weight": torch.ones(self.features, device=key.device)}, {}

    def shape(self, inputs: InputSpec) -> tuple[int, ...]:
        return (self.features,)

    def forward(self, params: Params, x: Tensor, norm: Normaliser, key: Tensor | None) -> Tensor:
        counts = torch.zeros(len(x), self.features + 1, device=x.device)
        counts = counts.scatter_add(1, x, torch.ones_like(x, dtype=counts.dtype))[:, 1:]
        return F.normalize(counts.sqrt() * params["weight"], dim=-1)


def words(text: str) -> list[str]:
    """Split a text into words and punctuation in lower case, without accents, as BERT does."""
    try:
        from tokenizers import normalizers, pre_tokenizers
    except ModuleNotFoundError:
        raise UserError(
            "backbone=text_transformer: tokenizers is not installed; "
            "pip install 'metalearn-lab[text]'"
        ) from None
    text = normalizers.BertNormalizer(lowercase=True).normalize_str(text)
    return [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTransformer(Backbone):
    """A small transformer over hashed words, from scratch; the mean of its outputs (pre-norm).

    `heads` is a divisor of the number `width` of features; words after `length` are left out.
    `dropout` leaves words out in training (none is scaled).
    """

    input_kinds: ClassVar[tuple[str, ...]] = ("tokens",)
    normalises: ClassVar[bool] = False

    layers: int = at_least(1)
    width: int = at_least(2)
    heads: int = at_least(1)
    vocabulary: int = at_least(1)
    length: int = at_least(1)
    dropout: float = between(0, 1)

    def tokenizer(self) -> Tokenizer:
        return HashedTokens(self.vocabulary + 1, self.length, words)

    def init(self, inputs: InputSpec, key: Tensor) -> tuple[Params, Params]:
        width = self.width
        if width % self.heads:
            raise UserError(f"backbone.heads={self.heads}: should divide backbone.width={width}")

        vocabulary = inputs.vocabulary or self.vocabulary + 1
        params: Params = {
            "token.weight": prng.normal(prng.fold_in(key, 0), (vocabulary, width)) * width**-0.5,
            "position.weight": prng.normal(prng.fold_in(key, 1), (inputs.shape[0], width)) * 0.02,
            **init_transformer(key, self.layers, width),
        }
        return params, {}

    def shape(self, inputs: InputSpec) -> tuple[int, ...]:
        return (self.width,)

    def forward(self, params: Params, x: Tensor, norm: Normaliser, key: Tensor | None) -> Tensor:
        """Compute the mean output over the tokens x [B, L] that are no padding."""
        is_word = x != 0
        if key is not None and self.dropout:
            is_word = is_word & (prng.uniform(key, tuple(x.shape)) >= self.dropout)
        mask = torch.where(is_word, 0.0, -1e9)[:, None, None, :]  # a text without words: uniform
        position = params["position.weight"][: x.shape[1]]
        z = F.embedding(x, params["token.weight"]) + position
        z = transformer(params, z, self.layers, self.heads, self.eps, mask)
        return masked_mean(z, is_word)
