"""The docstring corpus: what is read, split and dropped, and the BEIR folder."""

import importlib
import pathlib
import subprocess
import sys

import pytest

from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.formats.beir import Beir
from dptdr_jax.data.records import Judgement

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
sys.path.append(str(LAUNCH))  # as `python launch/docstrings.py` has it

import docstrings  # noqa: E402
from docstrings import Options, split_docstring, write_folder  # noqa: E402
from near_duplicates import DuplicateFinder  # noqa: E402

WORDS = ("orbit", "planet", "violin", "harvest", "granite", "copper", "lantern", "willow", "meadow", "cinder", "falcon")


def body(seed: int, n: int = 20) -> str:
  """Words in an order that only `seed` has."""
  return " ".join(f"{WORDS[(seed * 7 + i * (seed + 3)) % len(WORDS)]}{seed}" for i in range(n))


def function(name: str, summary: str, text: str) -> str:
  return f'def {name}():\n  """{summary}\n\n  {text}\n  """\n'


@pytest.fixture
def sources(tmp_path, monkeypatch):
  """{package: {file: source}} of three packages, which a test may change before `make` writes them."""
  monkeypatch.syspath_prepend(tmp_path)
  return {
    "alphapkg": {"one.py": function("turn", "Turn the wheel of a cart.", body(1))},
    "betapkg": {"two.py": function("melt", "Melt some snow for the tea.", body(2))},
    "gammapkg": {"three.py": function("weave", "Weave a basket out of reeds.", body(3))},
  }


@pytest.fixture
def make(sources, tmp_path):
  """make(**options) → Beir over a folder made of the packages, each of which raises when it is imported."""

  def run(**options):
    for package, modules in sources.items():
      for name, source in {"__init__.py": "raise RuntimeError('imported')\n", **modules}.items():
        path = tmp_path / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source if isinstance(source, bytes) else source.encode())
    importlib.invalidate_caches()
    options = {"packages": tuple(sources), "test_modules": ("betapkg",), "dev_modules": ("gammapkg",)} | options
    write_folder(tmp_path / "out", Options(**options))
    return Beir(tmp_path / "out")

  return run


def names(made, split):
  return [judgement.passage_id for judgement in made.judgements(split)]


def counts(made):
  return files.read_json(made.directory / "docstrings.json")["counts"]


def test_summary_asks_and_name_with_body_answers(make):
  made = make()
  assert made.splits() == ("train", "dev", "test")
  (query,) = made.queries("train")
  assert query.text == "Turn the wheel of a cart."
  assert list(made.judgements("train")) == [Judgement(query.id, "alphapkg.one.turn", 1)]
  passages = list(made.passages())
  assert [passage.id for passage in passages] == ["alphapkg.one.turn", "betapkg.two.melt", "gammapkg.three.weave"]
  assert passages[0].title == "alphapkg.one.turn" and passages[0].text == body(1)
  assert query.id not in {passage.id for passage in passages}
  assert names(made, "dev") == ["gammapkg.three.weave"] and names(made, "test") == ["betapkg.two.melt"]
  assert not {"alphapkg", "betapkg", "gammapkg"} & set(sys.modules), "nothing is imported"
  assert make(dev_modules=()).splits() == ("train", "test")
  made = make(dev_modules=(), test_modules=())
  assert made.splits() == ("train",) and len(names(made, "train")) == 3


def test_private_objects_and_tests_are_left_out(sources, make):
  hidden = function("hidden", "Hide behind the old barn.", body(4))
  sources["alphapkg"] |= {
    "_impl/_inner.py": function("shown", "Show the stars at night.", body(5)),
    "tests/case.py": hidden,
    "test_case.py": hidden,
    "case_test.py": hidden,
    "_vendor/copy.py": hidden,
    "kinds.py": 'class _Inner:\n  """Keep it to yourself please.\n\n  ' + body(6) + '\n  """\n' + "class Outer:\n"
    "  if True:\n    async def run(self):\n      '''Run around the lake twice.\n\n      " + body(7) + "\n      '''\n"
    "  def _walk(self):\n    '''Walk around the lake once.\n\n    " + body(8) + "\n    '''\n",
  }  # fmt: skip
  assert names(make(), "train") == ["alphapkg.kinds.Outer.run", "alphapkg.one.turn", "alphapkg.shown"]


