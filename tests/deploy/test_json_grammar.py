"""deploy/json_grammar.py, json_schema.py: what is accepted is JSON, and all JSON is accepted."""

import json
import random

import pytest

from deploy import json_grammar, json_schema
from utils.run import UserError

LETTERS = 'abz 09"\\/\n\t\x00\x1f\x7fé日🦜{}[]:,'


def value(random_, depth=3):
    """A random JSON value."""
    kind = random_.randrange(8 if depth else 6)
    if kind < 3:
        return random_.choice([None, True, False])
    if kind == 3:
        return random_.choice([0, -1, 7, 1.5, -0.25, 1e300, 1e-7, 10**20, -120])
    if kind < 6:
        return "".join(random_.choices(LETTERS, k=random_.randrange(6)))
    children = [value(random_, depth - 1) for _ in range(random_.randrange(4))]
    return children if kind == 6 else {value_key(random_): child for child in children}


def value_key(random_):
    return "".join(random_.choices(LETTERS, k=random_.randrange(4)))


def texts(count, seed=0):
    """Random JSON texts in all the ways that json.dumps writes them."""
    random_ = random.Random(seed)
    ways = [
        {},
        {"ensure_ascii": False},
        {"indent": 2},
        {"separators": (",", ":")},
        {"indent": "\t"},
    ]
    return [json.dumps(value(random_), **random_.choice(ways)) for _ in range(count)]


def loads(text):
    """Whether Python reads it as JSON, without NaN and Infinity, which are not JSON."""

    def refuse(name):
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def test_every_beginning_of_json_is_accepted_and_can_be_completed():
    grammar = json_grammar.JsonGrammar()
    for text in texts(800):
        state = grammar.start
        for i, char in enumerate(text):
            closing = grammar.closing(state)
            assert loads(text[:i] + closing), text[:i]
            assert grammar.is_complete(state) == loads(text[:i]), text[:i]
            state = grammar.step(state, char)
            assert state is not None, text[: i + 1]
            hash(state)
        assert grammar.is_complete(state) and grammar.closing(state) == ""


def test_the_closing_gets_shorter_with_each_of_its_characters():
    """So that whoever has as many tokens as it has characters can always complete the text."""
    grammar = json_grammar.JsonGrammar()
    modes = set()
    schema = json_schema.ObjectGrammar(
        json_schema.fields(["a:string", "b:1,12,x", "c:number", "d:boolean"])
    )
    beginnings = [(grammar, text[:i]) for text in texts(150, seed=1) for i in range(len(text))]
    beginnings += [
        (grammar, text)
        for text in ('"\\', '"\\u', '"\\u1', '"\\u12', '"\\u123', "-", "1.", "1e", "1e+")
    ]
    beginnings += [
        (grammar, text) for text in ('{"\\u1', '[{"a', '{"a"', '{"a":1,', "tr", "nul", "[f")
    ]
    whole = '{"a": "x\\n", "b": "12", "c": -1.5e+3, "d": false}'
    beginnings += [(schema, whole[:i]) for i in range(len(whole))]
    for acceptor, text in beginnings:
        state = json_grammar.read(acceptor, text)
        closing = acceptor.closing(state)
        modes.add(state[0])
        for i, char in enumerate(closing):
            state = acceptor.step(state, char)
            assert acceptor.closing(state) == closing[i + 1 :], (text, closing)
        assert acceptor.is_complete(state)
    assert modes >= set(json_grammar.TAILS) - {"object"}


def test_what_is_accepted_is_what_python_reads(parity):
    """Texts with a few characters changed: the automaton and json.loads agree on each."""
    random_ = random.Random(2)
    grammar = json_grammar.JsonGrammar()
    pool = '{}[]",:\\/ \n\tntrfu0123456789+-.eEaAé\x00\x1f\x7f'
    mine = []
    theirs = []
    for text in texts(4000, seed=3):
        letters = list(text)
        for _ in range(random_.randrange(1, 4)):
            at = random_.randrange(len(letters) + 1)
            kind = random_.randrange(3)
            if kind == 0:
                letters.insert(at, random_.choice(pool))
            elif letters and kind == 1:
                letters.pop(at - 1)
            elif letters:
                letters[at - 1] = random_.choice(pool)
        text = "".join(letters)
        state = json_grammar.read(grammar, text)
        mine.append(float(state is not None and grammar.is_complete(state)))
        theirs.append(float(loads(text)))
        assert mine[-1] == theirs[-1], repr(text)
    assert 300 < sum(mine) < 3500
    parity(
        "Decoding", "json_grammar.JsonGrammar", "json.loads, mutated texts", mine, theirs, atol=0
    )


