"""Image classifiers of transformers from a folder: their classes, their image processor, their maps or blocks."""

import pytest
import torch
import transformers

from sparsebench import config, tasks
from sparsebench.config.compose import compose_all
from sparsebench.measure import neutral
from sparsebench.tasks.image_classification import attention_products
from tests.helpers import built, tiny_images, work

LABELS = {0: "left", 1: "up", 2: "down"}  # another order than the folders'


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        num_channels=3, initializer_range=0.2, id2label=LABELS,
    ))  # fmt: skip


def resnet():
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", hidden_act="relu", id2label=LABELS,
    ))  # fmt: skip


@pytest.fixture(scope="module", params=[vit, resnet], ids=["vit", "resnet"])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    target = tmp_path_factory.mktemp(request.param.__name__)
    request.param().save_pretrained(target)
    size = {"height": 16, "width": 16}
    transformers.ViTImageProcessor(size=size, image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(target)
    return target


def loaded_from(folder, tmp_path, **changes):
    data = tiny_images(count=24, size=16, channels=3)
    return built("model", "model=hf-image", f"model.path={folder}", **changes).load(work(tmp_path), data), data


def test_it_is_the_model_of_the_folder(folder, tmp_path):
    """Logits, labels by the names of the configuration, pixels by the processor; blocks or maps, and all products counted."""
    loaded, data = loaded_from(folder, tmp_path)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    (batch,) = data.test.batches(None, 8, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(batch.inputs).logits, theirs(batch.inputs).logits)
    assert loaded.info["classes_told"] == "by name" and data.classes == ["left", "up", "down"]
    assert batch.labels.tolist() == [[1, 2, 0][i % 3] for i in range(16, 24)]
    assert data.test.recipe.mean == (0.4, 0.4, 0.4) and data.describe()["preprocessing"]["name"].startswith(
        "processor of"
    )
    assert bool(loaded.info["maps"]) == ("resnet" in str(folder))
    settings = config.build_settings(compose_all(["model=lenet5", "method=dense"])[0])
    task = tasks.load("vision")
    dense = task.assess(loaded, loaded.module, data, settings)
    attention = 0 if loaded.info["maps"] else 2 * 2 * 32 * 17**2
    assert dense.attention_macs == attention
    compared = task.compare(dense, dense, data, settings)
    assert compared.macs["dense"] > 0 and compared.quality["accuracy"]["protocol"]["examples"] == 8


def test_methods_fit_or_say_so(folder, tmp_path):
    """Spatial top-k takes the network with ReLUs; the transformer takes experts, and each refuses the other in one line."""
    loaded, data = loaded_from(folder, tmp_path)
    inputs, expected = neutral.probe(loaded.module, data)
    method = built("method", "method=spatial_topk", "model=lenet5")
    if loaded.info["maps"]:
        module = method.apply(loaded.module, method.fit(loaded, data, work(tmp_path)), work(tmp_path))
        assert neutral.check(method, module, inputs, expected) < 1e-6
        experts = built("method", "method=moefication", "model=vit-tiny", "method.train=null")
        with pytest.raises(ValueError, match="known families"):
            experts.fit(loaded, data, work(tmp_path))
    else:
        with pytest.raises(
            ValueError, match="spatial_topk needs a network with ReLU .*: ViTForImageClassification has none"
        ):
            method.apply(loaded.module, method.fit(loaded, data, work(tmp_path)), work(tmp_path))


def test_other_channels_and_missing_processors_are_named(folder, tmp_path):
    data = tiny_images(count=24, size=16)
    with pytest.raises(ValueError, match=r"reads 3 channels, dataset.channels is 1"):
        built("model", "model=hf-image", f"model.path={folder}", recipe="dataset").load(work(tmp_path), data)


def test_products_between_activations_of_an_unknown_transformer():
    """Counted by torch's own counter: the same as by the shapes of known blocks."""
    _, data = None, tiny_images(count=24, size=16, channels=3)
    torch.manual_seed(0)

    class Wrapped(torch.nn.Module):  # no PreTrainedModel any more
        def __init__(self):
            super().__init__()
            self.inner = vit().eval()

        def forward(self, x):
            return self.inner(x).logits

    assert attention_products(Wrapped(), {}, data.test) == 2 * 2 * 32 * 17**2
