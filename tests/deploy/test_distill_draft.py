"""deploy/distill_draft.py: its losses are those of torch, the draft's layers the teacher's, and it learns to agree."""

import json

import pytest
import torch
import torch.nn.functional as F

from deploy import distill_draft, speculative
from deploy.drafters import DraftModel, ReducedHead, load_draft
from deploy.few_rows import use_few_rows
from deploy.llama import Llama
from tests import llamas
from utils import data, pretrained
from utils.run import UserError

SMALL = {"vocabulary": 40, "pieces": 48, "length": 16, "held_out": 4, "epochs": 6, "batch": 4}


def teacher(seed=0):
    """A Llama of four layers that all matter, and whose logits are far apart."""
    model = llamas.tiny(layers=4, seed=seed)
    for p in model.model.layers.parameters():
        p.data *= 3
    model.model.norm.weight.data *= 15
    return model.requires_grad_(False)


def test_loss_is_the_kl_divergence_of_torch(parity):
    torch.manual_seed(0)
    q = torch.randn(2, 5, 9, requires_grad=True)
    p = torch.randn(2, 5, 9)
    mine = distill_draft.distillation_loss(q, p)
    flat = (q.log_softmax(-1).flatten(0, 1), p.log_softmax(-1).flatten(0, 1))
    theirs = F.kl_div(*flat, reduction="batchmean", log_target=True)
    about = ("Distillation", "distill_draft.distillation_loss", "torch.nn.functional.kl_div")
    parity(*about, mine, theirs)
    (mine_grad,) = torch.autograd.grad(mine, q)
    # the gradient at temperature 1: q - p, Hinton et al., Eq. 2
    parity(
        "Distillation",
        "distillation_loss, gradient",
        "(q - p) / tokens",
        mine_grad,
        (q.softmax(-1) - p.softmax(-1)).detach() / 10,
    )
    assert float(distill_draft.distillation_loss(p, p)) == pytest.approx(0, abs=1e-6)


def test_cross_entropy_leaves_out_what_the_draft_cannot_say():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5)
    targets = torch.tensor([[1, -1, 4], [-1, 0, -1]])
    log_q = logits.log_softmax(-1)
    wanted = -(log_q[0, 0, 1] + log_q[0, 2, 4] + log_q[1, 1, 0]) / 3
    torch.testing.assert_close(distill_draft.cross_entropy_loss(logits, targets), wanted)


def test_acceptance_rate_is_one_minus_the_total_variation(parity):
    torch.manual_seed(0)
    p = torch.randn(3, 4, 30).softmax(-1)
    q = (2 * torch.randn(3, 4, 30)).softmax(-1)
    mine = distill_draft.acceptance_rate(p, q)
    about = ("Speculative decoding", "distill_draft.acceptance_rate", "1 - total variation")
    parity(*about, mine, 1 - (p - q).abs().sum(-1) / 2)
    # what accept_sampled keeps of draws from q
    generator = torch.Generator().manual_seed(0)
    p0, q0 = p[0, :2], q[0, :1]
    kept = 0
    for _ in range(4000):
        draft = torch.multinomial(q0, 1, generator=generator)[:, 0].tolist()
        kept += len(speculative.accept_sampled(p0, q0, draft, generator)) - 1
    assert kept / 4000 == pytest.approx(float(mine[0, 0]), abs=0.03)


def test_frequent_tokens_and_next_tokens():
    tokens = distill_draft.frequent_tokens([[7, 7, 3, 3, 3], [9, 1]], 3, 12)
    assert tokens.tolist() == [3, 7, 1]
    targets = distill_draft.next_tokens(torch.tensor([[3, 7, 9, 1]]), tokens, 12)
    assert targets.tolist() == [[1, -1, 2, -1]]