@pytest.mark.parametrize("text", [
    "01", "-", "-01", "1.", ".5", "1e", "1e+", "+1", "0x1", "1.e1", "--1", "1 2", "tru", "truee", "True", "NaN",
    "Infinity", "-Infinity", "nul", '"', '"\n"', '"\\x"', '"\\u12g4"', '"\\u123"', "'a'", "[1,]", "[,1]", "[1 2]",
    "{1:2}", '{"a"}', '{"a":}', '{"a":1,}', '{"a" 1}', "{,}", "[1}", '{"a":1]', "]", "", " ", "[", "\ufeff1", "\xa01",
    '{"a":1}}', "[]]", '"a""b"', "1,2",
])  # fmt: skip
def test_what_is_no_json_is_not_accepted(text):
    grammar = json_grammar.JsonGrammar()
    state = json_grammar.read(grammar, text)
    assert state is None or not grammar.is_complete(state)
    assert not loads(text)


def test_depth_and_root():
    grammar = json_grammar.JsonGrammar(max_depth=2, root="object")
    for text, complete in (('{"a":[1]}', True), (' {"a":[1', False), ("{}", True)):
        state = json_grammar.read(grammar, text)
        assert state is not None and grammar.is_complete(state) == complete
    for text in ('{"a":[[', '{"a":[{', '{"a":{"b":{', "[", "1", '"', "t"):
        assert json_grammar.read(grammar, text) is None
    assert (
        json_grammar.read(grammar, '{"a":[],"b":[1],"c":{') is not None
    )  # side by side is not inside
    assert grammar.closing(grammar.start) == "{}"


FIELDS = ["name:string", "age:integer", "size:number", "mood:happy,sad,sadder", "wise:boolean"]
WHOLE = '{"name": "A \\" b", "age": -12, "size": 1.5e3, "mood": "sadder", "wise": true}'


def test_an_object_of_given_fields():
    grammar = json_schema.ObjectGrammar(json_schema.fields(FIELDS))
    for i in range(len(WHOLE) + 1):
        state = json_grammar.read(grammar, WHOLE[:i])
        assert state is not None, WHOLE[:i]
        assert grammar.is_complete(state) == (i == len(WHOLE))
        made = json.loads(WHOLE[:i] + grammar.closing(state))
        assert list(made) == ["name", "age", "size", "mood", "wise"]
        assert [type(made[k]) for k in ("name", "age", "mood", "wise")] == [str, int, str, bool]
        assert isinstance(made["size"], (int, float)) and made["mood"] in ("happy", "sad", "sadder")
        in_name = WHOLE.index('"A') < i <= WHOLE.index(', "age') - 1 and WHOLE[i - 1] != "\\"
        assert grammar.in_string(state) == in_name, WHOLE[:i]
    assert json_grammar.read(grammar, WHOLE + " ") is None
    shortest = '{"name": "", "age": 0, "size": 0, "mood": "sad", "wise": true}'
    assert grammar.closing(grammar.start) == shortest


@pytest.mark.parametrize("text", [
    '{"name": 1', '{"name":  ', '{"name":"', '{ "', '{"age', '{"name": null', '{"name": "a" ', '{"name": "a", "age": "',
    '{"name": "a", "age": 1.', '{"name": "a", "age": 1e', '{"name": "a", "age": 1 ', '{"name": "a", "age": 01',
    '{"name": "a", "age": -,', '{"name": "a", "age": 1}', '{"name": "a", "age": [', '{"name": "a", "age":  ',
    '{"name": "a", "age": 1, "size": 1., ', '{"name": "a", "age": 1, "size": 1, "mood": "angry',
    '{"name": "a", "age": 1, "size": 1, "mood": "sadd"',
    '{"name": "a", "age": 1, "size": 1, "mood": "sa,', '{"name": "a", "age": 1, "size": 1, "mood": "sad", "wise": n',
])  # fmt: skip
def test_what_does_not_fit_the_fields_is_not_accepted(text):
    grammar = json_schema.ObjectGrammar(json_schema.fields(FIELDS))
    assert json_grammar.read(grammar, text) is None


def test_names_of_fields_may_hold_anything():
    key = 'q"\\é:'
    grammar = json_schema.ObjectGrammar([(key, "integer")])
    text = json.dumps({key: 3})
    assert grammar.is_complete(json_grammar.read(grammar, text))
    assert json_schema.fields(["a:b:string"]) == [("a:b", "string")]


@pytest.mark.parametrize("bad", [["a"], ["a:text"], [":string"], ["a:string", "a:number"], ["a:"]])
def test_fields_that_make_no_sense_are_refused(bad):
    with pytest.raises(UserError, match="--fields"):
        json_schema.fields(bad)
    with pytest.raises(UserError, match="at least one field"):
        json_schema.ObjectGrammar([])
