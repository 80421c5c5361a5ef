"""Four results in a few minutes, from the shipped weights: `make demo`, or python -m utils.demo

Each is a command of the book as a reader would type it. What they write is gathered on one page,
outputs/demo/index.html, every result above the command that made it.
"""

import html
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.run import check, cli

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Result:
    """One command, what it shows and where to read on."""

    title: str
    command: str  # --out is added
    figure: str  # of the run's folder; empty: the result is text
    words: str  # beside the result
    train: str  # the command that trains such a model
    page: str  # to read


RESULTS = (
    Result(
        "A language model that sees: LLaVA names fruit",
        "python vlm/llava.py --samples 8",
        "answers.png",
        "A vision encoder turns each photo into nine tokens; a language model of 135 million parameters reads them "
        "and answers: above each photo its answer, green if right, below the truth. No photo here was seen in "
        "training. It was taught fruit and nothing else: shown a bus, it names a fruit.",
        "python vlm/train.py",
        "vlm/llava.md",
    ),
    Result(
        "Text to image: latent diffusion draws emoji",
        'python models/stable_diffuser.py --pretrained --prompt "red apple" --sampling-steps 25',
        "prompt.png",
        "Eight draws of the prompt “red apple”, each from other noise, by 25 steps of DDIM in the latents of an "
        "autoencoder.",
        "python models/stable_diffuser.py",
        "models/stable_diffuser.md",
    ),
    Result(
        "Diffusion: digits out of noise",
        "python models/ddpm.py --pretrained --samples 10",
        "film.png",
        "Six digits that nobody wrote on their way from noise, left, to ink, right; t counts the steps still to go.",
        "python models/ddpm.py",
        "models/ddpm.md",
    ),
    Result(
        "Retrieval-augmented generation: a question answered from manuals",
        "python rag/raw_rag.py --distractors 300 --limit 0",
        "",
        "A sample of the manuals of Django, Celery and Scrapy: the passages found, the answer of a small language "
        "model without them, and with them.",
        "python rag/raw_rag.py",
        "rag/raw_rag.md",
    ),
)

STYLE = """
body { font: 17px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
body { color: #1a1a1a; background: #fff }
h1 { line-height: 1.2 }
h2 { margin-top: 3rem }
a { color: #0b57d0 }
img { max-width: 100%; border: 1px solid #ddd; border-radius: 6px; background: #fff }
pre { padding: .7rem 1rem; border-radius: 6px; white-space: pre-wrap; font-size: 14px; background: #f2f2f2 }
@media (prefers-color-scheme: dark) {
  body { color: #e8e8e8; background: #161616 }
  pre { background: #262626 }
  img { border-color: #333 }
  a { color: #8ab4f8 }
}
"""

SECTION = """
<h2>{title}</h2>
{shown}
<p>{words}</p>
<pre>{command}</pre>
<p>{seconds:.0f} seconds here. To train one: <code>{train}</code>. To read: <a href="{up}{page}">{page}</a>.</p>
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>VLM-Action: four results</title><style>{style}</style></head><body>
<h1>VLM-Action: four results</h1>
<p>All of them come from weights that this repository ships or fetched as a package, made by the commands that stand
below each.</p>
{sections}
</body></html>
"""


@dataclass(frozen=True)
class Config:
    """Run four commands of the book with its shipped weights and gather their results on one page."""

    out: str = "outputs/demo"  # where results and page go


def run(result: Result, number: int, folder: Path) -> tuple[str, float]:
    """Run one command, showing its output as it comes -> (what it printed, seconds). Raises UserError if it fails."""
    words = [sys.executable, *shlex.split(result.command)[1:], "--out", str(folder)]
    print(f"\n[{number}/{len(RESULTS)}] {result.title}\n$ {result.command}", flush=True)
    start = time.monotonic()
    piped = {"stdout": subprocess.PIPE, "text": True, "encoding": "utf-8", "bufsize": 1}
    process: Any = subprocess.Popen(words, cwd=ROOT, **piped)
    # Pass its lines on as they come, and keep them; progress bars go to stderr, the reader's own
    lines = []
    for line in process.stdout:
        print(f"    {line}", end="", flush=True)
        lines.append(line)
    before = f"the results before it are in {folder.parent}"
    check(process.wait() == 0, f"`{result.command}` failed, see above; {before}")
    return "".join(lines), time.monotonic() - start


def section(result: Result, number: int, printed: str, seconds: float, up: str = "../../") -> str:
    """One result as HTML: the figure or the text, then the command. `up` leads from the page to the repository."""
    title = html.escape(result.title)
    if result.figure:
        shown = f'<p><img src="{number}/{result.figure}" alt="{title}"></p>'
    else:
        shown = f"<pre>{html.escape(printed.split('written to')[0].strip())}</pre>"
    about = {"title": title, "shown": shown, "words": html.escape(result.words)}
    about["command"] = html.escape(result.command)
    about["train"] = html.escape(result.train)
    return SECTION.format(**about, seconds=seconds, up=up, page=result.page)


def page(sections: list[str]) -> str:
    """The whole page: no script, no font, nothing from elsewhere."""
    return PAGE.format(style=STYLE, sections="".join(sections))


def main(cfg: Config) -> dict:
    """Run all, write the page after each, so that a reader can open it early."""
    folder = Path(cfg.out)
    sections = []
    seconds = {}
    for number, result in enumerate(RESULTS, 1):
        printed, took = run(result, number, folder / str(number))
        if result.figure:
            drawn = folder / str(number) / result.figure
            check(drawn.is_file(), f"{result.command} drew no {result.figure}")
        sections.append(section(result, number, printed, took))
        seconds[result.title] = round(took, 1)
        (folder / "index.html").write_text(page(sections), "utf-8")
    # What it took, and what to run next
    (folder / "metrics.json").write_text(json.dumps({"seconds": seconds}, indent=2) + "\n", "utf-8")
    print(f"\nfour results in {sum(seconds.values()):.0f} seconds: open {folder}/index.html")
    print("to train such models yourself:  source .venv/bin/activate, then")
    for result in RESULTS:
        print(f"    {result.train}")
    return {"seconds": seconds}


if __name__ == "__main__":
    cli(main, Config)
