"""A small text encoder of its own for the demo model: vocabulary from ShapeEdit's instructions, T5 from sizes."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from ..files.safe_write import make_folder, write_text
from ..shapeedit.edits import draw_sample, words
from ..text.t5 import T5Config, T5Encoder
from ..text.tokenizers import END
from .settings import NewText

PAD = 0


def make_vocabulary(path: Path, size: int) -> None:
    """Write a tokenizer.json of byte pairs over ShapeEdit's words, all in lower case; unknown words fall to letters.

    The new style that a LoRA teaches (`duotone`) is not in it.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace()
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "</s>", "<unk>"], initial_alphabet=letters, show_progress=False
    )
    rng = Random(0)
    corpus = words(duotone=False) * 20 + [draw_sample(rng, "train").instruction for _ in range(4000)]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", END)]
    )
    make_folder(path.parent)
    write_text(path, tokenizer.to_str(pretty=True))


def new_text_encoder(sizes: NewText, vocabulary: int) -> T5Encoder:
    """A T5 encoder (v1.1 kind: gated GELU) with T5's own random weights."""
    config = T5Config(
        vocabulary=vocabulary,
        width=sizes.width,
        head_size=sizes.width // sizes.heads,
        hidden=sizes.hidden,
        layers=sizes.layers,
        heads=sizes.heads,
        gated=True,
        buckets=16,
        max_distance=64,
    )
    network = T5Encoder(config)
    inner = config.heads * config.head_size
    # Scores have no scale, so the query's weights begin with it.
    fan = {"shared": 1, "q": config.width * config.head_size, "o": inner, "wo": config.hidden}
    for name, parameter in network.named_parameters():
        layer = name.split(".")[-2]
        if layer.endswith("layer_norm"):
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=fan.get(layer, config.width) ** -0.5)
    return network


def pad(ids: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    """Token ids padded to `length` [B, length], and which are real. ValueError where one is longer."""
    longest = max(map(len, ids))
    if longest > length:
        raise ValueError(f"an instruction has {longest} text tokens but the model takes {length}; shorten it")
    table = torch.full((len(ids), length), PAD)
    for row, tokens in enumerate(ids):
        table[row, : len(tokens)] = torch.tensor(tokens)
    lengths = torch.tensor([len(tokens) for tokens in ids])
    return table, torch.arange(length)[None] < lengths[:, None]
