"""Pieces of a Llama and of a product, on four ranks, are the whole: values, gradients, bytes and calls."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from tests import llamas
from training import megatron, ranks, summa, tensor_parallel
from utils import pretrained, run

SOON = timedelta(seconds=60)  # a rank that waits longer has been forgotten
B, L, D, N = 3, 9, 32, 4


def tiny():
    """A Llama of random weights whose heads can be dealt to four: eight of queries, four of keys and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120, hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def numbers(found):
    """Tensors in a nest of dicts -> lists, to be sent to the process that asked."""
    if isinstance(found, dict):
        return {name: numbers(x) for name, x in found.items()}
    return (found.to_local() if isinstance(found, DTensor) else found).tolist()


def tensors(found):
    if isinstance(found, dict):
        return {name: tensors(x) for name, x in found.items()}
    return torch.tensor(found)


def learned(model, ids, loss, steps=12):
    """The losses of a few steps of gradient descent."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.5), []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(tensor_parallel.forward_backward(model, ids, loss)["loss"].item())
        optimizer.step()
    return losses


def ids():
    return torch.randint(2, 120, (B, L + 1), generator=torch.Generator().manual_seed(1))


def worker(cfg):
    """What each of the ranks finds."""
    found, rank = {}, dist.get_rank()
    ours = megatron.apply_tensor_parallel(tiny())
    with ranks.Traffic() as traffic:
        found["ours"] = numbers(
            tensor_parallel.forward_backward(ours, ids(), megatron.cross_entropy)
        )
    found |= {"sent": traffic.sent, "calls": traffic.calls, "bytes": ranks.states(ours)}
    for shared in (True, False):
        model = tensor_parallel.torch_tensor_parallel(tiny(), shared)
        with CommDebugMode() as counted:
            found[f"torch {shared}"] = numbers(
                tensor_parallel.forward_backward(
                    model, ids(), tensor_parallel.unsharded_cross_entropy
                )
            )
        found[f"torch calls {shared}"] = counted.get_total_counts()
    x = torch.full((2, 3), float(rank + 1), requires_grad=True)  # the operators alone
    found["g"] = megatron.g(x).tolist()
    megatron.g(x).backward(torch.full((2, 3), 5.0))
    found["gradient of g"], x.grad = x.grad.tolist(), None
    y = megatron.f(x)
    found["f"] = y.tolist()
    y.backward(torch.full((2, 3), float(rank + 1)))
    found["gradient of f"] = x.grad.tolist()
    generator = torch.Generator().manual_seed(2)
    states, words = (
        torch.randn(B, L, D, generator=generator),
        30 * torch.randn(120, D, generator=generator),
    )
    # Logits of some hundreds: exp alone would be infinite
    weight = words.chunk(N)[rank].clone().requires_grad_()
    value = megatron.cross_entropy(states, weight, ids()[:, 1:])
    value.backward()
    found["our loss"] = numbers({"loss": value.detach(), "gradient": weight.grad})
    weight = words.chunk(N)[rank].clone().requires_grad_()
    with loss_parallel():
        logits = DTensor.from_local(
            states.flatten(0, 1) @ weight.T, init_device_mesh("cpu", (N,)), [Shard(1)]
        )
        value = F.cross_entropy(logits, ids()[:, 1:].flatten())
        value.backward()
    found["torch loss"] = numbers({"loss": value.full_tensor().detach(), "gradient": weight.grad})
    found["learned"] = learned(ours, ids(), megatron.cross_entropy)
    found["grid"] = summa.worker(cfg)
    for key, value in (("num_key_value_heads", 2), ("vocab_size", 121), ("attention_bias", True)):
        model = tiny()
        setattr(model.config, key, value)
        with pytest.raises(run.UserError) as error:
            megatron.apply_tensor_parallel(model)
        found[key] = str(error.value)
    with pytest.raises(run.UserError) as error:
        tensor_parallel.worker(cfg)
    found["model"] = str(error.value)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    model = llamas.folder(tmp_path_factory.mktemp("model"))  # of two heads of keys and values
    return ranks.launch(worker, tensor_parallel.Config(model=model, batch=3, length=4), N, SOON)


@pytest.fixture(scope="module")
def whole():
    return tensor_parallel.forward_backward(tiny(), ids(), tensor_parallel.unsharded_cross_entropy)


def together(parts):
    """Shards of each rank, laid side by side again: columns or rows of the paper's matrices; of norms, the first."""
    side = {name: megatron.SHARD_DIM.get(name.split(".")[-2]) for name in parts[0]}
    return {
        name: tensors(parts[0][name])
        if dim is None
        else torch.cat([tensors(p[name]) for p in parts], dim)
        for name, dim in side.items()
    }


