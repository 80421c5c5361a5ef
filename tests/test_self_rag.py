"""rag/self_rag.py: a critic accepts or not, and without an accepted passage nothing is answered."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rag import answer, corpus, raw_rag, self_rag
from tests.passages import QUICK, dense
from utils.run import UserError


@pytest.fixture(scope="module")
def llm():
    return answer.Local("smollm2", tokens=8)


class Fake:
    def stream(self, chat):
        yield from ("It ", "barked ", "[1].")


def critic(marks):
    one = self_rag.Critic.__new__(self_rag.Critic)
    one.kind, one.llm, one.again = "cosine", None, None
    return one


def test_yes_is_the_probability_of_the_word(llm, parity):
    asked = "Is the sky blue?"
    ids = llm.prompt([{"role": "user", "content": f"{asked}\nAnswer with Yes or No."}])
    logits = llm.model(ids).logits[0, -1].float().softmax(-1)
    a, b = (float(logits[llm.tokenizer.convert_tokens_to_ids(w)]) for w in ("Yes", "No"))
    parity(
        "RAG",
        "self_rag.yes",
        "LlamaForCausalLM softmax over two words",
        self_rag.yes(llm, asked),
        a / (a + b),
        atol=2e-3,
    )


def test_area_under_the_curve(parity):
    """Against torchmetrics, with ties."""
    from torchmetrics.functional.classification import binary_auroc

    generator = np.random.default_rng(0)
    a, b = generator.integers(2, 9, 40) / 10, generator.integers(0, 7, 30) / 10
    scores, labels = torch.tensor([*a, *b]), torch.tensor([1] * 40 + [0] * 30)
    parity("RAG", "self_rag.auc", "torchmetrics binary_auroc", self_rag.auc(a, b), binary_auroc(scores, labels).item())
    assert self_rag.auc([3, 4], [1, 2]) == 1 and self_rag.auc([1], [1]) == 0.5


def test_the_threshold_parts_what_can_be_parted():
    cut = self_rag.best_threshold(np.array([0.6, 0.8]), np.array([0.1, 0.5]))
    assert 0.5 < cut <= 0.6


def test_only_accepted_passages_come_back():
    def retriever(threshold):
        return self_rag.SelfRetriever(quick=dense(), critic=critic(0), threshold=threshold, k=3)

    everything, some, none = (retriever(t).invoke("a dog barked at the moon") for t in (-1.0, 0.9, 1.1))
    assert len(everything) == 3 and len(some) == 1 and none == []
    said, found, support = self_rag.respond("a dog barked at the moon", retriever(0.9), Fake())
    assert said == "It barked [1]." and len(found) == 1 and support == 1.0
    assert self_rag.respond("a dog", retriever(1.1), Fake()) == (answer.NOWHERE, [], 0.0)


def test_a_hidden_answer_is_hidden():
    """The critic sees the passages of other sections only; the marks of both sides come from the same list."""
    question = corpus.Question("a dog barked at the moon", "file.md#1", "")
    there, hidden = self_rag.judge(critic(0), dense(), [question], 2)
    assert there[0] == pytest.approx(1, abs=1e-5) and hidden[0] < 0.9
    lost = corpus.Question("a dog barked at the moon", "elsewhere", "")
    assert len(self_rag.judge(critic(0), dense(), [lost], 2)[0]) == 0


@pytest.mark.parametrize("kind", ["cosine", "maxsim", "cross"])
def test_it_runs_on_the_answers(kind, tmp_path):
    cfg = self_rag.Config(**QUICK | {"limit": 6}, critic=kind, k=3, out=str(tmp_path))
    retriever = self_rag.build_retriever(cfg)
    assert len(retriever.invoke("Is Django stable?")) <= 3
    strict = retriever.model_copy(update={"threshold": 2.0})
    assert strict.invoke("Is Django stable?") == []


def test_support():
    assert self_rag.supported("the moon is made of cheese", dense().invoke("moon")) == pytest.approx(1 / 3)


def test_flags_that_cannot_be(tmp_path):
    cfg = self_rag.Config(**QUICK, out=str(tmp_path))
    for wrong, said in (({"critic": "llm"}, "--critic llm"), ({"threshold": 3.0}, "--threshold")):
        with pytest.raises(UserError, match=said):
            self_rag.build_retriever(replace(cfg, **wrong))


def test_the_threshold_is_chosen_on_other_questions_than_those_that_are_scored():
    questions = [f"question {i}" for i in range(129)]
    for limit in (0, 8, 32, 128):
        tried = self_rag.others(questions, limit, 16)
        assert tried and not set(tried) & set(raw_rag.spread(questions, limit))
    assert len(self_rag.others(questions, -1, 16)) == 16


def test_without_a_passage_nothing_is_generated(capsys, tmp_path):
    class Never:
        def stream(self, chat):
            if "passage" in chat[0]["content"]:
                raise AssertionError("it was asked to answer from nothing")
            yield "out of my head"

    retriever = self_rag.SelfRetriever(quick=dense(), critic=critic(0), threshold=2.0, k=3)
    cfg = self_rag.Config(question="How do I bake bread?", out=str(tmp_path))
    raw_rag.ask(cfg, retriever, Never())
    assert "with the passages: not in the documents" in capsys.readouterr().out
