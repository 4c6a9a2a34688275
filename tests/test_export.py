"""Other programs read what we export, and it predicts the same."""

import pytest
import torch
from torch import nn

from minicompress import codes, export, models


@pytest.fixture
def compressed():
    torch.manual_seed(0)
    model = models.MLP(widths=[6, 5, 4])
    return model, codes.encode(model, lambda w: codes.sparse(w, w > 0))


def test_the_original_keeps_its_weights(compressed):
    model, state = compressed
    before = {n: t.clone() for n, t in model.state_dict().items()}
    again = export.decoded(model, state)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    changed = again.state_dict()
    assert any(not torch.equal(t, before[n]) for n, t in changed.items())


def test_a_state_dict_loads_safely(compressed, tmp_path):
    model, state = compressed
    size = export.to_state_dict(tmp_path / "m.pt", model, state)
    assert size == (tmp_path / "m.pt").stat().st_size
    read = torch.load(tmp_path / "m.pt", weights_only=True)
    assert all(torch.equal(read[n], codes.value(x)) for n, x in state.items())


def test_safetensors_round_trips_with_ties(tmp_path):
    torch_ = pytest.importorskip("safetensors.torch")
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    size = export.to_safetensors(tmp_path / "m.safetensors", model)
    read = torch_.load_file(tmp_path / "m.safetensors")
    mine = model.state_dict()
    assert list(sorted(read)) == sorted(mine)
    assert all(torch.equal(read[n], mine[n]) for n in mine)
    assert size == (tmp_path / "m.safetensors").stat().st_size


def test_onnx_predicts_the_same_for_any_batch(compressed, tmp_path):
    pytest.importorskip("onnxscript")
    evaluator = pytest.importorskip("onnx.reference")
    model, state = compressed
    path = tmp_path / "m.onnx"
    size = export.to_onnx(path, model, (torch.zeros(2, 6),), state)
    assert size == path.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    session = evaluator.ReferenceEvaluator(str(path))
    for batch in (1, 7):
        x = torch.randn(batch, 6)
        (name,) = session.input_names
        (got,) = session.run(None, {name: x.numpy()})
        wanted = export.decoded(model, state)(x).detach()
        torch.testing.assert_close(torch.tensor(got), wanted)
