"""Image models and the traced form in which every ReLU is a module; top-k per channel map (docs/methods/spatial_topk.md)."""

import copy
import dataclasses
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
from sparsebench.measure import effective_macs, neutral, quality
from sparsebench.models import Loaded, recipes
from sparsebench.models.networks import CIFAR_RESNETS, CifarResNet, LeNet5
from sparsebench.models.weights import fill, named, translate_vit
from sparsebench.modules.activation_map import isolate, maps_of, spatial_topk
from sparsebench.records import record
from tests.helpers import TinyCNN, built, record_of, tiny_cnn, tiny_images, work

# ReLU calls per pass; DenseNet's first is not among them: what it feeds passes another ReLU before any convolution.
MAPS = {
    "resnet18": 17, "resnet34": 33, "resnet50": 49, "googlenet": 57, "densenet121": 120, "mobilenet_v2": 35,
    "squeezenet1_1": 25, "alexnet": 7, "mnasnet0_5": 35, "shufflenet_v2_x0_5": 37,
}  # fmt: skip


def vision_model(name="lenet5", **changes):
    return built("model", f"model={name}", **changes)


@pytest.mark.parametrize("name", MAPS)
def test_every_relu_call_is_a_map_of_its_own_and_the_output_stays(name):
    torch.manual_seed(0)
    stem, size = (
        ("cifar", 32) if name.startswith(("resnet", "googlenet", "densenet", "mobilenet")) else ("imagenet", 64)
    )
    changes = {"library": "torchvision", "architecture": name, "weights": "random", "stem": stem}
    module = vision_model("lenet5", **changes).plain(3, 10, size).eval()
    x, names = torch.randn(1, 3, size, size), list(module.state_dict())
    with torch.no_grad():
        before = module(x)
        traced = isolate(module, x)
        assert torch.equal(traced(x), before)
    sites = [m.site for m in maps_of(traced)]
    assert len(sites) == len(set(sites)) == MAPS[name]
    assert list(traced.state_dict()) == names  # weights of torchvision fit as they are


def test_maps_are_relus_that_feed_products():
    """conv -> relu twice through one module, a function; the ReLU after the last linear map is no map."""

    class Net(TinyCNN):
        def forward(self, x):
            return torch.relu(super().forward(x))

    assert [m.site for m in maps_of(isolate(Net(), torch.zeros(1, 1, 8, 8)))] == ["relu", "relu.2", "relu_2"]


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
        traced = isolate(module, x)
        assert torch.equal(traced(x), before)
    first, second, third = maps_of(traced)
    assert [m.ceiling for m in (first, second, third)] == [6.0, 6.0, None]
    z = torch.tensor([-1.0, 0.5, 3.0, 8.0])
    assert first(z).tolist() == [0, 0.5, 3, 6] and third(z).tolist() == [0, 0.5, 3, 8]
    first.threshold = 1.0
    assert first(z).tolist() == [0, 0, 3, 6]
    first.threshold, first.keep = None, 0.5
    assert first(z.view(1, 1, 2, 2)).flatten().tolist() == [0, 0, 3, 6]


SMOOTH = (nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3))


@pytest.mark.parametrize("name", ["fatrelu", "spatial_topk", "dstf"])
def test_a_method_for_maps_refuses_a_network_without_them(name, tmp_path):
    module = isolate(nn.Sequential(*SMOOTH), torch.zeros(1, 1, 8, 8))
    method, loaded = built("method", f"method={name}", "model=lenet5"), Loaded(module, None, {})
    with pytest.raises(ValueError, match=rf"method={name} needs a network with ReLU or ReLU6 .*: Sequential has none"):
        method.apply(module, method.fit(loaded, tiny_images(), work(tmp_path)), work(tmp_path))


