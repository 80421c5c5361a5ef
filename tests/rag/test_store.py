"""rag/store.py: FAISS and Qdrant hold the same passages; saving survives kills; kinds of index lose as expected."""

import json
import os
import signal
import time
from dataclasses import replace

import faiss
import numpy as np
import pytest
import torch
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore

from rag import faiss_store, qdrant_store, store, store_sync
from rag.raw_rag import Config
from tests.passages import TEXTS, Bag, document, documents
from utils.run import UserError

SETTINGS = {"embedder": "bag", "chunk": 1000, "overlap": 0, "titles": False}
CFG = Config(chunk=1000)


def both():
    return [
        faiss_store.FaissStore(Bag(), SETTINGS),
        qdrant_store.QdrantStore.open("", Bag(), SETTINGS),
    ]


def search(one, query="a cat on a mat", k=3):
    return [
        (d.metadata["id"], d.page_content, s) for d, s in one.similarity_search_with_score(query, k)
    ]


def test_the_search_is_the_largest_cosine(parity):
    """numpy, LangChain's store in memory, FAISS and Qdrant: the same passages with the same scores."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(list("abcdefghij"), 6)) for _ in range(60)]
    passages = [document(t, f"{i}") for i, t in enumerate(dict.fromkeys(texts))]
    vectors, query = Bag().encode([p.page_content for p in passages]), Bag().encode(["a b c"])[0]
    cosines = vectors @ query
    exact = torch.tensor(np.sort(cosines)[::-1][:10].copy())
    theirs = InMemoryVectorStore(Bag())
    theirs.add_documents(passages)
    langchain = theirs.similarity_search_with_score("a b c", 10)
    for one in both():
        one.sync(passages)
        mine = one.similarity_search_with_score("a b c", 10)
        name = f"{type(one).__module__.removeprefix('rag.')}.{type(one).__name__}"
        scores = torch.tensor([s for _, s in mine])
        parity("RAG", f"{name} search", "numpy: sorted cosines", scores, exact)
        parity("RAG", f"{name} search", "langchain_core InMemoryVectorStore", scores,
               torch.tensor([s for _, s in langchain]).float())  # fmt: skip
        assert [d.metadata["id"] for d, _ in mine[:3]] == [
            d.metadata["id"] for d, _ in langchain[:3]
        ]


@pytest.mark.parametrize("one", both(), ids=["faiss", "qdrant"])
def test_sync_adds_what_is_new_deletes_what_is_gone_and_repeats_nothing(one):
    first = documents()
    assert one.sync(first) == (4, 0) and one.sync(first) == (0, 0)
    assert one.sync(first + first[:2]) == (0, 0)  # the same passage twice is one
    changed = first[:3] + [Document("the moon is near", metadata=first[3].metadata)]
    assert one.sync(changed) == (1, 1)
    assert {text for _, text, _ in search(one, "moon", 9)} == {*TEXTS[:3], "the moon is near"}
    assert one.sync(changed[:1]) == (0, 3) and len(search(one, "moon", 9)) == 1
    assert one.sync([]) == (0, 1) and one.sync(first) == (4, 0)


def test_both_stores_find_the_same():
    ours, theirs = both()
    for one in (ours, theirs):
        one.sync(documents())
    for query in ("a dog", "moon", "friends of cats"):
        a, b = search(ours, query), search(theirs, query)
        assert [x[:2] for x in a] == [x[:2] for x in b]
        np.testing.assert_allclose([x[2] for x in a], [x[2] for x in b], atol=1e-5)


def test_what_was_saved_is_opened(tmp_path):
    one = store.open_store(CFG, Bag(), documents(), tmp_path / "index")
    again = faiss_store.FaissStore.open(tmp_path / "index", Bag(), SETTINGS)
    assert search(again) == search(one) and again.sync(documents()) == (0, 0)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "index").iterdir()}
    # Nothing changed: nothing is written
    store.open_store(CFG, Bag(), documents(), tmp_path / "index")
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "index").iterdir()}
    store.open_store(CFG, Bag(), documents()[:2], tmp_path / "index")
    assert len(list((tmp_path / "index").iterdir())) == 3  # old parts are gone


def test_another_model_or_length_is_refused_and_the_index_stays(tmp_path):
    store.open_store(CFG, Bag(), documents(), tmp_path)
    other = Bag()
    other.id = "another"
    with pytest.raises(UserError, match="embedder bag, now another.*--out"):
        store.open_store(CFG, other, documents(), tmp_path)
    with pytest.raises(UserError, match="chunk 1000, now 500"):
        store.open_store(replace(CFG, chunk=500), Bag(), documents(), tmp_path)
    assert len(search(faiss_store.FaissStore.open(tmp_path, Bag(), SETTINGS), "moon", 9)) == 4


def test_another_model_is_refused_by_qdrant_too():
    one = qdrant_store.QdrantStore.open("", Bag(), SETTINGS)
    one.sync(documents())
    [record] = one.client.scroll(one.NAME, limit=1)[0]
    with pytest.raises(UserError, match="chunk 1000, now 7"):
        store_sync.refuse_other_settings(
            record.payload["metadata"]["settings"], SETTINGS | {"chunk": 7}, "there"
        )


def test_a_damaged_index_is_refused(tmp_path):
    store.open_store(CFG, Bag(), documents(), tmp_path)
    names = {p.name.split("-")[0].split(".")[0]: p for p in tmp_path.iterdir()}
    assert names.keys() == {"index", "passages", "store"}
    generator = np.random.default_rng(0)
    for path in names.values():
        whole = path.read_bytes()
        for _ in range(30):
            data, where = bytearray(whole), int(generator.integers(len(whole)))
            data[where] ^= 1 << int(generator.integers(8))
            path.write_bytes(bytes(data))
            try:
                opened = faiss_store.FaissStore.open(tmp_path, Bag(), SETTINGS)
                # a flag of the record that nobody reads
                assert search(opened) and path == names["store"]
            except UserError as error:
                assert "damaged" in str(error) or "was made with" in str(error)
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="damaged"):
            faiss_store.FaissStore.open(tmp_path, Bag(), SETTINGS)
        path.write_bytes(whole)
    assert search(faiss_store.FaissStore.open(tmp_path, Bag(), SETTINGS))


def save_again_and_again(folder):
    """What the process does that is killed."""
    one = faiss_store.FaissStore(Bag(), {})
    one.sync([document(f"text {i}", str(i)) for i in range(300)])
    while True:
        for n in (299, 300):
            one.sync([document(f"text {i}", str(i)) for i in range(n)])
            one.save(folder)


def test_a_kill_while_saving_leaves_an_index(tmp_path):
    """Killed at a random moment of saving again and again: what is there opens, and is one of the two."""
    one = faiss_store.FaissStore(Bag(), {})
    one.sync([document(f"text {i}", str(i)) for i in range(300)])
    one.save(tmp_path)
    wait = np.random.default_rng(0)
    for _ in range(5):
        child = os.fork()
        if child == 0:
            try:
                save_again_and_again(tmp_path)
            finally:
                os._exit(1)
        time.sleep(float(wait.uniform(0.2, 0.6)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert len(faiss_store.FaissStore.open(tmp_path, Bag(), {}).documents) in (299, 300)


class Kill(BaseException):
    """The process ends here: nothing after it is run."""


def kill_at(monkeypatch, moment):
    """Let the operation on the disk with this number be half done, and the last one. -> a list of the operations."""
    done = []

    def step(name):
        done.append(name)
        return len(done) == moment

    class Cut:
        """A file of which the kill leaves the first half."""

        def __init__(self, path, mode):
            self.file = open(path, mode)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            half = step("write")
            self.file.write(data[: len(data) // 2] if half else data)
            self.file.flush()
            if half:
                raise Kill

        def flush(self):
            self.file.flush()

        def fileno(self):
            return self.file.fileno()

    def wrapped(name, action):
        def run(*arguments):
            if step(name):
                raise Kill
            return action(*arguments)

        return run

    monkeypatch.setattr(faiss_store, "open", Cut, raising=False)
    for name in ("replace", "fsync", "unlink"):
        monkeypatch.setattr(os, name, wrapped(name, getattr(os, name)))
    return done


def test_a_kill_at_every_step_of_saving_leaves_the_old_index_or_the_new_one(tmp_path, monkeypatch):
    """Not at random: killed in each write, and before each fsync, rename and removal, one after the other."""
    moment, seen = 0, set()
    while True:
        moment += 1
        folder = tmp_path / str(moment)
        one = store.open_store(CFG, Bag(), documents(), folder)
        one.sync(documents()[:2])
        with monkeypatch.context() as patch:
            done = kill_at(patch, moment)
            try:
                one.save(folder)
                killed = False
            except Kill:
                killed = True
        found = len(faiss_store.FaissStore.open(folder, Bag(), SETTINGS).documents)
        assert found in (2, 4), done
        seen.add(found)
        if not killed:
            break
    assert found == 2 and seen == {2, 4}
    # On the disk before it has its name
    assert done == ["write", "fsync", "replace"] * 3 + ["unlink"] * 2


def test_a_filter_is_kept_and_what_is_not_known_is_refused():
    one = faiss_store.FaissStore(Bag(), SETTINGS)
    one.sync(
        [
            *documents(),
            Document("the moon", metadata={"source": "other.md", "id": "o", "title": ""}),
        ]
    )
    ids = lambda found: [d.metadata["id"] for d in found]  # noqa: E731
    asked, other = "the moon is far away", {"source": "other.md"}
    assert ids(one.similarity_search(asked, 1)) == ["file.md#3/0"]
    assert ids(one.similarity_search(asked, 1, filter=other)) == ["o"]
    assert ids(one.similarity_search(asked, 9, filter=lambda m: m["id"].endswith("#0/0"))) == [
        "file.md#0/0"
    ]
    assert one.similarity_search(asked, 9, filter={"no such": None}) == []
    assert ids(one.as_retriever(search_kwargs={"k": 1, "filter": other}).invoke(asked)) == ["o"]
    vector = Bag().encode([asked])[0].tolist()
    assert ids(d for d, _ in one.similarity_search_with_score_by_vector(vector, 1, other)) == ["o"]
    for ask in (one.similarity_search, one.similarity_search_with_score):
        with pytest.raises(TypeError, match="does not know score_threshold"):
            ask("the moon", score_threshold=0.5)
    with pytest.raises(TypeError, match="does not know ids"):
        faiss_store.FaissStore.from_texts(["a"], Bag(), ids=["1"])


@pytest.mark.parametrize("kind", [faiss_store.FaissStore, qdrant_store.QdrantStore])
def test_an_empty_store_and_a_question_of_no_known_word_find_nothing(kind):
    """A vector of length zero has no direction: no KeyError, no NaN, and not the first passages by chance."""

    class Known(Bag):
        def word(self, letters):
            return super().word(letters) * (letters != "zebra")

    one = kind.from_texts([], Known())
    assert one.similarity_search_with_score("moon", 3) == []
    one.sync([document("the moon", "a"), document("zebra", "b")])  # one passage of no known word
    assert one.similarity_search_with_score("zebra", 3) == []
    found = one.similarity_search_with_score("moon", 3)
    assert found[0][0].metadata["id"] == "a" and all(np.isfinite(score) for _, score in found)
    with pytest.raises(ValueError, match="k is 0"):
        one.similarity_search_with_score("moon", 0)


def test_questions_are_encoded_as_questions_and_passages_as_documents():
    class Two(Bag):
        def encode(self, texts, task="query"):
            asked.append((task, *texts))
            return super().encode(texts)

    for kind in (faiss_store.FaissStore, qdrant_store.QdrantStore):
        asked: list = []
        one = kind.from_texts(["the moon"], Two())
        one.similarity_search("a dog")
        assert [a for a in asked if a[1] != "dummy_text"] == [
            ("document", "the moon"),
            ("query", "a dog"),
        ]


def test_an_empty_store_is_saved_and_opened(tmp_path):
    faiss_store.FaissStore(Bag(), SETTINGS).save(tmp_path)
    again = faiss_store.FaissStore.open(tmp_path, Bag(), SETTINGS)
    assert again.similarity_search("moon") == [] and again.sync(documents()) == (4, 0)
    assert len(search(again, "moon", 9)) == 4


def test_text_and_metadata_both_name_a_passage():
    a, b = document("the moon", "a"), document("the moon", "b")
    one = faiss_store.FaissStore(Bag(), SETTINGS)
    assert one.sync([a, b]) == (2, 0)
    assert {d.metadata["id"] for d in one.similarity_search("moon", 9)} == {"a", "b"}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        store.open_store(CFG, Bag(), documents(), tmp_path / "file" / "index")


def test_nobody_at_the_url():
    with pytest.raises(UserError, match="no Qdrant at --store-url http://127.0.0.1:9"):
        qdrant_store.QdrantStore.open("http://127.0.0.1:9", Bag(), SETTINGS)
    with pytest.raises(UserError, match="add --store qdrant"):
        store.open_store(replace(CFG, store_url="http://127.0.0.1:9"), Bag(), documents())


def test_nothing_in_an_index_is_a_program(tmp_path):
    store.open_store(CFG, Bag(), documents(), tmp_path)
    record = json.loads((tmp_path / "store.json").read_text())
    assert json.loads((tmp_path / record["passages"]).read_text())[0][1] == TEXTS[0]
    assert faiss.read_index(str(tmp_path / record["index"])).ntotal == 4


def test_kinds_of_index_lose_what_they_should():
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((40, 64))
    vectors = centres[generator.integers(0, 40, 3000)] + 0.3 * generator.standard_normal((3000, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    queries = vectors[:50] + 0.05 * generator.standard_normal((50, 64)).astype(np.float32)
    exact, _ = store.search(store.build("Flat", vectors)[0], queries, 10)
    np.testing.assert_array_equal(
        exact, np.argsort(-(queries @ vectors.T), 1, kind="stable")[:, :10]
    )
    assert store.recall(exact, exact).mean() == 1
    recipes = store.index_kinds(64, 3000)
    index, _ = store.build(recipes["ivf"][0], vectors)
    few, most = (
        store.recall(store.search(index, queries, 10, p)[0], exact).mean() for p in (1, 64)
    )
    assert few < most and most > 0.95
    sizes = {
        k: len(faiss.serialize_index(store.build(r, vectors)[0])) for k, (r, _) in recipes.items()
    }
    assert sizes["pq"] < sizes["sq8"] < sizes["flat"] < sizes["hnsw"]
