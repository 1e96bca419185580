"""How each family's own pipeline calls its transformer and its VAE, written out: an oracle for ours."""

import torch


def call(family, transformer, noisy, times, text, guidance, grid=(8, 8)):
    """The transformer as the family's own pipeline calls it; the output's predicting part."""
    embeds = text["prompt_embeds"]
    if family == "pixart_sigma":
        out = transformer(
            noisy,
            encoder_hidden_states=embeds,
            encoder_attention_mask=text["prompt_attention_mask"],
            timestep=times,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return out.chunk(2, dim=1)[0]
    if family in ("sd3", "sd35"):
        return transformer(
            noisy, encoder_hidden_states=embeds, pooled_projections=text["pooled_prompt_embeds"], timestep=times * 1000
        ).sample
    rows, columns = grid
    if family == "z_image":  # films of one frame; the time runs the other way, and so does what it gives
        captions = [words[mask] for words, mask in zip(embeds, text["prompt_embeds_mask"], strict=True)]
        films = transformer([image[:, None] for image in noisy], 1 - times, captions).sample
        return -torch.stack([film[:, 0] for film in films])
    if family == "qwen_image":
        return transformer(
            noisy,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=text["prompt_embeds_mask"],
            timestep=times,
            img_shapes=[[(1, rows, columns)]] * len(noisy),
        ).sample
    if family == "krea2":
        places = [(0, 0, 0)] * embeds.shape[1] + [(0, row, column) for row in range(rows) for column in range(columns)]
        return transformer(
            noisy,
            encoder_hidden_states=embeds,
            timestep=times,
            position_ids=torch.tensor(places, dtype=torch.float32),
            encoder_attention_mask=text["prompt_embeds_mask"],
        ).sample
    if family.startswith("flux2"):
        places = [(0, row, column, 0) for row in range(rows) for column in range(columns)]
        return transformer(
            noisy,
            encoder_hidden_states=embeds,
            timestep=times,
            img_ids=torch.tensor([places] * len(noisy)),
            txt_ids=torch.tensor([[(0, 0, 0, place) for place in range(embeds.shape[1])]] * len(noisy)),
            guidance=torch.full((len(noisy),), guidance) if family == "flux2_dev" else None,
        ).sample
    ids = torch.zeros(rows * columns, 3)
    ids[:, 1], ids[:, 2] = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    if family == "fibo":
        mask = torch.cat([text["prompt_embeds_mask"], embeds.new_ones(noisy.shape[:2], dtype=torch.bool)], dim=1)
        return transformer(
            noisy,
            encoder_hidden_states=embeds,
            text_encoder_layers=[text["prompt_layers"][:, :, block] for block in range(text["prompt_layers"].shape[2])],
            timestep=1000 * times,
            img_ids=ids,
            txt_ids=torch.zeros(embeds.shape[1], 3),
            joint_attention_kwargs={"attention_mask": mask[:, None, None]},
        ).sample
    if family == "longcat_image":
        length = embeds.shape[1]
        ids += torch.tensor([1, length, length])
        text_ids = torch.tensor([(0, place, place) for place in range(length)]).float()
        return transformer(noisy, encoder_hidden_states=embeds, timestep=times, img_ids=ids, txt_ids=text_ids).sample
    if family == "ovis_image":
        places = torch.arange(embeds.shape[1])
        text_ids = torch.stack((0 * places, places, places), dim=1).float()
        return transformer(noisy, encoder_hidden_states=embeds, timestep=times, img_ids=ids, txt_ids=text_ids).sample
    if family == "chroma":
        mask = text["prompt_attention_mask"]
        return transformer(
            noisy,
            encoder_hidden_states=embeds,
            timestep=times,
            img_ids=ids,
            txt_ids=torch.zeros(embeds.shape[1], 3),
            attention_mask=torch.cat([mask, mask.new_ones(noisy.shape[:2])], dim=1),
        ).sample
    return transformer(
        noisy,
        encoder_hidden_states=embeds,
        pooled_projections=text["pooled_prompt_embeds"],
        timestep=times,
        img_ids=ids,
        txt_ids=torch.zeros(embeds.shape[1], 3),
        guidance=torch.full((len(noisy),), guidance) if family == "flux_dev" else None,
    ).sample


def latents_of(family, vae, pixels, packed=True):
    """The transformer's latents of images [B, 3, height, width] in [-1, 1]; not packed: as the VAE has their channels."""
    if family.startswith("flux2"):  # normalised once they are packed, if they are
        latents = vae.encode(pixels).latent_dist.mean.clone()
        mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        if not packed:
            return latents
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            place = 2 * row + column
            part = latents[:, :, row::2, column::2]
            latents[:, :, row::2, column::2] = (part - mean[place::4, None, None]) / std[place::4, None, None]
    elif family in ("qwen_image", "krea2", "fibo"):  # of a film of one frame
        latents = vae.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0].clone()
        for channel, (mean, std) in enumerate(zip(vae.config.latents_mean, vae.config.latents_std, strict=True)):
            latents[:, channel] = (latents[:, channel] - mean) / std
    else:
        shift = 0.0 if family == "pixart_sigma" else 0.1  # PixArt's pipeline adds none before it decodes
        latents = (vae.encode(pixels).latent_dist.mean - shift) * 0.5
    if packed and family == "fibo":  # a token each
        return latents.flatten(2).transpose(1, 2)
    if packed and family in (
        "flux_dev",
        "flux_schnell",
        "chroma",
        "qwen_image",
        "flux2_dev",
        "flux2_klein_base",
        "ovis_image",
        "krea2",
        "longcat_image",
    ):  # 2 x 2 latents a token, channels slowest
        latents = latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return latents
