"""How each family's own pipeline calls its transformer, written out: an oracle for ours."""

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
    ids = torch.zeros(rows * columns, 3)
    ids[:, 1], ids[:, 2] = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
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