def test_the_weights_own_recipe_decides():
    """ResNet-50's second weights were trained to be seen through 232 pixels, its first ones through 256."""
    published = torchvision.models.ResNet50_Weights

    def of(weights):
        return recipes.of_torchvision("resnet50", Path("/somewhere", weights.url.rpartition("/")[2]), 1000)[0]

    first, second = of(published.IMAGENET1K_V1), of(published.IMAGENET1K_V2)
    assert first.resize == 256 and second.resize == 232 and second.at(112).resize == 116
    assert first.mean == (0.485, 0.456, 0.406) and "IMAGENET1K_V1" in first.name
    other, names = recipes.of_torchvision("resnet50", Path("mine.safetensors"), 1000)
    assert other.resize == 256 and "assumed" in other.name and names[1] == ("goldfish",)
    assert recipes.of_torchvision("resnet50", Path("mine.safetensors"), 10) is None
    theirs = published.IMAGENET1K_V2.transforms()
    picture = torch.randint(0, 256, (3, 300, 260), dtype=torch.uint8)
    shaped = second.shape(picture)
    norm = [torch.tensor(v).view(3, 1, 1) for v in (theirs.mean, theirs.std)]
    torch.testing.assert_close((shaped.float() / 255 - norm[0]) / norm[1], theirs(picture), rtol=0, atol=0.02)


class Branching(nn.Module):
    """Looks at values, so it can't be traced; one ReLU module, and with `function` a ReLU that is none."""

    def __init__(self, function=False):
        super().__init__()
        self.conv, self.relu, self.head, self.function = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 3), function

    def forward(self, x):
        x = self.relu(self.conv(x if x.sum() > 0 else -x))
        x = torch.relu(x - 0.1) if self.function else x
        return self.head(x.mean((2, 3)))


def test_a_network_that_can_not_be_traced_keeps_its_form_and_gets_maps():
    torch.manual_seed(0)
    x, module = torch.randn(2, 1, 8, 8), Branching().eval()
    with torch.no_grad():
        before = module(x)
        changed = isolate(module, x[:1])
        assert torch.equal(changed(x), before) and [m.site for m in maps_of(changed)] == ["relu"]
    with pytest.raises(
        ValueError, match=r"Branching can't be traced, and not each .* \(1 calls of 1 modules, 1 of functions\)"
    ):
        isolate(Branching(function=True), x[:1])


def test_images_that_a_network_does_not_take_are_named():
    module = torchvision.models.alexnet(weights=None, num_classes=3)
    with pytest.raises(ValueError, match="AlexNet does not take images of 3 x 32 x 32"):
        isolate(module, torch.zeros(1, 3, 32, 32))


def test_lenet5_has_the_known_size():
    assert sum(p.numel() for p in LeNet5(1, 10).parameters()) == 61_706


def test_resnets_for_cifar():
    """269,722 and 853,018 parameters (He et al. round to 0.27 and 0.85 M); the shortcut by hand, without parameters."""
    counts = {name: sum(p.numel() for p in CifarResNet(3, 10, n).parameters()) for name, n in CIFAR_RESNETS.items()}
    assert counts["resnet20"] == 269_722 and counts["resnet56"] == 853_018
    block = CifarResNet(3, 10, 1).eval().layer2[0]
    x = torch.randn(1, 16, 8, 8).relu()
    nn.init.zeros_(block.conv2.weight)  # only the shortcut is left
    with torch.no_grad():
        y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2]) and not y[:, :8].any() and not y[:, 24:].any()


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
    fill(ours, named(theirs.state_dict(), "test"), "test")
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
    damaged = {k: v for k, v in network.state_dict().items() if k != "fc2.bias"} | {"fc9.bias": torch.ones(1)}
    torch.save({"state_dict": {f"module.{k}": v for k, v in damaged.items()}}, tmp_path / "damaged.pth")
    with pytest.raises(
        ValueError, match=r"damaged.pth doesn't fit the network LeNet5: fc2.bias is missing \(and 1 more\)"
    ):
        vision_model(weights="pretrained", path=str(tmp_path / "damaged.pth")).load(work(tmp_path), data)
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
        (
            ["model=resnet18", "model.stem=cfar"],
            "model.stem must be one of imagenet, cifar .*, got 'cfar'",
        ),
        (["model=lenet5", "model.weights=pretrained"], "model.path must be a file of a state dict .* for model=lenet5"),
        (
            ["model=lenet5", "model.weights=pretrained", "model.path=/nowhere.pth"],
            "model.path must be a file of a state dict",
        ),
        (
            ["model=lenet5", "model.path=w.pth"],
            "model.weights must be pretrained where model.path is set, got 'scratch'",
        ),
        (["model=lenet5", "model.architecture=lenet6"], "architecture must be one of lenet5, .* got 'lenet6'"),
        (["model=torchvision", "model.architecture=resnet19"], r"80 networks of torchvision \(did you mean resnet18"),
        (["model=timm", "model.path=null"], "model.architecture must be a network of timm for model=timm, got null"),
        (["model=hf-image"], "model.path must be a folder with config.json"),
        (["model=squeezenet1_1", "method=topk"], "method=topk takes models of kind language"),
        (["model=squeezenet1_1", "method=moefication"], "method=moefication takes transformers"),
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
    (given,) = compose_all(["model=lenet5", "method=spatial_topk", "method.keep=0.1"])
    method = config.build_settings(given).method
    module = dataclasses.replace(method, sites=["relu"]).apply(tiny_cnn(), None, None)
    assert [m.keep for m in maps_of(module)] == [0.1, None, None]
    method = dataclasses.replace(method, sites=["nothing"])
    with pytest.raises(ValueError, match=r"method.sites must be among relu, relu.2, relu_2, got 'nothing'"):
        method.apply(tiny_cnn(), None, None)


