# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A tokenizer trained on the text, and the text as rows of tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.sample import CHAT_TEMPLATE
from tools.small_moe.text import DOMAINS, Texts

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"
SPECIAL = [END_OF_TEXT, "<|im_start|>", END_OF_TURN]

SHARES = {"prose": 0.4, "code": 0.3, "chat": 0.3}
"""Of the rows of a batch."""


def make_tokenizer(texts: Texts, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of so many entries, trained on all domains alike."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Code is five times the prose; the words of the prose must not be lost in it.
    training = texts.training
    sample = [*training["prose"] * 2, *training["chat"] * 2, *training["code"][::2]]
    tokenizer.train_from_iterator(sample, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TURN, pad_token=END_OF_TEXT
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _stream(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]
) -> torch.Tensor:
    """`documents` one after the other, each ended by END_OF_TEXT: [tokens] int64."""
    # Without the special tokens' own tokenization, a document that names them would
    # be a chat. None of this text does, except where it is one.
    encoded = tokenizer.backend_tokenizer.encode_batch(
        [document + END_OF_TEXT for document in documents]
    )
    return torch.tensor([i for e in encoded for i in e.ids], dtype=torch.int64)


@dataclass
class Rows:
    """Streams of tokens of each domain, cut into rows."""

    streams: dict[str, torch.Tensor]
    length: int
    """Tokens of a row."""

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerFast,
        documents: dict[str, list[str]],
        length: int,
    ) -> "Rows":
        streams = {d: _stream(tokenizer, documents[d]) for d in DOMAINS}
        for domain, stream in streams.items():
            if len(stream) < 2 * length:
                streams[domain] = stream.repeat(2 * length // len(stream) + 1)
        return cls(streams, length)

    def batches(self, rows: int, seed: int) -> Iterator[torch.Tensor]:
        """Without end: [rows, length] int64. Each domain is read from front to back, in
        rows of a random order, and again from another first token."""
        generator = torch.Generator().manual_seed(seed)
        readers = {d: self._reader(s, generator) for d, s in self.streams.items()}
        owed = dict.fromkeys(DOMAINS, 0.0)
        while True:
            batch = []
            for _ in range(rows):
                for domain in DOMAINS:
                    owed[domain] += SHARES[domain]
                domain = max(DOMAINS, key=lambda d: owed[d])
                owed[domain] -= 1
                batch.append(next(readers[domain]))
            yield torch.stack(batch)

    def _reader(
        self, stream: torch.Tensor, generator: torch.Generator
    ) -> Iterator[torch.Tensor]:
        while True:
            first = int(torch.randint(self.length, (1,), generator=generator))
            count = (len(stream) - first) // self.length
            for number in torch.randperm(count, generator=generator).tolist():
                begin = first + number * self.length
                yield stream[begin : begin + self.length]

    def first(self, domain: str, rows: int) -> torch.Tensor:
        """The first rows of a domain, at most so many: [n, length] int64."""
        stream = self.streams[domain]
        count = min(rows, len(stream) // self.length)
        return stream[: count * self.length].view(count, self.length)


def bytes_of_tokens(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """How many bytes each token is, special tokens none: [vocabulary] float32."""
    lengths = torch.zeros(len(tokenizer))
    for token, number in tokenizer.get_vocab().items():
        lengths[number] = 0 if token in SPECIAL else len(token)
    return lengths