def test_shards_are_the_whole_model(found, whole, parity):
    for one in found:
        ours = tensors({k: one["ours"][k] for k in ("loss", "states", "input gradient")})
        parity(
            "Tensor parallelism",
            "apply_tensor_parallel, loss, states, input gradient",
            "transformers",
            ours,
            {k: whole[k] for k in ours},
        )
    ours = together([one["ours"]["gradients"] for one in found])
    parity(
        "Tensor parallelism",
        "apply_tensor_parallel, gradients",
        "transformers",
        ours,
        whole["gradients"],
    )
    assert len(ours) == 2 * 9 + 2  # seven matrices and two norms a layer, the words, the last norm


def test_shards_are_those_of_torch(found, parity):
    for one in found:
        ours = tensors(one["ours"])
        ours["gradients"].pop("model.embed_tokens.weight")  # torch's words are whole
        for shared in (True, False):
            theirs = tensors(one[f"torch {shared}"])
            theirs["gradients"].pop("model.embed_tokens.weight")
            parity(
                "Tensor parallelism", "apply_tensor_parallel", "parallelize_module", ours, theirs
            )


def test_what_all_hold_stays_the_same_on_all(found):
    """Norms see the whole input, so their gradients must be whole: f stands behind them and not before."""
    first, *others = (one["ours"]["gradients"] for one in found)
    norms = [name for name in first if "norm" in name]
    assert len(norms) == 5 and all(first[name] == other[name] for name in norms for other in others)


def test_f_and_g_are_conjugate(found):
    for rank, one in enumerate(found):
        assert one["g"] == [[10.0] * 3] * 2 and one["gradient of g"] == [[5.0] * 3] * 2
        assert one["f"] == [[rank + 1.0] * 3] * 2 and one["gradient of f"] == [[10.0] * 3] * 2


def test_the_loss_is_that_of_torch(found, parity):
    for one in found:
        ours, theirs = tensors(one["our loss"]), tensors(one["torch loss"])
        assert theirs["loss"] > 80  # it would be infinite without the highest logit
        parity("Tensor parallelism", "cross_entropy", "torch loss_parallel", ours, theirs)


def test_bytes_and_calls_are_those_of_the_formula(found):
    norms, numbers = 5 * D, sum(p.numel() for p in tiny().parameters())
    rotary = sum(b.nbytes for b in tiny().buffers())
    for one in found:
        assert one["bytes"]["weights"] == 4 * ((numbers - norms) // N + norms) + rotary
        assert one["calls"] == 4 * 2 + megatron.VOCABULARY_ALL_REDUCES
        assert one["sent"] == {
            "all_reduce": 2 * (N - 1) / N * 4 * ((4 * 2 + 2) * B * L * D + 3 * B * L)
        }
        assert one["torch calls True"] == 4 * 2 and one["torch calls False"] == 7 * 2


def test_it_learns_what_the_whole_model_learns(found):
    alone = learned(tiny(), ids(), tensor_parallel.unsharded_cross_entropy)
    assert alone[-1] < alone[0] - 0.3
    for one in found:
        torch.testing.assert_close(
            torch.tensor(one["learned"]), torch.tensor(alone), atol=1e-4, rtol=1e-4
        )


def test_a_product_on_a_grid_is_the_whole_product(found, parity):
    grid = [one["grid"] for one in found]
    assert sorted(one["place"] for one in grid) == [[0, 0], [0, 1], [1, 0], [1, 1]]
    for one in grid:
        assert one["held"] * 4 == one["whole"]
        zero = dict.fromkeys(one["differences"], 0.0)
        parity(
            "Tensor parallelism",
            "Summa, share of the largest number",
            "matmul",
            one["differences"],
            zero,
        )


def test_what_cannot_be_dealt_is_refused(found):
    for one in found:
        for key in ("num_key_value_heads", "model"):
            assert one[key].startswith("2 heads of keys and values cannot be dealt to 4 ranks")
        assert (
            one["vocab_size"].startswith("121 words cannot be dealt")
            and "biases" in one["attention_bias"]
        )


@pytest.mark.parametrize("kind", ["gpt2", "opt", "qwen2"])
def test_other_models_are_refused_in_one_line(kind, monkeypatch):
    other = SimpleNamespace(config=AutoConfig.for_model(kind))
    monkeypatch.setattr(pretrained, "language_model", lambda _: (None, other))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(
        run.UserError, match=f"--model is a {kind}; only a Llama can be sharded here"
    ):
        tensor_parallel.read(tensor_parallel.Config(model="other"))


def test_bad_flags_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(run.UserError, match="--length"):
        tensor_parallel.main(tensor_parallel.Config(length=0, out=str(tmp_path / "x")))
    with pytest.raises(run.UserError, match="--ranks"):
        tensor_parallel.main(tensor_parallel.Config(ranks=0, out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()
