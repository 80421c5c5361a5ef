"""vlm/sparsity.py, kumaraswamy.py: top-k, gates, priors against torch and scipy; dropped tokens against masks."""

import pytest
import torch
from scipy import integrate, special, stats
from torch.distributions import Beta, Kumaraswamy
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli

from tests import eyes
from utils.run import UserError
from vlm import kumaraswamy, sparsity


@pytest.fixture
def some():
    torch.manual_seed(0)
    return torch.randn(3, 9, 6), torch.randn(3, 6)


def test_top_k_keeps_the_patches_of_highest_cosine_in_their_order(some):
    patches, query = some
    kept, indices = sparsity.top_k(patches, query, 4)
    for b in range(3):
        cosine = [float(p @ query[b] / p.norm() / query[b].norm()) for p in patches[b]]
        best = sorted(sorted(range(9), key=cosine.__getitem__)[-4:])
        assert indices[b].tolist() == best
        assert torch.equal(kept[b], patches[b, best])
    # the length of a patch does not count
    assert torch.equal(sparsity.top_k(patches * torch.rand(3, 9, 1), query, 4)[1], indices)


def test_top_k_of_all_is_all(some, parity):
    patches, query = some
    kept, indices = sparsity.top_k(patches, query, 9)
    parity("Token sparsity", "sparsity.top_k, k = all", "the patches", kept, patches, 0)
    assert indices.tolist() == [list(range(9))] * 3


@pytest.mark.parametrize("k", [0, 10])
def test_top_k_refuses(some, k):
    with pytest.raises(UserError, match="keeps 1 to 9"):
        sparsity.top_k(some[0], some[1], k)


def test_two_resolutions_have_a_known_number_of_tokens(some):
    fine, query = some
    coarse = torch.randn(3, 4, 6)
    both = sparsity.two_resolutions(coarse, fine, query, 3)
    assert both.shape == (3, 7, 6) and torch.equal(both[:, :4], coarse)
    assert torch.equal(both[:, 4:], sparsity.top_k(fine, query, 3)[0])


def test_evenly_spaced():
    assert sparsity.evenly_spaced(9, 3).tolist() == [1, 4, 7]
    assert sparsity.evenly_spaced(4, 4).tolist() == [0, 1, 2, 3]


def test_a_prompt_without_words_has_the_null_query():
    torch.manual_seed(0)
    query = sparsity.Query(5, 6)
    words = torch.randn(2, 4, 5)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    found = query(words, mask)
    assert torch.allclose(found[0], query.project(words[0, :2].mean(0)), atol=1e-6)
    assert torch.equal(found[1], query.null)
    found[1].sum().backward()
    assert query.null.grad is not None and query.null.grad.abs().sum() > 0


def test_a_threshold_keeps_at_least_one(some):
    patches, query = some
    scores = sparsity.cosine(patches, query)
    gates = sparsity.threshold(patches, query, 0.3)
    assert torch.equal(
        gates[:, :] > 0, (scores >= 0.3) | (scores == scores.max(1, keepdim=True)[0])
    )
    assert sparsity.threshold(patches, query, 2.0).sum(1).tolist() == [1, 1, 1]


def test_gates_are_the_relaxed_bernoulli_of_torch(some, parity):
    logits = some[0][..., 0]
    torch.manual_seed(3)
    theirs = LogitRelaxedBernoulli(torch.tensor(0.7), logits=logits).rsample().sigmoid()
    torch.manual_seed(3)
    noise = torch.rand(logits.shape)
    mine = sparsity.gumbel_sigmoid(logits, 0.7, hard=False, noise=noise)
    parity(
        "Token sparsity",
        "sparsity.gumbel_sigmoid",
        "torch LogitRelaxedBernoulli",
        mine,
        theirs,
        1e-5,
    )


def test_hard_gates_are_open_as_often_as_they_should_and_have_the_soft_gradient():
    torch.manual_seed(0)
    logits = torch.full((200, 500), 0.8, requires_grad=True)
    noise = torch.rand(200, 500)
    gates = sparsity.gumbel_sigmoid(logits, 0.5, noise=noise)
    assert set(gates.detach().unique().tolist()) <= {0.0, 1.0}
    # four standard errors
    assert (
        abs(float(gates.detach().mean()) - torch.sigmoid(torch.tensor(0.8)))
        < 4 * 0.5 / 100_000**0.5
    )
    (hard,) = torch.autograd.grad(gates.sum(), logits)
    soft = sparsity.gumbel_sigmoid(logits, 0.5, hard=False, noise=noise)
    (expected,) = torch.autograd.grad(soft.sum(), logits)
    assert torch.allclose(hard, expected) and expected.abs().sum() > 0


