"""What programs expect of a server that speaks OpenAI's protocol, with its client: of ours, or any other."""

import threading

import openai
import pytest

ASK = [{"role": "user", "content": "Name three fruits."}]


def chat(client, model, **about):
    """A greedy chat of few tokens."""
    about = {"model": model, "messages": ASK, "max_tokens": 24, "temperature": 0} | about
    return client.chat.completions.create(**about)


def stream(client, model, **about):
    """The same as a stream -> its chunks, and the text of them all."""
    options = {"include_usage": True}
    chunks = list(chat(client, model, stream=True, stream_options=options, **about))
    told = [choice for chunk in chunks for choice in chunk.choices]
    return chunks, "".join(choice.delta.content or "" for choice in told)


def models(client, model):
    """The model has its name in the list."""
    assert model in [one.id for one in client.models.list()]


def whole_answer(client, model):
    """Text, why it ended, and how many tokens it took."""
    answer = chat(client, model)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert 0 < usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert chat(client, model, max_tokens=1).choices[0].finish_reason == "length"


def streamed_answer(client, model):
    """The pieces of a stream are the whole answer, more than one, with usage at the end."""
    whole = chat(client, model)
    chunks, text = stream(client, model)
    assert text == whole.choices[0].message.content
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 1
    ends = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [x for x in ends if x] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def stop_string(client, model):
    """What follows a stop string is not said, nor the string itself."""
    whole = chat(client, model).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    answer = chat(client, model, stop=[stop]).choices[0]
    assert answer.message.content == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def conversation(client, model):
    """A system prompt and earlier turns are read."""
    turns = [{"role": "system", "content": "Be brief."}, *ASK]
    turns += [{"role": "assistant", "content": "Fig."}, {"role": "user", "content": "More."}]
    longer = chat(client, model, messages=turns)
    assert longer.usage.prompt_tokens > chat(client, model).usage.prompt_tokens


def many_at_once(client, model):
    """Eight users, whole and as streams: each gets an answer."""
    found = []

    def ask(number):
        if number % 2:
            found.append(stream(client, model)[1])
        else:
            found.append(chat(client, model).choices[0].message.content)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(found)


def refusals(client, model):
    """What makes no sense is a status from 400 to 499, and the next request is answered."""
    for about in ({"temperature": -1}, {"max_tokens": -1}, {"messages": []}):
        with pytest.raises(openai.APIStatusError) as error:
            chat(client, model, **about)
        assert 400 <= error.value.status_code < 500, about
    with pytest.raises(openai.APIStatusError) as error:
        chat(client, "a-model-that-is-not-there")
    assert 400 <= error.value.status_code < 500
    assert chat(client, model).choices


CHECKS = [
    models,
    whole_answer,
    streamed_answer,
    stop_string,
    conversation,
    many_at_once,
    refusals,
]
