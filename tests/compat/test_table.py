"""README's table of compatibility: each row has its tests, and they exist."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# rows by how they begin -> their tests
ROWS = {
    "LoRA": "compat/test_lora.py: test_lora test_lora_before_converting test_lora_on_pixart",
    "ControlNet": "compat/test_generation.py: test_controlnet test_pixart_sigma_takes_no_image",
    "image-to-image": "compat/test_generation.py: test_img2img test_pixart_sigma_takes_no_image",
    "inpainting": "compat/test_generation.py: test_inpaint test_flux_tools test_pixart_sigma_takes_no_image",
    "Kontext": "compat/test_generation.py: test_kontext",
    "IP-Adapter": "compat/test_refused.py: test_flux_ip_adapter test_sd3_ip_adapter",
    "PAG": "compat/test_refused.py: test_pag test_perturbed_attention_guider",
    "skip-layer": "compat/test_generation.py: test_skip_layer_guidance test_skipped_layers_by_hook",
    "`fuse_qkv_projections`": "models/test_bad_input.py: test_fused_projections",
    "`set_attn_processor`": "models/test_bad_input.py: test_setting_processors_changes_nothing_when_refused",
    "first-block": "compat/test_caches.py: test_caches test_others_have_no_caches",
    "TaylorSeer": "compat/test_caches.py: test_caches test_others_have_no_caches",
    "group offload": "compat/test_memory.py: test_group_offload test_offloaded_models_are_not_converted",
    "sequential offload": "compat/test_memory.py: test_sequential_offload test_offloaded_models_are_not_converted",
    "model offload": "compat/test_memory.py: test_model_offload",
    "layerwise casting": "compat/test_memory.py: test_layerwise_casting",
    "VAE tiling": "compat/test_generation.py: test_vae_tiling",
    "callbacks": "compat/test_generation.py: test_callbacks",
    "`from_pipe`": "compat/test_generation.py: test_from_pipe",
    "gradient checkpointing": "models/test_training_and_compile.py: test_gradient_checkpointing_changes_no_gradient",
    "`compile_repeated_blocks`": "models/test_training_and_compile.py: test_compiled_blocks",
    "`torch.compile": "models/test_training_and_compile.py: test_a_compiled_model_is_one_graph",
    "int8": "compat/test_memory.py: test_quantized_loading",
}
WORDS = ("works", "refused", "not in diffusers", "untested: needs a GPU")


def rows():
    section = (TESTS.parent / "README.md").read_text().split("## Compatibility\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in lines[2:]}


def test_every_row_has_its_tests():
    table = rows()
    for feature, cells in table.items():
        assert len(cells) == 3 and all(any(word in cell for word in WORDS) for cell in cells), feature
        known = [row for row in ROWS if feature.startswith(row)]
        untested = all(cell.startswith("untested") for cell in cells)
        assert len(known) == (0 if untested else 1), feature
    assert all(any(feature.startswith(row) for feature in table) for row in ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_the_tests_of_a_row_exist(row):
    path, _, names = ROWS[row].partition(": ")
    defined = re.findall(r"^def (test_\w+)", (TESTS / path).read_text(), re.MULTILINE)
    assert names and set(names.split()) <= set(defined)
