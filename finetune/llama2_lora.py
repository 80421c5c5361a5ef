"""LoRA: freeze the model, learn a correction of low rank beside its matrices. Hu et al. 2021, arXiv:2106.09685.

A matrix W of a trained model has millions of numbers, and a new task moves it little, in few directions. So leave W as
it is and learn W + B A, where A (r x in) and B (out x r) are thin; B starts at zero, so step 0 is the base model. After
training B A can be added to W once, and nothing is slower than before. Sections are the paper's.

Four relatives are a few lines each: rsLoRA (Kalajdzievski 2023, arXiv:2312.03732), DoRA (Liu et al. 2024,
arXiv:2402.09353), LoRA+ (Hayou et al. 2024, arXiv:2402.12354), IA3 (Liu et al. 2022, arXiv:2205.05638).

Shapes: x (..., in) -> (..., out), W (out, in), rank r.
Differences from the paper: every linear layer of attention by default, not query and value alone; A starts uniform, as
in PEFT, not normal. DoRA's lengths are those of rows of W (out, in), again as in PEFT.

    python finetune/llama2_lora.py
    python finetune/llama2_lora.py --variant dora --rank 4
    python finetune/llama2_lora.py --backend peft                       # the same through the PEFT library
    python finetune/llama2_lora.py --model meta-llama/Llama-2-7b-hf     # larger, for a GPU: any hub id or local folder
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from finetune import adapters, llama2_full, sentiment
from utils import figures, pretrained, run
from utils.text import printable

Variant = Literal["lora", "rslora", "dora", "ia3"]


@dataclass(frozen=True)
class Config(llama2_full.Training):
    """Adapt a language model by low-rank corrections and score it."""

    lr: float = 2e-3  # peak learning rate
    variant: Variant = "lora"  # lora, or rslora, dora, ia3
    rank: int = 8  # r, the rank of the corrections
    alpha: float = 16.0  # corrections are multiplied by alpha / r
    dropout: float = 0.0  # share of the inputs of a correction that is hidden in training
    plus: float = 1.0  # LoRA+: B learns so many times faster than A; its authors take 16
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # ends of names, or regular expressions
    within: str = ""  # the part of the model that may change; a target outside of it is an error
    also: tuple[str, ...] = ()  # modules to train whole besides, such as model.norm (PEFT: modules_to_save)
    merge: bool = False  # also write the merged model, an ordinary folder for from_pretrained
    backend: Literal["ours", "peft"] = "ours"  # who injects
    out: str = "outputs/llama2_lora"  # where the results go


class LoRALinear(nn.Module):
    """A frozen linear layer and its correction: W x + s B A x, s = alpha / r. Sec. 4.1."""

    def __init__(self, base, rank, alpha, dropout=0.0, variant="lora"):
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(dropout)
        new = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **new))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **new))  # zero: step 0 is the base model
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = alpha / (math.sqrt(rank) if variant == "rslora" else rank)  # rsLoRA, Theorem 3.2
        self.magnitude = nn.Parameter(base.weight.float().norm(dim=1)) if variant == "dora" else None

    def update(self):
        """What is added to W: (out, in), of rank r at most."""
        return self.scale * self.lora_B @ self.lora_A

    def gain(self):
        """DoRA, Eq. 5: what each row of W + B A is multiplied by, so that its length is the learned magnitude: (out,).

        The length in the denominator counts as a constant in the gradient (Sec. 4.3 there).
        """
        return self.magnitude / (self.base.weight.float() + self.update()).norm(dim=1).detach()

    def forward(self, x):
        low = F.linear(self.scale * F.linear(self.dropout(x), self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        if self.magnitude is None:
            return self.base(x) + low
        y = self.gain() * (F.linear(x, self.base.weight) + low)
        return y if self.base.bias is None else y + self.base.bias

    def merged(self):
        """The weight of one plain layer that does the same: (out, in)."""
        weight = self.base.weight.float() + self.update()
        return weight if self.magnitude is None else self.gain()[:, None] * weight


class IA3Linear(nn.Module):
    """A frozen linear layer with its output or input scaled number by number: l * W x, or W (l * x). IA3, Sec. 3.3."""

    def __init__(self, base, feedforward):
        super().__init__()
        self.base, self.feedforward = base, feedforward
        size = base.in_features if feedforward else base.out_features
        self.ia3_l = nn.Parameter(torch.ones(size, device=base.weight.device))  # one: step 0 is the base model

    def forward(self, x):
        if self.feedforward:
            return self.base((x * self.ia3_l).to(x.dtype))
        return self.base(x) * self.ia3_l

    def merged(self):
        return self.base.weight.float() * (self.ia3_l if self.feedforward else self.ia3_l[:, None])


ADAPTERS = (LoRALinear, IA3Linear)
FEEDFORWARD = ("down_proj",)  # IA3 scales the inputs of these: the inner activations of the MLP


def matches(name, targets):
    """A target is the end of a name, whole words between dots, or a regular expression for all of it."""
    return any(f".{name}".endswith(f".{t}") or re.fullmatch(t, name) for t in targets)


def find(model, targets, within=""):
    """Names of the linear layers meant by `targets`. Raises UserError for none, and for one outside of `within`."""
    linear = [name for name, m in model.named_modules() if hasattr(m, "in_features")]  # of any kind
    try:
        found = [name for name in linear if matches(name, targets)]
    except re.error as error:
        raise run.UserError(f"--targets {' '.join(targets)}: not a regular expression ({error})") from None
    kinds = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in linear))
    run.check(found, f"--targets {' '.join(targets)} names no linear layer; there are: {kinds}")
    outside = [name for name in found if not f"{name}.".startswith(f"{within}." if within else "")]
    run.check(not outside, f"--targets {' '.join(targets)} names layers outside of {within}: {', '.join(outside[:3])}")
    return found


def single(model, names):
    """Raises UserError for a module that is not there, or shares its weights: a head that is the embedding, too."""
    modules, owners = dict(model.named_modules()), {}
    for name, module in modules.items():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(name)
    for name in names:
        run.check(name in modules, f"--also {name}: there is no such module")
        shared = next((owners[id(p)] for p in modules[name].parameters() if len(owners[id(p)]) > 1), ())
        run.check(not shared, f"{' and '.join(shared)} are one and the same weight: neither can be adapted alone")


def inject(model, targets, rank, alpha, dropout=0.0, variant="lora", within="", also=()):
    """Freeze the model and put an adapter around every target, in place -> the names of the layers.

    within: the part of the model that may be changed; also: names of modules to train whole.
    """
    run.check(rank > 0 and 0 <= dropout < 1, "--rank must be at least 1, --dropout at least 0 and below 1")
    return inject_at(model, find(model, targets, within), rank, alpha, dropout, variant, also)


def inject_at(model, names, rank, alpha, dropout=0.0, variant="lora", also=()):
    """`inject` for layers that are named in full."""
    single(model, [*names, *also])
    model.requires_grad_(False)
    for name in names:
        base, (parent, _, child) = model.get_submodule(name), name.rpartition(".")
        if variant == "ia3":
            adapter = IA3Linear(base, child in FEEDFORWARD)
        else:
            adapter = LoRALinear(base, rank, alpha, dropout, variant)
        setattr(model.get_submodule(parent), child, adapter)
    for name in also:
        model.get_submodule(name).float().requires_grad_(True)
    return names


@torch.no_grad()
def merge(model):
    """Add every correction to its matrix and take the adapters out, in place -> the model, as fast as it was."""
    for name, adapter in [(n, m) for n, m in model.named_modules() if isinstance(m, ADAPTERS)]:
        run.check(isinstance(adapter.base, nn.Linear), f"{name} is stored in few bits: nothing can be added to it")
        adapter.base.weight.copy_(adapter.merged())
        if isinstance(adapter, IA3Linear) and not adapter.feedforward and adapter.base.bias is not None:
            adapter.base.bias.mul_(adapter.ia3_l)  # l * (W x + b)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapter.base)
    return model


def groups(model, plus=1.0):
    """What the optimizer gets: all that is trained; B learns `plus` times faster (LoRA+)."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    fast = [p for n, p in trained if "lora_B" in n]
    slow = [p for n, p in trained if "lora_B" not in n]
    return [llama2_full.group(slow, 1.0)] + ([llama2_full.group(fast, plus)] if fast else [])


