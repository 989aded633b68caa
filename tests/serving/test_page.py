"""The page in a real Chromium: hits while typing, two rankings, keyboard, phone, files, keys."""

import os
import re
import shutil

import pytest
from support import server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
expect.set_options(timeout=30_000)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
  pytest.skip("no chromium is installed (Debian: apt-get install chromium)", allow_module_level=True)
SHOTS = os.environ.get("DPTDR_SCREENSHOTS")  # a directory: pictures to look at
KEY = "keeper-0123456789"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
  directory = tmp_path_factory.mktemp("page")
  server.models(directory)
  keys = directory / "keys"
  keys.write_text(f"admin: {KEY}\n")
  flags = (f"--task=first={directory / 'a'}", f"--task=second={directory / 'b'}", f"--api-key-file={keys}")
  with server.served(directory, *flags, key=KEY) as started:
    for task in ("first", "second"):
      started.client.post(f"/tasks/{task}/documents", json={"documents": server.documents(120)})
      started.encoded(task)
    yield started


@pytest.fixture(scope="module")
def browser():
  with playwright.sync_playwright() as started:
    opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield opened
    opened.close()


@pytest.fixture
def page(browser, running):
  """The page, with the key; every request to elsewhere and every error of a script fails the test."""
  context = browser.new_context(viewport={"width": 1200, "height": 900})
  context.add_init_script(f"sessionStorage.setItem('key', '{KEY}')")
  page, wrong = context.new_page(), []
  page.on("pageerror", lambda error: wrong.append(str(error)))
  page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
  page.on("request", lambda asked: None if asked.url.startswith((running.url, "data:")) else wrong.append(asked.url))
  page.goto(running.url)
  expect(page.locator(".pane .task option")).to_have_count(2)
  yield page
  context.close()
  assert wrong == []


def shot(page, name):
  if SHOTS:
    page.screenshot(path=f"{SHOTS}/{name}.png")


def typed(page, text):
  page.fill("#query", "")
  page.type("#query", text)
  expect(page.locator(f'.pane:first-child .hits[data-query="{text}"] li')).not_to_have_count(0)


def test_hits_come_while_typing_with_marked_words_scores_and_times(page):
  page.select_option(".mode", "bm25")
  typed(page, "merge pivots")
  assert page.locator(".hits li").count() == 10
  assert {word.lower() for word in page.locator("mark").all_inner_texts()} == {"merge", "pivot"}
  scores = [float(text) for text in page.locator(".score").all_inner_texts()]
  assert scores == sorted(scores, reverse=True) and scores[0] > 0
  expect(page.locator(".about")).to_have_text(re.compile(r"^bm25 [\d.]+ ms · total [\d.]+ ms · .* · 120 documents$"))
  page.fill(".filter", "topic=graphs")
  page.fill("#query", "merge node")
  expect(page.locator(".title").filter(has_not_text="graphs")).to_have_count(0)
  expect(page.locator(".title").first).to_have_text("graphs")
  shot(page, "one")
  page.fill("#query", "")
  expect(page.locator(".hits li")).to_have_count(0)


def test_two_rankings_side_by_side_are_in_the_address(page, running):
  typed(page, "heap merge")
  page.click("#compare")
  expect(page.locator(".pane:nth-child(2) .hits li")).to_have_count(10)
  left, right = (page.locator(".pane").nth(number) for number in range(2))
  right.locator(".task").select_option("second")
  right.locator(".mode").select_option("fused")
  expect(right.locator(".about")).to_contain_text("bm25")
  expect(left.locator(".about")).to_contain_text("vector")
  expect(left.locator(".other").first).to_contain_text(re.compile("only here|there"))
  shot(page, "two")
  page.goto(page.url)
  expect(page.locator(".pane:nth-child(2) .hits li")).to_have_count(10)
  assert page.input_value("#query") == "heap merge" and page.locator(".task").nth(1).input_value() == "second"
  page.keyboard.press("Alt+c")
  assert page.locator(".pane").count() == 1


def test_everything_is_reached_by_the_keyboard(page):
  typed(page, "graph path")
  page.keyboard.press("ArrowDown")
  page.keyboard.press("ArrowDown")
  chosen = page.evaluate("document.activeElement.querySelector('.rank').textContent")
  assert chosen == "2"
  page.keyboard.press("Enter")
  fields = page.locator("li:focus .fields").inner_text()
  assert "topic" in fields and "row" in fields
  shot(page, "fields")
  page.keyboard.press("Escape")
  assert page.evaluate("document.activeElement.id") == "query"
  page.locator(".hits li").first.focus()
  page.keyboard.press("/")
  assert page.evaluate("document.activeElement.id") == "query" and page.input_value("#query") == "graph path"


def test_files_are_added_with_progress(page, running, tmp_path):
  lines = tmp_path / "more.jsonl"
  lines.write_text('{"_id": "j1", "text": "zebra one", "title": "<img src=x onerror=alert(1)>"}\n' * 1)
  page.set_input_files("#file", lines)
  expect(page.locator("#status")).to_contain_text("1 documents of more.jsonl")
  table = tmp_path / "table.csv"
  rows = "".join(f'c{row},"zebra, ""quoted""\nline {row}",t\n' for row in range(450))
  table.write_text("id,text,tag\n" + rows)
  page.set_input_files("#file", table)
  page.wait_for_selector("#work:not([hidden])")
  expect(page.locator("#status")).to_contain_text("450 documents of table.csv")
  page.wait_for_selector("#work", state="hidden", timeout=60_000)
  page.select_option(".mode", "bm25")
  typed(page, "zebra")
  assert running.client.get("/tasks/first/documents/c7").json() == {
    "id": "c7", "title": "", "text": 'zebra, "quoted"\nline 7', "tag": "t"
  }  # fmt: skip
  page.fill("#query", "zebra one")
  expect(page.locator(".title").first).to_contain_text("<img")  # as text, not as an element
  assert page.locator(".hits img").count() == 0
  broken = tmp_path / "broken.jsonl"
  broken.write_text('{"id": "x", "text": "y"}\n{\n')
  page.set_input_files("#file", broken)
  expect(page.locator("#status")).to_contain_text("line 2 is not JSON")
  assert page.locator("#status.bad").count() == 1


def test_dropped_file_is_added(page, running):
  page.evaluate(
    """() => {
      const data = new DataTransfer();
      data.items.add(new File(['{"id": "dropped", "text": "okapi"}'], "drop.jsonl"));
      document.dispatchEvent(new DragEvent("dragover", { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
  )
  assert page.is_visible("#drop")
  page.evaluate(
    """() => {
      const data = new DataTransfer();
      data.items.add(new File(['{"id": "dropped", "text": "okapi"}'], "drop.jsonl"));
      document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
  )
  expect(page.locator("#status")).to_contain_text("drop.jsonl")
  assert running.client.get("/tasks/first/documents/dropped").json()["text"] == "okapi"


def test_phone(page):
  page.set_viewport_size({"width": 375, "height": 720})
  page.click("#compare")
  typed(page, "sort merge")
  expect(page.locator(".pane:nth-child(2) .hits li")).to_have_count(10)
  assert page.evaluate("document.documentElement.scrollWidth") <= 375
  shot(page, "phone")


def test_key_is_asked_for(browser, running):
  context = browser.new_context()
  page = context.new_page()
  page.goto(running.url)
  page.wait_for_selector("#login[open]")
  page.fill("#key", KEY)
  shot(page, "login")
  page.keyboard.press("Enter")
  expect(page.locator(".pane .task option")).to_have_count(2)
  context.close()
