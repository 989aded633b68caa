"""A tokenizer from nothing: byte-level BPE with RoBERTa's special tokens, trained on a corpus."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # ids 0 … 4; RoBERTa's has <mask> last, all else the same
LEAST = 256 + len(SPECIAL)  # ids: the bytes and these


def train_byte_level_bpe(texts: Iterator[str], size: int, directory: pathlib.Path) -> int:
  """Trains a tokenizer and writes its files; returns its number of ids, `size` or fewer where the corpus is small.

  Args:
    texts: the corpus; read once.
    size: ids wanted, special tokens and the 256 bytes included: LEAST or more.
    directory: exists; gets tokenizer.json and tokenizer_config.json.
  """
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=size, min_frequency=2, special_tokens=list(SPECIAL), show_progress=False,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
  )  # fmt: skip
  made.train_from_iterator(texts, trainer)
  made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
  made.save(str(directory / "tokenizer.json"))
  names = {"bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "</s>",
           "unk_token": "<unk>", "mask_token": "<mask>"}  # fmt: skip
  about = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
  (directory / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
  return made.get_vocab_size()
