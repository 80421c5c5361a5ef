"""Chat templates with image tokens in them: special tokens, turns of a conversation, supervised tokens.

Where the text says <image>, as many image tokens stand as the connector makes of a photo. Labels
are those of the answers and of the token that ends each; questions and the template itself are
masked. LLaVA, Liu et al. 2023, arXiv:2304.08485, Sec. 4.2; Vicuna's template is LLaVA's own.
"""

from deploy import decode
from utils.run import check
from utils.text import plain

IGNORE = -100  # the label of a token that is not supervised
IMAGE, START, END = "<image>", "<im_patch_start>", "<im_patch_end>"
# What stands before a question and after it, and after an answer: supervised, and masked
STYLES = {
    "chatml": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", "\n"),
    "llama2": ("[INST] ", " [/INST]", "</s>", ""),
    "vicuna": ("USER: ", " ASSISTANT:", "</s>", ""),  # LLaVA's own
}


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


def style(tokenizer):
    """How this model was taught to talk: chatml, llama2 or vicuna, by its words."""
    if has(tokenizer, "<|im_start|>"):
        return "chatml"
    return "llama2" if "[INST]" in (tokenizer.chat_template or "") else "vicuna"


def end_of_answer(tokenizer, talk=None):
    """The token that ends an answer, which is supervised; None if the tokenizer has no such
    word."""
    word = STYLES[talk or style(tokenizer)][2]
    return word if has(tokenizer, word) else tokenizer.eos_token


def ends(tokenizer, language=None):
    """The ids that end an answer: of the supervised end token, and all that the model itself
    names."""
    word = end_of_answer(tokenizer)
    ours = [] if word is None else [tokenizer.convert_tokens_to_ids(word)]
    return sorted({*ours, *decode.ends(tokenizer, language)})


def chat(tokenizer, turns, count, talk=None):
    """Turns [(question, answer or None), ...] -> ids, supervised (lists): only answers and their
    end tokens are.

    Every <image> in a question becomes `count` of them, between START and END if the vocabulary has these. Pieces are
    tokenized one by one, so that the border between prompt and target is a border of tokens, whatever the texts are.
     Raises UserError for an answer, if the tokenizer has no word to end it.
    """
    before, after, _, rest = STYLES[talk or style(tokenizer)]
    ending = end_of_answer(tokenizer, talk)
    place = f"{START}{IMAGE * count}{END}" if has(tokenizer, START) else IMAGE * count
    ids = []
    supervised = []

    def say(text, is_target):
        new = tokenizer(text, add_special_tokens=False).input_ids
        ids.extend(new)
        supervised.extend([is_target] * len(new))

    def typed(text):
        """What somebody typed: the names of special words in it are plain text, all but <image>."""
        return place.join(plain(part, tokenizer) for part in text.split(IMAGE))

    if tokenizer.bos_token_id is not None and before == STYLES["vicuna"][0]:
        ids = [tokenizer.bos_token_id]
        supervised = [False]
    for question, answer in turns:
        # question, masked
        say(before, False)
        say(typed(question), False)
        say(after, False)
        # answer and its end token, supervised
        if answer is not None:
            check(ending, "the tokenizer has no word that ends an answer: set its eos_token")
            say(plain(answer, tokenizer), True)
            say(ending, True)
            say(rest, False)
    return ids, supervised
