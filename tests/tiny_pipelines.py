"""Tiny random pipelines of every family's own classes, offline."""

from inspect import signature

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AddedToken,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from hybriddit import HybridConfig, hybridize
from hybriddit.data.teacher_images import teacher_images
from hybriddit.models import family_of

FAMILIES = (
    "pixart_sigma",
    "sd3",
    "sd35",
    "flux_dev",
    "flux_schnell",
    "chroma",
    "qwen_image",
    "flux2_dev",
    "flux2_klein_base",
    "z_image",
    "ovis_image",
    "krea2",
    "longcat_image",
    "fibo",
)
WORDS = ["a", "red", "blue", "shoe", "bag"]
PROMPTS = ["a red shoe", "a blue bag", "a red bag", "a blue shoe"]
TEXT_LENGTH = 6
FLUX_SIZES = {
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}


def tiny_pipeline(family: str, seed: int = 0, latent_channels: int = 4):
    """A pipeline of 64 x 64 pixels: 8 x 8 tokens. (diffusers' SD3 inpaints with 16 latent channels alone.)"""
    torch.manual_seed(seed)
    latent_channels = 16 if family == "longcat_image" else latent_channels  # diffusers' pipeline takes no others
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        scaling_factor=0.5,
        shift_factor=0.1,
        mid_block_add_attention=False,
    )
    if family == "pixart_sigma":
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=latent_channels,
            out_channels=2 * latent_channels,
            num_layers=2,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=16,
            patch_size=2,
            use_additional_conditions=False,
        )
        scheduler = DPMSolverMultistepScheduler(beta_schedule="linear")
        pipeline = PixArtSigmaPipeline(_t5_tokenizer(), _t5(), vae, transformer, scheduler)
    elif family in ("sd3", "sd35"):
        transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=latent_channels,
            out_channels=latent_channels,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            pos_embed_max_size=16,
            dual_attention_layers=(0, 1) if family == "sd35" else (),
            qk_norm="rms_norm" if family == "sd35" else None,
        )
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipeline = StableDiffusion3Pipeline(
            transformer,
            scheduler,
            vae,
            _clip(CLIPTextModelWithProjection),
            _clip_tokenizer(),
            _clip(CLIPTextModelWithProjection),
            _clip_tokenizer(),
            _t5(),
            _t5_tokenizer(),
        )
    elif family == "chroma":
        transformer = ChromaTransformer2DModel(
            **FLUX_SIZES,
            in_channels=4 * latent_channels,
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipeline = ChromaPipeline(scheduler, vae, _t5(), _t5_tokenizer(), transformer)
    elif family == "qwen_image":
        vae = _qwen_vae(latent_channels)
        sizes = {name: size for name, size in FLUX_SIZES.items() if name != "num_single_layers"}
        transformer = QwenImageTransformer2DModel(
            **sizes | {"num_layers": 2}, in_channels=4 * latent_channels, out_channels=latent_channels
        )
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        )
        pipeline = QwenImagePipeline(scheduler, vae, _qwen(), _qwen_tokenizer(), transformer)
    elif family in ("flux2_dev", "flux2_klein", "flux2_klein_base"):
        vae = _flux2_vae(latent_channels)
        transformer = Flux2Transformer2DModel(
            **FLUX_SIZES | {"axes_dims_rope": (2, 2, 2, 2), "joint_attention_dim": 3 * 8},
            in_channels=4 * latent_channels,
            timestep_guidance_channels=8,
            guidance_embeds=family == "flux2_dev",
        )
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        if family == "flux2_dev":
            pipeline = Flux2Pipeline(scheduler, vae, _mistral(), _pixtral(), transformer)
        else:
            distilled = family == "flux2_klein"
            pipeline = Flux2KleinPipeline(scheduler, vae, _qwen3(), _qwen3_tokenizer(), transformer, distilled)
    elif family in ("z_image", "z_image_turbo"):
        transformer = ZImageTransformer2DModel(
            in_channels=latent_channels,
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=8,
            axes_dims=[2, 2, 4],
            axes_lens=[128, 128, 128],
        )
        scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0 if family == "z_image" else 3.0)
        tokenizer = _qwen3_tokenizer()
        tokenizer.chat_template = SAID + "{{ message.content }} bag" + ENDED  # the real one, too, is never empty
        pipeline = ZImagePipeline(scheduler, vae, _qwen3(), tokenizer, transformer)
    elif family == "ovis_image":
        transformer = OvisImageTransformer2DModel(
            **FLUX_SIZES | {"joint_attention_dim": 8}, in_channels=4 * latent_channels, out_channels=4 * latent_channels
        )
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        pipeline = OvisImagePipeline(scheduler, vae, _qwen3().model, _ovis_tokenizer(), transformer)
    elif family in ("krea2", "krea2_turbo"):
        vae = _qwen_vae(latent_channels)
        transformer = Krea2Transformer2DModel(
            in_channels=4 * latent_channels,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
            timestep_embed_dim=8,
            text_hidden_dim=8,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=8,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(2, 2, 4),
        )
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400)
        encoder = _qwen3_vl(), _krea2_tokenizer()
        settings = {"text_encoder_select_layers": (0, 1), "is_distilled": family == "krea2_turbo"}
        pipeline = Krea2Pipeline(scheduler, vae, *encoder, transformer, **settings)
    elif family == "longcat_image":
        transformer = LongCatImageTransformer2DModel(**FLUX_SIZES | {"num_single_layers": 1}, in_channels=4 * 16)
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        tokenizer = _byte_tokenizer()
        reader = Qwen2VLProcessor(
            Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=SAID + ENDED
        )
        pipeline = LongCatImagePipeline(scheduler, vae, _qwen(), tokenizer, reader, transformer)
        pipeline.tokenizer_max_length = TEXT_LENGTH
    elif family in ("fibo", "fibo_16"):
        pixels = 8 if family == "fibo" else 16  # of a latent; once it is loaded, the pipeline's is 16 whatever its VAE
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=latent_channels,
            dim_mult=[1] * (3 if pixels == 8 else 4),
            num_res_blocks=1,
            temperal_downsample=[False, True, True][-(2 if pixels == 8 else 3) :],
            latents_mean=[0.1 * channel - 0.2 for channel in range(latent_channels)],
            latents_std=[2.0 + 0.1 * channel for channel in range(latent_channels)],
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=pixels,
            is_residual=True,
        ).eval()
        transformer = BriaFiboTransformer2DModel(**FLUX_SIZES, in_channels=latent_channels, text_encoder_dim=8)
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        reader = SmolLM3ForCausalLM(
            SmolLM3Config(num_hidden_layers=1, **SMALL | {"vocab_size": 128_001, "pad_token_id": None})
        ).eval()
        pipeline = BriaFiboPipeline(transformer, scheduler, vae, reader, _byte_tokenizer())
        pipeline.vae_scale_factor = pixels
    elif family in ("sd15", "sdxl"):
        return _unet_pipeline(family, latent_channels)
    else:
        transformer = FluxTransformer2DModel(
            **FLUX_SIZES,
            in_channels=4 * latent_channels,
            pooled_projection_dim=8,
            guidance_embeds=family == "flux_dev",
        )
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=family == "flux_dev")
        pipeline = FluxPipeline(
            scheduler, vae, _clip(CLIPTextModel), _clip_tokenizer(), _t5(), _t5_tokenizer(), transformer
        )
    # a fresh adaLN modulates by almost nothing: make attention matter
    for name, parameter in transformer.named_parameters():
        if name.endswith("to_qkv_mlp_proj.weight"):
            torch.nn.init.normal_(parameter[:48], std=0.5)
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=1.0)
        if "norm" in name and name.endswith("linear.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
        if name.endswith(("to_q.weight", "to_k.weight")):
            torch.nn.init.normal_(parameter, std=0.5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _unet_pipeline(family: str, latent_channels: int):
    """Of two levels, with 8 x 8 latents for 64 x 64 pixels; SDXL's kind reads two encoders and is told sizes."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        scaling_factor=0.5,
        mid_block_add_attention=False,
    )
    large = family == "sdxl"
    sizes = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 8}
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=16 if large else 8,
        attention_head_dim=(1, 2) if large else 2,  # heads, in fact
        **({"addition_embed_type": "text_time", "use_linear_projection": True, **sizes} if large else {}),
    )
    for name, parameter in unet.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            torch.nn.init.normal_(parameter, std=0.5)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    first, tokenizer = _clip(CLIPTextModel), _clip_tokenizer()
    if large:
        others = _clip(CLIPTextModelWithProjection), tokenizer, _clip_tokenizer(), unet, EulerDiscreteScheduler(**betas)
        pipeline = StableDiffusionXLPipeline(vae, first, *others)
    else:
        scheduler = DDIMScheduler(**betas, clip_sample=False, prediction_type="v_prediction")
        others = tokenizer, unet, scheduler, None, None
        pipeline = StableDiffusionPipeline(vae, first, *others, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def hybrid_pipeline(family: str, window: int = 3):
    """A tiny pipeline whose transformer is hybrid, with random far branches and gates in place of fresh ones."""
    pipeline = tiny_pipeline(family)
    hybridize(pipeline.transformer, HybridConfig(window=window))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in pipeline.transformer.named_parameters():
        if ".hybrid." in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipeline


def text_setting(pipeline, length=TEXT_LENGTH):
    """The setting of the number of text tokens, where the pipeline's call has it."""
    return {"max_sequence_length": length} if "max_sequence_length" in signature(pipeline.__call__).parameters else {}


def of_prompt(pipeline, prompt, length=TEXT_LENGTH):
    """A pipeline's arguments for a prompt. Chroma's own mask is of numbers, which hide no padded text in diffusers."""
    if isinstance(pipeline, QwenImagePipeline):  # which does not guide without a negative prompt
        return {"prompt": prompt, "negative_prompt": " ", "max_sequence_length": length}
    if isinstance(pipeline, LongCatImagePipeline):  # which would let its encoder write another prompt
        pipeline.tokenizer_max_length = TEXT_LENGTH  # 512 once it is loaded
        return {"prompt": prompt, "enable_prompt_rewrite": False}
    if not isinstance(pipeline, ChromaPipeline):
        return {"prompt": prompt, **text_setting(pipeline, length)}
    family = family_of(pipeline.transformer)
    text, empty = (family.encode_prompts(pipeline, [words], max_sequence_length=length) for words in (prompt, ""))
    return family.sampling_arguments(text, empty, 1)


def recipe_of(pipeline, name: str | None = None):
    """How the family of its transformer says it is distilled."""
    family = family_of(pipeline.transformer)
    return family.recipe(pipeline.transformer.config, name or family.pipeline_recipe(pipeline.config))


def tiny_data(pipeline, images: int = 8, prompts=PROMPTS, **kwargs):
    """What the tiny teacher makes of the prompts, in memory."""
    settings = {"height": 64, "width": 64, "steps": 2, "guidance_scale": 3.5, **text_setting(pipeline)}
    settings |= {"batch_size": 4, "progress": False}
    return teacher_images(pipeline, prompts, images=images, **{**settings, **kwargs})


def _t5():
    return T5EncoderModel(
        T5Config(vocab_size=len(WORDS) + 3, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()


def _t5_tokenizer():
    pieces = ["<pad>", "</s>", "<unk>", *("▁" + word for word in WORDS)]
    return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def _qwen():
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": 400,
                "bos_token_id": None,
                "eos_token_id": None,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
                "fullatt_block_indexes": [0],
            },
        )
    ).eval()


def _qwen_vae(latent_channels):
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=latent_channels,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1 * channel - 0.2 for channel in range(latent_channels)],
        latents_std=[2.0 + 0.1 * channel for channel in range(latent_channels)],
    ).eval()