def test_probability_of_a_gate(some):
    p = sparsity.gate_probability(*some, scale=4.0, bias=0.2)
    assert torch.allclose(p.logit(), 4 * (sparsity.cosine(*some) - 0.2), atol=1e-4)


def test_beta_bernoulli_prior_is_scipys(parity):
    gates = torch.tensor([[1.0, 0, 0, 1, 1], [0, 0, 0, 0, 1]])
    mine = sparsity.beta_bernoulli_log_prior(gates, 2.0, 3.5)
    # Beta-binomial counts the ways in which k of n may be open
    k = gates.sum(1).int().tolist()
    theirs = [stats.betabinom.logpmf(i, 5, 2.0, 3.5) - special.gammaln(6) + special.gammaln(i + 1)
              + special.gammaln(6 - i) for i in k]  # fmt: skip
    parity(
        "Token sparsity",
        "sparsity.beta_bernoulli_log_prior",
        "scipy betabinom",
        mine,
        torch.tensor(theirs),
        1e-5,
    )


def test_posterior_after_k_of_n():
    assert sparsity.beta_posterior(2, 3, 4, 10) == (6, 9)


def test_the_loss_of_gates_is_an_upper_bound_of_the_divergence():
    """The divergence itself as a sum over all 2^6 states of six gates."""
    torch.manual_seed(0)
    p = torch.rand(4, 6)
    states = torch.tensor([[i >> n & 1 for n in range(6)] for i in range(64)]).float()
    for alpha, beta in ((1.0, 9.0), (2.0, 2.0)):
        log_p = sparsity.beta_bernoulli_log_prior(states, alpha, beta)
        log_q = (states @ p.log().T + (1 - states) @ (1 - p).log().T).T
        exact = (log_q.exp() * (log_q - log_p)).sum(1)
        bound = sparsity.gate_loss(p, alpha, beta)
        assert (bound >= exact).all() and (bound < exact + 1.5).all() and (exact > 0).all()
    # nearly sure gates: both agree
    sure = torch.tensor([[1e-5, 1 - 1e-5, 1 - 1e-5, 1e-5]])
    expected = -sparsity.beta_bernoulli_log_prior(sure.round(), 2.0, 2.0)
    assert torch.allclose(sparsity.gate_loss(sure, 2.0, 2.0), expected, atol=1e-3)
    # a prior of few open gates prefers few
    few, many = torch.full((1, 16), 0.1), torch.full((1, 16), 0.9)
    assert sparsity.gate_loss(few, 1.0, 9.0) < sparsity.gate_loss(many, 1.0, 9.0)


def test_dropped_tokens_are_read_as_masked_ones(parity):
    """A Llama over the open tokens with their old positions, against all tokens with the closed ones masked."""
    torch.manual_seed(0)
    model = eyes.shake(eyes.speaker())
    tokens = torch.randn(2, 7, 24)
    gates = torch.tensor([[1.0, 0, 1, 1, 0, 0, 1], [0, 1.0, 0, 1, 0, 0, 1]])
    positions = torch.arange(7).expand(2, 7)
    kept, mask, places = sparsity.drop(tokens, gates, positions)
    assert kept.shape == (2, 4, 24) and mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert places.tolist() == [[0, 2, 3, 6], [1, 3, 6, 0]]
    short = model(inputs_embeds=kept, attention_mask=mask, position_ids=places).logits
    whole = model(inputs_embeds=tokens, attention_mask=gates.long(), position_ids=positions).logits
    theirs = torch.cat([whole[0, [0, 2, 3, 6]], whole[1, [1, 3, 6]]])
    mine = torch.cat([short[0], short[1, :3]])
    parity(
        "Token sparsity",
        "sparsity.drop",
        "transformers Llama, closed tokens masked",
        mine,
        theirs,
        1e-5,
    )
    # other positions are another text
    moved = model(inputs_embeds=kept, attention_mask=mask).logits
    assert (moved[0] - short[0]).abs().max() > 1e-3


GRID = [(0.5, 0.5), (1.0, 3.0), (2.0, 5.0), (8.0, 2.0), (1.0, 1.0)]