def test_pieces_are_whole_and_do_not_overlap():
    texts = [list(range(10)), list(range(20, 23)), list(range(30, 38))]
    pieces = distill_draft.pieces_of(texts, 4, 4)
    assert sorted(pieces.tolist()) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [30, 31, 32, 33],
        [34, 35, 36, 37],
    ]
    assert pieces.tolist() != distill_draft.pieces_of(texts, 4, 4, seed=1).tolist()
    with pytest.raises(UserError, match="have 4 pieces of 4 tokens"):
        distill_draft.pieces_of(texts, 5, 4)


def test_the_draft_begins_with_layers_of_the_teacher(parity):
    assert distill_draft.source_layers(30, 1) == [0]
    assert distill_draft.source_layers(30, 3) == [0, 1, 29]
    model = teacher()
    whole = distill_draft.draft_of(model, 4, torch.arange(120))
    ids = torch.tensor([[5, 6, 7, 8]])
    about = ("Distillation", "distill_draft.draft_of, all layers", "the teacher")
    parity(*about, whole(ids).logits, model(ids).logits)
    draft = distill_draft.draft_of(model, 2, torch.tensor([3, 7]))
    for mine, source in ((0, 0), (1, 3)):
        for name, p in draft.model.layers[mine].named_parameters():
            assert torch.equal(p, model.model.layers[source].get_parameter(name))
    # only its layers learn, and the teacher's are not the same tensors
    for name, p in draft.named_parameters():
        assert p.requires_grad == (".layers." in name)
    assert draft.model.layers[0].mlp.up_proj.weight is not model.model.layers[0].mlp.up_proj.weight
    assert draft.config.draft_vocabulary == [3, 7] and model.config.num_hidden_layers == 4


def test_states_of_the_teacher_give_its_logits():
    model = teacher()
    pieces = torch.randint(0, 120, (5, 8))
    states = distill_draft.teacher_states(model, pieces, batch=2)
    torch.testing.assert_close(model.lm_head(states), model(pieces).logits)


def trained(loss, **flags):
    """-> acceptance rates of new pieces before and after some steps, and the losses."""
    torch.manual_seed(0)
    model = teacher()
    tokens = torch.arange(120)
    pieces = torch.randint(0, 120, (48, 16))
    judged = torch.randint(0, 120, (4, 16))
    cfg = distill_draft.Config(**SMALL | {"loss": loss, "lr": 0.01} | flags)
    draft = distill_draft.draft_of(model, 2, tokens)
    before = distill_draft.evaluate(draft, model, tokens, judged)[0].mean()
    frozen = draft.model.embed_tokens.weight.clone()
    wanted = distill_draft.teacher_states(model, pieces)
    if loss == "cross-entropy":
        wanted = distill_draft.next_tokens(pieces, tokens, 120)
    losses = list(distill_draft.train(draft, model.lm_head.weight, pieces, wanted, cfg))
    assert torch.equal(draft.model.embed_tokens.weight, frozen)
    after, agree = distill_draft.evaluate(draft, model, tokens, judged)
    assert after.shape == agree.shape == (4, 16)
    return float(before), float(after.mean()), losses


def test_distillation_raises_the_acceptance_rate():
    before, after, losses = trained("distillation")
    assert len(losses) == 72 == distill_draft.step_count(distill_draft.Config(**SMALL))
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    assert after > before + 0.1


def test_cross_entropy_learns_the_text_and_not_the_teacher():
    _, distilled, _ = trained("distillation")
    _, after, losses = trained("cross-entropy")
    assert losses[-1] < losses[0]
    # random text has nothing to do with what the teacher says
    assert after < distilled