def _flux2_vae(latent_channels):
    """With statistics that are not those of a fresh batch norm."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        mid_block_add_attention=False,
    ).eval()
    vae.bn.running_mean.copy_(0.1 * torch.arange(4 * latent_channels) - 0.2)
    vae.bn.running_var.copy_(2 + 0.1 * torch.arange(4 * latent_channels))
    return vae


# of language models whose layers 10, 20 and 30, or 9, 18 and 27, are read
SMALL = {
    "vocab_size": 400,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
SAID = "{%- for message in messages -%}{%- if message.role == 'user' -%}"
ENDED = "{%- endif -%}{%- endfor -%}"


def _mistral():
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    config = Mistral3Config(
        text_config={"model_type": "mistral", "num_hidden_layers": 30, "pad_token_id": None, **SMALL},
        vision_config={"model_type": "pixtral", "image_size": 28, "patch_size": 14, **vision},
    )
    return Mistral3ForConditionalGeneration(config).eval()


def _pixtral():
    tokenizer = _byte_tokenizer()
    return PixtralProcessor(
        PixtralImageProcessor(), tokenizer, chat_template=SAID + "{{ message.content[0].text }}" + ENDED
    )


def _qwen3():
    return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=27, **SMALL)).eval()


def _qwen3_tokenizer():
    tokenizer = _byte_tokenizer()
    tokenizer.chat_template = SAID + "{{ message.content }}" + ENDED
    return tokenizer


def _ovis_tokenizer():
    """What comes before the prompt is 28 tokens, as in the real one, which the pipeline drops."""
    tokenizer = _byte_tokenizer()
    words = (
        "Describe the image by detailing color quantity text shape size texture spatial relationships of objects and"
    )
    told = [f" {word}" for word in words.split()] + ["Describe", ",", " background", ": ", "<|im_start|>", "user\n"]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in told])
    tokenizer.chat_template = SAID + "<|im_start|>user\n{{ message.content }}" + ENDED
    return tokenizer


def _qwen3_vl():
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 8}
    rotary = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 0]}
    text = {"num_hidden_layers": 1, "rope_parameters": rotary, **SMALL}
    config = Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    return Qwen3VLModel(config).eval()


def _krea2_tokenizer():
    """The template is 34 tokens before the prompt and 5 behind it, as in the real one; a prompt of ours is one."""
    return _qwen_tokenizer(("\n", "assistant", *PROMPTS))


def _byte_tokenizer():
    """A tokenizer of words, and of letters where there is none."""
    letters = sorted(ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "<|endoftext|>"])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    words = [form for word in WORDS for form in (word, f" {word}")] + ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return tokenizer


def _qwen_tokenizer(more=("\n<|im_start|>assistant\n",)):
    """The words of the pipeline's template are a token each, as in the real one, whose first 34 tokens are dropped."""
    template = (
        "<|im_start|> system Describe Ġthe Ġimage Ġby Ġdetailing Ġcolor , Ġshape Ġsize Ġtexture Ġquantity Ġtext Ġspatial "
        "Ġrelationships Ġof Ġobjects Ġand Ġbackground : <|im_end|> user"
    )
    words = [*(word.replace("Ġ", " ") for word in template.split()), *more]
    words += [form for word in WORDS for form in (word, f" {word}")]
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate([*letters, "<|endoftext|>"])}, merges=[])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return tokenizer


def _clip(cls):
    return cls(
        CLIPTextConfig(
            vocab_size=40,
            hidden_size=8,
            intermediate_size=8,
            projection_dim=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).eval()


def _clip_tokenizer():
    letters = [chr(c) for c in range(ord("a"), ord("r") + 1)]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=16)
