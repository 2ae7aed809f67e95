"""Image models and the traced form in which every ReLU is a module; top-k per channel map (docs/methods/spatial_topk.md)."""

import json
from pathlib import Path

import jsonschema
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from sparsebench import config
from sparsebench.config.compose import compose_all
from sparsebench.models.vision import TORCHVISION, LeNet5, fill, translate_vit
from sparsebench.modules.activation_map import isolate, maps_of, spatial_topk
from sparsebench.records import record
from tests.helpers import TinyCNN, built, record_of, tiny_cnn, tiny_images, work

# ReLU calls per pass; DenseNet's first is not among them: what it feeds passes another ReLU before any convolution.
MAPS = {"resnet18": 17, "resnet34": 33, "resnet50": 49, "googlenet": 57, "densenet121": 120, "mobilenet_v2": 35}


def vision_model(name="lenet5", **changes):
    return built("model", f"model={name}", **changes)


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_relu_call_is_a_map_of_its_own_and_the_output_stays(name):
    torch.manual_seed(0)
    module = vision_model("resnet18", architecture=name, weights="random", stem="cifar").plain(3, 10, 32).eval()
    x, names = torch.randn(1, 3, 32, 32), list(module.state_dict())
    with torch.no_grad():
        before = module(x)
        traced = isolate(module)
        assert torch.equal(traced(x), before)
    sites = [m.site for m in maps_of(traced)]
    assert len(sites) == len(set(sites)) == MAPS[name]
    assert list(traced.state_dict()) == names  # weights of torchvision fit as they are


def test_maps_are_relus_that_feed_products():
    """conv -> relu twice through one module, a function; the ReLU after the last linear map is no map."""

    class Net(TinyCNN):
        def forward(self, x):
            return torch.relu(super().forward(x))

    assert [m.site for m in maps_of(isolate(Net()))] == ["relu", "relu.2", "relu_2"]


class Net6(nn.Module):
    """ReLU6 as a module, as a function and as a method's neighbour."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
        self.relu6, self.head = nn.ReLU6(), nn.Linear(4, 3)

    def forward(self, x):
        x = nn.functional.relu6(input=self.conv2(self.relu6(self.conv1(x) * 20)))
        return self.head(self.conv3(x).relu().mean((2, 3)))


def test_relu6_is_a_map_that_keeps_its_clip():
    torch.manual_seed(0)
    x, module = torch.randn(4, 1, 8, 8), Net6().eval()
    with torch.no_grad():
        before = module(x)
        traced = isolate(module)
        assert torch.equal(traced(x), before)
    first, second, third = maps_of(traced)
    assert [m.ceiling for m in (first, second, third)] == [6.0, 6.0, None]
    z = torch.tensor([-1.0, 0.5, 3.0, 8.0])
    assert first(z).tolist() == [0, 0.5, 3, 6] and third(z).tolist() == [0, 0.5, 3, 8]
    first.threshold = 1.0
    assert first(z).tolist() == [0, 0, 3, 6]
    first.threshold, first.keep = None, 0.5
    assert first(z.view(1, 1, 2, 2)).flatten().tolist() == [0, 0, 3, 6]


def test_a_network_without_maps_is_refused():
    with pytest.raises(ValueError, match="no ReLU or ReLU6 before a convolution or linear map in Sequential"):
        isolate(nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3)))


def test_the_weights_own_recipe_decides():
    """ResNet-50's second weights were trained to be seen through 232 pixels, its first ones through 256."""
    model = vision_model("resnet50")
    values = {}
    for weights in torchvision.models.ResNet50_Weights:
        values[weights.name] = model.recipe(Path("/somewhere", weights.url.rpartition("/")[2]), 224)
    assert values["IMAGENET1K_V1"].resize == 256 and values["IMAGENET1K_V2"].resize == 232
    assert values["IMAGENET1K_V1"].mean == (0.485, 0.456, 0.406) and "IMAGENET1K_V1" in values["IMAGENET1K_V1"].name
    assert model.recipe(Path("mine.safetensors"), 224) is None
    assert (
        model.recipe(Path(torchvision.models.ResNet50_Weights.IMAGENET1K_V2.url.rpartition("/")[2]), 112).resize == 116
    )
    theirs = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()
    picture = torch.randint(0, 256, (3, 300, 260), dtype=torch.uint8)
    shaped = values["IMAGENET1K_V2"].shape(picture)
    norm = [torch.tensor(v).view(3, 1, 1) for v in (theirs.mean, theirs.std)]
    torch.testing.assert_close((shaped.float() / 255 - norm[0]) / norm[1], theirs(picture), rtol=0, atol=0.02)


