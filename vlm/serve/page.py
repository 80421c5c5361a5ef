"""Gradio page: upload a photo, ask about it, several turns; the answer streams from a gateway by OpenAI's protocol.

Gradio: Abid et al. 2019, arXiv:1906.02569. The page holds no model. A photo is scaled down before it is
sent, which drops what a camera wrote into it, too. What the model says is shown as text: nothing in it
becomes a tag, a link or an address that the browser fetches. Limits of length and size are here, those of
rate are the gateway's, which hears in a header whose question it is.

    python vlm/serve/page.py --gateway http://127.0.0.1:8080/v1        # http://127.0.0.1:7860
"""

import os
import signal
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from deploy.http_server import bind
from deploy.serve import KEY
from utils import images, run
from utils.run import UserError, check
from utils.text import clean
from vlm.serve.client import messages_of, stream_chat
from vlm.serve.content import data_url

THUMBNAIL = 160
LONGEST = 500  # characters of a question
SIDE = 896  # pixels of a photo that is sent, at most: the worker looks at its middle square of 448
WAITING = 16  # questions that wait, of all visitors
EXAMPLE = Path(__file__).parents[1] / "figures" / "photo.jpg"
QUESTIONS = ("What fruit is this?", "Is it an apple? Answer yes or no.", "Describe the photo.")
ABOUT = (
    "A vision-language model answers, maybe wrong. The weights of the book were taught fourteen kinds "
    "of fruit and nothing else: they call anything else a fruit, too."
)
NO_PHOTO = "This answer is about no photo. Upload one, of at most {} MB, and start a new chat."
STYLE = """
.note {min-height: 1.5em; overflow-wrap: anywhere; font-weight: 600; color: var(--body-text-color-subdued)}
.talk {display: flex; flex-direction: column-reverse; gap: 10px; height: 430px; padding: 12px; overflow-y: auto;
    border: 1px solid var(--border-color-primary); border-radius: 8px}
.talk p {max-width: 75%; margin: 0; padding: 8px 12px; border-radius: 12px; font-size: 1.1em;
    white-space: pre-wrap; overflow-wrap: anywhere}
.talk .asked {align-self: flex-end; background: var(--color-accent-soft)}
.talk .told {align-self: flex-start; background: var(--background-fill-secondary)}
.talk img {align-self: flex-end; border-radius: 12px}
"""


class Turn(NamedTuple):
    """A question, the photo that went with it (its file, data URL and thumbnail; "": none), the answer."""

    path: str
    url: str
    thumbnail: str
    question: str
    answer: str


@dataclass(frozen=True)
class Config:
    """Upload, ask, several turns, on a page."""

    # or any server of OpenAI's protocol that takes photos
    gateway: str = "http://127.0.0.1:8080/v1"
    host: str = "127.0.0.1"
    port: int = 7860
    max_tokens: int = 64  # of an answer
    upload_mb: int = 8  # of a photo, at most
    answers: int = 8  # that stream at once
    out: str = "outputs/vlm_page"


def scaled_urls(path):
    """A photo of whatever size -> data URLs of at most SIDE and THUMBNAIL pixels a side. Raises UserError for what is
    none."""
    try:
        photo = images.to_rgb(images.open_image(path))
    except UserError as error:
        # a visitor knows the file by its name, not by its place on the server
        raise UserError(str(error).replace(str(path), Path(path).name)) from None
    photo.thumbnail((SIDE, SIDE))
    small = photo.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_url(photo), data_url(small)


def bubbles(turns):
    """HTML of a conversation. Only what is written here is a tag, all else is text."""
    parts = []
    for turn in turns:
        if turn.thumbnail:
            parts.append(f'<img src="{escape(turn.thumbnail)}" alt="the photo">')
        parts.append(f'<p class="asked">{escape(clean(turn.question))}</p>')
        if turn.answer:
            parts.append(f'<p class="told">{escape(clean(turn.answer))}</p>')
    # the last one first: the box is scrolled to its end
    return f'<div class="talk" role="log">{"".join(reversed(parts))}</div>'


def note(line):
    return f'<div class="note" role="status">{escape(clean(line))}</div>'


def reply(cfg, key, text, path, turns, visitor):
    """Yields (line for the visitor, HTML of the conversation, turns, text of the box) while an answer comes.

    A photo goes with the first question about it; an answer that is stopped keeps what was said.
    """
    text = clean(text or "").strip()
    if not text or len(text) > LONGEST:
        line = f"{len(text)} characters; {LONGEST} are the most." if text else "Type a question."
        yield note(line), bubbles(turns), turns, text
        return
    asked = Turn("", "", "", text, "")
    try:
        if path and path not in {turn.path for turn in turns}:
            url, thumbnail = scaled_urls(path)
            asked = asked._replace(path=path, url=url, thumbnail=thumbnail)
        yield note("Answering ..."), bubbles([*turns, asked]), turns, ""
        before = [(turn.url, turn.question, turn.answer) for turn in turns]
        messages = messages_of(before, text, asked.url)
        said = ""
        for piece in stream_chat(cfg.gateway, messages, key, visitor, cfg.max_tokens):
            said += piece
            now = [*turns, asked._replace(answer=said)]
            # a turn counts from its first word: two questions must not follow each other
            yield note("Answering ..."), bubbles(now), now if said.strip() else turns, ""
        now = [*turns, asked._replace(answer=said if said.strip() else "(nothing)")]
        # an upload that was refused is no photo of the conversation
        without = "" if any(turn.url for turn in now) else NO_PHOTO.format(cfg.upload_mb)
        yield note(without), bubbles(now), now, ""
    except UserError as error:
        yield note(f"{error}."), bubbles(turns), turns, text


