"""What every family promises the rest of the package, tried on a tiny model of each."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from quota.calib.blocks import Batch
from quota.calib.stream import FloatSource
from quota.core.formats import MODULES, SCHEMES
from quota.models import FAMILIES, family_class, find_family, submodule
from quota.models.groups import PARTS
from quota.models.images import ImageInput
from quota.models.quantize import float_linears, linear_paths, quantize_structure, quantized_linears
from quota.models.rtn import quantize_rtn
from tests.tiny import TINY

SYNTHETIC = {"llava_next": 16 + 64, "llava_onevision": 16 + 32, "internvl": 12}  # where an image has no 9 tokens
PACKAGE = Path(__file__).parents[2] / "quota"


@cache
def tiny(name):
    return TINY[name][0]()


@pytest.fixture(scope="module", params=TINY)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    path = tmp_path_factory.mktemp("family") / name
    tiny(name).save_pretrained(path)
    return path


def test_its_file_is_its_name(name):
    found = type(find_family(tiny(name)))
    assert found.__module__ == f"quota.models.{name}" and type(tiny(name)).__name__ == found.model_class
    assert issubclass(found, family_class(found.name)) and tiny(name).config.model_type == found.name


def test_every_family_has_a_tiny_model():
    assert set(FAMILIES) <= set(TINY) and all(family_class(name).name == name for name in FAMILIES)


def test_no_other_room_knows_a_family_by_name():
    names = re.compile("|".join(rf"[\"']{name}[\"']" for name in TINY))
    rooms = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if names.search(path.read_text(encoding="utf-8"))
    }
    assert rooms <= {"models", "scenes"}


@pytest.mark.parametrize("module", MODULES)
def test_every_linear_of_a_block_is_in_exactly_one_group(name, module):
    model, family = tiny(name), find_family(tiny(name))
    part = PARTS[module]
    listed = [path for group in family.groups[part] for path in group.parts]
    assert len(set(listed)) == len(listed)
    for path in family.blocks(part):
        block = submodule(model, path)
        assert sorted(listed) == sorted(at for at, found in block.named_modules() if isinstance(found, nn.Linear))
        for group in family.groups[part]:
            assert len({linear.in_features for linear in float_linears(model, path, group)}) == 1


def test_quantized_linears_have_the_names_of_the_groups(name):
    model = quantize_structure(TINY[name][0](), MODULES)
    family = find_family(model)
    assert set(quantized_linears(model)) == {f"{path}.{group.name}" for path, group in family.group_paths(MODULES)}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@torch.no_grad()
def test_every_scheme_rounds_it(name, scheme):
    model, inputs = TINY[name][0](), TINY[name][1](tiny(name))
    wanted = model(**inputs).logits
    quantize_rtn(model, scheme=scheme)
    got = model(**inputs).logits
    assert set(quantized_linears(model)) == set(linear_paths(find_family(model), MODULES))
    assert got.isfinite().all() and not torch.equal(got, wanted)


@pytest.mark.parametrize("module", MODULES)
def test_a_calibrated_block_exports_the_tensors_that_a_loaded_one_has(name, module, folder):
    part, source = PARTS[module], FloatSource(folder)
    path = source.family.blocks(part)[0]
    block = source.block(part, path)
    block.quantize_linears()
    block.freeze()
    exported = {key: tuple(tensor.shape) for key, tensor in block.export().items()}
    model = quantize_structure(TINY[name][0](), (module,), exported)
    held = {f"{path}.{key}": tuple(tensor.shape) for key, tensor in submodule(model, path).state_dict().items()}
    assert held == exported


def test_the_tower_block_by_block_is_the_tower(name, folder):
    model, source = tiny(name), FloatSource(folder)
    family, inputs = source.family, TINY[name][1](model)
    images = family.images(inputs)
    assert len(images) == len(inputs["input_ids"])
    with torch.no_grad():
        wanted = family.encode(model, images)
        for image, features in zip(images, wanted, strict=True):
            hidden = family.tower_input(source.module, image)
            assert hidden.shape == (family.tower_rows(image.grid), family.vision_hidden_size)
            valid, grids = torch.ones(1, len(hidden), dtype=torch.bool), None if image.grid is None else [image.grid]
            tapped = []
            for index, path in enumerate(family.blocks("vision")):
                hidden = source.block("vision", path)(
                    Batch(hidden[None] if hidden.ndim == 2 else hidden, valid, grids=grids)
                )
                tapped += [hidden] if index in family.taps else []
            hidden, parts = family.leave_tower(source.module, hidden), []
            for path, whole in zip(family.blocks("projector"), [hidden, *tapped], strict=True):
                rows = family.projector_rows(whole[0], image.grid)
                parts.append(source.block("projector", path)(Batch(rows[None], valid))[0])
            newline = source.tensor(family.newline_path) if family.newline_path else None
            placed = family.arranged(torch.cat(parts, -1), image.grid, newline)
            assert placed.shape == (family.image_tokens(image), family.hidden_size * len(parts))
            torch.testing.assert_close(placed, features, rtol=1e-4, atol=1e-4)


def test_visual_tokens_belong_to_their_images(name):
    model = tiny(name)
    family, inputs = find_family(model), TINY[name][1](model)
    images = family.images(inputs)
    index = family.image_index(inputs["input_ids"], [image.grid for image in images])
    assert torch.equal(index.image >= 0, inputs["input_ids"] == family.image_token_id)
    for row, tiles, image in zip(index.image, index.tile, images, strict=True):
        assert int((row == 0).sum()) == family.image_tokens(image) and int(row.max()) == 0
        shapes = [raster.grid for raster in family.shown(image)]
        sizes = tiles[tiles >= 0].bincount().tolist()
        assert len(sizes) == len(shapes) and bool((row[tiles >= 0] == 0).all())
        assert all(shape is None or shape[0] * shape[1] == n for shape, n in zip(shapes, sizes, strict=True))


def test_synthetic_pixels_are_an_image_of_the_model(name):
    family = find_family(tiny(name))
    tokens = family.visual_tokens or SYNTHETIC.get(name, 9)
    shape, grid = family.pixel_shape(tokens)
    image = ImageInput(torch.zeros(shape), grid)
    ids = torch.full((1, family.image_tokens(image)), family.image_token_id)
    assert int(family.image_index(ids, [grid]).visual.sum()) == tokens
    assert family.vision_macs(tokens) > 0


def test_rotary_channels_are_covered_once(name):
    family = find_family(tiny(name))
    spans = sorted(family.rotary_axes(family.rotary(None)))
    assert [end for _, end, _ in spans] == [*(begin for begin, _, _ in spans[1:]), family.head_dim] and spans[0][0] == 0
    assert {axis for *_, axis in spans} == set(range(family.axes))
