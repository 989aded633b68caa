import importlib.util
import subprocess
import sys

import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.records import Judgement
from dptdr_jax.data.sources import docstrings
from dptdr_jax.data.sources.docstrings import DocstringSource, split_docstring
from dptdr_jax.data.sources.twins import TwinFinder

WORDS = ("orbit", "planet", "violin", "harvest", "granite", "copper", "lantern", "willow", "meadow", "cinder", "falcon")


def body(seed: int, n: int = 20) -> str:
  """Words in an order that only `seed` has."""
  return " ".join(f"{WORDS[(seed * 7 + i * (seed + 3)) % len(WORDS)]}{seed}" for i in range(n))


def function(name: str, summary: str, text: str) -> str:
  return f'def {name}():\n  """{summary}\n\n  {text}\n  """\n'


@pytest.fixture
def packages(tmp_path, monkeypatch):
  """Writes packages {name: {file: source}} where Python finds them; every one raises when it is imported."""
  monkeypatch.syspath_prepend(tmp_path)

  def write(sources):
    for package, files in sources.items():
      (tmp_path / package).mkdir()
      for name, source in {"__init__.py": "raise RuntimeError('imported')\n", **files}.items():
        path = tmp_path / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source if isinstance(source, bytes) else source.encode())
    importlib.invalidate_caches()
    return tmp_path

  return write


def three_packages():
  return {
    "alphapkg": {"one.py": function("turn", "Turn the wheel of a cart.", body(1))},
    "betapkg": {"two.py": function("melt", "Melt some snow for the tea.", body(2))},
    "gammapkg": {"three.py": function("weave", "Weave a basket out of reeds.", body(3))},
  }


def source(**settings):
  defaults = {
    "packages": ("alphapkg", "betapkg", "gammapkg"),
    "test_modules": ("betapkg",),
    "dev_modules": ("gammapkg",),
  }
  return DocstringSource(**{**defaults, **settings})


def names(made, split):
  return [judgement.passage_id for judgement in made.judgements(split)]


def test_summary_asks_and_name_with_body_answers(packages):
  root = packages(three_packages())
  made = source()
  assert made.splits() == ("train", "dev", "test")
  (query,) = made.queries("train")
  assert query.text == "Turn the wheel of a cart."
  assert list(made.judgements("train")) == [Judgement(query.id, "alphapkg.one.turn", 1)]
  passages = list(made.passages())
  assert [passage.id for passage in passages] == ["alphapkg.one.turn", "betapkg.two.melt", "gammapkg.three.weave"]
  assert passages[0].title == "alphapkg.one.turn" and passages[0].text == body(1)
  assert query.id not in {passage.id for passage in passages}
  assert list(made.negatives("train")) == []
  assert (root / "alphapkg" / "one.py") in made.files()
  assert names(made, "dev") == ["gammapkg.three.weave"] and names(made, "test") == ["betapkg.two.melt"]


def test_nothing_is_imported(packages):
  packages(three_packages())
  list(source().passages())
  assert not {"alphapkg", "betapkg", "gammapkg"} & set(sys.modules)


def test_what_is_private_or_a_test_is_left_out(packages):
  sources = three_packages()
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
  packages(sources)
  assert names(source(), "train") == ["alphapkg.kinds.Outer.run", "alphapkg.one.turn", "alphapkg.shown"]


def test_docstrings_of_c_code_count(packages):
  sources = three_packages()
  sources["alphapkg"]["_add_newdocs.py"] = (
    f"add_newdoc('alphapkg._core', 'sum', 'sum(x, out=None)\\n\\nAdd up all the apples.\\n\\n{body(4)}')\n"
    f"add_newdoc('airy', 'Blow a gentle breeze around.\\n\\n{body(5)}')\n"
    f"add_newdoc('_secret', 'Tell nobody about the cave.\\n\\n{body(6)}')\n"
    f"add_newdoc('alphapkg', 'parts', ('of', 'Name the parts of it.\\n\\n{body(7)}'))\n"
  )
  packages(sources)
  assert names(source(), "train") == ["alphapkg.sum", "alphapkg.airy", "alphapkg.one.turn"]
  assert next(source().queries("train")).text == "Add up all the apples."


def test_broken_files_are_skipped_and_counted(packages):
  sources = three_packages()
  sources["alphapkg"] |= {
    "broken.py": "def (:\n",
    "zeros.py": b"x = '\0'\n",
    "undecodable.py": b"x = '\xff\xfe'\n",
    "latin.py": b"# -*- coding: latin-1 -*-\n"
    + function("brew", "Brew the coffee of a café.", body(4)).encode("latin-1"),
  }
  packages(sources)
  made = source()
  assert made.counts["files skipped: cannot be parsed"] == 3
  assert made.counts["files read"] == 10
  assert [query.text for query in made.queries("train")][0] == "Brew the coffee of a café."