def test_what_can_not_be_traced_is_an_error():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="Branching can't be traced"):
        isolate(Branching())


def test_lenet5_has_the_known_size():
    assert sum(p.numel() for p in LeNet5(1, 10).parameters()) == 61_706


def test_torchvision_vit_translated_gives_the_same_logits():
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(16, 8, 3, 4, 32, 128, num_classes=5).eval()
    nn.init.normal_(theirs.heads.head.weight)
    import transformers

    shape = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, patch_size=8, image_size=16,
        num_channels=3, num_labels=5, layer_norm_eps=1e-6,
    )  # fmt: skip
    ours = transformers.ViTForImageClassification(shape).eval()
    fill(ours, theirs.state_dict(), "test")
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).logits, theirs(x), rtol=1e-4, atol=1e-5)
    assert "vit.layers.2.attention.v_proj.bias" in translate_vit(theirs.state_dict())


def test_weights_from_files_and_what_is_refused(tmp_path):
    network = LeNet5(1, 3)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    torch.save(network.state_dict(), tmp_path / "w.pth")
    data = tiny_images(size=28)
    for file in ("w.safetensors", "w.pth"):
        loaded = vision_model(weights="pretrained", path=str(tmp_path / file)).load(work(tmp_path), data)
        assert torch.equal(loaded.module.get_parameter("fc1.weight"), network.fc1.weight)
        assert loaded.info["maps"] == ["relu1", "relu2", "relu3", "relu4"]
    safetensors.torch.save_file(LeNet5(1, 10).state_dict(), tmp_path / "ten.safetensors")
    with pytest.raises(ValueError, match=r"ten.safetensors doesn't fit the network.*fc3"):
        vision_model(weights="pretrained", path=str(tmp_path / "ten.safetensors")).load(work(tmp_path), data)
    torch.save(Evil(), tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="can't be read as a state dict"):
        vision_model(weights="pretrained", path=str(tmp_path / "evil.pth")).load(work(tmp_path), data)
    assert not EVIL.exists()


EVIL = Path("evil-was-here")


class Evil:
    def __reduce__(self):
        return (EVIL.touch, ())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=lenet5", "dataset.size=32"], "dataset.size must be 28 for model=lenet5, got 32"),
        (["model=resnet18", "model.stem=cfar"], "model.stem must be one of imagenet, cifar, got 'cfar'"),
        (["model=lenet5", "model.weights=pretrained"], "model.path must be a file of weights for model=lenet5"),
        (["model=lenet5", "model.path=/nowhere.pth"], "model.path must be an existing .safetensors or .pth file"),
        (["model=lenet5", "dataset=pystdlib"], "dataset must hold vision data for model=lenet5"),
        (["model=lenet5", "method=teal"], "method=teal takes models of kind language"),
        (["model=lenet5", "model.train=null"], "model.weights=scratch needs model.train, got null"),
        (["model=lenet5", "dataset=idx"], r"dataset.path must be a folder with \*-images-idx3-ubyte"),
        (["model=lenet5", "dataset.test_share=0.9"], "dataset.test_share must be below 1 - dev_share = 0.8, got 0.9"),
        (["model=lenet5", "dataset.std=[1.0,2.0]"], r"dataset.std must have as many numbers as mean \(1\), got 2"),
    ],
)
def test_bad_settings_are_one_clear_line(overrides, message):
    methods = [] if any(o.startswith("method=") for o in overrides) else ["method=dense"]
    with pytest.raises(config.ConfigError, match=message):
        config.build_settings(compose_all([*overrides, *methods])[0])


def masks(z, keep):
    """Which positions stay, seen on scores that are never zero."""
    return spatial_topk(z + 1e3, keep) != 0


@pytest.mark.parametrize("keep", [0.01, 0.2, 0.29, 0.5])  # 0.29 of 30 is 8.7: 9 stay
def test_exactly_k_positions_per_image_and_channel(keep):
    """docs/methods/spatial_topk.md, 1 and 2: the same count everywhere, ties included; kept values bit-equal."""
    z = torch.randn(3, 4, 5, 6)
    k = max(1, round(keep * 30))
    assert bool((masks(z, keep).flatten(2).sum(2) == k).all())
    assert bool((masks(torch.zeros(2, 3, 5, 6), keep).flatten(2).sum(2) == k).all())
    y = spatial_topk(z, keep)
    kept = y != 0
    assert torch.equal(y[kept], z[kept])
    smallest = torch.where(kept, z.abs(), torch.inf).flatten(2).min(2).values
    largest = torch.where(kept, 0, z.abs()).flatten(2).max(2).values
    assert bool((smallest >= largest).all())