def tree(model):
    """Where the adapters sit: the module tree, equal layers drawn once."""
    lines = {}
    for name, module in model.named_modules():
        if isinstance(module, ADAPTERS):
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            key = re.sub(r"\.\d+\.", ".*.", name)
            count, _, _ = lines.get(key, (0, 0, 0))
            lines[key] = count + 1, trained, tuple(module.base.weight.shape)
    return "\n".join(f"{k:45} {n:3} x {t:7,} trained beside {s[0]} x {s[1]}" for k, (n, t, s) in lines.items())


@torch.no_grad()
def changes(model):
    """How far each kind of target moved, by layer: {target: [|W' - W| / |W|, ...]}, lengths as of one long vector."""
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, ADAPTERS):
            weight = m.base.weight.float()
            found.setdefault(name.rpartition(".")[2], []).append(float((m.merged() - weight).norm() / weight.norm()))
    return found


def names(model):
    """The layers that carry an adapter."""
    return [name for name, m in model.named_modules() if isinstance(m, ADAPTERS)]


def stored(name, adapter):
    """The numbers of one adapter as PEFT's files name and shape them: {name: tensor}, views of what is trained."""
    if isinstance(adapter, IA3Linear):
        return {f"{name}.ia3_l": adapter.ia3_l[None] if adapter.feedforward else adapter.ia3_l[:, None]}
    numbers = {f"{name}.lora_A.weight": adapter.lora_A, f"{name}.lora_B.weight": adapter.lora_B}
    if adapter.magnitude is not None:
        numbers[f"{name}.lora_magnitude_vector"] = adapter.magnitude
    return numbers