def test_evaluate_counts_what_the_draft_cannot_say_as_never_kept():
    model = teacher()
    pieces = torch.randint(0, 120, (3, 8))
    tokens = torch.tensor([4, 90, 17])
    draft = distill_draft.draft_of(model, 4, tokens)
    rates, agree = distill_draft.evaluate(draft, model, tokens, pieces, batch=2)
    logits = model(pieces).logits
    p = logits.softmax(-1)
    q = torch.zeros_like(p)
    q[..., tokens] = logits[..., tokens].softmax(-1)
    torch.testing.assert_close(rates, distill_draft.acceptance_rate(p, q))
    assert agree.tolist() == torch.isin(p.argmax(-1), tokens).float().tolist()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The command, on a tiny teacher with the tokenizer of the book -> metrics, folder, teacher."""
    folder = tmp_path_factory.mktemp("distill")
    tokenizer = pretrained.smollm2()[0]
    model = llamas.tiny(layers=3, vocabulary=len(tokenizer))
    pretrained.save(model.bfloat16(), tokenizer, folder / "teacher")
    flags = {"vocabulary": 500, "pieces": 6, "length": 24, "held_out": 2, "epochs": 1, "batch": 4}
    cfg = distill_draft.Config(model=str(folder / "teacher"), out=str(folder / "out"), **flags)
    pages = data.docs()[:100]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "docs", lambda: pages)
        return distill_draft.main(cfg), folder, model.float()


def test_the_folder_is_one_of_transformers(written):
    rows, folder, model = written
    assert {"before", "after", "loss, first and last"} == rows.keys()
    assert 0 < rows["after"]["acceptance rate"] < 1
    draft = pretrained.language_model(folder / "out/draft")[1]
    assert draft.config.num_hidden_layers == 2 and len(draft.config.draft_vocabulary) == 500
    assert (folder / "out/metrics.json").is_file()


def test_a_loaded_draft_is_exact_in_greedy_and_says_its_own_tokens_only(written, parity):
    _, folder, model = written
    llama = use_few_rows(Llama(model))
    small = load_draft(folder / "out/draft", llama)
    assert isinstance(small.head, ReducedHead)
    known = set(small.config.draft_vocabulary)
    prompt = [500, 600, 700, 500, 600]
    drafter = DraftModel(small, 64)
    assert set(drafter.propose(prompt, 4)[0]) <= known
    _, q = DraftModel(small, 64).propose(prompt, 2, temperature=1.0)
    assert (q > 0).sum(-1).tolist() == [500, 500]
    plain, _ = speculative.generate(llama, prompt, 20, speculative.NoDrafts())
    for fixed in (0, 3):
        mine, _ = speculative.generate(llama, prompt, 20, DraftModel(small, 64), 3, fixed)
        name = f"speculative.generate, distilled draft, {fixed or 'adaptive'}"
        about = ("Speculative decoding", name, "plain decoding")
        parity(*about, torch.tensor(mine), torch.tensor(plain), 0)


def test_a_damaged_draft_is_one_line(written, tmp_path):
    _, folder, model = written
    llama = Llama(model)
    path = folder / "out/draft/config.json"
    before = path.read_text("utf-8")
    try:
        for wrong in ([], [1, 49152], [-1], ["a"], {"a": 1}, [True]):
            config = json.loads(before)
            config["draft_vocabulary"] = wrong
            path.write_text(json.dumps(config), "utf-8")
            with pytest.raises(UserError, match="draft_vocabulary must be ids"):
                load_draft(folder / "out/draft", llama)
    finally:
        path.write_text(before, "utf-8")
    with pytest.raises(UserError, match="in its vocabulary, not 120"):
        load_draft(folder / "out/draft", Llama(llamas.tiny()))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"layers": 0}, "start at 1"),
        ({"epochs": 0}, "start at 1"),
        ({"length": 1}, "--length at 2"),
        ({"lr": 0.0}, "--lr"),
        ({"layers": 99}, "the teacher has 30"),
        ({"vocabulary": 49153}, "the teacher has 49152"),
        ({"length": 9000}, "positions"),
    ],
)
def test_flags_that_make_no_sense(flags, line, tmp_path):
    with pytest.raises(UserError, match=line):
        distill_draft.main(distill_draft.Config(**flags, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