def test_a_whole_run_through_the_command(forked, tmp_path):
    quick = (
        "model.train.steps=100", "model.train.warmup=5", "model.train.optimizer=adamw", "model.train.lr=3.0e-3",
        "method.train.steps=10", "method.l1_steps=5", "method.finetune_steps=5", "method.strengths=[1.0]",
        "measure.samples=30", "hardware.threads=1",
    )  # fmt: skip
    process = forked("model=lenet5", "method=dstf", *quick)
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


# ---------------------------------------------------------------------------------------------------------------------
# Networks of libraries, random and small, with a state dict from a file


NETWORKS = {  # name -> settings of the model; all read 3 x 32 x 32
    "squeezenet1_1": {"library": "torchvision", "architecture": "squeezenet1_1"},  # ReLU
    "mobilenet_v2": {"library": "torchvision", "architecture": "mobilenet_v2", "stem": "cifar"},  # ReLU6
    "test_resnet": {"library": "timm", "architecture": "test_resnet"},
    "resnet20": {"library": "builtin", "architecture": "resnet20"},
}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """network(name): (that network with weights read from a file, the data prepared for it); each made once."""
    folder, made = tmp_path_factory.mktemp("networks"), {}

    def make(name):
        if name not in made:
            if NETWORKS[name]["library"] == "timm":
                pytest.importorskip("timm")
            torch.manual_seed(0)
            plain = vision_model(**NETWORKS[name], weights="random").plain(3, 3, 32)
            safetensors.torch.save_file(plain.state_dict(), folder / f"{name}.safetensors")
            data = tiny_images(count=24, size=32, channels=3)
            model = vision_model(**NETWORKS[name], weights="pretrained", path=str(folder / f"{name}.safetensors"))
            made[name] = (model.load(work(folder), data), plain.eval(), data)
        loaded, plain, data = made[name]
        return Loaded(copy.deepcopy(loaded.module), None, loaded.info), plain, data

    return make


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_from_a_file_is_the_librarys_own(name, network):
    loaded, plain, data = network(name)
    (batch,) = data.test.batches(None, 8, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(batch.inputs), plain(batch.inputs), rtol=1e-5, atol=1e-5)
    assert loaded.info["classes"] == 3 and loaded.info["classes_told"] == "in the order of their names"
    assert len(loaded.info["maps"]) > 5


METHODS = {
    "fatrelu": ["method.tolerance=0.5", "method.budget=0.5"],
    "spatial_topk": ["method.keep=0.1"],
    "dstf": ["method.train.steps=2", "method.train.batch_size=4", "method.train.micro_batch=4", "method.l1_steps=1",
             "method.finetune_steps=1", "method.strengths=[10.0]", "method.train.lr=1.0e-4"],
}  # fmt: skip