def save(model, folder, cfg, base="", also=()):
    """Write the adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors.

    base: what `from_pretrained` finds the model by that it belongs to, a folder or a hub id; `also`: names of modules
    that were trained whole (PEFT's modules_to_save).
    """
    tensors = {}
    for name in names(model):
        tensors |= stored(name, model.get_submodule(name))
    for name in also:
        tensors |= {f"{name}.{k}": v for k, v in model.get_submodule(name).state_dict().items()}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "target_modules": names(model), "modules_to_save": list(also) or None,
    }  # fmt: skip
    if cfg.variant == "ia3":
        config |= {"peft_type": "IA3", "feedforward_modules": [n for n in names(model) if n.endswith(FEEDFORWARD)]}
    else:
        config |= {
            "r": cfg.rank, "lora_alpha": cfg.alpha, "lora_dropout": cfg.dropout, "bias": "none",
            "use_rslora": cfg.variant == "rslora", "use_dora": cfg.variant == "dora",
        }  # fmt: skip
    adapters.write(folder, config, {adapters.PREFIX + k: v for k, v in tensors.items()})


def adapted(model, config, tensors):
    """Names of the layers that an adapter of PEFT is for.

    A list holds ends of names. A string is a regular expression; the file of the weights says as well where they
    belong, and unlike a stranger's expression it cannot take for ever.
    """
    targets = config["target_modules"]
    linear = [name for name, m in model.named_modules() if hasattr(m, "in_features")]
    if isinstance(targets, str):
        owners = {re.sub(r"\.(lora_[AB]\.weight|lora_magnitude_vector|ia3_l)$", "", key) for key in tensors}
        return [name for name in linear if adapters.PREFIX + name in owners]
    return [name for name in linear if any(f".{name}".endswith(f".{t}") for t in targets)]


