"""A CLIP of a few weights, whose vocabulary is letters."""

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_tiny_clip(folder) -> None:
    """Save it and its processor, as transformers does."""
    torch.manual_seed(0)
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz," for end in ("", "</w>")]
    vocabulary = {word: i for i, word in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    text = {**SIZES, "vocab_size": len(vocabulary), "max_position_embeddings": 77, "eos_token_id": 1}
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    squares = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    CLIPProcessor(squares, CLIPTokenizer(vocab=vocabulary, merges=[])).save_pretrained(folder)
