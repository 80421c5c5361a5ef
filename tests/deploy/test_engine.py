"""deploy/engine.py, scheduler.py, paged_cache.py: answers as if each request were alone, blocks that add up."""

from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from deploy import engine as engine_module
from deploy import engine_blocks, generation, paged_cache
from deploy.engine import Engine, mixed_requests
from deploy.llama import Llama
from deploy.logits_processors import sampler
from deploy.paged_cache import BlockPool, PagedCache, Part
from tests.deploy.test_decode import talker
from utils import pretrained
from utils.run import UserError


@pytest.fixture(scope="module")
def model():
    return talker()


def alone(model, prompt, new, eos=None):
    """Greedy answer of transformers' forward pass, one prompt at a time."""
    ids = torch.tensor([prompt])
    found = generation.greedy(model, input_ids=ids, max_new_tokens=new, eos=eos, pad=0)[0].tolist()
    for place, token in enumerate(found):
        if eos is not None and token in eos:
            return found[: place + 1]
    return found


def prompts_of(seed, count, longest=30):
    random = np.random.default_rng(seed)
    return [random.integers(3, 120, random.integers(1, longest)).tolist() for _ in range(count)]


def check_blocks(engine):
    """Every block is free or held, by as many as have it in their table; keys point to what they name."""
    scheduler, pool = engine.scheduler, engine.pool
    held = Counter(b for r in [*scheduler.running, *scheduler.waiting] for b in r.table)
    for block, holders in enumerate(pool.holders):
        assert holders == held[block]
        assert (block in pool.free) == (holders == 0)
    assert {block: key for key, block in pool.by_key.items()} == pool.key_of
    for request in scheduler.running:
        assert len(set(request.table)) == len(request.table)
        assert len(request.table) * pool.size >= request.cached


def run_all(engine, requests):
    steps = 0
    while any(not request.finished for request in requests):
        fed = engine.fed
        engine.step()
        assert engine.fed - fed <= engine.scheduler.max_tokens
        check_blocks(engine)
        steps += 1
        assert steps < 2000, "requests starve"
    assert len(engine.pool.free) == len(engine.pool.holders)


WAYS = {
    "all at once": {"max_batch": 12},
    "two at a time": {"max_batch": 2},
    "chunks of five tokens": {"max_tokens": 5},
    "one token a step": {"max_tokens": 1},
    "blocks of one token": {"block_size": 1, "blocks": 400},
    "blocks of sixteen": {"block_size": 16, "blocks": 30},
    "few blocks, preempted": {"blocks": 14, "block_size": 4},
    "shortest first": {"policy": "shortest", "max_batch": 3},
    "nothing is shared": {"prefix_sharing": False},
    "few blocks, nothing shared": {"blocks": 14, "block_size": 4, "prefix_sharing": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_each_prompt_alone(model, parity, way):
    """Twelve prompts, some with the same beginning, answers of different lengths."""
    beginning = (prompts_of(9, 1)[0] * 20)[:20]
    prompts = prompts_of(0, 6) + [beginning + p for p in prompts_of(1, 6, 12)]
    lengths = [3 + i % 9 for i in range(12)]
    engine = Engine(model, **{"blocks": 100, "block_size": 4} | WAYS[way])
    requests = [engine.add(p, n, eos=(5, 9)) for p, n in zip(prompts, lengths)]
    run_all(engine, requests)
    theirs = [alone(model, p, n, (5, 9)) for p, n in zip(prompts, lengths)]
    for request, wanted in zip(requests, theirs):
        assert request.finished == ("stop" if wanted[-1] in (5, 9) else "length")
    mine = torch.tensor(sum((r.new for r in requests), []))
    name = f"engine.Engine, {way}"
    parity("Engine", name, "each prompt alone", mine, torch.tensor(sum(theirs, [])), 0)
    if "few blocks" in way:
        assert engine.scheduler.preempted > 0
    assert (engine.scheduler.shared > 0) == engine.scheduler.prefix_sharing


def test_answers_are_those_of_generate(model, parity):
    prompts = prompts_of(2, 5)
    mine = Engine(model, blocks=100).generate(prompts, 12)
    theirs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        about = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 2}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **about)
        theirs.append(found[0, len(prompt) :].tolist())
    parity(
        "Engine",
        "engine.Engine.generate",
        "transformers generate",
        torch.tensor(mine),
        torch.tensor(theirs),
        0,
    )


