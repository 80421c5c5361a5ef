"""The model that vlm/train.py trains: of parts by their names, or another LLaVA to go on with."""

from training import ranks
from utils import run
from utils.run import check
from vlm import llava, llava_parts, peft_files, prompts, tower
from vlm.trainable import set_trainable


def build_model(cfg, on):
    """-> tokenizer, Llava with its trainable parameters: of parts by their names, or of another model."""
    run.seed(cfg.train.seed)
    if cfg.train.ckpt_path:
        tokenizer, model = llava.load(cfg.train.ckpt_path, on)
    else:
        tokenizer, language = llava_parts.language_model(cfg.model.text_name_or_path, on)
        named = cfg.model
        size = named.img_size or None
        vision_tower = tower.load(
            named.vision_name_or_path, named.vision_layer, named.select, size, on
        )
        run.seed(cfg.train.seed)
        about = (named.connector, language, tokenizer)
        more = {"options": named.connector_options()}
        more["tiles"] = (named.tiles, named.image_grid_pinpoints)
        model = llava.build(vision_tower, *about, on=on, **more)
    # photos of fruit are judged without tiles (train_evaluation.py)
    if model.grids:
        check(cfg.data.paths, "a model with tiles learns from conversations of yours: name --data")
        llava_parts.check_map(model.vision, model.connector)
    # the chat template: that of the model, or of its adapter, unless --template says otherwise
    learned = tokenizer.chat_template if cfg.train.ckpt_path else ""
    if cfg.train.adapter:
        learned = peft_files.read(cfg.train.adapter).chat_template or tokenizer.chat_template
        tokenizer.chat_template = learned
    prompts.use_template(tokenizer, cfg.data.template)
    line = prompts.template_change(learned, tokenizer, cfg.data.template)
    if line and ranks.rank_and_world_size()[0] == 0:
        print(line, flush=True)
    if cfg.train.precision == "fp32":
        model.language.float()
    # on rows as short as these eager is faster than the fused kernel on a CPU
    attention = cfg.model.attn_implementation or ("eager" if on.type == "cpu" else None)
    if attention:
        model.language.set_attn_implementation(attention)
    set_trainable(model, cfg)
    if cfg.train.gradient_checkpointing:
        model.language.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    return tokenizer, model
