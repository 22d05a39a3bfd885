"""The base model's text side: a tokenizer of the world's words and a UMT5 encoder that understands them.

The encoder is taught to name what a caption asks for from the state of any of its tokens, and then frozen: the
transformer need not learn language as well.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from sandbox import world

TEXT_LENGTH = 24
"""Tokens of the longest caption, and its end mark."""


def make_tokenizer(*, end_last: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the world's language; an end mark closes every text, as T5's does.

    `end_last` gives the end mark the largest index, as CLIP's has, and takes it out of the texts themselves.
    """
    words = sorted({word for phrase in world.vocabulary() for word in phrase.lower().split()})
    tokens = ["<pad>", "<unk>", *words, "</s>"] if end_last else ["<pad>", "</s>", "<unk>", *words]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    if end_last:
        tokenizer.normalizer = normalizers.Sequence([tokenizer.normalizer, normalizers.Replace("</s>", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = ("</s>", vocabulary["</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
    )


def make_text_encoder(tokenizer: PreTrainedTokenizerFast) -> UMT5EncoderModel:
    """An untrained UMT5 encoder of two layers."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
        )
    )


ANSWERS: dict[str, tuple[str | None, ...]] = {
    "colour 1": tuple(world.COLOURS),
    "shape 1": world.SHAPES,
    "colour 2": (None, *world.COLOURS),
    "shape 2": (None, *world.SHAPES),
    "motion": world.MOTIONS,
    "background": world.BACKGROUNDS,
    "size": (None, "small", "large"),
    "effect": (None, "strobe", "disco", "storm", "pulse", "fade"),
    "glyph": (None, "dagger", "duel", "cross", "arrow"),
}


def answers(request: world.Request) -> list[int]:
    """What the text encoder must be able to say about a request: an index for each entry of `ANSWERS`."""
    first, *others = request.things
    second = others[0] if others else None
    told = (
        first.colour,
        first.shape,
        second and second.colour,
        second and second.shape,
        request.motion,
        request.background,
        request.size,
        request.effect,
        request.glyph,
    )
    return [options.index(value) for options, value in zip(ANSWERS.values(), told, strict=True)]


def encode_texts(encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Prompt embeddings `(b, 24, 128)` as WanPipeline makes them: zero after the end mark."""
    tokens = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    tokens = tokens.to(encoder.device)
    hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return hidden * tokens.attention_mask[..., None]


def train_text_encoder(
    encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    num_steps: int,
    batch_size: int = 128,
) -> Iterator[float]:
    """Teach the encoder to name a caption's attributes from any token; yields the loss of each step."""
    rng = np.random.default_rng(seed)
    head = nn.Linear(encoder.config.d_model, sum(map(len, ANSWERS.values())))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps)
    for _ in range(num_steps):
        requests = [world.sample_training_request(rng) for _ in range(batch_size)]
        texts = [world.caption(request, rng) for request in requests]
        hidden = encode_texts(encoder, tokenizer, texts)
        present = hidden.abs().sum(-1) > 0
        logits = head(hidden[present]).split([len(options) for options in ANSWERS.values()], dim=-1)
        truth = torch.tensor([answers(request) for request in requests])
        truth = truth[:, None].expand(-1, TEXT_LENGTH, -1)[present]
        loss = torch.stack([F.cross_entropy(logit, truth[:, i]) for i, logit in enumerate(logits)]).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
