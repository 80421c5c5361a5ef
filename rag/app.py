"""Gradio page: ask the manuals, or a folder of your own; the answer streams, its sources stand beside it.

Gradio: Abid et al. 2019, arXiv:1906.02569. The page is the few lines of `page`; the rest is what a demonstration lacks
until somebody misuses it. Passages and answers are texts that anybody may have written, so nothing in them becomes a
tag; questions have a length and a rate, one is answered at a time, and few may wait, of one visitor fewer than of all.
It listens on this machine alone.

    python rag/app.py                                      # http://127.0.0.1:7860
    python rag/app.py --docs FOLDER                        # your own .md .rst .txt .html .pdf
    python rag/app.py --retriever merge --port 8000        # raw, child-parent, rerank, merge
    python rag/app.py --once --question "Can I use Django with MongoDB?"   # the same without a page
"""

import logging
import os
import re
import socket
import time
from dataclasses import dataclass, fields
from functools import partial
from html import escape
from typing import Any, Literal

from langchain_core.retrievers import BaseRetriever

from rag import advanced_rag_child_parent_retrieval as child_parent
from rag import advanced_rag_merge_retrievers as merging
from rag import advanced_rag_rerank as rerank
from rag import answer, language_models, raw_rag
from utils import run
from utils.run import UserError, check
from utils.text import clean

SCRIPTS: dict[str, Any] = {
    "raw": raw_rag,
    "child-parent": child_parent,
    "rerank": rerank,
    "merge": merging,
}
HOST = "127.0.0.1"  # whoever wants more puts a server with passwords and https before it
LONGEST = answer.LONGEST  # characters of a question
WAITING, PLACES = 8, 2  # questions that wait: of all visitors, and of one
EXAMPLES = (
    raw_rag.EXAMPLE,
    "Do I have to use your model/database layer?",
    "Can messages be encrypted?",
)
STYLE = """
.note {min-height: 1.5em; font-weight: 600; color: var(--body-text-color-subdued)}
.told {font-size: 1.15em; line-height: 1.6; white-space: pre-wrap; overflow-wrap: anywhere}
.cited {padding-left: 1.2em; list-style: disc}
.told a, .cited a {margin: 0; padding: 0; color: var(--link-text-color)} .told s, .cited s {color: #dc2626}
#passages {max-height: calc(100vh - 10em); overflow-y: auto; padding: 3px}
.passage {margin-bottom: 10px; padding: 8px 12px; border: 1px solid var(--border-color-primary); border-radius: 8px}
.passage:target {border-color: var(--link-text-color); box-shadow: 0 0 0 2px var(--link-text-color)}
.passage pre {font: inherit; white-space: pre-wrap; overflow-wrap: anywhere} .passage small {display: block}
"""


@dataclass(frozen=True)
class Config(raw_rag.Config):
    """Ask and answer on a page."""

    # which script of the chapter finds
    retriever: Literal["raw", "child-parent", "rerank", "merge"] = "raw"
    chunk: int = 0  # characters of a passage; 0: as many as that script takes
    port: int = 7860  # of the page, on this machine
    rate: int = 10  # questions a minute of one visitor
    once: bool = False  # answer --question here, and end without a page
    out: str = "outputs/app"


def build_retriever(cfg: Config) -> BaseRetriever:
    """The retriever of the script that --retriever names, with the flags that all of them have."""
    script = SCRIPTS[cfg.retriever]
    flags = {
        f.name: getattr(cfg, f.name)
        for f in fields(raw_rag.Config)
        if f.name != "chunk" or cfg.chunk
    }
    return script.build_retriever(script.Config(**flags | {"out": f"{cfg.out}/{cfg.retriever}"}))


def wait(asked, now, limit, span=60.0):
    """-> seconds until one more question is at most the limit-th in any `span` seconds. `asked`: times, in order."""
    return max(0.0, asked[-limit] + span - now) if len(asked) >= limit else 0.0