def test_lowest_position_wins_a_tie():
    assert spatial_topk(torch.ones(1, 1, 2, 3), 0.5).flatten().tolist() == [1, 1, 1, 0, 0, 0]


def test_keeping_all_is_the_identity_and_channels_commute():
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    assert spatial_topk(z, 1.0) is z
    order = torch.randperm(4)
    assert torch.equal(spatial_topk(z, 0.3)[:, order], spatial_topk(z[:, order], 0.3))
    places = torch.randperm(9)
    flat = z.detach().flatten(2)[..., places].view_as(z)
    assert torch.equal(spatial_topk(flat, 0.3), spatial_topk(z, 0.3).flatten(2)[..., places].view_as(z))


def test_gradient_passes_only_where_kept():
    """docs/methods/spatial_topk.md, check 3 (mask backward)."""
    z = torch.randn(1, 2, 4, 4, requires_grad=True)
    y = spatial_topk(z, 0.25)
    y.sum().backward()
    assert torch.equal(z.grad, (y != 0).float())


def test_one_image_never_changes_anothers_mask():
    """docs/methods/spatial_topk.md, check 4, for images."""
    z = torch.randn(2, 3, 4, 4)
    before = spatial_topk(z, 0.3)[0].clone()
    z[1] *= 100
    assert torch.equal(spatial_topk(z, 0.3)[0], before)


def test_topk_at_chosen_maps(tmp_path):
    build = config.build_settings
    given = ["model=lenet5", "method=spatial_topk", "method.keep=0.1"]
    method = build(compose_all([*given, "method.sites=[relu]"])[0]).method
    module = method.apply(tiny_cnn(), None, None)
    assert [m.keep for m in maps_of(module)] == [0.1, None, None]
    method = build(compose_all([*given, "method.sites=[nothing]"])[0]).method
    with pytest.raises(ValueError, match=r"method.sites must be among relu, relu.2, relu_2, got 'nothing'"):
        method.apply(tiny_cnn(), None, None)


def test_a_whole_run_through_the_command(sparsebench, tmp_path):
    quick = (
        "model.train.steps=100", "model.train.warmup=5", "model.train.optimizer=adamw", "model.train.lr=3.0e-3",
        "method.train.steps=10", "method.l1_steps=5", "method.finetune_steps=5", "method.strengths=[1.0]",
        "measure.samples=30", "hardware.threads=1",
    )  # fmt: skip
    process = sparsebench("model=lenet5", "method=dstf", *quick)
    assert process.returncode == 0, process.stderr
    content = record_of(process, tmp_path)
    jsonschema.validate(content, json.loads(record.SCHEMA_FILE.read_text()))
    assert content["dataset"]["name"] == "digits" and content["quality"]["accuracy"]["dense"] > 0.5
    sparsity, macs = content["sparsity"], content["macs"]
    assert sparsity["weight_sparsity"] == pytest.approx(0.5, abs=0.01) and sparsity["baseline"]["weight_sparsity"] == 0
    gain = 100 * (sparsity["model_wide"] - sparsity["baseline"]["model_wide"])
    assert sparsity["model_wide_gain_points"] == pytest.approx(gain)
    assert macs["sparse"] < macs["dense"]
    layers = [macs["per_site"][name] for name in content["latency"]["layers_that_skip"]]
    saved = sum(layer["dense_macs"] - layer["activation_only"] for layer in layers)
    assert macs["executed"] == pytest.approx(macs["dense"] - saved)
    assert {"noisy", "reasons", "load"} <= set(content["latency"])
    assert macs["reduction"]["both"] >= max(macs["reduction"]["activation"], macs["reduction"]["weight"])
    folder = (tmp_path / json.loads(process.stdout.strip().splitlines()[-1])["record"]).parent
    for name in content["extra"]["pictures"]:
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and (folder / name).stat().st_size > 5000
    confusion = content["extra"]["classification"]["confusion"]["sparse"]
    assert sum(map(sum, confusion)) == content["quality"]["accuracy"]["protocol"]["examples"] == 360
    assert set(content["latency"]["forward"]) == {"1", "32"}