def test_docstrings_of_c_code_are_read(sources, make):
  sources["alphapkg"]["_add_newdocs.py"] = (
    f"add_newdoc('alphapkg._core', 'sum', 'sum(x, out=None)\\n\\nAdd up all the apples.\\n\\n{body(4)}')\n"
    f"add_newdoc('airy', 'Blow a gentle breeze around.\\n\\n{body(5)}')\n"
    f"add_newdoc('_secret', 'Tell nobody about the cave.\\n\\n{body(6)}')\n"
    f"add_newdoc('alphapkg', 'parts', ('of', 'Name the parts of it.\\n\\n{body(7)}'))\n"
  )
  assert names(make(), "train") == ["alphapkg.sum", "alphapkg.airy", "alphapkg.one.turn"]
  assert next(make().queries("train")).text == "Add up all the apples."


def test_broken_files_are_skipped_and_counted(sources, make):
  sources["alphapkg"] |= {
    "broken.py": "def (:\n",
    "zeros.py": b"x = '\0'\n",
    "undecodable.py": b"x = '\xff\xfe'\n",
    "latin.py": b"# -*- coding: latin-1 -*-\n"
    + function("brew", "Brew the coffee of a café.", body(4)).encode("latin-1"),
  }
  made = make()
  assert counts(made)["files skipped: cannot be parsed"] == 3
  assert counts(made)["files read"] == 10
  assert [query.text for query in made.queries("train")][0] == "Brew the coffee of a café."


def test_short_and_repeated_docstrings_are_dropped_for_a_reason(sources, make):
  sources["alphapkg"]["more.py"] = "".join([
    function("brief", "Too short.", body(4)),
    function("bare", "This one has no body.", "Only a few words."),
    function("fold", "Fold the paper in half.", body(5)),
    function("fold_again", "Fold the paper in half!", body(5)),
    function("cut", "Cut the paper in half.", body(6)),
    function("cut_too", "Cut the paper in half.", body(7)),
    function("glue", "Glue both of the halves.", body(8)),
    function("paste", "Paste them onto the wall.", body(8)),
    function("glue", "Glue the halves once more.", body(9)),
  ])  # fmt: skip
  made = make()
  assert names(made, "train") == ["alphapkg.more.fold", "alphapkg.more.glue", "alphapkg.one.turn"]
  assert {reason: n for reason, n in counts(made).items() if reason.startswith("dropped: ")} == {
    "dropped: short summary": 1,
    "dropped: short body": 1,
    "dropped: same name": 1,
    "dropped: repeated body": 2,
    "dropped: summary of several objects": 2,
  }


def test_near_duplicates_are_in_one_split_only(sources, make):
  sources["alphapkg"]["twins.py"] = "".join([
    function("same_summary", "Melts snow for tea.", body(4)),
    function("melt", "Melt snow for a cup.", body(5)),
    function("other_name", "Melt snow for a cup, quickly.", body(6)),
    function("same_body", "Explain everything about winter drinks.", body(2) + " and then some more words"),
  ])  # fmt: skip
  sources["gammapkg"]["twin.py"] = function("thaw", "Melt some snow for the tea pot.", body(7))
  made = make()
  assert names(made, "train") == ["alphapkg.one.turn", "alphapkg.twins.other_name"]
  assert names(made, "dev") == ["gammapkg.three.weave"] and names(made, "test") == ["betapkg.two.melt"]
  assert counts(made)["dropped from train: near-duplicate of a pair held out"] == 3
  assert counts(made)["dropped from dev: near-duplicate of a pair held out"] == 1
  assert len(list(made.passages())) == 4


def test_boilerplate_of_many_docstrings_makes_no_near_duplicates():
  boilerplate = body(1)
  finder = DuplicateFinder()
  finder.add([(f"x.f{i}", f"summary{i}", f"{boilerplate} {body(i + 2)}") for i in range(40)])
  assert not finder.has_duplicate("y.g", "unlike", f"{boilerplate} {body(99)}")
  assert finder.has_duplicate("y.g", "unlike", f"{boilerplate} {body(5)}")