def raw_path(payload: Any) -> Any:
    """An uploaded file as it is: `scaled_urls` reads it, and says in a line if it is no photo."""
    return payload.path if payload else None


def page(cfg, key=""):
    """The photo at the left, the conversation at the right."""
    import gradio as gr

    def ask(text, path, turns, request: gr.Request):
        visitor = request.client.host if request.client else ""
        yield from reply(cfg, key, text, path, turns, visitor)

    def fill(question):
        return images.open_image(EXAMPLE), question

    with gr.Blocks(title="Ask about a photo", analytics_enabled=False, fill_width=True) as blocks:
        # what stands on the page
        gr.HTML(f"<h1>Ask about a photo</h1><p>{escape(ABOUT)}</p>")
        turns = gr.State([])
        with gr.Row():
            with gr.Column(scale=1):
                label = f"Photo, up to {cfg.upload_mb} MB"
                photo = gr.Image(type="filepath", sources=["upload"], label=label, elem_id="photo")
                photo.preprocess = raw_path
                gr.HTML("<p>Or try the photo of the book:</p>")
                buttons = [gr.Button(q, size="sm", elem_classes="example") for q in QUESTIONS]
            with gr.Column(scale=2):
                talk = gr.HTML(bubbles([]), elem_id="talk")
                status = gr.HTML(note(""))
                hint = f"up to {LONGEST} characters"
                box = gr.Textbox(label="Question", placeholder=hint, elem_id="question")
                with gr.Row():
                    go = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
                    new = gr.Button("New chat", elem_id="new")
        # three ways to ask: the button, the enter key, an example
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        one = {"concurrency_limit": cfg.answers, "concurrency_id": "chat", "trigger_mode": "once"}
        parts = {"fn": ask, "inputs": [box, photo, turns], "outputs": [status, talk, turns, box]}
        running = [gr.on([go.click, box.submit], **parts | quiet | one)]
        for button in buttons:
            filled = button.click(fill, button, [photo, box], queue=False, **quiet)
            running.append(filled.then(**parts | quiet | one))
        # stop: first cancel, or a late word takes the note back
        halt = stop.click(None, cancels=running, queue=False, **quiet)
        halt.then(lambda: note("Stopped."), None, status, queue=False, **quiet)
        fresh = new.click(None, cancels=running, queue=False, **quiet)
        nothing = (note(""), bubbles([]), [], None)
        fresh.then(lambda: nothing, None, [status, talk, turns, photo], queue=False, **quiet)
    blocks.queue(max_size=WAITING, api_open=False)
    return blocks


def serve(blocks, cfg):
    """Listen, and return."""
    import gradio as gr

    # fonts of the system: nothing to fetch
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    rest: dict[str, Any] = {"theme": theme, "css": STYLE, "footer_links": [], "quiet": True}
    rest |= {"prevent_thread_lock": True, "max_file_size": f"{cfg.upload_mb}mb"}
    # nothing that reaches out, records or monitors
    switched_off = ["share", "ssr_mode", "run_history", "enable_monitoring", "mcp_server"]
    rest |= dict.fromkeys(switched_off, False)
    blocks.launch(server_name=cfg.host, server_port=cfg.port, **rest)


def main(cfg: Config) -> dict:
    """Serve until SIGTERM or Ctrl-C."""
    web = cfg.gateway.startswith(("http://", "https://"))
    check(web, "--gateway is an address: http://host:port/v1")
    check(min(cfg.max_tokens, cfg.upload_mb, cfg.answers) > 0, "numbers: at least 1")
    check(1 <= cfg.port < 2**16, "--port must be from 1 to 65535")
    # better said before than after all is loaded
    bind(cfg.host, cfg.port).close()
    folder = run.output(cfg.out, cfg)
    # Trust no forwarded address: each visitor could say which one is counted
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
    blocks = page(cfg, os.environ.get(KEY, ""))
    serve(blocks, cfg)
    print(f"open http://{cfg.host}:{cfg.port} in a browser; Ctrl-C ends it", flush=True)
    # SIGTERM ends it as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    blocks.block_thread()
    return run.report(folder, {"port": cfg.port}, then="vlm/demo.md")


if __name__ == "__main__":
    run.cli(main, Config)