def load(model, folder):
    """Inject what an adapter folder describes, ours or PEFT's, and load it, in place -> names of the layers.

    Raises UserError for another kind of adapter, for a setting that is not known here, for a weight that is missing,
    and for one that has no place.
    """
    config, tensors = adapters.read(folder, ("LORA", "IA3"))
    where = printable(folder)
    if config["peft_type"] == "IA3":
        variant, rank, alpha = "ia3", 1, 1
    else:
        variant = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
        rank, alpha = config["r"], config["lora_alpha"]
    found = adapted(model, config, tensors)
    run.check(found, f"{where}: its target_modules name no linear layer of this model")
    inner = config.get("feedforward_modules") or []
    scaled = [n for n in found if any(f".{n}".endswith(f".{t}") for t in inner)]  # IA3 scales their inputs
    same = variant != "ia3" or scaled == [n for n in found if n.endswith(FEEDFORWARD)]
    run.check(same, f"{where}: feedforward_modules are not the {', '.join(FEEDFORWARD)}; load it with PEFT")
    for name in found:  # before anything is made: a rank of a billion is a typing error
        smallest = min(model.get_submodule(name).in_features, model.get_submodule(name).out_features)
        run.check(rank <= 64 * smallest, f"{where}: rank {rank} is far above the width of {name}, {smallest}")
    also = config.get("modules_to_save") or ()
    inject_at(model, found, rank, alpha, variant=variant, also=also)
    wanted = {}
    for name in found:
        wanted |= stored(name, model.get_submodule(name))
    for name in also:
        wanted |= {f"{name}.{k}": v for k, v in model.get_submodule(name).named_parameters()}
    missing = sorted({adapters.PREFIX + k for k in wanted} - tensors.keys())
    strange = sorted(tensors.keys() - {adapters.PREFIX + k for k in wanted})
    lost = printable(f"missing {missing[:2]}, without a place {strange[:2]}")
    run.check(not missing and not strange, f"{where}: {lost}")
    for name, weight in wanted.items():
        shape, place = tuple(tensors[adapters.PREFIX + name].shape), tuple(weight.shape)
        run.check(shape == place, f"{where}: {name} has the shape {shape}, this model needs {place}")
    with torch.no_grad():
        for name, weight in wanted.items():
            weight.copy_(tensors[adapters.PREFIX + name])
    return found


def allow(model, cfg):
    """The names of the targets. Raises UserError for flags that cannot be meant, before anything is written."""
    run.check(cfg.rank > 0 and 0 <= cfg.dropout < 1, "--rank must be at least 1, --dropout at least 0 and below 1")
    run.check(cfg.plus > 0, "--plus must be above 0")
    layers = find(model, cfg.targets, cfg.within)
    single(model, [*layers, *cfg.also])
    return layers


def through_peft(model, cfg):
    """The same adapters by the PEFT library -> its model; what it holds is ours, number by number (see the tests)."""
    from peft import IA3Config, LoraConfig, get_peft_model

    layers = allow(model, cfg)
    if cfg.variant == "ia3":
        config = IA3Config(
            target_modules=layers, feedforward_modules=[n for n in layers if n.endswith(FEEDFORWARD)],
            task_type="CAUSAL_LM", modules_to_save=list(cfg.also) or None,
        )  # fmt: skip
    else:
        config = LoraConfig(
            r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=layers, task_type="CAUSAL_LM",
            use_rslora=cfg.variant == "rslora", use_dora=cfg.variant == "dora", modules_to_save=list(cfg.also) or None,
        )  # fmt: skip
    made = get_peft_model(model, config)
    made.peft_config["default"].base_model_name_or_path = adapters.base_of(model)
    return made


def main(cfg: Config) -> dict:
    """Inject, train, score; write the adapter in PEFT's layout."""
    bench = llama2_full.start(cfg, lambda model: allow(model, cfg))
    model, folder, base = bench.model, bench.folder, adapters.base_of(bench.model)
    if cfg.backend == "peft":
        model = through_peft(model, cfg)
    else:
        inject(model, cfg.targets, cfg.rank, cfg.alpha, cfg.dropout, cfg.variant, cfg.within, cfg.also)
        print(tree(model))
    metrics = llama2_full.experiment(cfg, bench, sentiment.network(model), model, groups(model, cfg.plus))
    if cfg.backend == "peft":
        model.save_pretrained(folder / "adapter")
    else:
        save(model, folder / "adapter", cfg, base, cfg.also)
        figures.curves(folder / "changes.png", changes(model), "layer", "relative change of the weight")
    metrics["checkpoint_MiB"] = llama2_full.size(folder / "adapter")
    if cfg.merge:
        whole = model.merge_and_unload() if cfg.backend == "peft" else merge(model)
        pretrained.save(whole, bench.tokenizer, folder / "merged")
    print(adapters.usage(folder / "adapter", base))
    return run.report(folder, metrics, then="python finetune/compare.py")


if __name__ == "__main__":
    run.cli(main, Config)