def test_paged_attention_is_attention_over_what_the_blocks_hold(model, parity):
    """Logits of chunks and single tokens of three sequences in one pass, in blocks that lie anywhere."""
    llama = Llama(model)
    cache = PagedCache(llama, blocks=12, size=4)
    texts = [torch.randint(3, 120, (n,)) for n in (11, 6, 3)]
    tables = [[7, 2, 9], [0, 11], [5]]
    # first a part of each, then the rest: five tokens, one, one
    first = [6, 5, 2]
    for start, counts in (([0, 0, 0], first), (first, [5, 1, 1])):
        cache.begin([Part(t, p, n) for t, p, n in zip(tables, start, counts)])
        ids = torch.cat([x[p : p + n] for x, p, n in zip(texts, start, counts)])
        places = torch.cat([torch.arange(p, p + n) for p, n in zip(start, counts)])
        logits = llama(ids[None], places[None], cache)[0]
    with torch.no_grad():
        theirs = torch.cat([model(x[None]).logits[0, p:] for x, p in zip(texts, first)])
    parity(
        "Engine",
        "paged_cache.PagedCache, logits",
        "transformers.LlamaForCausalLM",
        logits,
        theirs,
        1e-5,
    )


def test_the_same_beginning_is_read_once(model):
    """Sixteen requests, 40 tokens in common and 2 of their own: in one step or one after the other."""
    beginning = prompts_of(3, 1, 60)[0][:8] * 5
    prompts = [[*beginning, 3 + i, 50] for i in range(16)]
    engine = Engine(model, blocks=100, block_size=4, max_tokens=1000)
    together = engine.generate(prompts, 1)
    assert engine.fed == 42 + 15 * 2 and engine.scheduler.shared == 15 * 40
    # later requests find the blocks, though nobody holds them any more
    engine.fed = 0
    assert engine.generate(prompts[:1], 1) == together[:1]
    assert engine.fed == 2
    engine = Engine(model, blocks=100, block_size=4, max_tokens=1000, prefix_sharing=False)
    assert engine.generate(prompts, 1) == together and engine.fed == 16 * 42


def test_a_whole_prompt_that_is_there_is_read_from_its_last_block_on(model):
    """A prompt of two full blocks: its last token must be read, for its logits."""
    prompt = prompts_of(4, 1, 60)[0][:1] * 8
    engine = Engine(model, blocks=10, block_size=4)
    first = engine.generate([prompt], 3)
    engine.fed = 0
    assert engine.generate([prompt], 3) == first
    assert engine.fed == 4 + 2


def test_forgotten_blocks_are_not_found(model):
    """A small cache: another request has taken the blocks, the first one is read again, and answers alike."""
    first, second = prompts_of(5, 2, 60)
    first, second = (first * 20)[:20], (second * 20)[:24]
    engine = Engine(model, blocks=7, block_size=4)
    answer = engine.generate([first], 4)
    engine.generate([second], 4)
    shared = engine.scheduler.shared
    assert engine.generate([first], 4) == answer
    assert engine.scheduler.shared - shared < 16


def test_a_beginning_with_a_gap_is_read_from_the_gap_on(model):
    """Of three blocks of a prompt the second was taken by others: only the first is shared."""
    prompt = (prompts_of(12, 1, 60)[0] * 14)[:14]
    engine = Engine(model, blocks=20, block_size=4)
    answer = engine.generate([prompt], 4)
    second = list(engine.pool.by_key)[1]
    del engine.pool.key_of[engine.pool.by_key.pop(second)]
    engine.fed = 0
    assert engine.generate([prompt], 4) == answer
    assert engine.fed == 10 + 3


def test_a_preempted_request_is_the_next_one(model):
    """Two requests outgrow the cache, a third waits: the second gives way, and goes on before the third."""
    prompts = [[5] * 8, [6] * 8, [7] * 8]
    engine = Engine(model, blocks=5, block_size=4, max_batch=2, prefix_sharing=False)
    requests = [engine.add(prompt, 8) for prompt in prompts]
    while not engine.scheduler.preempted:
        engine.step()
    assert engine.scheduler.waiting == requests[1:] and requests[1].new
    run_all(engine, requests)
    assert [r.new for r in requests] == [alone(model, p, 8) for p in prompts]


