import pytest
import safetensors.torch
import torch
from networks import lively

from models import build_model
from utils.files import DamagedError, InputError, read_tensors, write_json, write_tensors
from utils.masks import apply_mask, dense_mask, drop_lowest, sparsity
from utils.scores import magnitude_mask, random_scores
from utils.tickets import load_dense_weights, load_fitting_ticket, load_ticket, load_ticket_network, write_ticket

NETWORK = {"arch": "alexnet", "channels": 1, "classes": 7, "neuron": "lif", "width": 0.05, "batch_norm": "over_time"}
NETWORK |= {"tau": 1.5, "v_threshold": 0.5, "surrogate_alpha": 3.0}
ORIGIN = {"network": NETWORK, "method": "earlybird", "ticket": "level_04", "level": 4, "epoch": 2}


def assert_same(a, b):
    """The same tensors, bit for bit, in the same order."""
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.fixture
def images():
    return torch.randn(6, 1, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(images):
    torch.manual_seed(0)
    return lively(build_model(**NETWORK), images).eval()


@pytest.fixture
def path(tmp_path, model):
    """The saved ticket of 70 % of the model, cut from the weights in another file beside it."""
    write_ticket(tmp_path / "initial.safetensors", dense_mask(model), model.state_dict(), ORIGIN | {"dense": None})
    path = tmp_path / "level_04.safetensors"
    write_ticket(path, magnitude_mask(model, 0.7), model.state_dict(), ORIGIN | {"dense": "initial.safetensors"})
    return path


@pytest.mark.parametrize("backwards", [False, True])
def test_a_ticket_is_read_as_it_was_written_in_the_networks_order(path, model, monkeypatch, backwards):
    if backwards:
        load = safetensors.torch.load
        monkeypatch.setattr(safetensors.torch, "load", lambda content: dict(reversed(load(content).items())))
    mask, weights, origin = load_ticket(path)
    assert origin == ORIGIN | {"dense": "initial.safetensors"}
    assert_same(mask, magnitude_mask(model, 0.7))
    expected = {n: tensor * mask[n] if n in mask else tensor for n, tensor in model.state_dict().items()}
    assert_same(weights, expected)
    assert all(m.dtype == torch.bool for m in mask.values())


def test_a_file_is_enough_to_rebuild_a_network(path, model, images):
    torch.manual_seed(1)
    rebuilt, mask, origin = load_ticket_network(path)
    apply_mask(model, mask)
    assert sparsity(mask) == pytest.approx(0.7, abs=1e-3)
    assert origin["level"] == 4
    with torch.no_grad():
        logits = model(images, 3)
        assert torch.equal(rebuilt.eval()(images, 3), logits)
        assert torch.equal(rebuilt.train()(images, 3), model.train()(images, 3))
    for name, other in {"tau": 2.0, "v_threshold": 1.0, "batch_norm": "per_timestep"}.items():
        changed = build_model(**{**NETWORK, name: other})
        changed.load_state_dict(rebuilt.state_dict())
        with torch.no_grad():
            assert not torch.equal(changed(images, 3), model(images, 3)), f"{name} matters to this network"


def test_a_vgg16_of_98_13_percent_takes_less_than_4_mb(tmp_path):
    model = build_model("vgg16", 3, 10)
    mask = drop_lowest(random_scores(model, torch.Generator().manual_seed(0)), dense_mask(model), 0.9822)
    assert 100 * sparsity(mask, sum(p.numel() for p in model.parameters())) == pytest.approx(98.13, abs=0.02)
    path = tmp_path / "ticket.safetensors"
    write_ticket(path, mask, model.state_dict(), ORIGIN)
    assert path.stat().st_size < 4e6


def test_the_weights_that_a_ticket_was_cut_from_lie_beside_it(path, model, tmp_path):
    assert_same(load_dense_weights(path, model), dict(model.state_dict()))
    with pytest.raises(InputError, match=r"initial\.safetensors"):
        load_dense_weights(tmp_path / "initial.safetensors", model)
    with pytest.raises(InputError, match=r"initial\.safetensors.*stem\.weight"):
        load_dense_weights(path, build_model(**{**NETWORK, "channels": 3}))


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"channels": 3}, "stem.weight"),
        ({"classes": 10}, "classifier.weight"),
        ({"arch": "resnet19"}, "blocks.0.conv1.weight"),
        ({"width": 0.1}, "stem.weight"),
    ],
)
def test_a_ticket_of_another_network_names_the_first_parameter_that_differs(path, change, first):
    with pytest.raises(InputError) as error:
        load_fitting_ticket(path, build_model(**{**NETWORK, **change}))
    assert str(path) in str(error.value)
    assert f" {first} " in str(error.value)


def test_a_ticket_whose_mask_lacks_a_layer_does_not_fit(path, model):
    mask = magnitude_mask(model, 0.7)
    del mask["hidden.0.weight"]
    write_ticket(path, mask, model.state_dict(), ORIGIN)
    with pytest.raises(InputError, match=r"hidden\.0\.weight"):
        load_fitting_ticket(path, model)


@pytest.mark.parametrize("kind", ["empty", "text", "json", "cut in the header", "cut in the tensors", "other tensors"])
def test_a_damaged_or_foreign_file_is_named(path, kind):
    content = path.read_bytes()
    replacements = {"empty": b"", "text": b"not a ticket at all", "cut in the header": content[:500]}
    if kind == "json":
        write_json(path, {"level": 4})
    elif kind == "other tensors":
        safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(replacements.get(kind, content[:-100]))
    with pytest.raises(DamagedError, match=str(path)):
        load_ticket(path)


def change_tensor(name, function):
    return lambda tensors, metadata: tensors.update({name: function(tensors[name])})


@pytest.mark.parametrize(
    "change",
    [
        *(lambda _, metadata, name=name: metadata.pop(name) for name in ("origin", "shapes")),
        *(lambda _, metadata, name=name: metadata["origin"].pop(name) for name in ("network", "level", "epoch")),
        lambda _, metadata: metadata["shapes"].pop("classifier.weight"),
        lambda _, metadata: metadata["shapes"].update({"classifier.weight": [7, 1]}),
        lambda _, metadata: metadata["shapes"].update({"classifier.weight": "wide"}),
        lambda _, metadata: metadata["origin"].update(network={**NETWORK, "arch": "vgg11"}),
        lambda _, metadata: metadata["origin"].update(network={**NETWORK, "width": 0.1}),
        lambda _, metadata: metadata["origin"].update(network={**NETWORK, "depth": 3}),
        lambda tensors, _: tensors.pop("mask.classifier.weight"),
        lambda tensors, _: tensors.pop("weights.classifier.weight"),
        lambda tensors, _: tensors.pop("weights.classifier.bias"),
        change_tensor("mask.classifier.weight", lambda bits: bits[:-1]),
        change_tensor("weights.classifier.weight", lambda values: values[:-1]),
    ],
)
def test_a_file_that_lacks_what_a_ticket_holds_is_named(path, change):
    tensors, metadata = read_tensors(path)
    change(tensors, metadata)
    write_tensors(path, tensors, metadata)
    with pytest.raises(DamagedError, match=str(path)):
        load_ticket_network(path)


@pytest.mark.parametrize(("folder", "kind"), [("none", FileNotFoundError), ("file", NotADirectoryError)])
def test_a_file_that_cannot_be_written_is_named_not_the_one_beside_it(tmp_path, folder, kind):
    (tmp_path / "file").touch()
    path = tmp_path / folder / "ticket.safetensors"
    with pytest.raises(kind) as error:
        write_tensors(path, {}, {})
    assert error.value.filename == str(path)
