"""Chat templates of language models as Jinja texts: ours, a tokenizer's own, or a file; prompts and targets in them.

A chat template is a small program that writes a conversation as one text. Which part of that text
is to be learned follows from the difference of two renderings, whatever the template is: up to the
question it is the prompt (add_generation_prompt), what the answer adds is the target. In our own
templates {% generation %} marks the same part, for `return_assistant_tokens_mask` of transformers.

plain, vicuna and llava_llama_2 are the formats of LLaVA's stages, Liu et al. 2023, arXiv:2304.08485
and arXiv:2310.03744; [INST] is that of Llama 2 (Touvron et al. 2023, arXiv:2307.09288) and Mistral
(Jiang et al. 2023, arXiv:2310.06825), chatml that of Qwen and SmolLM2 (without a default system
message).
"""

import re

from utils.run import UserError, check
from utils.text import printable

IMAGE = "<image>"
# Some templates write the day's date into the system message: the same every day
DATE = "26 Jul 2024"

# Stage 1: pictures and their caption, nothing else. LLaVA ends it with a newline, here it is eos.
PLAIN = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] }}{{ eos_token }}
        {%- endgeneration %}
    {%- elif '<image>' in message['content'] %}
        {{- '<image>' * message['content'].count('<image>') }}
    {%- else %}
        {{- message['content'] }}
    {%- endif %}
{%- endfor %}
"""

# LLaVA-1.5, whose system message is not added here; the space before an answer belongs to its first token
VICUNA = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- 'ASSISTANT:' }}
        {%- generation %}
            {{- ' ' + message['content'] }}{{ eos_token }}
        {%- endgeneration %}
    {%- elif message['role'] == 'user' %}
        {{- 'USER: ' + message['content'] + ' ' }}
    {%- else %}
        {{- message['content'] + ' ' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}
"""

# Every turn begins with bos; the system message stands inside the first question
LLAVA_LLAMA_2 = r"""
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- ' ' + message['content'] + ' ' }}{{ eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- bos_token }}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- endif %}
{%- endfor %}
"""

# Mistral-7B-Instruct-v0.2: bos once, no place for a system message but the first question
MISTRAL_INSTRUCT = r"""
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '\n\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- ' ' + message['content'] }}{{ eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- endif %}
{%- endfor %}
"""

CHATML = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

TEMPLATES = {
    "plain": PLAIN,
    "vicuna": VICUNA,
    "llava_llama_2": LLAVA_LLAMA_2,
    "mistral_instruct": MISTRAL_INSTRUCT,
    "chatml": CHATML,
}


def render(tokenizer, messages, ask=False):
    """Messages [{"role", "content"}, ...] -> text, by the tokenizer's chat template, or vicuna if it has none.

    ask: up to the place where an answer begins. Raises UserError: the template fails on them.
    """
    # a tokenizer without a template of its own gets vicuna
    template = None if tokenizer.chat_template else VICUNA
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=ask,
            tokenize=False,
            date_string=DATE,
        )
    # a program that somebody else wrote raises what comes
    except Exception as error:
        reason = printable(error) or type(error).__name__
        raise UserError(f"the chat template fails: {reason}") from None


def message(role, text, in_parts):
    """A message; in_parts: its content is a list, as processors of transformers pass it."""
    return {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}


def wants_parts(tokenizer):
    """Does the template read the content of a message as a list of parts?

    Raises UserError: it fails on a text and on a list, or leaves out what the user says.
    """
    failures = []
    for in_parts in (False, True):
        try:
            text = render(tokenizer, [message("user", IMAGE, in_parts)], ask=True)
        except UserError as error:
            failures.append(error)
            continue
        # some templates print a list as Python does, or leave out what they do not know: the marker tells
        if IMAGE in text:
            return in_parts
    if len(failures) == 2:
        raise failures[0]
    raise UserError("the chat template leaves out what the user says")


def control_words(tokenizer):
    """Tokens that are never part of a text, the longest first."""
    # the longest first: one may begin with another
    words = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return sorted((word for word in words if word.strip()), key=len, reverse=True)


def split_answer(tokenizer, text, answer):
    """What the template writes behind a prompt -> how much of it is the target, and the word that ends the answer.

    The word is a control token behind the answer (spaces between them are part of the target), or
    None: the template writes none. Raises UserError: the answer is not there, or something else
    stands behind it.
    """
    words = control_words(tokenizer)
    # every place where the answer may end: a template may write its letters before it, too
    places = [found.end() for found in re.finditer(re.escape(answer.strip()), text)]
    check(places, "the chat template changes the answer, or leaves it out")
    for place in places:
        behind = text[place:].lstrip()
        for word in words:
            if behind.startswith(word):
                return len(text) - len(behind) + len(word), word
    # no control token behind it: then nothing else may stand there
    behind = text[places[-1] :].strip()
    not_one = f"{printable(behind)!r} behind an answer is no token of this tokenizer"
    check(not behind, f"the chat template does not fit: {not_one}")
    return places[-1], None


def segments(tokenizer, turns, system=""):
    """Turns [(question, answer or None), ...] -> [(text, is target), ...]: prompt, target, prompt, target, ...

    A target is an answer with all that the template puts before it, and the token that ends it. A
    template without such a token gets the tokenizer's eos, as in LLaVA's own format. What stands
    behind the last end is no target. Raises UserError for a template of which a prompt is not the
    beginning of what follows it, and if there is no token to end an answer.
    """
    in_parts = wants_parts(tokenizer)
    messages = [message("system", system, in_parts)] if system else []
    found = []
    done = ""
    rest = ""
    for question, answer in turns:
        # 1. the prompt: what the question adds to the text so far
        messages.append(message("user", question, in_parts))
        prompt = render(tokenizer, messages, ask=True)
        other = "the chat template writes an earlier turn in another way once a question follows it"
        check(prompt.startswith(done), f"{other}: take another template, or one turn a row")
        added = prompt[len(done) :]
        other = f"the chat template does not write each {IMAGE} of a question once"
        check(added.count(IMAGE) == question.count(IMAGE), other)
        found.append((added, False))
        done = prompt
        if answer is None:
            continue
        # 2. the target: what the answer adds to the prompt, up to its end
        messages.append(message("assistant", answer, in_parts))
        whole = render(tokenizer, messages)
        other = "the chat template does not begin with its own prompt once an answer is in it"
        check(whole.startswith(prompt), other)
        size, end = split_answer(tokenizer, whole[len(prompt) :], answer)
        done = whole[: len(prompt) + size]
        rest = whole[len(done) :]
        # 3. its end, if the template writes none
        missing = ""
        if end is None:
            missing = tokenizer.eos_token
            check(missing, "the tokenizer has no word that ends an answer: set its eos_token")
        found.append((done[len(prompt) :] + missing, True))
    if turns and turns[-1][1] is not None and rest:
        found.append((rest, False))
    return found
