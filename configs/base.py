"""Every field once, with its unit, its default and where that comes from. The other configs say only what differs."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """The defaults; a backbone and a data source are still to be named."""
  return ConfigDict(
    dict(
      seed=0,  # of everything random: prompts, order of examples, negatives, dropout
      fsdp=1,  # devices over which a frozen backbone is split that does not fit one; all devices split the batch
      wait_seconds=86_400.0,  # several processes: how long one waits for the others before it gives up
      compute_dtype="auto",  # of matrix products: 'float32' (all of it, no TF32), 'bfloat16', or 'auto': bfloat16 on
      # accelerators and float32 on a CPU
      backbone=dict(
        path="",  # a hub id, a local directory in Hugging Face layout, or 'package:NAME' (weights in a Python package)
        sha256="",  # of its model.safetensors; checked when given
      ),
      data=_data(),
      text=_text(),
      vector=_vector(),
      pretrain=_pretrain(),
      prompt=_prompt(),
      train=_train(),
      rounds=1,  # of training; between two of them negatives are mined with the retriever of the first (the paper's:
      # 2). 0: none, and what is trained already is evaluated
      mine=_mine(),
      cross=_cross(),
      encode=_encode(),
      index=_index(),
      evaluate=_evaluate(),
    )
  )


def _data() -> dict:
  return dict(
    source="beir",  # 'beir', 'msmarco', 'nq', 'original' (the authors' training JSONL), 'docstrings', or 'text': .txt
    # (a passage a line) and JSONL files without queries, which pretrain a backbone and nothing more
    dir="",  # folder of the source's files (a manual directory: nothing is downloaded where the files are here)
    download=False,  # msmarco, nq: fetch the official files into dir, checksums verified
    empty_text="title",  # beir, a passage without text: its 'title' is its text, without both it is an error. 'keep':
    # without both it stays, and no word finds it; 'error': an error whatever its title
    title_augmented=False,  # msmarco: join para.title.txt (the corpus that RocketQA, coCondenser and DPTDR report on)
    packages=("stdlib",),  # docstrings: packages to read; never imported
    dev_modules=(),  # docstrings: modules whose pairs are the dev split
    test_modules=(),  # docstrings: modules whose pairs are the test split
    train_split="train",  # split with the training judgements
    dev_split="dev",  # split that chooses the checkpoint; '' for none
    max_stored_tokens=512,  # tokens of a text that the token store keeps; training and encoding cut further
  )


def _text() -> dict:
  return dict(
    query_length=32,  # tokens, special tokens included (the paper: 32 for MS MARCO and NQ)
    passage_length=128,  # tokens, special tokens included (the paper: 128)
    separator=" ",  # between title and text; RoBERTa's original recipe: '</s>'
    query_template="{text}",  # E5: 'query: {text}'; BGE: 'Represent this sentence … passages: {text}'
    passage_template="{title}{separator}{text}",  # E5: 'passage: {title}{separator}{text}'
  )


def _vector() -> dict:
  return dict(
    pooling="first",  # 'first' token (the original) or 'mean' over tokens
    normalize=False,  # vectors of length 1
    temperature=1.0,  # the loss divides scores by it; about .05 with normalize
  )


def _pretrain() -> dict:
  return dict(
    enabled=False,  # train the whole backbone on the corpus, without labels, before it is frozen (the paper's RIP)
    corpora=("data",),  # 'data' (this run's), text or JSONL files, workdirs of other runs whose prepare is done
    weights=(),  # share of each corpus, any scale; () by numbers of passages
    tokenizer="backbone",  # 'backbone' (go on from backbone.path), or 'train': one of the corpus and a random RoBERTa
    vocabulary=30_000,  # tokenizer 'train': ids of the byte-level BPE
    shape=dict(hidden_size=384, num_layers=6, num_heads=6, intermediate_size=1536, max_positions=514),  # 'train'
    max_stored_tokens=1024,  # tokens of a passage that spans are cut from; a warning tells how many have as many
    epochs=8.0,  # passes over the corpora (coCondenser: 8, little gain after 4); ignored where steps or tokens > 0
    steps=0,  # optimiser steps
    tokens=0,  # budget of tokens, padding not counted; ignored where steps > 0
    spans=2048,  # a step, over all devices; two a passage (coCondenser)
    span_tokens=128,  # limit of a span, special tokens included (coCondenser: 128)
    shortest=8,  # fewest tokens of text in a span
    short_share=0.1,  # spans that aim at a random shorter length (coCondenser's 10 %)
    overlap=False,  # spans may overlap (Contriever's cropping); wants passages longer than span_tokens (MS MARCO's: 70)
    neighbours=1,  # passages drawn in a row, where the corpus' order means something: harder contrast
    contrast_weight=1.0,  # of the contrast between spans; 0: none
    mlm_weight=1.0,  # of masked language modelling; 0: none, and spans are not masked
    mask_rate=0.15,  # share of the tokens that are masked, whole words (BERT)
    normalize=False,  # contrast vectors of length 1; False: raw dot products (coCondenser)
    temperature=1.0,  # the contrast divides scores by it; about .05 with normalize
    dropout=-1.0,  # the backbone's; -1: config.json's own rates; 0: none
    chunk=0,  # gradient cache, spans a device at a time; 0: all at once
    remat="none",  # what the backward pass computes again to save memory: 'none', 'attention', 'layer' (1/3 more work)
    fsdp=1,  # devices over which parameters and optimiser are split; all devices split the batch
    learning_rate=1e-4,  # peak (coCondenser)
    schedule="linear",  # decay after the warm-up: 'linear', 'cosine' or 'constant'
    warmup=0.1,  # share of the steps, or from 1 on their number, where `steps` is set
    weight_decay=0.01,  # AdamW; not on biases and norms
    clip=1.0,  # global norm of the gradient
    log_every=10,  # steps between two lines of metrics.jsonl
    checkpoint_every=1000,  # steps
    keep_checkpoints=2,  # newest ones kept
    evaluate_every=1000,  # steps between two evaluations on dev (never chooses; sizes as in train). 0: none
    loader_workers=2,  # threads that build batches ahead
  )


def _prompt() -> dict:
  return dict(
    kind="deep",  # 'deep' (keys and values in every layer), 'shallow' (at the embeddings), 'none' (all weights train)
    length=32,  # P, prompt vectors a layer
    projection="none",  # 'none', 'mlp'; shallow prompts also 'lstm'
    projection_size=512,  # width inside the projection
    tied=True,  # one prompt for queries and passages, or one each
    position_shift=-1,  # tokens' positions start this much later; -1: the prompt's length, as the original does
    dropout=0.1,  # on the prompt's keys and values, as the original
    dropout_per="example",  # 'example' (as the original) or 'batch' (one mask for all)
    init="normal",  # 'normal': N(0, init_scale); 'words': the frozen layers' own keys and values of frequent words
    init_scale=0.02,  # standard deviation (the original's)
  )


def _train() -> dict:
  return dict(
    epochs=10.0,  # passes over the training queries; ignored where steps > 0
    steps=0,  # optimiser steps; 0: from epochs
    queries=64,  # a step, over all devices
    passages=2,  # a query: its positive and passages - 1 negatives; 1: in-batch negatives alone
    positive="rotate",  # 'rotate' with the epoch, or 'first' always (NQ)
    negatives="source",  # of round 1: 'source' (the data's own), 'bm25' (mined first, mine.runs too) or 'random'
    sampling="window",  # of negatives in an epoch: 'window' (the original's), 'random', 'top', 'simans' (by score,
    # and 'random' in a round whose negatives have no scores of simans_source)
    sample_first=0,  # only the negatives of a query from this place on, best first
    sample_last=0,  # … and up to this one; 0: to the end
    simans_source="dense",  # whose scores SimANS draws by: 'bm25', 'dense', or one of mine.retrievers or of the file
    # names of mine.runs
    simans_a=0.5,  # its sharpness, 1 / score²; 200 where scores are cosines
    simans_b=0.0,  # its shift, in scores
    refresh_every=0,  # steps; > 0: negatives are mined anew from every so manyeth state while training goes on (ANCE)
    restart=True,  # each round from fresh prompts (the paper's stage 2); False: from those of the round before
    query_chunk=0,  # gradient cache, queries a device at a time; 0: all at once
    passage_chunk=0,  # gradient cache, passages a device at a time; 0: all at once
    remat="none",  # what the backward pass computes again to save memory: 'none', 'attention', 'layer' (1/2 more work)
    both_directions=False,  # also tell each passage's query from the others
    backbone_dropout=-1.0,  # -1: config.json's own rates, as the original; 0: none
    learning_rate=7e-3,  # peak (the paper's; runs of some hundred steps want 2e-2 and more)
    schedule="linear",  # decay after the warm-up: 'linear', 'cosine' or 'constant'
    warmup=0.1,  # share of the steps, or from 1 on their number, where `steps` is set
    weight_decay=0.0,  # AdamW; not on biases and norms
    clip=1.0,  # global norm of the gradient
    log_every=10,  # steps between two lines of metrics.jsonl
    checkpoint_every=500,  # steps
    keep_checkpoints=2,  # newest ones kept
    evaluate_every=500,  # steps between two evaluations on dev; the best is kept. 0: the last is kept
    evaluate_passages=4096,  # passages of the small dev corpus: the judged ones, filled up at random
    evaluate_queries=512,  # dev queries of an evaluation
    select_by="RR@10",  # measure on dev that chooses
    loader_workers=2,  # threads that build batches ahead
  )


def _mine() -> dict:
  return dict(
    bm25=_mined_from(depth=100),
    dense=_mined_from(depth=200),  # the retriever of the round before, by config.index (Tevatron: 200)
    sources=("bm25", "dense", "runs"),  # of a pool between two rounds; before round 1 there is no dense one
    retrievers=(),  # further ones, asked as `dense` but without its margins: 'backbone' (untuned), 'pretrain', 'train1'
    # (in pools after round 2), …
    runs=(),  # TREC run files of other retrievers over the training queries; file names tell them apart
    outside=_mined_from(depth=200),  # how each of them is used
    width=0,  # candidates that a query has in all; 0: whatever the sources give
    same_text=True,  # take out what equals a positive's text, or contains one of 40 characters or more
    cross_encoder=False,  # after all else, keep only what the cross-encoder (see cross) is sure of (RocketQA)
    negative_below=0.1,  # probability below which a candidate stays a negative (RocketQA: .1)
    positive_above=0.9,  # and above which it is a pseudo-positive (RocketQA: .9)
    pseudo_positives=False,  # train on pseudo-positives as on judged ones; else they are left out
    near_duplicate=0.0,  # and what shares this share of its word shingles with a positive (Jaccard); 0: off
  )


def _mined_from(depth: int) -> dict:
  return dict(
    depth=depth,  # ranks of it that are candidates; 0: not asked
    first=0,  # ranks skipped on top, where false negatives stand
    quota=0,  # candidates it gives to a query at most; 0: all
    relative_margin=0.0,  # take out what it scores above this share of its positive (cosines: .95; of a score s below 0
    # that is s - (1 - share) · |s|); 1: above the positive; 0: off. With an index.factory that is not exact, what it
    # finds has the index's own, rounded score
    absolute_margin=0.0,  # or above its positive's score less this; 0: off
  )


def _cross() -> dict:
  return dict(
    enabled=False,  # train a cross-encoder (prompts and a head on the same backbone): it reranks, see also mine
    negatives="bm25",  # 'source' (the data's own), 'bm25' (those of mine0) or 'random'
    sample_last=0,  # only the best so many of a query's; 0: all
    epochs=2.0,  # passes over the training queries; ignored where steps > 0
    steps=0,  # optimiser steps; 0: from epochs
    queries=32,  # a step, over all devices
    passages=4,  # a query: its positive and passages - 1 negatives; the two classes weigh the same
    pair_length=160,  # tokens of query and passage together, special tokens included; text.query_length holds too
    length=32,  # P, prompt vectors a layer, of its own deep prompt
    init="normal",  # its prompt's start: 'normal' or 'words', as prompt.init
    head="match",  # 'match': how well the passage has the query's tokens, by their vectors in the one sequence, besides
    # token 0; 'first': token 0 alone (RocketQA), which takes far longer to train on a frozen backbone
    backbone_dropout=-1.0,  # -1: config.json's own rates; 0: none
    learning_rate=7e-3,  # peak, of prompt and head
    schedule="linear",  # decay after the warm-up: 'linear', 'cosine' or 'constant'
    warmup=0.1,  # share of the steps, or from 1 on their number, where `steps` is set
    weight_decay=0.0,  # AdamW; not on biases
    clip=1.0,  # global norm of the gradient
    chunk=0,  # pairs a device at a time, gradients added up; 0: all at once
    log_every=10,  # steps between two lines of metrics.jsonl
    checkpoint_every=500,  # steps
    keep_checkpoints=2,  # newest ones kept
    evaluate_every=500,  # steps between two trials on dev; the best is kept. 0: the last is kept
    evaluate_queries=128,  # dev queries of a trial
    evaluate_passages=16,  # a dev query: a positive and what BM25 ranks highest beside the positives
    loader_workers=2,  # threads that build batches ahead
    depth=50,  # candidates of a training query that are scored for denoising, best first (RocketQA: 50); with
    # mine.cross_encoder the others are taken out, and a query that keeps none gets random passages
    rerank=100,  # passages of the last retriever that are ranked again in evaluation; those below stay below
  )


def _encode() -> dict:
  return dict(
    batch_tokens=16384,  # tokens a device encodes at a time, padding included
    shard_passages=100_000,  # passages a shard; a killed run goes on at the next shard
    dtype="float32",  # of stored vectors: 'float32' or 'float16'
  )


def _index() -> dict:
  return dict(
    backend="faiss",  # 'faiss' (on the host) or 'devices' (exact, on all local accelerators)
    device_dtype="float32",  # devices: or 'bfloat16', half the memory; the best are scored again in float32
    device_bytes=2**29,  # devices: of each one's memory for passages at a time
    factory="Flat",  # FAISS index, inner product: 'Flat' (exact), 'IVF4096,Flat', 'IVF4096,PQ64', 'HNSW32', …
    sample=262_144,  # vectors that an index trains on
    search_parameters="",  # FAISS parameters at search time, e.g. 'nprobe=64' or 'efSearch=128'
  )


def _evaluate() -> dict:
  return dict(
    splits=("dev",),  # judged splits to report
    measures=("RR@10", "R@20", "R@50", "R@100", "R@1000", "nDCG@10"),  # ir-measures' names
    answers=False,  # Success@k counts passages that contain an answer (NQ's R@k), not judged ones
    graded_splits=(),  # splits in which grades from 2 on are relevant (TREC Deep Learning); nDCG takes the grades
    depth=1000,  # passages a query in the run files
    bm25=True,  # baseline: BM25, k1 .9, b .4, stemmed
    backbone=True,  # baselines: the untuned backbone, before and (where there was any) after pretraining
    retrievers=(),  # saved ones too, each 'NAME=DIR': of any run, task or backbone, or a checkpoint of the original
    other_poolings=(),  # the same baselines with these poolings too: 'first', 'mean' other than vector.pooling
    msmarco_format=False,  # write runs in MS MARCO's format besides TREC's
    examples=12,  # queries that the report shows with their top passages
  )
