"""A backbone and a corpus small enough for a whole run in seconds, in the formats that users bring."""

from __future__ import annotations

import gzip
import importlib
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # of `configs`, which are beside the package

TOPICS = {
  "sorting": "merge quick heap stable order compare swap pivot list array sorted ascending",
  "graphs": "node edge path cycle tree weight shortest flow vertex neighbour connected bipartite",
  "numbers": "prime factor modulo integer fraction divisor remainder even odd square root power",
  "strings": "prefix suffix substring character match pattern search replace upper lower trim split",
  "files": "open read write close seek buffer stream directory rename delete append lock",
  "network": "socket packet address port listen connect timeout retry server client route latency",
  "statistics": "mean median variance sample deviation quantile normal hypothesis interval regression fit error",
  "matrices": "row column rank inverse transpose product determinant eigenvalue diagonal sparse dense trace",
}


def sentences(count: int, words: int, seed: int) -> list[tuple[str, str]]:
  """Returns (topic, sentence) pairs: `words` words of one topic each, drawn by `seed`."""
  generator = np.random.default_rng(seed)
  names = sorted(TOPICS)
  drawn = []
  for index in range(count):
    topic = names[index % len(names)]
    drawn.append((topic, " ".join(generator.choice(TOPICS[topic].split(), words))))
  return drawn


def beir(directory: pathlib.Path, passages: int = 64, queries: int = 48, seed: int = 0) -> pathlib.Path:
  """Writes a BEIR folder: a passage's query is some of its words; splits train and dev."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / "qrels").mkdir(exist_ok=True)
  generator = np.random.default_rng(seed)
  corpus = sentences(passages, 14, seed)
  with gzip.open(directory / "corpus.jsonl.gz", "wt", encoding="utf-8") as stream:
    for row, (topic, text) in enumerate(corpus):
      stream.write(json.dumps({"_id": f"p{row}", "title": topic, "text": text}) + "\n")
  judged: dict[str, list[str]] = {"train": [], "dev": []}
  with open(directory / "queries.jsonl", "w", encoding="utf-8") as stream:
    for number in range(queries):
      row = int(generator.integers(passages))
      text = " ".join(generator.permutation(corpus[row][1].split())[:5])
      stream.write(json.dumps({"_id": f"q{number}", "text": text}) + "\n")
      judged["dev" if number % 3 == 0 else "train"].append(f"q{number}\tp{row}\t1\n")
  for split, lines in judged.items():
    (directory / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
  return directory


def tokenizer() -> tokenizers.Tokenizer:
  """A WordPiece tokenizer over the topics' words and the letters, with BERT's special tokens."""
  words = sorted({word for topic in TOPICS.values() for word in topic.split()} | set(TOPICS))
  letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
  pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *(f"##{letter}" for letter in letters)]
  vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
  made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
  made.normalizer = normalizers.BertNormalizer()
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  made.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
  )
  made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
  return made


def bpe() -> tokenizers.Tokenizer:
  """A byte-level BPE tokenizer in which the topics' words are whole, with RoBERTa's special tokens."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=1000,
    special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  made.train_from_iterator([f"{topic} {words}" for topic, words in sorted(TOPICS.items())], trainer)
  made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
  return made


