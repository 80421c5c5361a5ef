"""Prompts with image tokens in them: special tokens, chat template, turns of a conversation, supervised tokens.

Where the text says <image>, as many image tokens stand as the connector makes of a photo. Labels
are those of the answers and of the token that ends each; questions and the template itself are
masked. LLaVA, Liu et al. 2023, arXiv:2304.08485, Sec. 4.2; the templates are in templates.py.
"""

from deploy import decode
from utils.run import UserError, check
from utils.text import plain, printable, read_text
from vlm import templates
from vlm.templates import IMAGE, TEMPLATES

IGNORE = -100  # the label of a token that is not supervised
START, END = "<im_patch_start>", "<im_patch_end>"
# A conversation that every template must take
TRIAL = [(f"{IMAGE}\nWhat is it?", "a pear")]
CONTEXT = 64  # characters before a text, with which it is tokenized


def add_words(tokenizer, language, words=(IMAGE,)):
    """Put words into the vocabulary -> the id of <image>; embeddings grow, and no row of them is
    ever lost.

    Many models have more rows than their tokenizer has words: cutting the table to the tokenizer's
    length loses them.
    """
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(words)}, replace_extra_special_tokens=False
    )
    # rows of the embedding table, frozen or trainable as they were
    rows = language.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        moves = language.get_input_embeddings().weight.requires_grad
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        language.get_input_embeddings().weight.requires_grad_(moves)
        language.get_output_embeddings().weight.requires_grad_(moves)
    # a padding token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    language.config.pad_token_id = tokenizer.pad_token_id
    language.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer.convert_tokens_to_ids(IMAGE)


def has(tokenizer, word):
    """Is it one word of the vocabulary? (Asking for the whole vocabulary takes 30 ms, each
    time.)"""
    unknown = (None, tokenizer.unk_token_id)
    return word == tokenizer.unk_token or tokenizer.convert_tokens_to_ids(word) not in unknown


def use_template(tokenizer, name_or_path=""):
    """Set the tokenizer's chat template: one of TEMPLATES by name, or a Jinja file. It is saved with the tokenizer.

    "" keeps the tokenizer's own; a tokenizer without one gets vicuna. Raises UserError, and changes
    nothing: no such file, not UTF-8, no Jinja, or a template in which a question and its answer
    cannot be told apart.
    """
    own = tokenizer.chat_template
    name = name_or_path or "its own"
    # a name, a file, or what is there
    if name_or_path in TEMPLATES:
        chosen = TEMPLATES[name_or_path]
    elif name_or_path:
        chosen = read_template(name_or_path)
    else:
        chosen = own or TEMPLATES["vicuna"]
    # a conversation in it
    tokenizer.chat_template = chosen
    try:
        messages = TRIAL if tokenizer.eos_token else [(TRIAL[0][0], None)]
        templates.segments(tokenizer, messages)
    except UserError as error:
        tokenizer.chat_template = own
        mend = f"take one of {', '.join(TEMPLATES)}"
        raise UserError(f"chat template {printable(name)}: {error}; {mend}") from None


def template_change(learned, tokenizer, name_or_path):
    """A line that warns if a model goes on in another chat template than the one that it brings; "" if it does not."""
    if not learned or learned == tokenizer.chat_template:
        return ""
    names = {text: name for name, text in TEMPLATES.items()}
    before = names.get(learned, "of its own")
    return (
        f"warning: --template {printable(name_or_path)}: the model brings the chat template "
        f"{before} and may have learned it; from now on it learns the other, and forgets it"
    )


def read_template(path):
    """A Jinja file -> its text. Raises UserError: it cannot be read, is not UTF-8, or is
    empty."""
    try:
        text = read_text(path, 1)
        check(text.strip(), f"{printable(path)} is empty")
    except UserError as error:
        known = ", ".join(TEMPLATES)
        raise UserError(f"{error}; a chat template is a Jinja file or one of {known}") from None
    return text


def end_of_answer(tokenizer):
    """The token that ends an answer in the tokenizer's chat template, which is supervised; eos if the template
    writes none, None if there is no eos either."""
    question, answer = TRIAL[0]
    in_parts = templates.wants_parts(tokenizer)
    messages = [templates.message("user", question, in_parts)]
    prompt = templates.render(tokenizer, messages, ask=True)
    messages.append(templates.message("assistant", answer, in_parts))
    whole = templates.render(tokenizer, messages)
    _, word = templates.split_answer(tokenizer, whole[len(prompt) :], answer)
    return word or tokenizer.eos_token


def ends(tokenizer, language=None):
    """The ids that end an answer: of the supervised end token, and all that the model itself
    names."""
    word = end_of_answer(tokenizer)
    ours = [] if word is None else [tokenizer.convert_tokens_to_ids(word)]
    return sorted({*ours, *decode.ends(tokenizer, language)})


def tokens_behind(tokenizer, before, text):
    """ids of a text where it stands behind another one: SentencePiece puts a space before what begins a text.

    They never share a token with the text before: if the tokenizer would join both, the text is
    tokenized alone, as it is when an answer is generated.
    """

    def ids_of(part):
        return tokenizer(part, add_special_tokens=False).input_ids

    # the end of what stands before, alone and with the text: what is new are its tokens
    context = before[-CONTEXT:]
    known = ids_of(context)
    both = ids_of(context + text)
    return both[len(known) :] if both[: len(known)] == known else ids_of(text)


def chat(tokenizer, turns, count, system=""):
    """Turns [(question, answer or None), ...] -> ids, supervised (lists): only answers and their
    end tokens are. The text is that of the tokenizer's chat template (`use_template`).

    Every <image> in a question becomes `count` of them, between START and END if the vocabulary has these.
    Prompts and targets are tokenized one by one, so that the border between them is a border of tokens, and what is
    asked in use is the beginning of what was learned. bos stands where the template writes it. What somebody typed is
    text: the names of control tokens in it are letters. Raises UserError for a template that does
    not fit, and for an answer, if there is no token to end it.
    """
    place = f"{START}{IMAGE * count}{END}" if has(tokenizer, START) else IMAGE * count

    def typed(text):
        """What somebody typed: the names of special words in it are plain text, all but <image>."""
        return IMAGE.join(plain(part, tokenizer) for part in text.split(IMAGE))

    # control tokens in what somebody typed become letters
    written = []
    for question, answer in turns:
        written.append((typed(question), None if answer is None else plain(answer, tokenizer)))
    # prompt, target, prompt, target, ...: each tokenized by itself, behind what came before
    ids = []
    supervised = []
    before = ""
    for text, is_target in templates.segments(tokenizer, written, plain(system, tokenizer)):
        if not is_target:
            text = text.replace(IMAGE, place)
        new = tokens_behind(tokenizer, before, text)
        ids.extend(new)
        supervised.extend([is_target] * len(new))
        before += text
    return ids, supervised
