"""With the quantizers off, transformed blocks compute what the float blocks compute; nothing else may be calibrated
before this holds."""

from __future__ import annotations

import pytest
import torch

from quota.calib.blocks import Batch
from quota.calib.rows import select_features
from quota.calib.stream import FloatSource
from quota.models.images import ImageInput
from tests.tiny import llava_inputs, tiny_llava

TOLERANCE = 1e-3  # relative, float32


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float")
    tiny_llava().save_pretrained(folder)
    return FloatSource(folder)


def scramble(block, seed=3):
    """Random well-conditioned transforms and diagonals: far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.matrices():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(
                    torch.linalg.qr(noise)[0]
                    + 0.1 * torch.randn(parameter.shape, generator=generator) / parameter.shape[0] ** 0.5
                )
            else:
                parameter.copy_(0.5 * noise)


def relative(out, wanted):
    return float(((out - wanted).norm() / wanted.norm()).detach())


KINDS = [
    ("decoder", "model.language_model.layers.1", 64),
    ("vision", "model.vision_tower.encoder.layers.0", 32),
    ("projector", "model.multi_modal_projector", 32),
]


@pytest.mark.parametrize(("kind", "path", "width"), KINDS)
def test_transforms_alone_change_nothing(source, kind, path, width):
    block = source.block(kind, path)
    batch = Batch(
        torch.randn(2, 17, width, generator=torch.Generator().manual_seed(0)),
        torch.ones(2, 17, dtype=torch.bool),
        torch.arange(17).expand(2, 17),
    )
    wanted = block(batch)
    block.quantize_linears()
    scramble(block)
    block.set_mode("float")
    assert relative(block(batch), wanted) < TOLERANCE
    block.set_mode("learn")
    assert relative(block(batch), wanted) > 10 * TOLERANCE  # the quantizers do something


def test_streamed_blocks_reproduce_the_model(source):
    """Embedding, vision, projector and decoder blocks chained by hand equal the upstream model's hidden states."""
    from quota.calib import stream as streaming

    model = tiny_llava()
    inputs = llava_inputs(model, rows=((3, 5), (3, 5)))
    with torch.no_grad():
        wanted = model(**inputs, output_hidden_states=True).hidden_states
    folder = source.folder / "streams"
    folder.mkdir()
    arch = source.family
    current = streaming.embed_images(
        source, [ImageInput(pixels) for pixels in inputs["pixel_values"]], [None] * 2, folder / "0", "float32"
    )
    for index in range(arch.vision_layers_used):
        following = current.like(folder / f"v{index}")
        streaming.advance(source.block("vision", arch.vision_layer(index)), current, following, 2, "cpu")
        current = following
    features = select_features(source, current, folder / "features")
    projected = features.like(folder / "projected", width=arch.hidden_size)
    streaming.advance(source.block("projector", arch.projector_path), features, projected, 2, "cpu")
    current = streaming.embed_text(source, list(inputs["input_ids"]), projected, folder / "text")
    for index in range(arch.layers - 1):
        assert relative(torch.stack([current.read(0), current.read(1)]), wanted[index]) < 1e-5
        following = current.like(folder / f"t{index}")
        streaming.advance(source.block("decoder", arch.decoder_layer(index)), current, following, 2, "cpu")
        current = following


def test_right_padding_does_not_leak(source):
    block = source.block("decoder", "model.language_model.layers.0")
    hidden = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([hidden, torch.full((1, 4, 64), 9.0)], 1)
    alone = block(Batch(hidden, torch.ones(1, 9, dtype=torch.bool), torch.arange(9)[None]))
    together = block(Batch(padded, torch.ones(1, 13, dtype=torch.bool), torch.arange(13)[None]))
    assert relative(together[:, :9], alone) < 1e-6