def test_the_longer_module_name_decides(sources, make):
  sources["betapkg"]["kept.py"] = function("carve", "Carve a spoon from birch.", body(4))
  made = make(test_modules=("betapkg", "gammapkg.three"), dev_modules=("betapkg.kept",))
  assert names(made, "dev") == ["betapkg.kept.carve"]
  assert names(made, "test") == ["betapkg.two.melt", "gammapkg.three.weave"]


def test_folder_depends_on_files_and_options_alone(make, tmp_path):
  make()
  arguments = ["--packages=alphapkg,betapkg,gammapkg,optax", "--test_modules=betapkg,optax", "--dev_modules=gammapkg"]
  contents = []
  for seed in ("1", "2"):
    done = subprocess.run(
      [sys.executable, str(LAUNCH / "docstrings.py"), f"--out={tmp_path / seed}", *arguments],
      env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "written; docstrings: 1 train, 1 dev" in done.stdout, done.stderr
    folder = sorted(path for path in (tmp_path / seed).rglob("*") if path.is_file())
    contents.append({path.relative_to(tmp_path / seed): path.read_bytes() for path in folder})
  assert contents[0] == contents[1] and sum(map(len, contents[0].values())) > 100_000


def test_folder_is_written_again_only_after_a_change(sources, make, tmp_path):
  corpus = make().directory / "corpus.jsonl"
  written = corpus.stat().st_mtime_ns
  assert make().files() == [corpus] and corpus.stat().st_mtime_ns == written
  make(dev_modules=())
  assert not (tmp_path / "out/qrels/dev.tsv").exists()
  sources["alphapkg"]["one.py"] = function("turn", "Turn the wheel of a waggon.", body(1))
  assert next(make().queries("train")).text == "Turn the wheel of a waggon."
  corpus.unlink()
  assert len(list(make().passages())) == 3


@pytest.mark.parametrize("ours", [True, False])
def test_folder_with_other_files_is_refused_untouched(make, tmp_path, ours, capsys):
  if ours:
    make(dev_modules=())
  theirs = tmp_path / "out/notes/notes.txt"
  theirs.parent.mkdir(parents=True)
  theirs.write_text("mine")
  with pytest.raises(InputError, match="out: the directory holds something else"):
    make()
  flags = [f"--out={tmp_path / 'out'}", "--packages=alphapkg", "--test_modules=", "--dev_modules="]
  assert docstrings.main(flags) == 2
  assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
  assert theirs.read_text() == "mine" and (tmp_path / "out/corpus.jsonl").exists() == ours


@pytest.mark.parametrize(
  ("options", "culprit"),
  [
    ({"packages": ("alphapkg", "nosuchpkg")}, "nosuchpkg"),
    ({"packages": ("os.path",)}, "os.path"),
    ({"packages": ("sys",)}, "no Python source: 'sys'"),
    ({"test_modules": ("betapkg.nothing",)}, "betapkg.nothing"),
  ],
)
def test_errors_name_the_culprit(make, options, culprit):
  with pytest.raises(InputError, match=culprit):
    make(**options)


def test_package_may_be_one_file(make, tmp_path):
  (tmp_path / "lonepkg.py").write_text(function("sail", "Sail across the narrow bay.", body(4)))
  assert names(make(packages=("lonepkg", "betapkg", "gammapkg")), "train") == ["lonepkg.sail"]


@pytest.mark.parametrize(
  ("docstring", "summary", "rest"),
  [
    ("Do this.\n\n    Then that.\n      Indented.\n    ", "Do this.", "Then that.\n  Indented."),
    ("Do this. And then\n    do that.\n\n    More.", "Do this.", "And then\ndo that.\n\nMore."),
    ("\n  Wrap a line, e.g. this\n  one, in `two`.\n  ", "Wrap a line, e.g. this one, in two.", ""),
    ("Like :func:`~numpy.sum` and :py:class:`A <b.A>`.", "Like numpy.sum and A.", ""),
    ("Title here\n    ==========\n\n    Body.", "Title here", "Body."),
    ("f(x, y=(1, 2)) -> int\n\nReal summary.\n\nBody.", "Real summary.", "Body."),
  ],
)
def test_split_docstring(docstring, summary, rest):
  assert split_docstring(docstring) == (summary, rest)