class Desk:
    """Where questions come in: one retriever and one model for all visitors."""

    def __init__(
        self, retriever, llm, k=5, rate=10, clock=time.monotonic, close: Any = None, abstain=-1.0
    ):
        """`close(question, passages)` says how close they are; below `abstain` nothing is answered; -1: always."""
        self.retriever, self.llm, self.k, self.rate, self.clock = retriever, llm, k, rate, clock
        self.close, self.abstain = close, abstain
        self.asked, self.answered = {}, 0

    def refuse(self, question, visitor):
        """-> one line, why this is not answered; empty if it is."""
        if not question:
            return "Type a question first."
        if len(question) > LONGEST:
            return f"The question has {len(question)} characters; {LONGEST} are the most."
        now = self.clock()
        if seconds := wait(self.asked.get(visitor, []), now, self.rate):
            return f"More than {self.rate} a minute: ask again in {seconds:.1f} s."
        # Who stays
        self.asked = {
            v: times[-self.rate :] for v, times in self.asked.items() if times[-1] > now - 60
        }
        self.asked.setdefault(visitor, []).append(now)
        return ""

    def reply(self, question, visitor):
        """Yields (line for the visitor, answer so far, passages): first the passages, then a word at a time."""
        question = clean(question or "").strip()
        if line := self.refuse(question, visitor):
            yield line, "", []
            return
        yield "Searching ...", "", []
        told, found = "", []
        try:
            found = self.retriever.invoke(question)[: self.k]
            yield "Reading ...", told, found
            if found and self.abstain > -1 and self.close(question, found) < self.abstain:
                told = answer.NOWHERE
            elif self.llm and found:  # without passages it would answer out of its head
                for word in self.llm.stream(
                    answer.messages(question, answer.passages_read(self.llm, found))
                ):
                    told += word
                    yield "Answering ...", told, found
            self.answered += 1
            yield (
                "" if found else "No passage was found, so there is nothing to answer from.",
                told.strip(),
                found,
            )
        except UserError as error:
            yield f"{error}.", told, found
        except Exception as error:  # of the search, say: the page goes on, and its owner sees why
            logging.exception("a question was not answered")
            yield f"This could not be answered ({type(error).__name__}).", told, found


def show(line, told, found):
    """-> HTML of line, answer, citations and passages. Only what is written here is a tag, all else is text."""
    real, invented = answer.citations(told, found)
    links = {n: f'<a href="#passage-{n}">[{n}]</a>' for n in real} | {
        n: f"<s>[{n}]</s>" for n in invented
    }
    text = re.sub(r"\[(\d{1,3})\]", lambda m: links[int(m[1])], escape(told))
    cited = [f"{links[n]} {escape(found[n - 1].metadata['source'])}" for n in real]
    cited += [f"{links[n]} is invented: there is no such passage" for n in invented]
    cited = cited or ["The answer cites no passage."] * bool(told and not line)
    note, listed = (
        f'<div class="note" role="status">{escape(line)}</div>',
        "".join(f"<li>{c}</li>" for c in cited),
    )
    passages = "".join(
        f'<div class="passage" id="passage-{i}"><b>[{i}]</b> {m["score"]:.3f} <code>{escape(m["source"])}</code>'
        f"<small>{escape(m['title'])}</small><pre>{escape(d.page_content)}</pre></div>"
        for i, d in enumerate(found, 1)
        for m in [d.metadata]
    )
    parts = note, f'<div class="told">{text}</div>', f'<ul class="cited">{listed}</ul>', passages
    return tuple(clean(part) for part in parts)


