"""Gradio page: ask the manuals, or a folder; the answer streams, its sources stand beside it.

Gradio: Abid et al. 2019, arXiv:1906.02569. The page is the few lines of `page`; the rest is what a
demonstration lacks until somebody misuses it. Passages and answers are texts that anybody may have
written, so nothing in them becomes a tag; questions have a length and a rate
(`question_service.py`), one is answered at a time, and few may wait, of one visitor fewer than of
all. It listens on this machine alone.

    python rag/app.py                                      # http://127.0.0.1:7860
    python rag/app.py --docs FOLDER                        # your own .md .rst .txt .html .pdf
    python rag/app.py --retriever merge --port 8000        # raw, child-parent, rerank, merge
    python rag/app.py --once --question "Can I use Django with MongoDB?"   # the same without a page
"""

import os
import re
import socket
from dataclasses import dataclass, fields
from functools import partial
from html import escape
from typing import Any, Literal

from langchain_core.retrievers import BaseRetriever

from rag import advanced_rag_child_parent_retrieval as child_parent
from rag import advanced_rag_merge_retrievers as merging
from rag import advanced_rag_rerank as rerank
from rag import answer, language_models, raw_rag
from rag.question_service import LONGEST, QuestionService
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
WAITING = 8  # questions that wait, of all visitors
PLACES = 2  # and of one
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
    names = [f.name for f in fields(raw_rag.Config)]
    flags = {name: getattr(cfg, name) for name in names}
    flags["out"] = f"{cfg.out}/{cfg.retriever}"
    # Zero: passages as long as that script takes them
    if not cfg.chunk:
        del flags["chunk"]
    return script.build_retriever(script.Config(**flags))


def show(line, told, found):
    """-> HTML of line, answer, citations and passages.

    Only what is written here is a tag, all else is text.
    """
    # Numbers in brackets: links to passages, or struck out
    real, invented = answer.citations(told, found)
    links = {n: f'<a href="#passage-{n}">[{n}]</a>' for n in real}
    links |= {n: f"<s>[{n}]</s>" for n in invented}
    text = re.sub(r"\[(\d{1,3})\]", lambda m: links[int(m[1])], escape(told))
    # The list of what is cited
    cited = [f"{links[n]} {escape(found[n - 1].metadata['source'])}" for n in real]
    cited += [f"{links[n]} is invented: there is no such passage" for n in invented]
    if not cited and told and not line:
        cited = ["The answer cites no passage."]
    listed = "".join(f"<li>{c}</li>" for c in cited)
    # The passages
    passages = ""
    for i, d in enumerate(found, 1):
        m = d.metadata
        passages += f'<div class="passage" id="passage-{i}"><b>[{i}]</b> {m["score"]:.3f} '
        passages += f"<code>{escape(m['source'])}</code><small>{escape(m['title'])}</small>"
        passages += f"<pre>{escape(d.page_content)}</pre></div>"
    parts = [
        f'<div class="note" role="status">{escape(line)}</div>',
        f'<div class="told">{text}</div>',
        f'<ul class="cited">{listed}</ul>',
        passages,
    ]
    return tuple(clean(part) for part in parts)