def backbone(
  directory: pathlib.Path, *, family: str = "bert", hidden: int = 32, layers: int = 2, heads: int = 4, seed: int = 0,
  head: bool = False,
) -> pathlib.Path:  # fmt: skip
  """Writes a random BERT or RoBERTa in Hugging Face layout: config.json, model.safetensors, tokenizer files.

  With `head` it has a language-model head, and its tensors the names of a whole checkpoint.
  """
  directory.mkdir(parents=True, exist_ok=True)
  vocabulary, special, of_family = {
    "bert": (tokenizer, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
             {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0}),
    "roberta": (bpe, ("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
                {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}),
  }[family]  # fmt: skip
  vocabulary = vocabulary()
  size, inner, positions = vocabulary.get_vocab_size(), 2 * hidden, 96
  config = {
    "model_type": family, "vocab_size": size, "hidden_size": hidden, "num_hidden_layers": layers,
    "num_attention_heads": heads, "intermediate_size": inner, "max_position_embeddings": positions,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02,
    **of_family,
  }  # fmt: skip
  generator = np.random.default_rng(seed)

  def normal(*shape: int) -> np.ndarray:
    return generator.normal(0, 0.2, shape).astype(np.float32)

  tensors = {
    "embeddings.word_embeddings.weight": normal(size, hidden),
    "embeddings.position_embeddings.weight": 0.1 * normal(positions, hidden),
    "embeddings.token_type_embeddings.weight": normal(config["type_vocab_size"], hidden),
  }
  norms = ["embeddings.LayerNorm"]
  for layer in range(layers):
    at = f"encoder.layer.{layer}."
    dense = {f"attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")}
    dense |= {
      "attention.output.dense": (hidden, hidden),
      "intermediate.dense": (inner, hidden),
      "output.dense": (hidden, inner),
    }
    for name, shape in dense.items():
      tensors[f"{at}{name}.weight"], tensors[f"{at}{name}.bias"] = normal(*shape), 0.1 * normal(shape[0])
    norms += [f"{at}attention.output.LayerNorm", f"{at}output.LayerNorm"]
  for name in norms:
    tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + 0.1 * normal(hidden), 0.1 * normal(hidden)
  if head:
    tensors = {f"{family}.{name}": tensor for name, tensor in tensors.items()} | _head(family, size, hidden, normal)
  (directory / "config.json").write_text(json.dumps(config))
  save_file(tensors, directory / "model.safetensors")
  vocabulary.save(str(directory / "tokenizer.json"))
  names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
  tokens = {"tokenizer_class": f"{family.capitalize()}Tokenizer", **dict(zip(names, special, strict=True))}
  (directory / "tokenizer_config.json").write_text(json.dumps(tokens))
  return directory


def _head(family: str, size: int, hidden: int, normal: Callable[..., np.ndarray]) -> dict[str, np.ndarray]:
  """A language-model head's tensors, tied to the word embeddings."""
  dense, norm, bias = {
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
  }[family]
  return {
    f"{dense}.weight": normal(hidden, hidden), f"{dense}.bias": normal(hidden),
    f"{norm}.weight": 1 + normal(hidden), f"{norm}.bias": normal(hidden), bias: normal(size),
  }  # fmt: skip


_SMALL = {
  "prompt.length": 4, "text.passage_length": 32, "train.steps": 4, "train.queries": 8, "train.evaluate_every": 2,
  "train.learning_rate": 0.01, "train.negatives": "bm25", "train.query_chunk": 0, "train.passage_chunk": 0,
  "log_every": 1, "pretrain.spans": 16, "pretrain.span_tokens": 18, "pretrain.steps": 2, "pretrain.evaluate_every": 2,
  "cross.steps": 2, "cross.queries": 4, "cross.passages": 2, "cross.length": 4, "cross.pair_length": 48,
  "cross.evaluate_every": 2, "cross.evaluate_queries": 8, "cross.rerank": 10, "cross.depth": 5,
  "mine.bm25.depth": 10, "mine.dense.depth": 20, "evaluate.measures": ("RR@10", "R@100"), "backbone.sha256": "",
}  # fmt: skip


def config(directory: pathlib.Path, name: str = "beir", **fields: Any):
  """configs/NAME.py over DIR/data and DIR/backbone, which are written first, at their size.

  Args:
    fields: settings by their names with '__' for '.'.
  """
  if not (directory / "data").exists():
    beir(directory / "data")
  if not (directory / "backbone").exists():
    backbone(directory / "backbone")
  made = importlib.import_module(f"configs.{name}").get_config()
  made.data.dir, made.backbone.path = str(directory / "data"), str(directory / "backbone")
  made.update_from_flattened_dict(_SMALL | {key.replace("__", "."): value for key, value in fields.items()})
  return made