def test_short_and_repeated_docstrings_are_dropped_for_a_reason(packages):
  sources = three_packages()
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
  packages(sources)
  made = source()
  assert names(made, "train") == ["alphapkg.more.fold", "alphapkg.more.glue", "alphapkg.one.turn"]
  assert {reason: n for reason, n in made.counts.items() if reason.startswith("dropped: ")} == {
    "dropped: short summary": 1,
    "dropped: short body": 1,
    "dropped: same name": 1,
    "dropped: repeated body": 2,
    "dropped: summary of several objects": 2,
  }


def test_twins_stand_on_one_side_of_the_split_only(packages):
  sources = three_packages()
  sources["alphapkg"]["twins.py"] = "".join([
    function("same_summary", "Melts snow for tea.", body(4)),
    function("melt", "Melt snow for a cup.", body(5)),
    function("other_name", "Melt snow for a cup, quickly.", body(6)),
    function("same_body", "Explain everything about winter drinks.", body(2) + " and then some more words"),
  ])  # fmt: skip
  sources["gammapkg"]["twin.py"] = function("thaw", "Melt some snow for the tea pot.", body(7))
  packages(sources)
  made = source()
  assert names(made, "train") == ["alphapkg.one.turn", "alphapkg.twins.other_name"]
  assert names(made, "dev") == ["gammapkg.three.weave"] and names(made, "test") == ["betapkg.two.melt"]
  assert made.counts["dropped from train: twin of a pair held out"] == 3
  assert made.counts["dropped from dev: twin of a pair held out"] == 1
  assert len(list(made.passages())) == 4


def test_shingles_of_a_house_style_make_no_twins():
  style = body(1)
  finder = TwinFinder()
  finder.add([(f"x.f{i}", f"summary{i}", f"{style} {body(i + 2)}") for i in range(40)])
  assert not finder.has_twin("y.g", "unlike", f"{style} {body(99)}")
  assert finder.has_twin("y.g", "unlike", f"{style} {body(5)}")


def test_the_longer_module_name_decides(packages):
  sources = three_packages()
  sources["betapkg"]["kept.py"] = function("carve", "Carve a spoon from birch.", body(4))
  packages(sources)
  made = source(test_modules=("betapkg", "gammapkg.three"), dev_modules=("betapkg.kept",))
  assert names(made, "dev") == ["betapkg.kept.carve"]
  assert names(made, "test") == ["betapkg.two.melt", "gammapkg.three.weave"]


def test_a_second_process_with_another_hash_seed_reads_the_same(packages):
  root = packages(three_packages())
  code = (
    "from dptdr_jax.data.sources.docstrings import DocstringSource\n"
    "s = DocstringSource(packages=('alphapkg', 'betapkg', 'gammapkg', 'optax'), test_modules=('betapkg', 'optax'),"
    " dev_modules=('gammapkg',))\n"
    "print([*s.passages()], [[*s.queries(x)] for x in s.splits()], s.counts)"
  )
  runs = [
    subprocess.run(
      [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{code}"],
      env={"PYTHONHASHSEED": seed},
      capture_output=True,
      check=True,
      text=True,
    ).stdout
    for seed in ("1", "2")
  ]
  assert runs[0] == runs[1] and len(runs[0]) > 100_000


def test_input_errors_name_the_culprit(packages):
  packages(three_packages())
  with pytest.raises(InputError, match="nosuchpkg"):
    list(source(packages=("alphapkg", "nosuchpkg")).passages())
  with pytest.raises(InputError, match="os.path"):
    list(source(packages=("os.path",)).passages())
  with pytest.raises(InputError, match="betapkg.nothing"):
    list(source(test_modules=("betapkg.nothing",)).passages())
  with pytest.raises(InputError, match="validation"):
    list(source().queries("validation"))
  with pytest.raises(InputError, match="no Python source"):
    source(packages=("sys",)).files()


def test_a_split_without_modules_is_none(packages):
  packages(three_packages())
  assert source().splits() == ("train", "dev", "test")
  assert source(dev_modules=()).splits() == ("train", "test")
  made = source(dev_modules=(), test_modules=())
  assert made.splits() == ("train",) and len(names(made, "train")) == 3


def test_a_package_may_be_one_file(packages):
  root = packages(three_packages())
  (root / "lonepkg.py").write_text(function("sail", "Sail across the narrow bay.", body(4)))
  assert names(source(packages=("lonepkg", "betapkg", "gammapkg")), "train") == ["lonepkg.sail"]


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


def test_the_defaults_read_real_packages():
  made = DocstringSource()
  sizes = {split: len(list(made.queries(split))) for split in made.splits()}
  assert sizes["test"] >= 1000 and sizes["dev"] >= 300 and sizes["train"] >= 3000
  assert sum(sizes.values()) == len(list(made.passages()))
  assert docstrings.STDLIB in made.packages
