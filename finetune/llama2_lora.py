"""LoRA, low-rank adaptation: freeze the model, train an update of low rank beside its matrices. Hu et al. 2021,
arXiv:2106.09685.

A matrix W of a trained model has millions of numbers, and a new task moves it little, in few directions. So leave W as
it is and learn W + s B A, where A (r x in) and B (out x r) are thin; B starts at zero, so step 0 is the base model.
After training s B A can be merged into W once, and nothing is slower than before. Sections are the paper's.

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

from finetune import adapters, llama2_full, sentiment, task_setup
from utils import figures, pretrained, run
from utils.text import printable

Variant = Literal["lora", "rslora", "dora", "ia3"]


@dataclass(frozen=True)
class Config(task_setup.Training):
    """Adapt a language model by low-rank updates of its weights and score it."""

    lr: float = 2e-3  # peak learning rate
    variant: Variant = "lora"  # lora, or rslora, dora, ia3
    rank: int = 8  # r, the rank of the updates
    alpha: float = 16.0  # updates are multiplied by alpha / r
    dropout: float = 0.0  # dropout rate of an update's inputs in training
    plus: float = 1.0  # LoRA+: B learns so many times faster than A; its authors take 16
    # ends of names, or regular expressions
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    within: str = ""  # the part of the model that may change; a target outside of it is an error
    # modules to train whole besides, such as model.norm (PEFT: modules_to_save)
    also: tuple[str, ...] = ()
    merge: bool = False  # also write the merged model, an ordinary folder for from_pretrained
    backend: Literal["ours", "peft"] = "ours"  # who injects
    out: str = "outputs/llama2_lora"  # where the results go


class LoRALinear(nn.Module):
    """LoRA, Sec. 4.1: a frozen linear layer and a low-rank update beside it, W x + s B A x with s = alpha / r."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base = base
        self.dropout = nn.Dropout(dropout)
        self.scale = self.scaling(alpha, rank)
        # A is random and B zero: step 0 is the base model, and yet B has a gradient.
        new = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **new))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **new))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @staticmethod
    def scaling(alpha, rank):
        """s, what the update is multiplied by."""
        return alpha / rank

    def low_rank_update(self, x):
        """s B A x: (..., in) -> (..., out). The r numbers of A x are scaled, which are fewer than those of B A x."""
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # A x: (..., r)
        return F.linear(self.scale * low, self.lora_B.to(x.dtype))

    def forward(self, x):
        update = self.low_rank_update(x)
        base_output = self.base(x)
        return base_output + update

    def delta_weight(self):
        """s B A, what merging adds to W: (out, in), of rank r at most."""
        return self.scale * self.lora_B @ self.lora_A

    def merged_weight(self):
        """W + s B A, the weight of one plain layer that does the same: (out, in)."""
        return self.base.weight.float() + self.delta_weight()

    def merge(self):
        """Write the merged weight into the frozen layer -> that layer."""
        self.base.weight.copy_(self.merged_weight())
        return self.base


class RsLoRALinear(LoRALinear):
    """rsLoRA, rank-stabilised LoRA, Theorem 3.2: s = alpha / sqrt(r), so that a larger rank learns no more slowly."""

    @staticmethod
    def scaling(alpha, rank):
        return alpha / math.sqrt(rank)


