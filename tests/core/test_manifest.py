"""What a stage is told to have changed, and what of it is kept."""

from dptdr_jax.core import manifest
from dptdr_jax.core.manifest import differences


def test_differences_are_those_of_what_is_stored():
  old = {"config": {"splits": ["dev"], "depth": 10, "gone": 1}, "files": {"a": "x"}}
  new = {"config": {"splits": ("dev",), "depth": 20, "came": None}, "files": {"a": "x"}}
  assert differences(old, new) == ["config.depth: 10 → 20", "config.gone: 1 → None"]


def test_a_manifest_that_cannot_be_read_counts_as_absent(tmp_path, caplog):
  path = tmp_path / "inputs.json"
  assert manifest.read(path) is None and not caplog.records
  (tmp_path / "corpus.jsonl").write_text("{}")
  found = manifest.Fingerprints(path).of([tmp_path / "corpus.jsonl"])
  assert list(manifest.read(path)) == list(found)
  path.write_text(path.read_text()[:-9])
  assert manifest.read(path) is None and "inputs.json" in caplog.text
  assert manifest.Fingerprints(path).of([tmp_path / "corpus.jsonl"]) == found


def test_kept_parts_stay_at_any_depth(tmp_path):
  for name in ("begun.json", "manifest.json", "text/corpus/a", "text/splits/dev/b", "text/e", "bm25/c", "d"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  manifest.clear(tmp_path, ("text/corpus", "bm25", "nowhere/x"))
  assert list(manifest.sizes(tmp_path)) == ["begun.json", "bm25/c", "text/corpus/a"]