@pytest.mark.parametrize(("a", "b"), GRID)
def test_kumaraswamy_is_that_of_torch(a, b, parity):
    both = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    theirs = Kumaraswamy(*both)
    x = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    name = "kumaraswamy.log_density"
    parity(
        "Token sparsity",
        name,
        "torch Kumaraswamy",
        kumaraswamy.log_density(x, *both),
        theirs.log_prob(x),
        1e-9,
    )
    parity(
        "Token sparsity",
        "kumaraswamy.mean",
        "torch Kumaraswamy",
        kumaraswamy.mean(*both),
        theirs.mean,
        1e-9,
    )
    # the sampler inverts the distribution function
    u = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    assert torch.allclose(1 - (1 - kumaraswamy.sample(*both, u) ** a) ** b, 1 - u, atol=1e-9)


def test_samples_have_gradients_and_survive_large_b():
    a = torch.tensor(2.0, requires_grad=True)
    b = torch.tensor(1e9, requires_grad=True)
    x = kumaraswamy.sample(a, b, torch.full((5,), 0.3))
    assert (x > 0).all()
    x.sum().backward()
    assert a.grad is not None and b.grad is not None and a.grad.isfinite() and b.grad.isfinite()


@pytest.mark.parametrize(("alpha", "beta"), GRID)
def test_matched_log_moments_are_betas(alpha, beta, parity):
    wanted = torch.tensor(alpha), torch.tensor(beta)
    a, b = kumaraswamy.match_beta(*wanted)
    theirs = stats.beta(alpha, beta)
    mean = theirs.expect(lambda x: special.xlogy(1, x))
    variance = theirs.expect(lambda x: special.xlogy(1, x) ** 2) - mean**2
    mine = torch.stack(kumaraswamy.log_moments(a, b))
    name = "scipy, moments of log x under Beta"
    parity(
        "Token sparsity",
        "kumaraswamy.match_beta",
        name,
        mine,
        torch.tensor([mean, variance]).double(),
        1e-4,
    )


def test_where_one_of_both_is_one_the_match_is_exact():
    one = torch.tensor(1.0)
    for alpha, beta in ((one, torch.tensor(4.0)), (torch.tensor(3.0), one)):
        a, b = kumaraswamy.match_beta(alpha, beta)
        assert torch.allclose(a, alpha.double(), atol=1e-6) and torch.allclose(
            b, beta.double(), atol=1e-6
        )


def test_beyond_it_is_another_distribution():
    """Log-moments say little near 1: of Beta(8, 2) the mean of x is missed by more than that of Beta(2, 2)."""
    missed = []
    for pair in ((2.0, 2.0), (0.5, 0.3)):
        alpha, beta = map(torch.tensor, pair)
        a, b = kumaraswamy.match_beta(alpha, beta)
        missed.append(abs(float(kumaraswamy.mean(a, b) - alpha / (alpha + beta))))
    assert missed[0] < 0.002 < missed[1]


def test_match_refuses():
    with pytest.raises(UserError, match="above 0"):
        kumaraswamy.match_beta(torch.tensor(-1.0), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("a", "b", "alpha", "beta"), [(2.0, 3.0, 1.5, 2.5), (0.8, 1.2, 1.0, 4.0), (3.0, 2.0, 2.0, 1.0)]
)
def test_divergence_from_beta_is_the_integral(a, b, alpha, beta, parity):
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (a, b, alpha, beta)]
    mine = kumaraswamy.kl_from_beta(*numbers, terms=4000)

    def integrand(x):
        x = torch.tensor(x, dtype=torch.float64)
        log_q = kumaraswamy.log_density(x, numbers[0], numbers[1])
        return float(log_q.exp() * (log_q - Beta(numbers[2], numbers[3]).log_prob(x)))

    theirs = torch.tensor(integrate.quad(integrand, 0, 1, limit=200)[0]).double()
    parity("Token sparsity", "kumaraswamy.kl_from_beta", "scipy quad", mine, theirs, 1e-3)


def test_the_auxiliary_network_begins_near_the_uniform_distribution():
    torch.manual_seed(0)
    a, b = kumaraswamy.GateParameters(6)(torch.randn(2, 5, 6))
    assert a.shape == b.shape == (2, 5) and (a > 0).all() and (b > 0).all()
    assert abs(float(a.detach().mean()) - 1) < 0.2 and abs(float(b.detach().mean()) - 1) < 0.2
