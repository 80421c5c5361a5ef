"""Edge agreement of a ControlNet: do pictures drawn under control have the edges asked for, and still show the prompt?

Held-out emoji are drawn under their own names, without control, along their own edges, and along those of another;
and without a prompt, without control and along their own edges. The score is F1 between the edges of what was drawn and
those asked for, with a tolerance of one pixel.
"""

import textwrap
from dataclasses import replace

from models.edges import canny, f1
from models.prompt_alignment import cosine_similarity, picture_features
from utils import data


def draw(painter, network, prompts, noise, cfg):
    """Prompts along whatever edges `network` follows -> images (N, 3, H, W) in [-1, 1]."""
    under = replace(painter, model=network)
    return under.draw(prompts, noise, cfg.guidance_scale, cfg.sampling_steps)


def evaluate(painter, controlled, images, captions, pick, noise, cfg):
    """-> metrics, rows {label: images} and titles; `controlled`: edges, scale -> network; pick: indices (N,)."""
    true = data.to_float(images[pick])
    prompts = [captions[i] for i in pick]
    own = canny(true)
    other = own.roll(1, 0)
    # edges asked for, control scale, whether the name is the prompt
    ways = {"without control": (own, 0.0, True), "own edges": (own, cfg.control_scale, True)}
    ways["other edges"] = (other, cfg.control_scale, True)
    ways["no prompt, without control"] = (own, 0.0, False)
    ways["no prompt, own edges"] = (own, cfg.control_scale, False)
    features = picture_features(true)
    metrics = {}
    rows = {"true": true, "its edges": lines(own)}
    for name, (wanted, scale, named) in ways.items():
        network = controlled(wanted.float(), scale)
        if named:
            drawn = draw(painter, network, prompts, noise, cfg)
        else:
            # without words there is nothing to guide towards
            plain = replace(cfg, guidance_scale=1.0)
            drawn = draw(painter, network, [""] * len(pick), noise, plain)
        agreement = f1(canny(drawn), wanted)
        similarity = cosine_similarity(picture_features(drawn), features)
        metrics[name] = {
            "edge_f1": float(agreement.mean()),
            "standard_error": float(agreement.std() / len(pick) ** 0.5),
            "similarity": float(similarity.mean()),
        }
        if name == "other edges":
            rows["edges of another"] = lines(other)
        rows[name] = drawn
    # what any two emoji agree by chance
    metrics["chance_edge_f1"] = float(f1(other, own).mean())
    titles = [textwrap.fill(prompt, 12) for prompt in prompts]
    return metrics, rows, titles


def lines(edges):
    """An edge map as a picture: black lines on white, (B, 1, H, W) bool -> (B, 3, H, W) in [-1, 1]."""
    return (1 - 2 * edges.float()).expand(-1, 3, -1, -1)
