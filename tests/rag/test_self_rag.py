"""rag/self_rag.py: a critic accepts or not, and without an accepted passage nothing is answered."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rag import answer, corpus, language_models, raw_rag, self_rag
from tests.passages import QUICK, dense, documents
from utils.run import UserError


@pytest.fixture(scope="module")
def llm():
    return language_models.Local("smollm2", tokens=8)


class Fake:
    def stream(self, chat):
        yield from ("It ", "barked ", "[1].")


def critic():
    return self_rag.Critic("cosine", None, None)


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
    parity(
        "RAG",
        "self_rag.auc",
        "torchmetrics binary_auroc",
        self_rag.auc(a, b),
        binary_auroc(scores, labels).item(),
    )
    assert self_rag.auc([3, 4], [1, 2]) == 1 and self_rag.auc([1], [1]) == 0.5


def test_the_threshold_parts_what_can_be_parted():
    cut = self_rag.best_threshold(np.array([0.6, 0.8]), np.array([0.1, 0.5]))
    assert 0.5 < cut <= 0.6


def test_only_accepted_passages_come_back():
    def retriever(threshold):
        return self_rag.SelfRetriever(quick=dense(), critic=critic(), threshold=threshold, k=3)

    everything, some, none = (
        retriever(t).invoke("a dog barked at the moon") for t in (-1.0, 0.9, 1.1)
    )
    assert len(everything) == 3 and len(some) == 1 and none == []
    said, found, support = self_rag.respond("a dog barked at the moon", retriever(0.9), Fake())
    assert said == "It barked [1]." and len(found) == 1 and support == 1.0
    assert self_rag.respond("a dog", retriever(1.1), Fake()) == (answer.NOWHERE, [], 0.0)


def test_a_hidden_answer_is_hidden():
    """The critic sees the passages of other sections only; the marks of both sides come from the same list."""
    question = corpus.Question("a dog barked at the moon", "file.md#1", "")
    there, hidden = self_rag.judge(critic(), dense(), [question], 2)
    assert there[0] == pytest.approx(1, abs=1e-5) and hidden[0] < 0.9
    lost = corpus.Question("a dog barked at the moon", "elsewhere", "")
    assert len(self_rag.judge(critic(), dense(), [lost], 2)[0]) == 0


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return str(tmp_path_factory.mktemp("self"))


@pytest.mark.parametrize("kind", ["cosine", "maxsim", "cross"])
def test_it_runs_on_the_answers(kind, out, monkeypatch):
    monkeypatch.setattr(self_rag, "others", lambda questions, limit, count: questions[1:4])
    cfg = self_rag.Config(**QUICK | {"limit": 6}, critic=kind, k=3, out=out)
    retriever = self_rag.build_retriever(cfg)
    assert len(retriever.invoke("Is Django stable?")) <= 3
    strict = retriever.model_copy(update={"threshold": 2.0})
    assert strict.invoke("Is Django stable?") == []


def test_support():
    assert self_rag.supported(
        "the moon is made of cheese", dense().invoke("moon")
    ) == pytest.approx(1 / 3)


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

    retriever = self_rag.SelfRetriever(quick=dense(), critic=critic(), threshold=2.0, k=3)
    cfg = self_rag.Config(question="How do I bake bread?", out=str(tmp_path))
    raw_rag.ask(cfg, retriever, Never())
    assert "with the passages: not in the documents" in capsys.readouterr().out


def test_the_critic_in_words_reads_the_passage_and_the_question(monkeypatch):
    asked = []
    monkeypatch.setattr(
        self_rag, "yes", lambda llm, text: asked.append((llm, text)) or len(asked) / 10
    )
    marks = self_rag.Critic("llm", "the model", None)("Who sat?", documents()[:2])
    assert marks == [0.1, 0.2] and [llm for llm, _ in asked] == ["the model"] * 2
    assert "the cat sat on the mat" in asked[0][1] and "a dog barked" in asked[1][1]
    assert all(text.endswith("Question: Who sat?") for _, text in asked)


@pytest.mark.parametrize("kind, mark", [("maxsim", 0.75), ("cross", self_rag.sigmoid(0.25))])
def test_the_scores_of_reranking_become_marks(kind, mark, monkeypatch):
    """Two cosines, added, are halved; a score of the cross-encoder, middle 1/2 of its scale, goes through a sigmoid."""
    seen = []
    again = lambda question, found: seen.append((question, len(found))) or [1.5, 1.0]  # noqa: E731
    monkeypatch.setattr(
        self_rag.rerank, "reranker", lambda cfg: again if cfg.reranker == kind else None
    )
    monkeypatch.setattr(self_rag.cross_encoder, "SCALE", 1.0)
    marks = self_rag.Critic(kind, None, SimpleNamespace(embedder="minilm"))("Who?", documents()[:2])
    assert marks[0] == pytest.approx(mark) and marks[0] > marks[1] and seen == [("Who?", 2)]
    assert self_rag.sigmoid(0) == 0.5 and self_rag.sigmoid(9) > 0.99


class Marks:
    """A critic that likes long passages."""

    kind = "long"

    def __call__(self, question, found):
        return [len(d.page_content) / 100 for d in found]


def test_the_marks_of_the_critic_order_what_comes_back():
    retriever = self_rag.SelfRetriever(quick=dense(), critic=Marks(), threshold=0.21, k=2)
    found = retriever.invoke("the moon is far away")
    assert [d.page_content for d in found] == [
        "cats and dogs are friends",
        "a dog barked at the moon",
    ]
    assert [d.metadata["score"] for d in found] == [0.25, 0.24]


def test_the_threshold_is_the_one_of_other_questions(out, monkeypatch):
    """--threshold is taken as it is; without it, it comes from questions that are not scored."""
    monkeypatch.setattr(self_rag, "quick_search", lambda cfg: dense())
    questions = [corpus.Question(f"question {i}", f"file.md#{i}", "") for i in range(12)]
    monkeypatch.setattr(self_rag.corpus, "load", lambda cfg: ([], questions))
    judged = []

    def judge(critic, retriever, tried, k):
        judged.append(tried)
        return np.array([0.7, 0.9]), np.array([0.1, 0.6])

    monkeypatch.setattr(self_rag, "judge", judge)
    cfg = self_rag.Config(**QUICK | {"limit": 6}, k=3, out=out)
    assert self_rag.build_retriever(cfg).threshold == 0.7 and self_rag.build_retriever(cfg).k == 3  # pyright: ignore
    assert judged[0] and not set(judged[0]) & set(raw_rag.spread(questions, 6))
    assert (
        self_rag.build_retriever(replace(cfg, threshold=0.2)).threshold == 0.2 and len(judged) == 2
    )  # pyright: ignore


def test_an_answer_is_written_from_the_k_accepted_passages():
    seen = []

    class Model:
        def stream(self, chat):
            seen.append(chat)
            yield "a dog barked loudly again"

    retriever = self_rag.SelfRetriever(quick=dense(), critic=critic(), threshold=-1, k=4)
    said, found, support = self_rag.respond("a dog barked at the moon", retriever, Model(), k=1)
    assert seen[0] == answer.messages("a dog barked at the moon", found) and len(found) == 1
    assert (
        said == "a dog barked loudly again" and 0 < support == self_rag.supported(said, found) < 1
    )


def test_critics_are_compared_by_thresholds_of_every_second_question(tmp_path, monkeypatch):
    """Where odd questions need another threshold than even ones, half of them are judged wrong, not none."""
    there, hidden = np.array([0.9, 0.3, 0.9, 0.3]), np.array([0.5, 0.1, 0.5, 0.1])
    monkeypatch.setattr(self_rag, "judge", lambda critic, *rest: (there, hidden))
    monkeypatch.setattr(self_rag, "Critic", lambda kind, llm, cfg: kind)
    monkeypatch.setattr(self_rag, "quick_search", lambda cfg: None)
    rows = self_rag.compare(self_rag.Config(limit=4), tmp_path, None)
    assert [row["balanced accuracy"] for row in rows.values()] == [0.5] * 3 and rows[
        "IsRel by cosine"
    ]["AUC"] == 0.75
    assert (
        rows.keys() == {"IsRel by cosine", "IsRel by maxsim", "IsRel by cross"}
        and (tmp_path / "critics.png").is_file()
    )


def test_a_search_is_needed_for_what_a_manual_says(tmp_path, monkeypatch):
    """AUC of the questions of the manuals above everyday ones, not the other way round."""
    monkeypatch.setattr(self_rag, "yes", lambda llm, text: 0.9 if "Question: Q" in text else 0.1)
    there, hidden = np.array([0.9, 0.8, 0.9, 0.8]), np.array([0.5, 0.1, 0.5, 0.1])
    monkeypatch.setattr(self_rag, "judge", lambda critic, *rest: (there, hidden))
    monkeypatch.setattr(self_rag, "Critic", lambda kind, llm, cfg: kind)
    monkeypatch.setattr(self_rag, "quick_search", lambda cfg: None)
    monkeypatch.setattr(
        self_rag.corpus,
        "load",
        lambda cfg: ([], [corpus.Question(f"Q{i}", "g", "") for i in range(4)]),
    )
    rows = self_rag.compare(self_rag.Config(limit=4), tmp_path, SimpleNamespace(loss=1))
    assert rows["Retrieve by llm"] == {"AUC": 1.0, "questions": 4.0} and "IsRel by llm" in rows