def page(service, about, examples=()):
    """Question and answer at the left, passages at the right."""
    import gradio as gr

    def ask(question, request: gr.Request):
        for step in service.reply(question, visitor(request)):
            yield show(*step)

    with gr.Blocks(title="Ask the documents", analytics_enabled=False, fill_width=True) as blocks:
        # What stands on the page
        gr.HTML(f"<h1>Ask the documents</h1><p>{escape(about)}</p>")
        with gr.Row():
            with gr.Column():
                hint = f"up to {LONGEST} characters"
                box = gr.Textbox(label="Question", placeholder=hint, elem_id="question")
                with gr.Row():
                    go = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
                with gr.Row():
                    buttons = []
                    for text in examples:
                        buttons.append(gr.Button(text, size="sm", elem_classes="example"))
                note = gr.HTML(show("", "", [])[0])
                told = gr.HTML()
                cited = gr.HTML()
            with gr.Column():
                beside = gr.HTML(elem_id="passages")
        # Three ways to ask: the button, the enter key, an example
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        one = {"concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "once"}
        parts = {"fn": ask, "inputs": box, "outputs": [note, told, cited, beside]} | quiet | one
        running = [gr.on([go.click, box.submit], **parts)]
        for button in buttons:
            filled = button.click(lambda text: text, button, box, queue=False, **quiet)
            running.append(filled.then(**parts))
        # Stop: first cancel, or a late word takes the note back
        halt = stop.click(None, cancels=running, queue=False, **quiet)
        halt.then(lambda: show("Stopped.", "", [])[0], None, note, queue=False, **quiet)
    # Few may wait
    blocks.queue(max_size=WAITING, api_open=False)
    blocks._queue.push = fair_push(blocks._queue)
    return blocks


def visitor(request):
    """The address that a request comes from."""
    return request.client.host if request.client else ""


def fair_push(queue):
    """Gradio's `push`, which takes a question into the queue, with a limit for each visitor."""
    push = queue.push

    async def push_fairly(body, request, username):
        waiting = []
        for line in queue.event_queue_per_concurrency_id.values():
            waiting += line.queue
        if sum(visitor(event.request) == visitor(request) for event in waiting) >= PLACES:
            return False, f"{PLACES} of your questions wait already.", "queue_full"
        return await push(body=body, request=request, username=username)

    return push_fairly


def check_port(port):
    """Raises UserError if nobody can listen at this port.

    Better said before a minute of loading than after it.
    """
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((HOST, port))
    except OSError as error:
        reason = str(error.strerror).lower()
        raise UserError(f"--port {port}: {reason}; choose another one") from None


def serve(blocks, port):
    """Listen, and return."""
    import gradio as gr

    # Trust no forwarded address: each visitor could say which one is counted
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
    # Fonts of the system: nothing to fetch
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    rest = {
        "theme": theme,
        "css": STYLE,
        "footer_links": [],
        "prevent_thread_lock": True,
        "quiet": True,
    }
    # One byte: Gradio takes uploads, whether or not there is anything to upload on the page
    rest["max_file_size"] = 1
    # Nothing that reaches out, records or monitors
    switched_off = ["share", "ssr_mode", "run_history", "enable_monitoring", "mcp_server"]
    rest |= dict.fromkeys(switched_off, False)
    blocks.launch(server_name=HOST, server_port=port, **rest)


def main(cfg: Config) -> dict:
    """Load once; then answer one question, or all that come until Ctrl-C."""
    run.seed(cfg.seed)
    check(1 <= cfg.port <= 65535 and cfg.rate >= 1, "--port: 1 to 65535; --rate: 1 or more")
    check(cfg.k >= 1, "--k must be 1 or more")
    check(-1 <= cfg.abstain <= 1, "--abstain is a cosine: between -1 and 1")
    # What can be refused at once, before anything is loaded
    question = raw_rag.asked(cfg) if cfg.once else ""
    if not cfg.once:
        check_port(cfg.port)
    # Load model and retriever
    llm = None
    if cfg.llm != "none":
        llm = language_models.language_model(cfg.llm, cfg.tokens)
    folder = run.output(cfg.out, cfg)
    close = partial(raw_rag.closeness, cfg.embedder)
    retriever = build_retriever(cfg)
    service = QuestionService(retriever, llm, cfg.k, cfg.rate, close=close, abstain=cfg.abstain)
    # One question, without a page
    if cfg.once:
        line, told, found = list(service.reply(question, HOST))[-1]
        check(not line, line)
        cited, invented = answer.citations(told, found)
        passages = [d.metadata["id"] for d in found]
        metrics = {"answer": told, "cited": cited, "invented": invented, "passages": passages}
        return run.report(folder, metrics)
    # The page, until Ctrl-C
    reads = min(cfg.k, getattr(llm, "reads", cfg.k))
    about = (
        f"A language model reads {reads} of the {cfg.k} best passages and answers, maybe wrong: "
        "they are beside it."
    )
    examples = [cfg.question] if cfg.question else []
    if not cfg.docs:
        examples += EXAMPLES
    blocks = page(service, about, examples)
    serve(blocks, cfg.port)
    print(f"open http://{HOST}:{cfg.port} in a browser; Ctrl-C ends it", flush=True)
    blocks.block_thread()
    metrics = {"questions answered": service.answered}
    return run.report(folder, metrics, then="python rag/compare.py")


if __name__ == "__main__":
    run.cli(main, Config)
