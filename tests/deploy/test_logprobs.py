"""deploy/logprobs.py: log probabilities are those of generate, whatever chose the token; the form is OpenAI's."""

import pytest
import torch

from deploy import generation, logits_processors, logprobs, token_bytes
from tests import llamas
from tests.deploy.test_decode import PAD, talker
from utils.run import UserError


def test_logprobs_are_those_of_generate(parity):
    model = talker()
    ids = torch.randint(3, 120, (3, 7))
    recorder = logprobs.LogprobRecorder(5)
    mine = torch.stack(list(generation.stream(model, recorder, 9, input_ids=ids)), 1)
    theirs = model.generate(
        input_ids=ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=PAD,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert torch.equal(mine, theirs.sequences[:, 7:]) and len(recorder.steps) == 9
    log_p = torch.stack(theirs.logits, 1).log_softmax(-1)
    chosen = log_p.gather(-1, mine[..., None])[..., 0]
    best, alternatives = log_p.topk(5)
    found = [torch.stack(x, 1) for x in zip(*recorder.steps)]
    assert torch.equal(found[0], mine) and torch.equal(found[3], alternatives)
    where = ("logprobs.top_logprobs", "transformers output_logits, log_softmax")
    parity("Decoding", *where, found[1:3], [chosen, best])
    # a forward pass over all of it says the same
    again = generation.log_probs(model, mine, input_ids=ids)
    torch.testing.assert_close(found[1], again, atol=1e-4, rtol=1e-5)


def test_logprobs_are_those_before_temperature_and_truncation():
    logits = torch.randn(4, 120)
    pick = logits_processors.sampler(temperature=3.0, k=50)
    recorder = logprobs.LogprobRecorder(2, pick)
    token = recorder(logits)
    ((kept, chosen, best, ids),) = recorder.steps
    log_p = logits.log_softmax(-1)
    assert torch.equal(kept, token) and torch.equal(chosen, log_p[range(4), token])
    assert (token != ids[:, 0]).any()  # not only the likeliest is drawn
    assert torch.equal(best[:, 0], log_p.amax(-1)) and torch.equal(ids[:, 0], logits.argmax(-1))
    assert (best[:, 0] > best[:, 1]).all() and (chosen < 0).all()


def test_no_alternatives_are_none():
    logits = torch.randn(2, 9)
    chosen, best, ids = logprobs.top_logprobs(logits, torch.tensor([1, 2]), 0)
    assert chosen.shape == (2,) and best.shape == ids.shape == (2, 0)
    for n in (-1, 10):
        with pytest.raises(UserError, match="between 0 and 9"):
            logprobs.top_logprobs(logits, torch.tensor([1, 2]), n)


def test_the_form_is_that_of_openai():
    tokenizer = llamas.tokenizer()
    parrot = tokenizer("🦜")["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    recorder = logprobs.LogprobRecorder(2)
    for token in (*parrot, end):
        logits = torch.zeros(2, len(tokenizer))
        logits[1, token] = 9.0
        recorder(logits)
    content = logprobs.openai_logprobs(recorder.steps, tokenizer, row=1)["content"]
    assert bytes(sum((c["bytes"] for c in content), [])).decode("utf-8") == "🦜<|im_end|>"
    assert content[0]["token"] == "\ufffd" and content[-1]["token"] == "<|im_end|>"
    for c in content:
        assert c.keys() == {"token", "logprob", "bytes", "top_logprobs"} and c["logprob"] < 0
        first, second = c["top_logprobs"]
        assert first == {k: c[k] for k in ("token", "logprob", "bytes")}
        assert second["logprob"] < first["logprob"]


def test_the_bytes_of_tokens_are_those_of_the_text():
    tokenizer = llamas.tokenizer()
    pieces = token_bytes.token_bytes(tokenizer)
    text = 'naïve 🦜\n\t"quotes" \\ 日本語 \x7f\u00ad ½ tabs'
    ids = tokenizer(text)["input_ids"]
    assert b"".join(pieces[i] for i in ids) == text.encode("utf-8")
    assert len(pieces) == len(tokenizer)
    assert all(pieces[i] is None for i in tokenizer.all_special_ids)
    assert pieces[tokenizer.convert_tokens_to_ids("<file_sep>")] is None
    assert sum(piece is None for piece in pieces) == len(tokenizer.added_tokens_decoder)


def test_the_letters_for_bytes_are_those_of_gpt2(parity):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    mine, theirs = token_bytes.byte_table(), {v: k for k, v in bytes_to_unicode().items()}
    assert mine == theirs and len(mine) == 256
    parity("Decoding", "token_bytes.byte_table", "transformers bytes_to_unicode", mine, theirs)


def test_a_tokenizer_without_bytes_is_refused():
    from types import SimpleNamespace

    with pytest.raises(UserError, match="no byte-level BPE"):
        token_bytes.token_bytes(SimpleNamespace())


def test_utf8_step_knows_what_is_a_letter():
    """Every run of up to four bytes from a set with all edges: whole letters are those that Python decodes."""
    edges = [
        0x41,
        0x7F,
        0x80,
        0x8F,
        0x90,
        0x9F,
        0xA0,
        0xBF,
        0xC0,
        0xC1,
        0xC2,
        0xDF,
        0xE0,
        0xE1,
        0xEC,
    ]
    edges += [0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]
    for first in edges:
        for second in edges:
            for third in (0x80, 0xBF, 0xC0):
                for run in (
                    [first],
                    [first, second],
                    [first, second, third],
                    [first, second, third, 0x80],
                ):
                    waiting = ()
                    for byte in run:
                        waiting = None if waiting is None else token_bytes.utf8_step(waiting, byte)
                    try:
                        bytes(run).decode("utf-8")
                        whole = True
                    except UnicodeDecodeError:
                        whole = False
                    assert (waiting == ()) == whole, bytes(run)
                    if waiting:  # as many bytes as it waits for make it whole
                        least = [waiting[1]] + [0x80] * (waiting[0] - 1)
                        assert bytes(run + least).decode("utf-8")