def test_the_least_recently_used_block_goes_first():
    pool = BlockPool(3, 4)
    a, b, c = pool.take(), pool.take(), pool.take()
    for block, key in ((a, b"a"), (b, b"b"), (c, b"c")):
        pool.remember(block, key)
    for block in (b, a, c):
        pool.release(block)
    # found again, and held: not for taking
    pool.share(b)
    assert [pool.take(), pool.take()] == [a, c]
    assert pool.by_key == {b"b": b}


def test_keys_name_everything_before_a_block():
    one = paged_cache.next_key(b"", [1, 2])
    assert one == paged_cache.next_key(b"", [1, 2]) != paged_cache.next_key(b"", [12])
    assert paged_cache.next_key(one, [3, 4]) != paged_cache.next_key(b"", [3, 4])


def test_twins_share_their_prompt_and_write_into_copies(model):
    """Parallel sampling: the blocks of the prompt are held by all; the last one is copied when it is written to."""
    prompt = prompts_of(6, 1, 60)[0][:10]
    prompt = (prompt * 10)[:10]
    engine = Engine(model, blocks=40, block_size=4, prefix_sharing=False)
    first = engine.add(prompt, 8)
    engine.step()
    engine.step()
    fed = engine.fed
    draws = [sampler(generator=torch.Generator().manual_seed(i)) for i in range(2)]
    twins = [engine.fork(first, pick=draw) for draw in draws] + [engine.fork(first)]
    assert all(twin.table[:2] == first.table[:2] for twin in twins)
    assert engine.pool.holders[first.table[0]] == 4
    engine.step()
    # the prompt was not read again, but for its last token
    assert engine.fed - fed == 4
    assert len({r.table[2] for r in (first, *twins)}) == 4
    run_all(engine, [first, *twins])
    assert first.new == twins[2].new == alone(model, prompt, 8)
    # the draws of each as if it were alone
    for i, twin in enumerate(twins[:2]):
        pick = sampler(generator=torch.Generator().manual_seed(i))
        assert Engine(model, blocks=40).generate([prompt], 8, pick=pick) == [twin.new]
    assert twins[0].new != twins[1].new


def test_a_twin_waits_if_the_batch_is_full_or_the_prompt_not_read(model):
    engine = Engine(model, blocks=40, block_size=4, max_batch=1, max_tokens=4)
    first = engine.add(prompts_of(7, 1)[0] * 4, 5)
    twin = engine.fork(first)
    engine.step()
    assert not twin.table and twin in engine.scheduler.waiting
    run_all(engine, [first, twin])
    assert first.new == twin.new


def test_a_request_that_is_cancelled_leaves_no_block(model):
    engine = Engine(model, blocks=60, block_size=4, max_batch=2)
    requests = [engine.add(p, 10) for p in prompts_of(8, 4)]
    engine.step()
    for request in (requests[0], requests[3]):
        engine.cancel(request)
        check_blocks(engine)
        assert request.finished == "cancelled" and not request.table
        assert request not in (*engine.scheduler.running, *engine.scheduler.waiting)
    run_all(engine, requests)
    engine.cancel(requests[1])
    assert requests[1].finished == "length"
    assert [r.new for r in requests[1:3]] == [alone(model, r.prompt, 10) for r in requests[1:3]]


def test_pictures_are_shared_by_what_they_show(model, parity):
    """Nine image tokens with one id: two questions on one photo share its blocks, another photo does not."""
    photos = torch.randn(2, 9, 32)
    questions = [[7, 8, 9], [10, 11]]

    def asked(photo, question):
        prompt = [4, 4] + [50] * 9 + question
        embeds = {2 + i: photos[photo, i] for i in range(9)}
        names = {2 + i: (f"photo {photo}", i) for i in range(9)}
        return prompt, {"embeds": embeds, "names": names}

    def theirs(photo, question):
        prompt, _ = asked(photo, question)
        x = model.get_input_embeddings()(torch.tensor([prompt])).clone()
        x[0, 2:11] = photos[photo]
        found = generation.greedy(model, inputs_embeds=x, max_new_tokens=6, pad=0)
        return found[0].tolist()

    engine = Engine(model, blocks=60, block_size=4)
    fed = []
    for photo, question in ((0, 0), (0, 1), (1, 0)):
        prompt, about = asked(photo, questions[question])
        before = engine.fed
        (found,) = engine.generate([prompt], 6, **about)
        fed.append(engine.fed - before)
        name = f"engine.Engine, question {question} on photo {photo}"
        wanted = torch.tensor(theirs(photo, questions[question]))
        parity("Engine", name, "embeddings, alone", torch.tensor(found), wanted, 0)
    # two blocks of four hold the beginning and six image tokens
    assert fed == [14 + 5, 13 - 8 + 5, 14 + 5]