class DoRALinear(LoRALinear):
    """DoRA, Eq. 5: the direction of W + s B A row by row, times a learned magnitude m."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        self.magnitude = nn.Parameter(base.weight.float().norm(dim=1))  # m: (out,)

    def gain(self):
        """m / |W + s B A|, what each row of W + s B A is multiplied by: (out,).

        The norm counts as a constant in the gradient (Sec. 4.3).
        """
        norm = super().merged_weight().norm(dim=1).detach()
        return self.magnitude / norm

    def forward(self, x):
        update = self.low_rank_update(x)
        base_output = F.linear(x, self.base.weight)  # the bias is not part of W, and is not scaled
        y = self.gain() * (base_output + update)
        return y if self.base.bias is None else y + self.base.bias

    def merged_weight(self):
        return self.gain()[:, None] * super().merged_weight()


class IA3Linear(nn.Module):
    """IA3, Sec. 3.3: a frozen linear layer whose output or input is scaled by a vector l: l * W x, or W (l * x)."""

    def __init__(self, base, feedforward):
        super().__init__()
        self.base = base
        self.feedforward = feedforward  # scales its input
        size = base.in_features if feedforward else base.out_features
        # one: step 0 is the base model
        self.ia3_l = nn.Parameter(torch.ones(size, device=base.weight.device))

    def forward(self, x):
        if self.feedforward:
            scaled_input = (x * self.ia3_l).to(x.dtype)
            return self.base(scaled_input)
        return self.base(x) * self.ia3_l

    def merged_weight(self):
        """Columns of W times l, or rows: (out, in)."""
        scale = self.ia3_l if self.feedforward else self.ia3_l[:, None]
        return self.base.weight.float() * scale

    def merge(self):
        """Write the merged weight into the frozen layer -> that layer."""
        self.base.weight.copy_(self.merged_weight())
        # l * (W x + b) scales the bias, too.
        if not self.feedforward and self.base.bias is not None:
            self.base.bias.mul_(self.ia3_l)
        return self.base


LORA_LAYERS = {"lora": LoRALinear, "rslora": RsLoRALinear, "dora": DoRALinear}
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
        raise run.UserError(
            f"--targets {' '.join(targets)}: not a regular expression ({error})"
        ) from None
    kinds = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in linear))
    run.check(found, f"--targets {' '.join(targets)} names no linear layer; there are: {kinds}")
    outside = [name for name in found if not f"{name}.".startswith(f"{within}." if within else "")]
    run.check(
        not outside,
        f"--targets {' '.join(targets)} names layers outside of {within}: {', '.join(outside[:3])}",
    )
    return found


def refuse_tied(model, names):
    """Raises UserError for a module that is not there, or whose weights are tied: a head that is the embedding, too."""
    modules = dict(model.named_modules())
    owners = {}
    for name, module in modules.items():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(name)
    for name in names:
        run.check(name in modules, f"--also {name}: there is no such module")
        shared = next(
            (owners[id(p)] for p in modules[name].parameters() if len(owners[id(p)]) > 1), ()
        )
        run.check(
            not shared,
            f"{' and '.join(shared)} are one and the same weight: neither can be adapted alone",
        )


def inject(model, targets, rank, alpha, dropout=0.0, variant="lora", within="", also=()):
    """Freeze the model and put an adapter around every target, in place -> the names of the layers.

    within: the part of the model that may be changed; also: names of modules to train whole.
    """
    run.check(
        rank > 0 and 0 <= dropout < 1, "--rank must be at least 1, --dropout at least 0 and below 1"
    )
    names = find(model, targets, within)
    return inject_at(model, names, rank, alpha, dropout, variant, also)


def inject_at(model, names, rank, alpha, dropout=0.0, variant="lora", also=()):
    """`inject` for layers that are named in full."""
    refuse_tied(model, [*names, *also])
    # All of the base model is frozen.
    model.requires_grad_(False)
    # Each target gives its place to an adapter that holds it.
    for name in names:
        base = model.get_submodule(name)
        if variant == "ia3":
            adapter = IA3Linear(base, feedforward=name.rpartition(".")[2] in FEEDFORWARD)
        else:
            adapter = LORA_LAYERS[variant](base, rank, alpha, dropout)
        replace_module(model, name, adapter)
    # PEFT's modules_to_save: trained whole, in fp32.
    for name in also:
        model.get_submodule(name).float().requires_grad_(True)
    return names


def replace_module(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def merge(model):
    """Merge every adapter into its layer and take it out, in place -> the model, as fast as it was.

    PEFT calls it merge_and_unload. There is no way back (unmerge), for W and s B A are one sum now: keep the adapter's
    file, and `load` it into the base model again.
    """
    for name in names(model):
        adapter = model.get_submodule(name)
        run.check(
            isinstance(adapter.base, nn.Linear),
            f"{name} is stored in few bits: nothing can be added to it",
        )
        merged = adapter.merge()
        replace_module(model, name, merged)
    return model


def lora_plus_groups(model, ratio=1.0):
    """LoRA+: param groups in which the learning rate of B is `ratio` times that of all else; 1 is plain LoRA."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    lora_b = [p for name, p in trained if "lora_B" in name]
    others = [p for name, p in trained if "lora_B" not in name]
    groups = [llama2_full.param_group(others, 1.0)]
    if lora_b:
        groups.append(llama2_full.param_group(lora_b, ratio))
    return groups


