"""How weights want their images, against what timm and transformers do themselves."""

import pytest
import torch
import transformers
from PIL import Image

from sparsebench.models import recipes

PICTURE = torch.randint(0, 256, (3, 140, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def prepared(recipe, picture=PICTURE):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.mean, recipe.std))
    return (recipe.shape(picture).float() / 255 - mean) / std


def pil(picture=PICTURE):
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


PROCESSORS = {
    "vit": (transformers.ViTImageProcessor, {"size": {"height": 32, "width": 32}}, 32, None),
    "crop": (transformers.ConvNextImageProcessor, {"size": {"shortest_edge": 32}}, 32, 36),
    "edge": (transformers.CLIPImageProcessor, {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, 32, 40),
    "plain": (transformers.ViTImageProcessor, {"size": {"height": 32, "width": 32}, "do_normalize": False}, 32, None),
    "factor": (
        transformers.ViTImageProcessor, {"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5}, 32, None
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_of_transformers(name):
    cls, options, size, resize = PROCESSORS[name]
    processor = cls(**options)
    recipe = recipes.of_processor(processor, "here")
    assert (recipe.size, recipe.resize, recipe.name) == (size, resize, "processor of here")
    theirs = torch.as_tensor(processor(pil(), return_tensors="pt")["pixel_values"][0])
    steps = 0.02 / min(recipe.std)  # a few of 256 levels, where resizing rounds
    torch.testing.assert_close(prepared(recipe), theirs, rtol=0, atol=steps)


def test_a_processor_that_does_something_else_is_refused():
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 40})
    with pytest.raises(ValueError, match="the image processor of here is not supported .* set model.recipe=dataset"):
        recipes.of_processor(processor, "here")


def test_configurations_of_timm():
    timm = pytest.importorskip("timm")
    module = timm.create_model("test_resnet", pretrained=False)
    recipe, names = recipes.of_timm(module)
    own = timm.data.resolve_data_config(model=module, use_test_size=True)
    theirs = timm.data.create_transform(**own, is_training=False)(pil(PICTURE.repeat(1, 2, 4)))
    assert recipe.size == own["input_size"][-1] and recipe.name.startswith("timm test_resnet") and len(names) == 1000
    torch.testing.assert_close(prepared(recipe, PICTURE.repeat(1, 2, 4)), theirs, rtol=0, atol=0.1)
    module.pretrained_cfg["crop_mode"] = "border"
    with pytest.raises(
        ValueError, match=r"timm's recipe of test_resnet.* is not supported .* set model.recipe=dataset"
    ):
        recipes.of_timm(module)
