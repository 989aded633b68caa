"""A tokenizer trained on a corpus: byte-level BPE with RoBERTa's special tokens."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # ids 0 … 4; RoBERTa has <mask> last instead
LEAST = 256 + len(SPECIAL)  # ids: the bytes and the special tokens


def train_byte_level_bpe(texts: Iterator[str], size: int, directory: pathlib.Path) -> int:
  """Trains a tokenizer, writes its files, and returns its number of ids: `size`, or fewer if the corpus is small.

  Args:
    texts: the corpus; read once.
    size: LEAST or more; special tokens and the 256 bytes included.
    directory: exists; gets tokenizer.json and tokenizer_config.json.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=size, min_frequency=2, special_tokens=list(SPECIAL), show_progress=False,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
  )  # fmt: skip
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
  tokenizer.save(str(directory / "tokenizer.json"))
  names = {"bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "</s>",
           "unk_token": "<unk>", "mask_token": "<mask>"}  # fmt: skip
  about = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
  (directory / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
  return tokenizer.get_vocab_size()