def tree(model):
    """Where the adapters sit: the module tree, equal layers drawn once."""
    lines = {}
    for name, module in model.named_modules():
        if isinstance(module, ADAPTERS):
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            key = re.sub(r"\.\d+\.", ".*.", name)
            count, _, _ = lines.get(key, (0, 0, 0))
            lines[key] = (count + 1, trained, tuple(module.base.weight.shape))
    rows = []
    for key, (count, trained, shape) in lines.items():
        rows.append(f"{key:45} {count:3} x {trained:7,} trained beside {shape[0]} x {shape[1]}")
    return "\n".join(rows)


@torch.no_grad()
def changes(model):
    """How far each kind of target moved, by layer: {target: [|W' - W| / |W|, ...]}, lengths as of one long vector."""
    found = {}
    for name in names(model):
        adapter = model.get_submodule(name)
        weight = adapter.base.weight.float()
        change = (adapter.merged_weight() - weight).norm() / weight.norm()
        target = name.rpartition(".")[2]
        found.setdefault(target, []).append(float(change))
    return found


def names(model):
    """The layers that carry an adapter."""
    return [name for name, m in model.named_modules() if isinstance(m, ADAPTERS)]


def peft_tensors(name, adapter):
    """The parameters of one adapter as PEFT's files name and shape them: {name: tensor}, views of what is trained."""
    if isinstance(adapter, IA3Linear):
        shaped = adapter.ia3_l[None] if adapter.feedforward else adapter.ia3_l[:, None]
        return {f"{name}.ia3_l": shaped}
    tensors = {f"{name}.lora_A.weight": adapter.lora_A, f"{name}.lora_B.weight": adapter.lora_B}
    if isinstance(adapter, DoRALinear):
        tensors[f"{name}.lora_magnitude_vector"] = adapter.magnitude
    return tensors


def save(model, folder, cfg, base="", also=()):
    """Write the adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors.

    base: what `from_pretrained` finds the model by that it belongs to, a folder or a hub id; `also`: names of modules
    that were trained whole (PEFT's modules_to_save).
    """
    tensors = {}
    for name in names(model):
        tensors |= peft_tensors(name, model.get_submodule(name))
    for name in also:
        tensors |= {f"{name}.{k}": v for k, v in model.get_submodule(name).state_dict().items()}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "target_modules": names(model), "modules_to_save": list(also) or None,
    }  # fmt: skip
    if cfg.variant == "ia3":
        config |= {
            "peft_type": "IA3",
            "feedforward_modules": [n for n in names(model) if n.endswith(FEEDFORWARD)],
        }
    else:
        config |= {
            "r": cfg.rank, "lora_alpha": cfg.alpha, "lora_dropout": cfg.dropout, "bias": "none",
            "use_rslora": cfg.variant == "rslora", "use_dora": cfg.variant == "dora",
        }  # fmt: skip
    adapters.write(folder, config, {adapters.PREFIX + k: v for k, v in tensors.items()})


def variant_of(config):
    """Which variant a configuration of PEFT is for."""
    if config["peft_type"] == "IA3":
        return "ia3"
    if config.get("use_dora"):
        return "dora"
    return "rslora" if config.get("use_rslora") else "lora"


def target_modules(model, config, tensors):
    """Names of the layers that an adapter of PEFT is for.

    A list holds ends of names. A string is a regular expression; the file of the weights says as well where they
    belong, and unlike a stranger's expression it cannot take for ever.
    """
    targets = config["target_modules"]
    linear = [name for name, m in model.named_modules() if hasattr(m, "in_features")]
    if isinstance(targets, str):
        owners = {
            re.sub(r"\.(lora_[AB]\.weight|lora_magnitude_vector|ia3_l)$", "", key)
            for key in tensors
        }
        return [name for name in linear if adapters.PREFIX + name in owners]
    return [name for name in linear if any(f".{name}".endswith(f".{t}") for t in targets)]


def check_feedforward(found, config, where):
    """Raises UserError if the IA3 layers whose inputs PEFT scales are others than ours."""
    ends = config.get("feedforward_modules") or []
    theirs = [name for name in found if any(f".{name}".endswith(f".{end}") for end in ends)]
    ours = [name for name in found if name.endswith(FEEDFORWARD)]
    run.check(
        theirs == ours,
        f"{where}: feedforward_modules are not the {', '.join(FEEDFORWARD)}; load it with PEFT",
    )


