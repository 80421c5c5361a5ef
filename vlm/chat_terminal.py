"""The terminal of a chat: questions and commands line by line, answers as they come.

Lines come from a terminal or a pipe, until /exit or their end. What is wrong with one line is said in one
line, and the next one is read; Ctrl-C stops an answer, not the chat. The conversation itself is in chat.py.
"""

import sys
import time
from contextlib import closing
from pathlib import Path

import torch

from deploy import serve
from utils import data, run
from utils.images import open_image
from utils.run import UserError, check
from utils.text import clean, printable
from vlm.chat import Conversation

SIDE = 448  # of the middle square of a picture, as in training
HELP = "a question; /image PATH: one more picture, /undo, /clear, /exit"


def read_picture(path, model, tiles=0):
    """A file -> uint8 (3,H,W): as it is if it is cut into tiles, else its middle square. Raises UserError."""
    tiled = tiles > 1 or (tiles == 0 and model.grids)
    return data.read_image(path, 0 if tiled else SIDE)


def check_pictures(paths):
    """Raises UserError for a file that is no picture, before weights are read in vain."""
    for path in paths:
        open_image(path)


def low_bit(model, name, bits):
    """Linear layers of the language model in 8 or 4 bits, in place; 0: as they are. Raises UserError."""
    if bits:
        asked = serve.Config(model=name, int8=bits == 8, int4=bits == 4)
        serve.low_bit(model.language.float(), asked)


def answer(conversation, question):
    """Print an answer while it comes; Ctrl-C stops it and nothing else."""
    begin = True
    with closing(conversation.ask(question)) as pieces:
        try:
            for piece in pieces:
                # some templates put a space before an answer
                piece = piece.lstrip() if begin else piece
                begin = begin and not piece
                print(clean(piece), end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]")
            return
    probability = torch.tensor(conversation.log_p).exp()
    print(f"  ({100 * float(probability):.0f} % sure)", flush=True)


def waiting(conversation):
    """How many pictures the next question will show, in words."""
    count = len(conversation.waiting)
    return "1 picture waits" if count == 1 else f"{count} pictures wait"


def command(conversation, line):
    """A line that begins with / -> what it did, in words. Raises UserError."""
    name, _, rest = line.partition(" ")
    if name == "/clear":
        conversation.clear()
        return "cleared; pictures, too"
    if name == "/undo":
        conversation.undo()
        return f"undone; {waiting(conversation)}"
    if name == "/image":
        check(rest.strip(), "/image PATH: name a file")
        # a terminal puts quotes around a file that is dropped on it
        path = Path(rest.strip().strip("'\"")).expanduser()
        conversation.add(read_picture(path, conversation.model, conversation.tiles))
        return f"{waiting(conversation)} for the next question"
    raise UserError(f"{printable(name)} is no command; {HELP}")


def lines():
    """What is typed, line by line, until the file ends; Ctrl-C between two questions is no end."""
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/exit ends it")
            continue
        # questions that are piped in show beside their answers
        if not sys.stdin.isatty():
            print(clean(line))
        yield line.strip()


def converse(conversation):
    """Answer lines until /exit or the end of the file; what is wrong with one is said, and the next one read."""
    for line in lines():
        if line == "/exit":
            return
        try:
            if line.startswith("/"):
                print(command(conversation, line))
            elif line:
                answer(conversation, line)
        except UserError as error:
            print(f"error: {clean(str(error))}", flush=True)


def start(cfg, tokenizer, model):
    """llava.main with --chat, several pictures, or <image> in the prompt -> metrics."""
    about = (cfg.max_new_tokens, cfg.tiles, cfg.max_prompt)
    conversation = Conversation(tokenizer, model, *about)
    for path in cfg.image:
        conversation.add(read_picture(path, model, cfg.tiles))
    if not cfg.chat:
        # what is wrong with the prompt ends the run before anything is written
        ids, _, _ = conversation.prompt(conversation.place_images(cfg.prompt))
        conversation.check_room(len(ids), len(ids))
    folder = run.output(cfg.out, cfg)
    begin = time.process_time()
    if cfg.chat:
        print(HELP)
        converse(conversation)
    else:
        print(cfg.prompt)
        answer(conversation, cfg.prompt)
    run.write_json(folder / "chat.json", conversation.turns)
    metrics = {
        "turns": len(conversation.turns),
        "tokens read": conversation.fed,
        "tokens found in the cache": conversation.reused,
        "CPU seconds of the chat": time.process_time() - begin,
    }
    return run.report(folder, metrics, "python vlm/train.py")
