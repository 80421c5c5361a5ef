"""vlm/flamingo_episodes.py: names drawn anew, targets, true captions, trials on held-out classes, intervals."""

import numpy as np
import pytest
import torch
from scipy import stats

from tests import eyes
from tests.vlm.flamingo_classes import (
    END,
    IMAGE,
    START,
    Letters,
    class_of,
    classes,
    everything,
    split_chunks,
)
from vlm import flamingo, flamingo_data, flamingo_episodes

ON = torch.device("cpu")


def test_names_of_an_episode_are_drawn_anew_and_are_targets_once_their_class_was_seen():
    known, chunks = everything(), flamingo_episodes.Chunks(Letters())
    words = np.arange(40, 80)
    random = np.random.default_rng(0)
    batch = flamingo_episodes.episode_batch(random, chunks, START, known, words, 60, 8, 4)
    names, kinds, sources, targets = {}, set(), set(), 0
    for ids, supervised, photos in zip(*batch):
        parts = split_chunks(ids.tolist(), supervised.tolist())
        shown = [class_of(known, int(p)).name for p in photos]
        assert len(parts) == 8 and len({class_of(known, int(p)).source for p in photos}) == 1
        said, seen = {}, set()
        for (text, is_target, end), name in zip(parts, shown):
            # one name for a class in a chain, the last word; what stands before it is no target
            assert said.setdefault(name, text[-1]) == text[-1]
            assert is_target == [False] * (len(text) - 1) + [name in seen] and end == (name in seen)
            seen.add(name)
            targets += is_target[-1]
        assert len(set(said.values())) == len(said)
        for name, word in said.items():
            names.setdefault(name, set()).add(word)
            kinds.add("nonsense" if word in words else "true")
            if word not in words:
                assert chunks.ids(name) == [word]
        sources.add(class_of(known, int(photos[0])).source)
    assert targets > 200 and kinds == {"nonsense", "true"} and sources == {"emoji", "fruit"}
    assert max(map(len, names.values())) > 2  # another name in another chain
    assert len({word for said in names.values() for word in said} & set(words)) > 25


def test_ways_are_two_or_more_and_half_of_the_emoji_are_neighbours():
    known = classes(count=200)
    spans = []
    for seed in range(200):
        drawn = flamingo_episodes.draw_classes(
            np.random.default_rng(seed), known + classes("fruit", 7), 3
        )
        assert len({c.name for c in drawn}) == 3
        if drawn[0].source == "emoji":
            numbers = [int(c.name.removeprefix("emoji")) for c in drawn]
            spans.append(max(numbers) - min(numbers) < flamingo_episodes.NEIGHBOURS)
    assert 0.35 < np.mean(spans) < 0.75 and 0.6 < len(spans) / 200 < 0.9


def test_captions_are_true_and_their_ends_are_targets():
    known, chunks = everything(), flamingo_episodes.Chunks(Letters())
    sizes, befores, sources = set(), set(), []
    for seed in range(12):
        batch = flamingo_episodes.caption_batch(
            np.random.default_rng(seed), chunks, START, known, 24
        )
        sizes.add(tuple(batch[2].shape))
        for ids, supervised, photos in zip(*batch):
            for (text, is_target, end), photo in zip(
                split_chunks(ids.tolist(), supervised.tolist()), photos
            ):
                shown = class_of(known, int(photo))
                facts = {tuple(chunks.ids(f"{k} {v}")): k for k, v in shown.facts.items()}
                facts[tuple(chunks.ids(shown.name))] = "alone"
                befores.add(facts[tuple(text)])
                assert is_target == [False] * (len(text) - 1) + [True] and end
                sources.append(shown.source)
    assert sizes <= {(24, 1), (12, 2), (8, 3), (6, 4)} and len(sizes) > 2
    assert befores == {flamingo_data.NAME, flamingo_data.COLOUR, "alone"}
    assert 0.4 < sources.count("emoji") / len(sources) < 0.6 and {"shapes", "fruit"} <= set(sources)


@pytest.mark.parametrize("control", ["", "shuffled names", "other pictures"])
def test_a_trial_never_shows_the_picture_that_it_asks_about(control):
    known = classes()
    by_chance = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        words = np.arange(40, 80)
        names, examples, asked, query = flamingo_episodes.draw_trial(
            random, known, words, 2, 2, False, control
        )
        assert (
            len(examples) == 4
            and len(set(p for _, p in examples) | {query}) == 5
            and len(names) == 2
        )
        truth = class_of(known, query).name
        shown = [(k, class_of(known, p).name) for k, p in examples]
        of_query = [k for k, name in shown if name == truth]
        if control == "other pictures":
            assert not of_query and len({name for _, name in shown}) == 2
        else:
            assert len(of_query) == 2
            by_chance += [k == asked for k in of_query]
        if not control:
            assert all((k == asked) == (name == truth) for k, name in shown)
            order = [k for k, _ in examples]
            by_chance.append(order == sorted(order))
    if control == "shuffled names":
        assert 0.3 < np.mean(by_chance) < 0.7
    if not control:
        assert not all(by_chance)  # in any order


def test_true_names_and_no_examples():
    known = classes()
    names, examples, asked, query = flamingo_episodes.draw_trial(
        np.random.default_rng(3), known, [], 3, 0, True, ""
    )
    assert not examples and names[asked] == class_of(known, query).name and len(set(names)) == 3


def test_scores_of_names_are_those_of_all_logits():
    language = eyes.shake(eyes.speaker(), 0.1)
    made = flamingo.Flamingo(language, [IMAGE, END], dim_in=16, every=1, latents=3, latent_width=12)
    eyes.shake(made.cross, 0.3)
    ids = torch.tensor(
        [[1, IMAGE, 20, END, IMAGE, 21, 30, END], [1, IMAGE, 22, END, IMAGE, 23, END, 1]]
    )
    supervised = torch.zeros_like(ids, dtype=torch.bool)
    supervised[0, 5:] = supervised[1, 5:7] = True
    features = torch.randn(2, 2, 4, 16)
    log_p = made(ids, made.resample(features)).float().log_softmax(-1)
    wanted = [
        log_p[0, 4, 21] + log_p[0, 5, 30] + log_p[0, 6, END],
        log_p[1, 4, 23] + log_p[1, 5, END],
    ]
    found = flamingo_episodes.name_scores(made, ids, supervised, features, ON)
    torch.testing.assert_close(found, torch.stack(wanted).detach(), atol=0.15, rtol=0.02)  # bf16
    other = flamingo_episodes.name_scores(made, ids, supervised, features.flip(1), ON)
    assert (found - other).abs().max() > 0.01


def test_intervals_are_those_of_a_proportion():
    right = torch.arange(300) < 291
    found = flamingo_episodes.interval(right)
    theirs = stats.binomtest(291, 300).proportion_ci(0.95, method="wilson")
    assert found["accuracy"] == pytest.approx(0.97)
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high), abs=1e-4)
