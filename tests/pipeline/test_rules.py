"""What can be known to fail fails before any work, in one line that names settings, values and what to do."""

import shutil

import pytest
from support import runs, tiny

from dptdr_jax.core.errors import InputError

ROUNDS = {"rounds": 2}
PRETRAIN = {"pretrain__enabled": True}
CROSS = {"cross__enabled": True}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  place = tmp_path_factory.mktemp("rules")
  (tiny.beir(place / "data") / "qrels/empty.tsv").write_text("query-id\tcorpus-id\tscore\n")
  tiny.backbone(place / "roberta", family="roberta")
  return place


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    # lengths and measures
    ({"text__passage_length": 512}, "512 tokens don't fit the backbone's 96 positions"),
    ({"data__max_stored_tokens": 20}, "text.query_length is beyond the 20 tokens that are stored: 32"),
    ({"prompt__length": 100, "prompt__position_shift": 0}, "can read 96: 100. Lower prompt.length"),
    ({"text__query_template": "query: {words}"}, "template"),
    ({"evaluate__measures": ("MRR10",)}, "MRR10"),
    ({"evaluate__measures": ()}, "evaluate.measures names no measure"),
    ({"evaluate__depth": 50}, "looks deeper than evaluate.depth, 50: 'R@100'"),
    ({"evaluate__other_poolings": ("mean",)}, "other_poolings holds vector.pooling's own: 'mean'"),
    ({"rounds": 0, "evaluate__baselines": ()}, "nothing to evaluate"),
    # data
    ({"data__dir": "nowhere"}, "nowhere: no such folder"),
    ({"data__dir": ""}, "no folder of data is named. Set --config.data.dir"),
    ({"data__download": True}, "data.download has no files of this format: 'beir'"),
    ({"data__dev_split": "train"}, "the dev split is the training split: 'train'"),
    ({"data__dev_split": "valid"}, "data.dev_split names a split that is not here: 'valid'.*dev.*; '' for none"),
    ({"data__train_split": "tarin"}, "a split that is not here: 'tarin'.* to train nothing, set rounds to 0"),
    ({"evaluate__splits": ("dev", "tset")}, "evaluate.splits names a split that is not here: 'tset'"),
    ({"evaluate__splits": ()}, "evaluate.splits names no split"),
    ({"evaluate__splits": ("dev", "empty")}, "nothing is judged in split empty, which RR@10 needs"),
    ({"evaluate__answers": True, "evaluate__measures": ("Success@5",)}, "no query of split dev has one"),
    ({"train__negatives": "source"}, "train.negatives is 'source', and no negatives come with this data"),
    ({"data__format": "text"}, "it is for pretraining. Set pretrain.enabled to True"),
    # backbone and devices
    ({"backbone__path": "package:no_such_package"}, "no such package is installed"),
    ({"backbone__sha256": "0" * 64}, "SHA-256"),
    ({"fsdp": 3}, "does not fit 8 devices"),
    ({"train__query_chunk": 3, "train__queries": 40}, "a query chunk of 3 does not divide the 5 rows"),
    # training
    ({"train__steps": 0, "train__epochs": 0.0}, "train has no steps. Set train.steps or train.epochs above 0"),
    ({"train__warmup": 3.0, "train__steps": 0}, "train: .*warm-?up"),
    ({"prompt__kind": "none", "prompt__tied": False}, "only prompts can be untied"),
    # mining
    ({**ROUNDS, "mine__runs": ("nowhere.trec",)}, "nowhere.trec: no such run file"),
    ({**ROUNDS, "mine__runs": (__file__, __file__.replace("/pipeline/", "/../tests/pipeline/"))}, "two sources of one"),
    ({**ROUNDS, "mine__sources": ("runs",)}, "nothing to mine from"),
    ({**ROUNDS, "mine__bm25__depth": 0, "mine__dense__depth": 0, "train__negatives": "random"}, "nothing to mine from"),
    ({**ROUNDS, "mine__dense__first": 20}, r"mine.dense.first must be below mine.dense.depth: \(20, 20\)"),
    ({**ROUNDS, "mine__dense__depth": 2**15}, "mine.dense.depth is beyond the 32,767 ranks"),
    ({**ROUNDS, "mine__negative_below": 0.95}, "mine.negative_below is above mine.positive_above"),
    ({"mine__runs": (__file__,), "train__negatives": "random"}, "mine.runs, and nothing is mined"),
    ({"mine__bm25__depth": 0}, "train.negatives is bm25, and mine.bm25.depth is 0"),
    ({**ROUNDS, "train__passages": 1}, "mining needs train.passages ≥ 2: 1"),
    ({"train__passages": 1, "train__refresh_every": 2}, "mining needs train.passages ≥ 2: 1"),
    ({"train__refresh_every": 2, "mine__dense__depth": 0}, "refresh_every mines with the retriever"),
    ({"train__sampling": "simans", "train__simans_source": "dens"}, "unknown train.simans_source: 'dens'. Use bm25"),
    ({**CROSS, "mine__cross_encoder": True}, "denoises what is mined with a retriever, and nothing is"),
    ({**ROUNDS, "mine__cross_encoder": True}, "needs a cross-encoder. Set cross.enabled to True"),
    ({**ROUNDS, **CROSS, "mine__pseudo_positives": True}, "are the cross-encoder's. Set mine.cross_encoder to True"),
    # index
    ({"index__search_parameters": "nprobe=4"}, "search is exact: 'nprobe=4'"),
    ({"index__search_parameters": "nprobe"}, "a list of NAME=NUMBER: 'nprobe'"),
    ({"index__factory": "IVF8Flat"}, "no FAISS index of width 32"),
    ({"index__factory": "IDMap,Flat"}, "IDMap,Flat"),
    ({"index__factory": "IVF8,Flat", "index__search_parameters": "nprob=4"}, "no search parameter of this name"),
    ({"index__backend": "devices", "index__factory": "HNSW32"}, "search on the devices is exact.*HNSW32"),
    # cross-encoder
    ({**CROSS, "cross__steps": 0, "cross__epochs": 0.0}, "cross has no steps"),
    ({**CROSS, "cross__pair_length": 30}, "leaves no room beside queries of 32 tokens: 30"),
    ({**CROSS, "cross__pair_length": 600}, "beyond the 512 tokens that are stored: 600"),
    ({**CROSS, "cross__pair_length": 120}, "don't fit the backbone's"),
    ({**CROSS, "rounds": 0}, "rounds is 0. Set cross.enabled to False"),
    # pretraining
    ({"pretrain__tokenizer": "train"}, "pretrain.tokenizer is train, and nothing is pretrained"),
    ({**PRETRAIN, "pretrain__mlm_weight": 0.0, "pretrain__contrast_weight": 0.0}, "both 0"),
    ({**PRETRAIN, "pretrain__span_tokens": 500}, "500 tokens don't fit"),
    ({**PRETRAIN, "pretrain__corpora": ("nowhere.txt",)}, "nowhere.txt: no such corpus"),
    ({**PRETRAIN, "pretrain__corpora": ()}, "pretrain.corpora is empty"),
    ({**PRETRAIN, "pretrain__steps": 0, "pretrain__epochs": 0.0}, "pretrain has no steps"),
    ({**PRETRAIN, "pretrain__spans": 18}, "spans must be pairs that 1 processes and 8 devices share evenly: 18"),
    ({**PRETRAIN, "pretrain__spans": 64, "pretrain__chunk": 3}, "a span chunk of 3 does not divide the 8 rows"),
    ({**PRETRAIN, "fsdp": 8, "pretrain__tokenizer": "train", "pretrain__shape__hidden_size": 36}, "over 8 devices"),
    ({**PRETRAIN, "pretrain__tokenizer": "train", "pretrain__vocabulary": 100}, "at least 261 ids: 100"),
  ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_any_work(directory, tmp_path, fields, message):
  made = runs.Run(tiny.config(directory, **fields), tmp_path / "work")
  with pytest.raises(InputError, match=message) as raised:
    made.run()
  assert "\n" not in str(raised.value) and not runs.stored(made.workdir)


def test_pool_takes_so_many_sources(directory, tmp_path):
  paths = [str(tmp_path / f"{number}.trec") for number in range(15)]
  for path in paths:
    shutil.copy(__file__, path)
  runs.Run(tiny.config(directory, rounds=2, mine__runs=tuple(paths[1:])), tmp_path / "work").plan()
  with pytest.raises(InputError, match="a pool takes 16 sources at most: 17. Name fewer mine.runs"):
    runs.Run(tiny.config(directory, rounds=2, mine__runs=tuple(paths)), tmp_path / "work").plan()