def check_tensors(wanted, tensors, where):
    """Raises UserError for a weight that is missing, for one that has no place, and for one of another shape."""
    missing = sorted(wanted.keys() - tensors.keys())
    strange = sorted(tensors.keys() - wanted.keys())
    lost = printable(f"missing {missing[:2]}, without a place {strange[:2]}")
    run.check(not missing and not strange, f"{where}: {lost}")
    for key, weight in wanted.items():
        name = key.removeprefix(adapters.PREFIX)
        shape = tuple(tensors[key].shape)
        place = tuple(weight.shape)
        run.check(
            shape == place, f"{where}: {name} has the shape {shape}, this model needs {place}"
        )


def load(model, folder):
    """Inject what an adapter folder describes, ours or PEFT's, and load it, in place -> names of the layers.

    Raises UserError for another kind of adapter, for a setting that is not known here, for a weight that is missing,
    and for one that has no place.
    """
    config, tensors = adapters.read(folder, ("LORA", "IA3"))
    where = printable(folder)
    variant = variant_of(config)
    rank = 1 if variant == "ia3" else config["r"]
    alpha = 1 if variant == "ia3" else config["lora_alpha"]
    # Which layers it is for, and whether they can be.
    found = target_modules(model, config, tensors)
    run.check(found, f"{where}: its target_modules name no linear layer of this model")
    if variant == "ia3":
        check_feedforward(found, config, where)
    for name in found:  # before anything is made: a rank of a billion is a typing error
        smallest = min(
            model.get_submodule(name).in_features, model.get_submodule(name).out_features
        )
        run.check(
            rank <= 64 * smallest,
            f"{where}: rank {rank} is far above the width of {name}, {smallest}",
        )
    # Fresh adapters in their places.
    also = config.get("modules_to_save") or ()
    inject_at(model, found, rank, alpha, variant=variant, also=also)
    # Every parameter of theirs, under its name in the file.
    wanted = {}
    for name in found:
        wanted |= peft_tensors(name, model.get_submodule(name))
    for name in also:
        wanted |= {f"{name}.{k}": v for k, v in model.get_submodule(name).named_parameters()}
    wanted = {adapters.PREFIX + name: weight for name, weight in wanted.items()}
    check_tensors(wanted, tensors, where)
    with torch.no_grad():
        for key, weight in wanted.items():
            weight.copy_(tensors[key])
    return found


def allow(model, cfg):
    """The names of the targets. Raises UserError for flags that cannot be meant, before anything is written."""
    run.check(
        cfg.rank > 0 and 0 <= cfg.dropout < 1,
        "--rank must be at least 1, --dropout at least 0 and below 1",
    )
    run.check(cfg.plus > 0, "--plus must be above 0")
    layers = find(model, cfg.targets, cfg.within)
    refuse_tied(model, [*layers, *cfg.also])
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
    bench = task_setup.start(cfg, lambda model: allow(model, cfg))
    model = bench.model
    folder = bench.folder
    base = adapters.base_of(model)
    if cfg.backend == "peft":
        model = through_peft(model, cfg)
    else:
        inject(
            model, cfg.targets, cfg.rank, cfg.alpha, cfg.dropout, cfg.variant, cfg.within, cfg.also
        )
        print(tree(model))
    groups = lora_plus_groups(model, cfg.plus)
    metrics = llama2_full.experiment(cfg, bench, sentiment.network(model), model, groups)
    if cfg.backend == "peft":
        model.save_pretrained(folder / "adapter")
    else:
        save(model, folder / "adapter", cfg, base, cfg.also)
        figures.curves(
            folder / "changes.png", changes(model), "layer", "relative change of the weight"
        )
    metrics["checkpoint_MiB"] = llama2_full.size(folder / "adapter")
    if cfg.merge:
        whole = model.merge_and_unload() if cfg.backend == "peft" else merge(model)
        pretrained.save(whole, bench.tokenizer, folder / "merged")
    print(adapters.usage(folder / "adapter", base))
    return run.report(folder, metrics, then="python finetune/compare.py")


if __name__ == "__main__":
    run.cli(main, Config)