def page(desk, about, examples=()):
    """Question and answer at the left, passages at the right."""
    import gradio as gr

    def ask(question, request: gr.Request):
        for step in desk.reply(question, visitor(request)):
            yield show(*step)

    with gr.Blocks(title="Ask the documents", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(f"<h1>Ask the documents</h1><p>{escape(about)}</p>")
        with gr.Row():
            with gr.Column():
                box = gr.Textbox(
                    label="Question", placeholder=f"up to {LONGEST} characters", elem_id="question"
                )
                with gr.Row():
                    go, stop = (
                        gr.Button("Ask", variant="primary", elem_id="ask"),
                        gr.Button("Stop", elem_id="stop"),
                    )
                with gr.Row():
                    buttons = [
                        gr.Button(text, size="sm", elem_classes="example") for text in examples
                    ]
                note, told, cited = gr.HTML(show("", "", [])[0]), gr.HTML(), gr.HTML()
            with gr.Column():
                beside = gr.HTML(elem_id="passages")
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        one = {"concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "once"}
        parts = {"fn": ask, "inputs": box, "outputs": [note, told, cited, beside]} | quiet | one
        running = [gr.on([go.click, box.submit], **parts)]
        running += [
            b.click(lambda text: text, b, box, queue=False, **quiet).then(**parts) for b in buttons
        ]
        # First this, or a late word takes the note back
        halt = stop.click(None, cancels=running, queue=False, **quiet)
        halt.then(lambda: show("Stopped.", "", [])[0], None, note, queue=False, **quiet)
    blocks.queue(max_size=WAITING, api_open=False)
    blocks._queue.push = fair(blocks._queue)
    return blocks


def visitor(request):
    """The address that a request comes from."""
    return request.client.host if request.client else ""


def fair(queue):
    """Gradio's `push`, which takes a question into the queue, with a limit for each visitor."""
    push = queue.push

    async def push_fairly(body, request, username):
        waiting = [
            event for line in queue.event_queue_per_concurrency_id.values() for event in line.queue
        ]
        if sum(visitor(event.request) == visitor(request) for event in waiting) >= PLACES:
            return False, f"{PLACES} of your questions wait already.", "queue_full"
        return await push(body=body, request=request, username=username)

    return push_fairly


def free(port):
    """Raises UserError if nobody can listen at this port: better said before a minute of loading than after it."""
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((HOST, port))
    except OSError as error:
        raise UserError(
            f"--port {port}: {str(error.strerror).lower()}; choose another one"
        ) from None


def serve(blocks, port):
    """Listen, and return."""
    import gradio as gr

    # Or each visitor could say which address is counted
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
    # Nothing to fetch
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    rest = {
        "theme": theme,
        "css": STYLE,
        "footer_links": [],
        "prevent_thread_lock": True,
        "quiet": True,
    }
    # byte: Gradio takes uploads, whether or not there is anything to upload on the page
    rest["max_file_size"] = 1
    rest |= dict.fromkeys(
        ["share", "ssr_mode", "run_history", "enable_monitoring", "mcp_server"], False
    )
    blocks.launch(server_name=HOST, server_port=port, **rest)


def main(cfg: Config) -> dict:
    """Load once; then answer one question, or all that come until Ctrl-C."""
    run.seed(cfg.seed)
    check(1 <= cfg.port <= 65535 and cfg.rate >= 1, "--port: 1 to 65535; --rate: 1 or more")
    check(cfg.k >= 1, "--k must be 1 or more")
    check(-1 <= cfg.abstain <= 1, "--abstain is a cosine: between -1 and 1")
    question = raw_rag.asked(cfg) if cfg.once else ""
    if not cfg.once:
        free(cfg.port)
    llm = language_models.language_model(cfg.llm, cfg.tokens) if cfg.llm != "none" else None
    folder = run.output(cfg.out, cfg)
    close = partial(raw_rag.closeness, cfg.embedder)
    desk = Desk(build_retriever(cfg), llm, cfg.k, cfg.rate, close=close, abstain=cfg.abstain)
    reads = min(cfg.k, getattr(llm, "reads", cfg.k))
    about = f"A language model reads {reads} of the {cfg.k} best passages and answers, maybe wrong: they are beside it."
    if cfg.once:
        line, told, found = list(desk.reply(question, HOST))[-1]
        check(not line, line)
        cited = dict(zip(("cited", "invented"), answer.citations(told, found)))
        return run.report(
            folder, {"answer": told, **cited, "passages": [d.metadata["id"] for d in found]}
        )
    blocks = page(desk, about, [*filter(None, [cfg.question]), *([] if cfg.docs else EXAMPLES)])
    serve(blocks, cfg.port)
    print(f"open http://{HOST}:{cfg.port} in a browser; Ctrl-C ends it", flush=True)
    blocks.block_thread()
    return run.report(folder, {"questions answered": desk.answered}, then="python rag/compare.py")


if __name__ == "__main__":
    run.cli(main, Config)
