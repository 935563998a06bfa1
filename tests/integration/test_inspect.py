"""`ftpipe inspect` as a process, and its page in a real browser."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftpipe import cli
from tests.integration.browser import Page, installed

pytestmark = pytest.mark.slow

END = "<|im_end|>"  # of ChatML's turns; then the end of the text
EOS = "<|endoftext|>"
EVIL = (
    "<script>document.title = 'stolen'</script>"
    "<img src=http://127.0.0.1:9/a.png onerror=\"document.title = 'stolen'\">"
    "<style>@import 'http://127.0.0.1:9/b.css'; * { display: none }</style>"
    "<iframe src=http://127.0.0.1:9/c></iframe></pre></details><a href=javascript:alert(1)>&amp;</a>"
)
ROWS = [
    ("Say yes.", "Yes."),
    ("Run this:\n" + EVIL, EVIL),
    ("Keep\n\n  my   spaces\tand lines ", "  two\n\n\tlines "),
    ("Long", "w" * 700 + " " + "and so on " * 60),
    ("Write 日本語, العربية and 🙂.", "日本語, العربية, 🙂 — e\u0301"),
]
WORDS = (
    "recipe=tiny",
    "data=own",
    "data.sources.mine.format=prompt_completion",
    "data.sources.mine.path=rows.jsonl",
    "data.template=chatml",
    "data.validation=0",
    "data.max_length=4096",
)


def inspect(folder: Path, *words: str, colours: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, in a pipe."""
    env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    return subprocess.run(
        [sys.executable, "-m", "ftpipe.cli", "inspect", *words],
        cwd=folder,
        env=env | ({"FORCE_COLOR": "1", "TERM": "xterm-256color"} if colours else {}),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the rows are prepared, and `page.html` shows them."""
    made = tmp_path_factory.mktemp("inspect")
    rows = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in ROWS]
    (made / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    done = inspect(made, *WORDS, "--html", "page.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("page: page.html\n") and "prepare: turns rows" in done.stdout
    return made


def given(prompt: str) -> str:
    return f"<|im_start|>user\n{prompt}{END}\n<|im_start|>assistant\n"


def test_the_dataset_is_made_first_and_shown(tmp_path: Path) -> None:
    done = inspect(tmp_path, "recipe=tiny")
    assert done.returncode == 0, done.stderr
    # 120 + 75 + 40 + 20 rows are shipped (src/ftpipe/samples)
    counts = re.search(r"\nall +255 +\d+ +(\d+) +0 +(\d+) +16 ", done.stdout)
    assert counts is not None and int(counts[1]) == int(counts[2]) + 16
    assert re.search(rf"\ndemonstrations train tokens +{counts[2]}( +\d+){{5}}\n", done.stdout)
    assert re.search(r"\ndemonstrations validation learned +16( +\d+){5}\n", done.stdout)
    assert f"data.max_length=1024: 0 of {counts[1]} demonstrations are longer\n" in done.stdout
    assert len(re.findall("⟦", done.stdout)) >= 4 and "\x1b" not in done.stdout
    again = inspect(tmp_path, "recipe=tiny")
    assert "prepare: nothing to do, made already" in again.stdout
    shown = done.stdout[done.stdout.index("\ntiny: prepare-") :]
    assert again.stdout.endswith(shown)


def test_one_row_is_shown_with_what_is_learned(folder: Path) -> None:
    done = inspect(folder, *WORDS, "--row", "1")
    tokens = len(f"{given('Say yes.')}Yes.{END}") + 1  # a byte each, and one eos
    assert done.stdout.endswith(
        f"== mine, row 1 (demonstrations, train): {tokens} tokens, {len(f'Yes.{END}') + 1} learned\n"
        + given("Say yes.").replace("\n", "↵\n")
        + f"⟦Yes.{END}{EOS}⟧\n"
    )
    green = inspect(folder, *WORDS, "--row=1", colours=True).stdout.rpartition("==")[2]
    found = re.findall(
        r"\x1b\[(?:\d+;)*32m([^\x1b]*)\x1b\[0m|\x1b\[(?:\d+;)*32(?:;\d+)*m([^\x1b]*)", green
    )
    assert "".join(one or two for one, two in found) == f"Yes.{END}{EOS}"
    assert "⟦" not in green


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--row=6"], "no row to show for --row 6."),
        (["--part", "validation"], "no row to show for --part validation."),
        (["--source=min"], "--source: no source 'min'. Did you mean 'mine'? Known: mine."),
        (["--use=preferences"], "--use: no rows for preferences here; the dataset has demonstrations."),
        (["--rwo=1"], "no option '--rwo'. Did you mean '--row'?"),
    ],
)
def test_what_does_not_fit_ends_with_2(
    folder: Path,
    words: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["inspect", *WORDS, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ftpipe: {sentence}") and said.count("\n") == 1


@pytest.mark.usefixtures("empty_folder")
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_made(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["inspect", "recipe=tiny", "--html", "nowhere/page.html"]) == 2
    assert "--html=nowhere/page.html is in no folder" in capsys.readouterr().err
    assert not list(Path().iterdir())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if installed() is None:
        pytest.skip("no Chromium (Debian: apt-get install chromium)")
    with Page(tmp_path_factory.mktemp("profile")) as made:
        yield made


def address(folder: Path, name: str = "page.html") -> str:
    return (folder / name).resolve().as_uri()


def test_the_coloured_spans_are_what_is_learned(folder: Path, page: Page) -> None:
    page.open(address(folder), width=1000)
    rows = page.run("[...document.querySelectorAll('pre')].map(row => row.textContent)")
    assert rows == [f"{given(prompt)}{answer}{END}{EOS}" for prompt, answer in ROWS]
    learned = page.run(
        "[...document.querySelectorAll('pre')].map(row =>"
        " [...row.querySelectorAll('.learned')].map(span => span.textContent))"
    )
    assert learned == [[f"{answer}{END}{EOS}"] for _, answer in ROWS]
    # what is coloured to the eye, character by character, is the same
    painted = page.run(
        "[...document.querySelectorAll('pre')].map(row => { const walk ="
        " document.createTreeWalker(row, NodeFilter.SHOW_TEXT); let text = '';"
        " while (walk.nextNode()) { let at = walk.currentNode.parentElement, seen = 'rgba(0, 0, 0, 0)';"
        " for (; at !== row && seen === 'rgba(0, 0, 0, 0)'; at = at.parentElement)"
        "   seen = getComputedStyle(at).backgroundColor;"
        " if (seen !== 'rgba(0, 0, 0, 0)') text += walk.currentNode.data; } return text })"
    )
    assert painted == [f"{answer}{END}{EOS}" for _, answer in ROWS]
    bars = page.run("[...document.querySelectorAll('.bars i')].map(bar => bar.offsetWidth)")
    # three rows, one and one of five have the lengths of a bar
    assert [round(3 * bar / max(bars)) for bar in bars if bar] == [3, 1, 1]
    specials = page.run("[...document.querySelectorAll('pre .special')].map(span => span.textContent)")
    assert specials == [EOS] * len(ROWS)  # the only special token of a tokenizer of bytes


def test_lines_and_spaces_look_as_they_are(folder: Path, page: Page) -> None:
    page.open(address(folder), width=1000)
    row = "document.querySelectorAll('pre')[2]"
    assert page.run(f"getComputedStyle({row}).whiteSpace") == "pre-wrap"
    text = given(ROWS[2][0]) + ROWS[2][1] + END
    assert page.run(f"{row}.querySelectorAll('.newline').length") == text.count("\n")
    assert page.run(f"{row}.querySelectorAll('.tab').length") == text.count("\t")
    marks = page.run(
        f"[...{row}.querySelectorAll('.newline')].map(at => getComputedStyle(at, '::before').content)"
    )
    assert set(marks) == {'"↵"'}
    # spaces before a line, between words beside another, and at the end of a line
    assert page.run(f"{row}.querySelectorAll('.space').length") == 2 + 3 + 2


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_is_wider_than_a_phone(folder: Path, page: Page, dark: bool) -> None:
    page.open(address(folder), width=360, dark=dark)
    assert page.run("innerWidth") == 360
    assert page.run("document.documentElement.scrollWidth") == 360
    # a table may be wider than its box, which scrolls by itself; nothing else is
    wide = page.run(
        "[...document.body.querySelectorAll('*')].filter(at => !at.closest('table') &&"
        " [...at.getClientRects()].some(box => box.left < 0 || box.right > 360)).map(at => at.outerHTML)"
    )
    assert wide == []
    cut = page.run(
        "[...document.body.querySelectorAll('*')].filter(at => at.scrollWidth > at.clientWidth + 1 &&"
        " at.clientWidth && !at.matches('.wide')).map(at => at.outerHTML.slice(0, 80))"
    )
    assert cut == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_colour_can_be_read(folder: Path, page: Page, dark: bool) -> None:
    page.open(address(folder), width=1000, dark=dark)
    # WCAG 2.1, 1.4.3: a contrast of 4.5 to 1, by relative luminance
    contrasts = page.run(
        """(() => {
          const light = colour => { const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map(part => {
            const share = part / 255;
            return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          const behind = at => { for (; at; at = at.parentElement) {
            const colour = getComputedStyle(at).backgroundColor;
            if (colour !== 'rgba(0, 0, 0, 0)') return colour; } };
          const chosen = ['h1', 'td', 'th', '.soft', '.bars span', 'summary', '.learned .token',
            '.learned .special', 'pre .token'];
          return chosen.map(name => { const at = document.querySelector(name);
            const both = [light(getComputedStyle(at).color), light(behind(at))];
            const [one, two] = both.sort((a, b) => b - a);
            return [name, (one + 0.05) / (two + 0.05)]; });
        })()"""
    )
    assert len(contrasts) == 9
    assert [name for name, contrast in contrasts if contrast < 4.5] == []
    background = page.run("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 60) == dark


@pytest.mark.parametrize("guarded", [True, False], ids=["as it is", "without its policy"])
def test_a_row_runs_nothing_and_asks_for_nothing(folder: Path, page: Page, guarded: bool) -> None:
    name = "page.html"
    if not guarded:  # escaping alone must do
        text = (folder / name).read_text(encoding="utf-8")
        bare = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
        assert bare != text
        name = "bare.html"
        (folder / name).write_text(bare, encoding="utf-8")
    page.open(address(folder, name), width=1000)
    assert page.requests == [address(folder, name)]
    assert page.complaints == []
    assert page.run("document.title").startswith("tiny: prepare-")
    strange = (
        "script, img, iframe, a, object, embed, form, input, svg, body style, [onerror], [href^=java]"
    )
    assert page.run(f"document.querySelectorAll('{strange}').length") == 0
    assert page.run("document.querySelectorAll('details').length") == len(ROWS)


def test_the_policy_would_stop_what_escaping_let_through(folder: Path, page: Page) -> None:
    text = (folder / "page.html").read_text(encoding="utf-8")
    (folder / "open.html").write_text(text.replace("</body>", f"{EVIL}</body>"), encoding="utf-8")
    page.open(address(folder, "open.html"), width=1000)
    assert page.run("document.querySelectorAll('body script, body img').length") == 2
    assert page.run("document.title").startswith("tiny: prepare-")
    assert any("Content Security Policy" in complaint for complaint in page.complaints)
