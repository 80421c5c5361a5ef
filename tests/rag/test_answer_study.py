"""rag/answer_study.py: what counts as right, questions and documents fit each other, nobody chooses by what judges."""

import json

import pytest

from rag import answer, answer_study, corpus, document_loaders, language_models, prompt_variants
from tests.passages import document, documents
from utils.run import UserError

SETS = json.loads((answer_study.HERE / "questions.json").read_text("utf-8"))


def test_a_key_fact_is_held_as_whole_words_in_any_writing():
    for said in ("It is six.", "SIX chickens", "at most\nsix"):
        assert answer_study.holds(said, ["six"])
    assert not answer_study.holds("sixty or thirty-sixth", ["six"])
    assert answer_study.holds("Set `SESSION_COOKIE_DOMAIN`.", ["x", "session_cookie_domain"])
    assert answer_study.holds("It isn\u2019t", ["isn't"]) and answer_study.holds(
        "7,141 lines", ["7,141"]
    )
    assert not answer_study.holds("", ["six"]) and not answer_study.holds("six", [])


@pytest.mark.parametrize("part", SETS)
def test_each_key_fact_is_in_the_documents_and_not_in_the_question(part):
    manuals = {q.text: q.answer for q in corpus.manuals()[1]}
    own = "\n".join(
        s.page_content for s in document_loaders.load_folder(answer_study.HERE / "documents")
    )
    for kind, rows in SETS[part].items():
        for row in rows if not kind.startswith("not") else ():
            text = manuals[row["question"]] if kind == "manuals" else own
            assert answer_study.holds(text, row["key"]), row
            assert not answer_study.holds(row["question"], row["key"]), row


def test_no_question_both_chooses_and_judges():
    texts = [
        row if isinstance(row, str) else row["question"]
        for kinds in SETS.values()
        for r in kinds.values()
        for row in r
    ]
    assert len(texts) == len(set(texts))
    assert [len(rows) for rows in SETS["judged"].values()] == [40, 20, 10, 10]


def test_the_chosen_way_is_how_the_chapter_asks_a_small_model():
    way, found = prompt_variants.VARIANTS[prompt_variants.CHOSEN], documents()
    small = type("Small", (), {"reads": 1})
    assert prompt_variants.chat("Who?", found[: way.k], way) == answer.messages(
        "Who?", answer.passages_read(small, found)
    )
    assert language_models.DECODING | way.decoding == language_models.DECODING


def test_each_way_is_another_prompt_or_decoding():
    found = documents()
    ways = [
        json.dumps([prompt_variants.chat("Who?", found[: w.k], w), w.decoding])
        for w in prompt_variants.VARIANTS.values()
    ]
    assert len(set(ways)) == len(ways)
    told = prompt_variants.chat(
        "Who?", found[:1], prompt_variants.VARIANTS["3 passages, question first"]
    )[1]["content"]
    assert told.startswith("Question: Who?") and told.endswith("</passage>")
    both = prompt_variants.chat(
        "Who?", found[:1], prompt_variants.VARIANTS["3 passages, question first and last"]
    )[1]["content"]
    assert both.count("Question: Who?") == 2


class Reader:
    """Answers with what is in its first passage, like a good reader; keeps what it was asked."""

    def __init__(self):
        self.chats = []

    def stream(self, chat):
        self.chats.append(chat)
        yield chat[1]["content"].split("<passage")[1].split("\n")[1]


def row(question, key, *texts):
    found = [document(text, f"{i}/0") for i, text in enumerate(texts)]
    for d, score in zip(found, (0.8, 0.4, 0.2)):
        d.metadata["score"] = score if key else score / 2
    return {"question": question, "key": key, "found": found, "kind": "manuals"}


def test_the_table_counts_facts_by_corpus(tmp_path):
    rows = [row(name, [name], "it is red", "blue") for name in ("red", "blue", "red", "blue")]
    rows[3]["kind"] = "documents"
    ways = {"one": prompt_variants.PromptVariant(k=1), "two": prompt_variants.PromptVariant(k=2)}
    table = answer_study.compare(Reader(), rows, ways, tmp_path / "answers.json")
    assert table["one"]["answers"][0] == 0.5 and table["one"]["documents"][0] == 0
    assert table["one"]["manuals"][0] == pytest.approx(2 / 3)
    assert table["one"]["context recall"] == 0.5 and table["two"]["context recall"] == 1
    said = json.loads((tmp_path / "answers.json").read_text("utf-8"))
    assert said["one"] == ["it is red"] * 4 and said["questions"] == ["red", "blue", "red", "blue"]


def out_of_order(llm, chats, decoding):
    """Says which question it was asked and how many passages it read; answers the second question first."""
    for i in (1, 2, 0):
        asked = chats[i][1]["content"]
        yield i, f"{asked.split('Question: ')[1]} of {asked.count('<passage')}"


def test_answers_belong_to_their_questions_and_ways_to_their_passages(monkeypatch):
    monkeypatch.setattr(answer_study, "generate", out_of_order)
    rows = [row(name, [name], "it is red", "blue") for name in ("red", "blue", "green")]
    for k in (1, 2):
        said, right = answer_study.ask(None, rows, prompt_variants.PromptVariant(k=k), "name")
        assert said == [f"red of {k}", f"blue of {k}", f"green of {k}"] and right.tolist() == [
            1,
            1,
            1,
        ]


