"""METEOR and SPICE of captions, by the official Java programs, where these are at hand.

Denkowski and Lavie 2014 (METEOR 1.5: stems, synonyms and paraphrases count); Anderson et al. 2016,
arXiv:1607.08822 (SPICE: the graph of objects and relations). Both come with pycocoevalcap (installed
for the tests: pip install -e ".[dev]"); SPICE also wants the models of Stanford CoreNLP 3.6, which it
fetches at its first use outside of this book.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path


def package():
    """Folder of pycocoevalcap, or None if it or Java is missing."""
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations or shutil.which("java") is None:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def java_scores(candidates, references):
    """{"METEOR", "SPICE"}: tokenized captions, one an image, and lists of references -> those that can be computed.

    candidates: [[token]]; references: [[[token]]].
    """
    folder = package()
    if folder is None:
        return {}
    ours = {i: [" ".join(tokens)] for i, tokens in enumerate(candidates)}
    theirs = {i: [" ".join(tokens) for tokens in each] for i, each in enumerate(references)}
    found = {}
    if any(folder.glob("meteor/meteor-*.jar")):
        from pycocoevalcap.meteor.meteor import Meteor

        found["METEOR"] = float(Meteor().compute_score(theirs, ours)[0])
    if any(folder.glob("spice/lib/stanford-corenlp-*-models.jar")):
        from pycocoevalcap.spice.spice import Spice

        found["SPICE"] = float(Spice().compute_score(theirs, ours)[0])
    return found