QUICK = {("squeezenet1_1", "spatial_topk"), ("squeezenet1_1", "dstf"), ("mobilenet_v2", "spatial_topk"),
         ("test_resnet", "fatrelu"), ("test_resnet", "spatial_topk")}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param(n, m, marks=() if (n, m) in QUICK else pytest.mark.slow) for n in NETWORKS for m in METHODS],
)
def test_every_method_for_maps_on_every_network(name, method, network, tmp_path):
    """Zeros of the maps by own hooks are what is counted, and more than before; nothing dropped is the dense network."""
    loaded, _, data = network(name)
    inputs, expected = neutral.probe(loaded.module, data)
    chosen = built("method", f"method={method}", "model=lenet5", *METHODS[method])
    before = zeros_by_hand(loaded.module, data)
    state = chosen.fit(loaded, data, work(tmp_path))
    module = chosen.apply(loaded.module, state, work(tmp_path))
    error = neutral.check(chosen, module, inputs, expected)
    assert error is None if method == "dstf" else error < 1e-6
    after = zeros_by_hand(module, data)
    _, counters = quality.classification_quality(module, data.test, None, 8)
    counted = sum(c.zeros for c in counters.values()) / sum(c.elements for c in counters.values())
    assert counted == pytest.approx(after, abs=1e-9)
    if method != "dstf":  # two steps of training may go either way
        assert after > before + (0.2 if method == "spatial_topk" else 0)
    else:
        assert 0 < after < 1 and method_masks(state) > 0.4


def zeros_by_hand(module, data):
    """Share of zeros among the outputs of the maps, over the test images."""
    seen = []
    hooks = [
        m.register_forward_hook(lambda _, x, y: seen.append((int((y == 0).sum()), y.numel()))) for m in maps_of(module)
    ]
    with torch.no_grad():
        for batch in data.test.batches(None, 8, "cpu"):
            module(batch.inputs)
    for hook in hooks:
        hook.remove()
    return sum(z for z, _ in seen) / sum(n for _, n in seen)


def method_masks(state):
    """Share of weights that a state's masks prune."""
    masks = [v for k, v in state.tensors.items() if k.startswith("mask.")]
    return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_folder_of_timm_says_its_architecture_and_recipe(place, tmp_path, monkeypatch):
    """The folder itself, or a repository in the Hub's local cache by its id."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module = timm.create_model("test_resnet", pretrained=False, num_classes=3).eval()
    repository, path = tmp_path / "hub" / "models--timm--mine", str(tmp_path / "mine")
    folder = repository / "snapshots" / ("a" * 40) if place == "hub" else Path(path)
    if place == "hub":
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("a" * 40)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("sparsebench.data.hub.reachable", lambda: False)
        path = "timm/mine"
    settings = {"mean": (0.5, 0.5, 0.5), "crop_pct": 0.5}
    timm.models.save_for_hf(module, folder, safe_serialization=True, model_config={"pretrained_cfg": settings})
    data = tiny_images(count=24, size=32, channels=3)
    model = vision_model("timm", path=path)
    assert model.problems(config.build_settings(compose_all(["model=lenet5", "method=dense"])[0])) == []
    loaded = model.load(work(tmp_path), data)
    assert data.test.recipe.mean == (0.5, 0.5, 0.5) and data.test.recipe.resize == 64
    (batch,) = data.test.batches(None, 8, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(batch.inputs), module(batch.inputs), rtol=1e-5, atol=1e-5)


def test_convolutions_that_pad_by_themselves(tmp_path):
    """timm's EfficientNet-Lite0 as TensorFlow pads: traced, ReLU6 found, products as torch's own of the padded input."""
    timm = pytest.importorskip("timm")
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    module = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=3).eval()
    assert len(list(maps_of(isolate(module, torch.zeros(1, 3, 32, 32))))) == 33
    conv, x = Conv2dSame(4, 6, 3, stride=2).eval(), torch.randn(2, 4, 9, 8).relu()
    with effective_macs.counting(nn.Sequential(conv)) as products, torch.no_grad():
        nn.Sequential(conv)(x)
    y = nn.functional.conv2d(nn.functional.pad((x != 0).float(), (0, 1, 1, 1)), torch.ones(6, 4, 3, 3), stride=2)
    ones = nn.functional.conv2d(
        nn.functional.pad(torch.ones(2, 4, 9, 8), (0, 1, 1, 1)), torch.ones(6, 4, 3, 3), stride=2
    )
    (counts,) = products.values()
    assert (counts.activation, counts.dense) == (int(y.sum()), int(ones.sum())) and y.shape == conv(x).shape