class Even:
    """Right on even questions under one instruction, on odd ones under the other."""

    def stream(self, chat):
        even = int(chat[1]["content"].split("Question: ")[1].split("\n")[0]) % 2 == 0
        yield "red" if even == (chat[0]["content"] == "even") else "no idea"


def test_one_half_of_the_questions_chooses_and_the_other_judges(tmp_path, monkeypatch):
    """The variant that is right on the first half is chosen, and all of its answers on the other half are wrong."""
    ways = {name: prompt_variants.PromptVariant(instruction=name, k=1) for name in ("odd", "even")}
    monkeypatch.setattr(answer_study, "VARIANTS", ways)
    monkeypatch.setattr(answer_study, "CHOSEN", "odd")
    monkeypatch.setattr(answer_study, "OLD", "odd")
    monkeypatch.setattr(answer_study.language_models, "language_model", lambda name, tokens: Even())
    rows = {"manuals": [row(str(i), ["red"], "it is red") for i in range(6)], "documents": []}
    rows |= {"not in the manuals": [row("0", [], "it is red")] * 2}
    monkeypatch.setattr(answer_study, "load", lambda cfg: {"judged": rows, "for choosing": rows})
    metrics = answer_study.main(answer_study.Config(out=str(tmp_path)))
    assert metrics["best"] == "even" and metrics["questions"] == 6
    assert metrics["even, judged"] == 0 and metrics["odd, judged"] == 1
    assert metrics["said by the model itself"] == 0 and (tmp_path / "answers.png").is_file()
    assert len(json.loads((tmp_path / "judging.json").read_text("utf-8"))["odd"]) == 3


def test_the_threshold_comes_from_the_questions_for_choosing():
    def marked(*cosines, key):
        rows = []
        for value in cosines:
            rows.append(row("a", key, "it is red", "not the best"))
            rows[-1]["found"][1].metadata["score"] = value
            rows[-1]["found"][0].metadata["score"] = value / 2
        return rows

    sets = {
        "judged": {
            "manuals": marked(0.9, 0.55, key=["red"]),
            "not in the manuals": marked(0.1, 0.2, 0.5, 0.7, key=[]),
        },
        "for choosing": {
            "manuals": marked(0.8, 0.6, key=["red"]),
            "not in the manuals": marked(0.3, 0.4, key=[]),
        },
    }
    found = answer_study.abstain(sets)
    assert found["threshold"] == 0.6 and found["AUC"] == 0.875
    assert found["right abstentions"][0] == 0.75 and found["wrong abstentions"][0] == 0.5
    given = answer_study.abstain(sets, 0.15)
    assert given["threshold"] == 0.15 and given["AUC"] == 0.875
    assert given["right abstentions"][0] == 0.25 and given["wrong abstentions"][0] == 0


def test_passages_are_those_of_the_question_and_its_corpus(monkeypatch):
    class Finds:
        def __init__(self, cfg):
            self.docs = cfg.docs

        def invoke(self, question):
            return [document(f"{bool(self.docs)} {question}", "a/0")]

    monkeypatch.setattr(answer_study.raw_rag, "build_retriever", Finds)
    sets = answer_study.load(answer_study.Config(limit=2))
    for kinds in sets.values():
        for kind, rows in kinds.items():
            assert len(rows) == 2 and all(bool(r["key"]) != kind.startswith("not") for r in rows)
            own = kind.endswith("documents")
            assert [r["found"][0].page_content for r in rows] == [
                f"{own} {r['question']}" for r in rows
            ]


def test_a_batch_says_what_each_says_alone(monkeypatch):
    """Padded at the left, whatever the length, in the order of the questions; its rules reach the model."""
    from tests.rag.test_answer import local

    llm = local(monkeypatch)
    chats = [[{"role": "user", "content": "x" * n}] for n in (9, 1, 30, 4)]
    monkeypatch.setattr(answer_study, "BATCH", 3)
    masks, whole = [], llm.model.generate
    monkeypatch.setattr(
        llm.model,
        "generate",
        lambda *a, **rest: (
            masks.append(rest["attention_mask"].sum(1).tolist()) or whole(*a, **rest)
        ),
    )
    assert dict(answer_study.generate(llm, chats, {})) == {
        i: "".join(llm.stream(c)).strip() for i, c in enumerate(chats)
    }
    lengths = sorted(len(llm.prompt(chat)[0]) for chat in chats)
    assert masks[:2] == [lengths[:3], lengths[3:]]  # of padding nothing is read
    seen, generate = [], llm.model.generate
    monkeypatch.setattr(
        llm.model, "generate", lambda *a, **rest: seen.append(rest) or generate(*a, **rest)
    )
    list(answer_study.generate(llm, chats, {"repetition_penalty": 1.1}))
    assert [rest["repetition_penalty"] for rest in seen] == [1.1, 1.1] and llm.rules[
        "repetition_penalty"
    ] == 1.0


def test_flags_that_cannot_be(tmp_path):
    for wrong, said in (({"limit": 1}, "--limit"), ({"only": "nothing"}, "the variants are")):
        with pytest.raises(UserError, match=said):
            answer_study.main(answer_study.Config(**wrong, out=str(tmp_path)))
    assert not list(tmp_path.iterdir())