def test_short_requests_overtake_and_the_first_come_is_served_first(model):
    prompts = [prompts_of(i, 1)[0] for i in range(3)]
    ended = {}
    for policy in ("fcfs", "shortest"):
        engine = Engine(model, blocks=60, max_batch=1, policy=policy)
        requests = [engine.add(p, n) for p, n in zip(prompts, (9, 40, 2))]
        ended[policy] = []
        while any(not r.finished for r in requests):
            engine.step()
            ended[policy] += [
                i for i, r in enumerate(requests) if r.finished and i not in ended[policy]
            ]
    assert ended["fcfs"] == [0, 1, 2]
    assert ended["shortest"].index(1) == 2


def test_a_long_prompt_does_not_hold_up_answers(model):
    """Chunked prefill: while 60 tokens are read in chunks, the other request says a token at every step."""
    engine = Engine(model, blocks=60, block_size=4, max_tokens=8)
    first = engine.add([5, 6], 20)
    engine.step()
    engine.add([7] * 60, 3)
    for step in range(8):
        engine.step()
        assert len(first.new) == 2 + step


def test_what_can_never_fit_is_refused(model):
    engine = Engine(model, blocks=5, block_size=4)
    for prompt, new, says in (
        ([], 3, "needs a prompt of one token"),
        ([3], 0, "asks for one"),
        ([3] * 100, 50, "150 tokens, but the model has 128 positions"),
        ([3] * 18, 3, "21 tokens never fit into a cache of 20"),
    ):
        with pytest.raises(UserError, match=says):
            engine.add(prompt, new)
    assert engine.generate([[3] * 18], 2)
    for flags in ({"blocks": 0}, {"block_size": 0}, {"max_batch": 0}, {"max_tokens": 0}):
        with pytest.raises(UserError, match="at least"):
            Engine(model, **flags)
    with pytest.raises(UserError, match="policy lifo: there are fcfs and shortest"):
        Engine(model, policy="lifo")
    assert engine.step() == []
    with pytest.raises(ValueError, match="must be in the cache"):
        engine.scheduler.fork(engine.add([3], 1), engine.add([3], 1))


def test_owners_of_blocks_and_their_figure(model):
    """A block is one request's, shared, free, or free and full of something that can be found again."""
    prompt = [3, 4, 5, 6, 7, 8, 9]
    engine = Engine(model, blocks=8, block_size=4)
    requests = [engine.add([*prompt, 50], 2), engine.add([*prompt, 51, 52], 4)]
    engine.step()
    first = engine_blocks.owners(engine, requests)
    # the block of the beginning is shared; one and two blocks more
    assert sorted(first.tolist()) == [-3, -1, -1, -1, -1, 0, 1, 1]
    while not all(request.finished for request in requests):
        engine.step()
    last = engine_blocks.owners(engine, requests)
    assert sorted(last.tolist()) == [-2, -2, -2, -2, -1, -1, -1, -1]
    figure = engine_blocks.draw_figure([first, last], 2)
    (image,) = figure.axes[0].images
    shown = image.get_array()
    plt.close(figure)
    assert shown.shape == (4, 2, 3)
    assert (shown[:, 1] == 0.88).all() and (shown[first[first != -1] == -3, 0] == 0.2).all()


def test_requests_are_mixed_and_begin_alike():
    tokenizer = pretrained.smollm2()[0]
    prompts, lengths = mixed_requests(tokenizer, 40, 96)
    assert all(16 <= len(p) <= 160 for p in prompts) and len({tuple(p) for p in prompts}) > 35
    assert min(lengths) >= 4 and max(lengths) <= 96 and np.median(lengths) < 30 < max(lengths)
    again, _ = mixed_requests(tokenizer, 40, 96, common=24)
    assert len({tuple(p[:24]) for p in again}) == 1
    assert [p[24:] for p in again] == prompts
    assert mixed_requests(tokenizer, 4, 2)[1] == [2] * 4


def test_bad_flags_of_the_script_are_one_line(tmp_path):
    for flags in ({"requests": 0}, {"max_new_tokens": 0}, {"common": -1}):
        with pytest.raises(UserError, match="at least 1|0 or more"):
            engine_module.main(engine_module.Config(**flags, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
